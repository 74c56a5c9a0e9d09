"""Muon that took an AdamW's place: its groups, its schedule, its parameters in their order.

    G             the gradient of a matrix W [m, n]; mu the momentum
    M <- mu M + (1 - mu) G                     an average, as AdamW's first moment is
    U = mu M + (1 - mu) G                      Nesterov; else U = M
    O = NewtonSchulz(U / |U|)                  near U (U^T U)^(-1/2), all singular values near 1
    W <- (1 - lr wd) W - lr s O                s so that s O has the root mean square asked for

(Jordan 2024; Liu et al. 2025, arXiv 2502.16982, eq. 2 and 4.) What is no hidden matrix stays on
AdamW, stepped by the class that the user had. The groups are the very dicts of the AdamW, so that
its schedulers drive Muon; what Muon needs beside them is plain data in them and in `state`, so that
state_dict carries all of it.
"""

import copy
import dataclasses
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from moonfx.capture.optimizers import (
    count_as_stepped,
    load_hooks,
    share_hooks,
    stands_for_step,
    without_hooks,
)
from moonfx.optim.matrices import Layout
from moonfx.optim.roles.table import RoleRow
from moonfx.optim.settings import MUON, Settings
from moonfx.optim.sharding import is_sharded
from moonfx.optim.state import low_bit
from moonfx.optim.state.checkpoint import load
from moonfx.optim.step.adamw_rest import Rest
from moonfx.optim.step.compiled import Graphs, compiled_or_eager
from moonfx.optim.step.distributed import update_sharded
from moonfx.optim.step.update import Matrix, UpdateRule, count, scales_of, update

# Rows for the parameters of a group that is added: the group, its own word on roles, which goes
# before the conversion's, and "muon", "adamw" or None, the optimizer of all of them.
Classify = Callable[[dict[str, Any], Mapping[Any, Any], str | None], list[RoleRow]]


