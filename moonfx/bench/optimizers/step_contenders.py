"""Who takes part in `moonfx bench optimizer`: each makes one step, or says why it cannot.

All step the same parameters with the same gradients, and have a momentum each.
"""

import argparse
import contextlib
import functools
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

import moonfx
from moonfx.bench.harness import machine
from moonfx.bench.harness.arguments import DTYPES
from moonfx.bench.harness.machine import Absent
from moonfx.bench.optimizers import other_packages as others
from moonfx.bench.optimizers.matrices import Shapes
from moonfx.bench.optimizers.written_muon import WrittenMuon
from moonfx.capture.inductor import empty_inductor_caches
from moonfx.kernels.reference.newton_schulz import JORDAN
from moonfx.ops.newton_schulz import newton_schulz_flops

OURS = ("moonfx", "converted")
BACKENDS: dict[str, Any] = {"inductor": "inductor", "moonfx": "moonfx"}
COMPILED = tuple(BACKENDS)
CONTENDERS = ("eager", "inductor", "moonfx", "converted", *others.NAMES)
VOCABULARY, GAINS = 8192, 61
LR = 1e-3


@dataclass
class Contender:
    """One way to run a step.

    Args:
        steps: what one step calls, one after another. muon: whose report can be read.
        note: in what it differs from torch.optim.Muon. compiled: whether any of it is.
        seconds: of each turn. compile_seconds: what the first two steps took beyond that.
    """

    steps: list[Callable[[], Any]]
    muon: torch.optim.Optimizer
    note: str = ""
    compiled: bool = True
    seconds: list[float] = field(default_factory=list)
    compile_seconds: float = 0.0

    def run(self) -> None:
        for step in self.steps:
            step()

    @property
    def best(self) -> float:
        return min(self.seconds)


@dataclass
class Setting:
    """What all contenders share.

    Args:
        matrices: Muon's, by name; rest: AdamW's. All have gradients.
    """

    matrices: dict[str, nn.Parameter]
    rest: dict[str, nn.Parameter]
    flops: int
    iterate: str
    options: argparse.Namespace
    device: torch.device

    @classmethod
    def make(
        cls,
        shapes: Shapes,
        dtype: str,
        iterate: str,
        options: argparse.Namespace,
        device: torch.device,
    ) -> "Setting":
        def parameter(*size: int) -> nn.Parameter:
            made = nn.Parameter((torch.randn(size, device=device) * 0.02).to(DTYPES[dtype]))
            made.grad = torch.randn(size, device=device).to(DTYPES[dtype])
            return made

        sizes = [shape for shape, count in shapes.items() for _ in range(count)]
        matrices = {f"layers.{i}.weight": parameter(*size) for i, size in enumerate(sizes)}
        rest = {}
        if options.rest:
            hidden = max(min(shape) for shape in shapes)
            rest["embed_tokens.weight"] = parameter(VOCABULARY, hidden)
            rest |= {f"norms.{i}.weight": parameter(hidden) for i in range(GAINS)}
        flops = sum(newton_schulz_flops(m, n, options.steps) for m, n in sizes)
        return cls(matrices, rest, flops, iterate, options, device)

    def first_steps(self, name: str) -> Contender:
        """A contender, compiled and with its states; raises Absent."""
        contender = self.build(name)
        guard = others.or_absent() if name in others.NAMES else contextlib.nullcontext()
        with guard, empty_inductor_caches(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            start = time.perf_counter()
            contender.run()
            contender.run()  # the first one also makes the states, which may compile once more
            machine.synchronize(self.device)
            contender.compile_seconds = time.perf_counter() - start
        return contender

    def build(self, name: str) -> Contender:
        steps = self.options.steps
        if name == "converted":
            self.in_bfloat16("moonfx.Muon")
            named = list((self.matrices | self.rest).items())
            roles = {key: "muon" if key in self.matrices else "adamw" for key, _ in named}
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # that without a model roles come from names
                adamw = torch.optim.AdamW(named, lr=LR)
                converted = moonfx.convert_optimizer(adamw, steps=steps, roles=roles)
            on_gpu = self.device.type != "cpu"  # where it compiles itself
            return Contender([converted.step], converted, compiled=on_gpu)
        if name in others.NAMES:
            made = others.muon(name, list(self.matrices.values()), steps, self.device)
            self.in_bfloat16("its Muon", but=name)
            others.check_patience(name, self.flops, self.device, self.options.patience)
            return Contender([made.optimizer.step, *self.by_inductor], made.optimizer, made.note)
        muon: torch.optim.Optimizer
        if self.iterate == "bfloat16":
            muon = torch.optim.Muon(
                self.matrices.values(), lr=LR, ns_steps=steps, adjust_lr_fn="match_rms_adamw"
            )
        else:
            muon = WrittenMuon(self.matrices.values(), LR, steps, DTYPES[self.iterate])
        optimizers = [muon, *self.adamw()]
        if name == "eager":
            return Contender([o.step for o in optimizers], muon, compiled=False)
        known = {"backend": BACKENDS[name]}
        if name == "moonfx":
            known["options"] = {"on_miss": "ignore"}
        return Contender([torch.compile(o.step, **known) for o in optimizers], muon)

    def in_bfloat16(self, who: str, but: str = "") -> None:
        """Raises Absent where another dtype is asked for."""
        if self.iterate != "bfloat16":
            dtype = str(others.MULTIPLIES_IN.get(but, torch.bfloat16)).removeprefix("torch.")
            raise Absent(f"{who} iterates in {dtype}, not in {self.iterate}")

    def adamw(self) -> list[torch.optim.Optimizer]:
        return [torch.optim.AdamW(self.rest.values(), lr=LR)] if self.rest else []

    @functools.cached_property
    def by_inductor(self) -> list[Callable[[], Any]]:
        """AdamW's step as the packages of others are given it."""
        return [torch.compile(o.step, backend=BACKENDS["inductor"]) for o in self.adamw()]


def needed_bytes(shapes: Shapes, options: argparse.Namespace, dtype: str, momenta: int) -> int:
    """Parameters, gradients, so many momenta, and about three tensors more while a step runs."""
    entries = sum(m * n * count for (m, n), count in shapes.items())
    if options.rest:
        entries += 2 * VOCABULARY * max(min(shape) for shape in shapes)
    return entries * DTYPES[dtype].itemsize * (2 + momenta + 3)


@functools.cache
def ready(device: torch.device, names: tuple[str, ...]) -> None:
    """Loads all that a compilation by those loads, and builds the operator's kernel.

    The first compilation in a process takes seconds longer than the same one does later.
    """
    for dtype in (torch.bfloat16, torch.float32):
        matrix = torch.ones(8, 8, device=device, dtype=dtype)
        torch.ops.moonfx.newton_schulz(matrix, list(JORDAN), "symmetric")
    options = argparse.Namespace(steps=1, rest=False)
    setting = Setting.make({(8, 16): 2}, "float32", "bfloat16", options, device)
    for name in names:
        setting.first_steps(name)
