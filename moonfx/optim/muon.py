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
import weakref
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, Protocol

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
from moonfx.optim.facts import Fact, saved
from moonfx.optim.matrices import Layout
from moonfx.optim.roles.table import RoleRow
from moonfx.optim.settings import FOLLOWED, MUON, Settings
from moonfx.optim.sharding import is_sharded
from moonfx.optim.state import low_bit
from moonfx.optim.state.checkpoint import load
from moonfx.optim.step.adamw_rest import Rest
from moonfx.optim.step.compiled import Graphs, compiled_or_eager
from moonfx.optim.step.distributed import update_sharded
from moonfx.optim.step.update import Matrix, UpdateRule, count, scales_of, update


class Classify(Protocol):
    """Gives rows to parameters that are added, as roles.classify.Classifier does."""

    def names(self, group: dict[str, Any]) -> list[str]: ...
    def __call__(
        self, group: dict[str, Any], overrides: Mapping[Any, Any], optimizer: str | None
    ) -> list[RoleRow]: ...


class Muon(Optimizer):
    """Muon for hidden matrices, the converted optimizer's own class for all else.

    Made by moonfx.convert_optimizer, which checks what it is given. Until its first step the
    converted optimizer is as it was; that step frees its state and retires it.

    Attributes:
        facts: what is known of each parameter, also of those that have left the groups.
        source: the converted optimizer until it is retired, then None.
        spent: whether it has gone back to AdamW, and lets the groups be.

    Args:
        source: the optimizer to convert.
        facts: what is known of each of its parameters.
        settings: how to step.
        state: the state to start from, per parameter; without, a parameter's starts at zero.
        classify: gives the rows of parameters that are added later.
    """

    def __init__(
        self,
        source: Optimizer,
        facts: Mapping[Tensor, Fact],
        settings: Settings,
        *,
        classify: Classify,
        state: Mapping[Tensor, dict[str, Any]] | None = None,
    ) -> None:
        self.settings = settings
        self.rest = Rest(source)
        self.source: Optimizer | None = None
        self.spent = False
        self._classify = classify
        self._graphs = Graphs()
        self._joining = True  # the parameters that __init__ adds have their facts
        super().__init__(source.param_groups, {**source.defaults, **settings.of_group()})
        del self._joining
        self.source = source
        self._driven: Any = weakref.ref(source)
        vars(self)["param_groups"] = source.param_groups
        share_hooks(source, self)
        kept_in = settings.momentum_dtype
        self.facts = {p: _with_note(fact, p, kept_in) for p, fact in facts.items()}
        self.state = defaultdict(dict, state or {})
        for p, values in self.state.items():
            if self.on_muon(p):
                values.update(saved(self.facts[p]))
        self._settle()

    def __setattr__(self, name: str, value: Any) -> None:
        """Groups that are put in the place of these go into the list that schedulers hold."""
        held = vars(self).get(name) if name == "param_groups" else None
        if held is None:
            super().__setattr__(name, value)
        elif value is not held:
            held[:] = value

    @property
    def table(self) -> list[RoleRow]:
        """A row per parameter, in the order of the groups."""
        self._settle()
        return [self.facts[p].row for group in self.param_groups for p in group["params"]]

    def on_muon(self, p: Tensor) -> bool:
        """Whether Muon steps a parameter, and not AdamW."""
        optimizer: str = self.facts[p].row.optimizer
        return optimizer == MUON

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group; its parameters are classified as those before were.

        Those that are not the model's are classified by their names and shapes, with a warning
        where no key "optimizer" decides. So is what else joins the groups, by the AdamW's own
        add_param_group or by hand, at the next step.

        Args:
            param_group: as torch takes it; a key "roles" overrides roles as convert_optimizer's
                argument does, and a key "optimizer", "muon" or "adamw", decides for all of them.

        Raises:
            TypeError, ValueError: as torch does, or for a bad override or a parameter that cannot
                be stepped; nothing was added.
        """
        if vars(self).get("_joining"):
            super().add_param_group(param_group)
            return
        if not isinstance(param_group, dict):
            raise TypeError(f"param_group must be a dict, got {type(param_group).__name__}")
        super().add_param_group(dict(param_group))
        try:
            self._settle()
        except BaseException:
            self.param_groups.pop()
            raise

    def _settle(self) -> None:
        """Brings what is known in line with the groups, which anyone may have edited.

        Raises:
            TypeError, ValueError: if a parameter that joined cannot be stepped.
        """
        if self.spent:
            return
        self._check_shared()
        known = {**self.defaults, **self.settings.of_group()}
        first = self.param_groups[0].get("lr") if self.param_groups else None
        for group in self.param_groups:
            strangers = [p for p in group["params"] if p not in self.facts]
            if strangers:
                self.facts.update(self._facts_of(group, strangers))
                group.pop("roles", None), group.pop("optimizer", None)
            for key, value in known.items():
                if key not in group:
                    group[key] = copy.deepcopy(value)
            if isinstance(first, Tensor) and not isinstance(group["lr"], Tensor):
                group["lr"] = torch.full_like(first, group["lr"])  # torchao's take no float
            follow(group)

    def _check_shared(self) -> None:
        """That the schedulers of the AdamW still drive the groups that are stepped.

        Raises:
            ValueError: if somebody gave the AdamW other groups.
        """
        source = self._driven and self._driven()
        if source is not None and source.param_groups is not self.param_groups:
            raise ValueError(
                f"the {type(source).__name__} that was converted was given other groups, by its "
                "load_state_dict or by hand, and its schedulers drive those: load into the "
                "moonfx.Muon, or set adamw.param_groups = muon.param_groups"
            )

    def _facts_of(self, group: dict[str, Any], strangers: list[Tensor]) -> dict[Tensor, Fact]:
        """What is known of parameters that joined a group."""
        names = dict(zip(group["params"], group.get("param_names") or (), strict=False))
        joined = {"params": strangers}
        if names:
            joined["param_names"] = [names[p] for p in strangers]
        overrides, optimizer = group.get("roles", {}), group.get("optimizer")
        heirs = None if overrides or optimizer else self._heirs(joined)
        if heirs is not None:
            return heirs
        rows = self._classify(joined, overrides, optimizer)
        kept_in, target = self.settings.momentum_dtype, self.settings.rms
        facts = [Fact(row, target if row.optimizer == MUON else None) for row in rows]
        return {p: _with_note(x, p, kept_in) for p, x in zip(strangers, facts, strict=True)}

    def _heirs(self, joined: dict[str, Any]) -> dict[Tensor, Fact] | None:
        """The facts of parameters that took the place of those they are called as in the model.

        Whoever shards a model after the conversion puts other tensors into its modules and groups.
        None if one of them took nobody's place.
        """
        here = {p for group in self.param_groups for p in group["params"]}
        gone = {fact.row.name: (p, fact) for p, fact in self.facts.items() if p not in here}
        named = list(zip(self._classify.names(joined), joined["params"], strict=True))
        alike = (x and x in gone and gone[x][0].shape == p.shape for x, p in named)
        if not all(alike):
            return None
        for name, _ in named:
            self.facts.pop(gone[name][0], None)
        return {p: gone[name][1] for name, p in named}

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
        self._settle()
        self._check_gradients()
        buckets = self._buckets()  # before AdamW's half moves: whatever is at fault shows here
        self.retire_source()
        self.rest.step(self.param_groups, self.state, lambda p: not self.on_muon(p))
        for (rule, *_), found in buckets.items():
            matrices = [self._at_rates(x) for x in found]
            if compiled_or_eager(self.settings.compile, matrices).compiled:
                self._graphs.update(matrices, rule)
            else:
                count(matrices)
                (update_sharded if is_sharded(matrices[0].weight) else update)(matrices, rule)
        return loss

    def plan(self) -> str:
        """How the next step will run: a line per bucket of equal device, dtypes and settings."""
        lines = []
        self._settle()
        for (_, device, dtype, *_), matrices in self._buckets().items():
            choice = compiled_or_eager(self.settings.compile, matrices)
            numbers = sum(x.weight.numel() for x in matrices)
            how = "one compiled graph" if choice.compiled else "eager"
            what = f"{len(matrices)} parameters, {numbers:,} numbers, {dtype} on {device}"
            lines.append(f"{what}: {how}, because {choice.why}")
        return "\n".join(lines) or "nothing to step: no Muon parameter has a gradient"

    def _check_gradients(self) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                grad = p.grad
                if grad is None:
                    continue
                refused = grad.is_complex() and self.on_muon(p)
                if refused or grad.layout != torch.strided:
                    kind = "complex" if refused else "sparse"
                    raise ValueError(
                        f"the gradient of '{self.facts[p].row.name}' is {kind} ({grad.dtype}, "
                        f"{grad.layout}); Muon steps dense, real gradients only. Nothing was "
                        "changed"
                    )

    def _buckets(self) -> dict[tuple[Any, ...], list[Matrix]]:
        """The matrices to step, by what one call of `update` can have in common."""
        buckets: dict[tuple[Any, ...], list[Matrix]] = defaultdict(list)
        for number, group in enumerate(self.param_groups):
            rule = UpdateRule.of_group(group)
            scaling = rule.exact_rms, rule.coefficients
            for p in group["params"]:
                if not self.on_muon(p) or p.grad is None or not p.numel():
                    continue
                fact = self.facts[p]
                layout: Layout = fact.row.layout
                assert fact.target_rms is not None  # it has none where AdamW steps
                scales = scales_of(p.shape, layout, fact.target_rms, *scaling)
                state = self.state[p] if self.state.get(p) else self._start(p, group)
                buffer = state["momentum_buffer"]
                key = (rule, p.device, p.dtype, p.grad.dtype, type(buffer), buffer.dtype)
                buckets[key].append(
                    Matrix(
                        *(p, p.grad, buffer, state["step"], layout, scales, number),
                        *(group["lr"], group["weight_decay"]),
                    )
                )
        return buckets

    def _at_rates(self, matrix: Matrix) -> Matrix:
        """A matrix at its group's rates, which the user's class may set as it steps."""
        group = self.param_groups[matrix.group]
        return matrix._replace(lr=group["lr"], weight_decay=group["weight_decay"])

    def _start(self, p: Tensor, group: dict[str, Any]) -> dict[str, Any]:
        """The state of a parameter that has none: the step lies where torch's AdamW has it."""
        on_device = group.get("capturable") or group.get("fused")
        device = p.device if on_device else torch.device("cpu")
        self.state[p] = {
            "step": torch.zeros((), dtype=torch.float32, device=device),
            "momentum_buffer": low_bit.zeros(p, self.settings.momentum_dtype),
            **saved(self.facts[p]),
        }
        return self.state[p]

    def state_dict(self) -> dict[str, Any]:
        """As torch's; a Muon parameter that has had no gradient has its facts in it."""
        self._settle()
        state, members = self.state, [p for g in self.param_groups for p in g["params"]]
        facts = {p: saved(self.facts[p]) for p in members if self.on_muon(p) and not state.get(p)}
        self.state = defaultdict(dict, {**state, **facts})
        try:
            return super().state_dict()
        finally:
            self.state = state

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
        return {**without_hooks(vars(self)), "source": None, "_driven": None, "_graphs": Graphs()}

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
        self._settle()
        load(self, state_dict)
        for hook in after:
            hook(self)


def follow(group: dict[str, Any]) -> None:
    """Gives Muon the momentum of a scheduler that cycles AdamW's first beta, as OneCycleLR does."""
    beta1 = group["betas"][0]
    if isinstance(beta1, Tensor):  # may lie on a device, which the host does not wait for
        return
    if group.setdefault(FOLLOWED, beta1) != beta1:
        group["momentum"] = group[FOLLOWED] = beta1


def _with_note(fact: Fact, p: Tensor, kept_in: str | None) -> Fact:
    """The fact, whose row says so if the parameter is too small for a momentum in few bits."""
    row: RoleRow = fact.row
    note = low_bit.why_not(p, kept_in) if kept_in and row.optimizer == MUON else None
    return fact._replace(row=replace(row, why=f"{row.why}; {note}")) if note else fact


@stands_for_step
def _refuse(*_: Any, **__: Any) -> None:
    raise RuntimeError(
        "this optimizer was converted by moonfx.convert_optimizer and gave up its state: call "
        "step() of the moonfx.Muon that was returned"
    )