class Muon(Optimizer):
    """Muon for hidden matrices, the converted optimizer's own class for all else.

    Made by moonfx.convert_optimizer, which checks what it is given. Until its first step the
    converted optimizer is as it was; that step frees its state and retires it.

    Attributes:
        table: one row per parameter, in the order of the groups.
        source: the converted optimizer until it is retired, then None.

    Args:
        source: the optimizer to convert.
        table: a row per parameter, in the order of its groups.
        settings: how to step.
        target_rms: of each parameter's update at lr 1; None where AdamW steps it.
        second_moment: of each the ratio of mean g^2 to mean momentum^2 to be expected, for the
            way back; None if unknown.
        state: the state to start from, per parameter; without, a parameter's starts at zero.
        classify: gives the rows of parameters that are added later.
    """

    def __init__(
        self,
        source: Optimizer,
        table: Sequence[RoleRow],
        settings: Settings,
        *,
        target_rms: Sequence[float | None],
        classify: Classify,
        second_moment: Sequence[float | None] | None = None,
        state: Mapping[Tensor, dict[str, Any]] | None = None,
    ) -> None:
        self.settings = settings
        self.rest = Rest(source)
        self.table: list[RoleRow] = []
        self.source: Optimizer | None = None
        self._classify = classify
        self._graphs = Graphs()
        self._joining = True  # the parameters that __init__ adds have their rows
        super().__init__(source.param_groups, {**source.defaults, **settings.of_group()})
        del self._joining
        self.source = source
        self.param_groups = source.param_groups
        share_hooks(source, self)
        moments = second_moment or [None] * len(table)
        rows = iter(zip(table, target_rms, moments, strict=True))
        for group in self.param_groups:
            _join(group, [next(rows) for _ in group["params"]], settings)
        parameters = (p for group in self.param_groups for p in group["params"])
        kept_in = settings.momentum_dtype
        self.table = [_with_note(x, p, kept_in) for x, p in zip(table, parameters, strict=True)]
        self.state = defaultdict(dict, state or {})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group; its parameters are classified as those before were.

        Those that are not the model's are classified by their names and shapes, with a warning
        where no key "optimizer" decides.

        Args:
            param_group: as torch takes it; a key "roles" overrides roles as convert_optimizer's
                argument does, and a key "optimizer", "muon" or "adamw", decides for all of them.

        Raises:
            TypeError, ValueError: as torch does, or for a bad override; nothing was added.
        """
        if vars(self).get("_joining"):
            super().add_param_group(param_group)
            return
        if not isinstance(param_group, dict):
            raise TypeError(f"param_group must be a dict, got {type(param_group).__name__}")
        group = {k: v for k, v in param_group.items() if k not in ("roles", "optimizer")}
        overrides, optimizer = param_group.get("roles", {}), param_group.get("optimizer")
        super().add_param_group(group)
        try:
            rows = self._classify(group, overrides, optimizer)
        except BaseException:
            self.param_groups.pop()
            raise
        first = self.param_groups[0]["lr"]
        if isinstance(first, Tensor) and not isinstance(group["lr"], Tensor):
            group["lr"] = torch.full_like(first, group["lr"])  # torchao's classes take no float
        target = self.settings.rms
        entries = [(row, target if row.optimizer == MUON else None, None) for row in rows]
        _join(group, entries, self.settings)
        kept_in = self.settings.momentum_dtype
        pairs = zip(rows, group["params"], strict=True)
        self.table.extend(_with_note(row, p, kept_in) for row, p in pairs)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of every parameter that has a gradient.

        NaN or infinity in a gradient makes NaN of its own matrix, all of it, and of no other.

        Raises:
            ValueError: before anything changes, if a gradient is sparse or complex.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._check_gradients()
        self.retire_source()
        self.rest.step(self.param_groups, self.state)
        for (rule, *_), matrices in self._buckets().items():
            if compiled_or_eager(self.settings.compile, matrices).compiled:
                self._graphs.update(matrices, rule)
            else:
                count(matrices)
                (update_sharded if is_sharded(matrices[0].weight) else update)(matrices, rule)
        return loss

    def plan(self) -> str:
        """How the next step will run: a line per bucket of equal device, dtypes and settings."""
        lines = []
        for (_, device, dtype, *_), matrices in self._buckets().items():
            choice = compiled_or_eager(self.settings.compile, matrices)
            numbers = sum(x.weight.numel() for x in matrices)
            how = "one compiled graph" if choice.compiled else "eager"
            what = f"{len(matrices)} parameters, {numbers:,} numbers, {dtype} on {device}"
            lines.append(f"{what}: {how}, because {choice.why}")
        return "\n".join(lines) or "nothing to step: no Muon parameter has a gradient"

    def _check_gradients(self) -> None:
        rows = iter(self.table)
        for group in self.param_groups:
            for p in group["params"]:
                row, grad = next(rows), p.grad
                if grad is not None and (grad.layout != torch.strided or grad.is_complex()):
                    kind = "complex" if grad.is_complex() else "sparse"
                    raise ValueError(
                        f"the gradient of '{row.name}' is {kind} ({grad.dtype}, {grad.layout}); "
                        "Muon steps dense, real gradients only. Nothing was changed"
                    )

    def _buckets(self) -> dict[tuple[Any, ...], list[Matrix]]:
        """The matrices to step, by what one call of `update` can have in common."""
        buckets: dict[tuple[Any, ...], list[Matrix]] = defaultdict(list)
        rows = iter(self.table)
        for number, group in enumerate(self.param_groups):
            rule = UpdateRule.of_group(group)
            kinds, targets = group["optimizers"], group["target_rms"]
            scaling = rule.exact_rms, rule.coefficients
            for p, kind, target in zip(group["params"], kinds, targets, strict=True):
                layout: Layout = next(rows).layout
                if kind != MUON or p.grad is None or not p.numel():
                    continue
                state = self.state[p] or self._start(p, group)
                buffer = state["momentum_buffer"]
                key = (rule, p.device, p.dtype, p.grad.dtype, type(buffer), buffer.dtype)
                buckets[key].append(
                    Matrix(
                        *(p, p.grad, buffer, state["step"]),
                        *(layout, scales_of(p.shape, layout, target, *scaling), number),
                        *(group["lr"], group["weight_decay"]),
                    )
                )
        return buckets

    def _start(self, p: Tensor, group: dict[str, Any]) -> dict[str, Any]:
        """The state of a parameter that has none: the step lies where torch's AdamW has it."""
        on_device = group.get("capturable") or group.get("fused")
        device = p.device if on_device else torch.device("cpu")
        self.state[p] = {
            "step": torch.zeros((), dtype=torch.float32, device=device),
            "momentum_buffer": low_bit.zeros(p, self.settings.momentum_dtype),
        }
        return self.state[p]

    def retire_source(self) -> None:
        """Frees the converted optimizer's state; its schedulers hold it, and drive the groups."""
        source, self.source = self.source, None
        if source is None:
            return
        source.state.clear()
        count_as_stepped(source)
        source.step = _refuse  # type: ignore[method-assign]

    def __deepcopy__(self, memo: dict[int, Any]) -> "Muon":
        for state in self.state.values():
            for value in state.values():
                if low_bit.has_codes(value):
                    memo[id(value)] = low_bit.cloned(value)
        made = type(self).__new__(type(self))
        memo[id(self)] = made
        made.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        return made

    def __getstate__(self) -> dict[str, Any]:
        return {**without_hooks(vars(self)), "source": None, "_graphs": Graphs()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a state_dict of a moonfx.Muon, or converts that of an AdamW and says so.

        The groups stay the dicts that schedulers hold; states keep the dtypes they were saved in.

        Raises:
            TypeError, ValueError: if it is of something else or does not fit; nothing was changed.
        """
        before, after = load_hooks(self)
        state_dict = dict(state_dict)
        for hook in before:
            state_dict = hook(self, state_dict) or state_dict
        load(self, state_dict)
        for hook in after:
            hook(self)


def _join(
    group: dict[str, Any],
    entries: Sequence[tuple[RoleRow, float | None, float | None]],
    settings: Settings,
) -> None:
    """Writes into a group how Muon steps it and which of its parameters."""
    group.update(settings.of_group())
    group["optimizers"] = [row.optimizer for row, _, _ in entries]
    group["target_rms"] = [target for _, target, _ in entries]
    group["second_moment"] = [moment for _, _, moment in entries]
    # Plain lists: what a checkpoint carries must not need moonfx to be read.
    group["layouts"] = [
        [row.layout.kind, row.layout.dim, row.layout.outer, list(row.layout.sizes)]
        for row, _, _ in entries
    ]


def _with_note(row: RoleRow, p: Tensor, kept_in: str | None) -> RoleRow:
    """The row, which says so if the parameter is too small for a momentum in few bits."""
    note = low_bit.why_not(p, kept_in) if kept_in and row.optimizer == MUON else None
    return dataclasses.replace(row, why=f"{row.why}; {note}") if note else row


@stands_for_step
def _refuse(*_: Any, **__: Any) -> None:
    raise RuntimeError(
        "this optimizer was converted by moonfx.convert_optimizer and gave up its state: call "
        "step() of the moonfx.Muon that was returned"
    )
