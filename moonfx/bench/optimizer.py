"""`moonfx bench optimizer`: one step of Muon, eager, under Inductor and under moonfx.

eager       torch.optim.Muon
inductor    torch.compile(torch.optim.Muon(...).step)
moonfx      torch.compile(torch.optim.Muon(...).step, backend="moonfx")
converted   moonfx.convert_optimizer(torch.optim.AdamW(...)), as it runs by itself

Each has parameters of its own and the same gradients; all take turns, the best turn counts. Compile
time is the first step's less the best later one's, with an empty Inductor cache for each. --rest
adds an embedding and the gains of norms, stepped by torch.optim.AdamW (compiled the same way).
"""

import argparse
import contextlib
import json
import os
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from tabulate import tabulate
from torch import nn
from tqdm import tqdm

import moonfx
from moonfx.bench import arguments, bars, machine
from moonfx.bench.cases import DTYPES
from moonfx.bench.matrices import MODELS, Shapes, fewer
from moonfx.bench.newton_schulz import add_sizes, check

CONTENDERS = ("eager", "inductor", "moonfx", "converted")
VOCABULARY, GAINS = 8192, 61


@dataclass
class Contender:
    """One way to run a step.

    Args:
        steps: what one step calls, one after another.
        seconds: of each turn. compile_seconds: 0.0 where nothing is compiled.
    """

    steps: list[Callable[[], Any]]
    seconds: list[float] = field(default_factory=list)
    compile_seconds: float = 0.0

    def run(self) -> None:
        for step in self.steps:
            step()

    @property
    def best(self) -> float:
        return min(self.seconds)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark; returns 0."""
    parser = argparse.ArgumentParser(
        prog="moonfx bench optimizer",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_sizes(parser)
    parser.add_argument("--only", nargs="+", choices=CONTENDERS, default=CONTENDERS)
    parser.add_argument("--rest", action="store_true", help="with what AdamW steps")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of the parameters")
    parser.add_argument(
        "--device", type=arguments.device, default="cuda" if torch.cuda.is_available() else "cpu"
    )
    options = parser.parse_args(argv)
    check(parser, options)
    device = torch.device(options.device)
    where = machine.describe(device)
    results = [
        (name, *measure(fewer(MODELS[name], options.count), options, device))
        for name in options.model
    ]
    if options.plot:
        title = f"One optimizer step, {where['hardware']}"
        heights = {c: [over(found, "inductor", c) for _, found, _ in results] for c in options.only}
        label = "times as fast as under Inductor"
        bars.draw(title, [name for name, *_ in results], heights, label, options.plot)
    if options.json:
        print(json.dumps({"where": where, "results": [to_dict(*r) for r in results]}, indent=1))
        return 0
    print("\n".join(f"{name}: {text}" for name, text in where.items()))
    for name, found, report in results:
        print(f"\n{name}, {options.dtype}, best of {options.repeats}\n\n{table(found)}")
        if report is not None:
            print(f"\n{report}")
    return 0


def measure(
    shapes: Shapes, options: argparse.Namespace, device: torch.device
) -> tuple[dict[str, Contender], moonfx.Report | None]:
    """Seconds of each contender, and what moonfx's backend did."""
    torch.manual_seed(0)
    dtype = DTYPES[options.dtype]
    sizes = [shape for shape, count in shapes.items() for _ in range(count)]
    like: dict[str, tuple[int, ...]] = {f"layers.{i}.weight": s for i, s in enumerate(sizes)}
    hidden = max(min(shape) for shape in shapes)
    rest: dict[str, tuple[int, ...]] = {"embed_tokens.weight": (VOCABULARY, hidden)}
    rest |= {f"norms.{i}.weight": (hidden,) for i in range(GAINS)}
    rest = rest if options.rest else {}
    gradients = {k: torch.randn(s, device=device).to(dtype) for k, s in (like | rest).items()}
    found: dict[str, Contender] = {}
    report = None
    for name in tqdm(options.only, unit="contender", leave=False, disable=None):
        contender, muon = build(name, gradients, set(rest), options.steps)
        found[name] = contender
        with empty_cache(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            start = time.perf_counter()
            contender.run()
            machine.synchronize(device)
            contender.compile_seconds = time.perf_counter() - start
            contender.run()  # a first step also makes the states, which may compile once more
        report = moonfx.report(muon) if name == "moonfx" else report
    for _ in range(options.repeats):
        for contender in found.values():
            contender.seconds.append(machine.seconds(contender.run, device))
    for contender in found.values():
        contender.compile_seconds = max(0.0, contender.compile_seconds - contender.best)
    return found, report


def build(
    name: str, gradients: dict[str, torch.Tensor], rest: set[str], steps: int
) -> tuple[Contender, torch.optim.Optimizer]:
    """A contender with parameters of its own, and its Muon."""
    torch._dynamo.reset()
    named: list[tuple[str, nn.Parameter]] = []
    for key, gradient in gradients.items():
        parameter = nn.Parameter(torch.randn_like(gradient) * 0.02)
        parameter.grad = gradient
        named.append((key, parameter))
    if name == "converted":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that without a model roles come from names
            roles = {key: "adamw" if key in rest else "muon" for key, _ in named}
            converted = moonfx.convert_optimizer(
                torch.optim.AdamW(named, lr=1e-3), steps=steps, roles=roles
            )
        return Contender([converted.step]), converted
    matrices = [p for key, p in named if key not in rest]
    muon = torch.optim.Muon(matrices, lr=1e-3, ns_steps=steps, adjust_lr_fn="match_rms_adamw")
    optimizers: list[torch.optim.Optimizer] = [muon]
    others = [p for key, p in named if key in rest]
    optimizers += [torch.optim.AdamW(others, lr=1e-3)] if others else []
    if name == "eager":
        return Contender([o.step for o in optimizers]), muon
    known: dict[str, Any] = {"backend": "inductor"}
    if name == "moonfx":
        known = {"backend": "moonfx", "options": {"on_miss": "ignore"}}
    return Contender([torch.compile(o.step, **known) for o in optimizers]), muon


@contextlib.contextmanager
def empty_cache() -> Iterator[None]:
    """Has Inductor compile what it compiled before."""
    before = os.environ.get("TORCHINDUCTOR_CACHE_DIR")
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder
        try:
            yield
        finally:
            if before is None:
                os.environ.pop("TORCHINDUCTOR_CACHE_DIR", None)
            else:
                os.environ["TORCHINDUCTOR_CACHE_DIR"] = before


def over(found: dict[str, Contender], whole: str, part: str) -> float | None:
    if whole not in found or part not in found:
        return None
    return found[whole].best / found[part].best


def to_dict(name: str, found: dict[str, Contender], report: moonfx.Report | None) -> dict[str, Any]:
    return {
        "model": name,
        "seconds": {c: one.seconds for c, one in found.items()},
        "compile_seconds": {c: one.compile_seconds for c, one in found.items()},
        "of_eager": {c: 1 / r for c in found if (r := over(found, "eager", c))},
        "of_inductor": {c: 1 / r for c in found if (r := over(found, "inductor", c))},
        "report": report.to_dict() if report is not None else None,
    }


def table(found: dict[str, Contender]) -> str:
    rows = [
        [
            name,
            f"{one.best * 1e3:.1f}",
            *(
                f"{1 / ratio:.2f}" if (ratio := over(found, whole, name)) else "-"
                for whole in ("eager", "inductor")
            ),
            f"{one.compile_seconds:.1f}" if name in ("inductor", "moonfx") else "-",
        ]
        for name, one in found.items()
    ]
    titles = ["step", "ms", "of eager's time", "of Inductor's time", "compile s"]
    return tabulate(rows, titles, disable_numparse=True, colalign=["left", *["right"] * 4])


if __name__ == "__main__":
    raise SystemExit(main())
