"""Decides the role of every parameter of an optimizer: graph > module > name > shape."""

import warnings
import weakref
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from moonfx.optim.matrices import Layout
from moonfx.optim.roles.by_module import Modules
from moonfx.optim.roles.by_name import FLATTENED, by_name, by_shape, unwrapped
from moonfx.optim.roles.overrides import Overrides, overridden
from moonfx.optim.roles.parameter_sites import (
    ParameterSite,
    check_owned,
    innermost,
    is_flattened,
    sites_of,
)
from moonfx.optim.roles.steppable import check_dense, check_initialized, judged
from moonfx.optim.roles.table import ROLES, Finding, RoleRow, row_of
from moonfx.optim.settings import MUON

if TYPE_CHECKING:
    from moonfx.optim.roles.by_use import Uses

Example = tuple[Any, ...] | dict[str, Any]

NO_MODEL = (
    "parameters are classified by their names and shapes, which show neither tied weights, nor "
    "which matrix produces the logits, nor what is split after a fused projection: pass model=, "
    "and example= to see how the model uses each parameter"
)

STRANGERS = (
    "added parameters are not the model's, and are classified by their names and shapes: "
    "'optimizer' ('muon' or 'adamw') or 'roles' in the added group says where they go"
)


def classify(
    parameters: Sequence[nn.Parameter],
    names: Sequence[str],
    model: nn.Module | None = None,
    example: tuple[Any, ...] | Mapping[str, Any] | None = None,
    overrides: Mapping[Any, Any] | None = None,
    strangers: str = "refuse",
) -> list[RoleRow]:
    """The role of each parameter.

    Args:
        parameters: of an optimizer, in its order.
        names: as far as they are known, "" where not; a model's own go before them.
        model: what uses them.
        example: what to call the model with, positional or keyword inputs, to see how it uses
            each. The model is traced and not run: nothing in it changes. Without it, the graphs
            that moonfx.sparsify or backend="moonfx" compiled so far say it.
        overrides: the user's word, {name | "re:<regex>" | predicate: "muon" | "adamw" | role |
            Layout}.
        strangers: what to do with parameters that a given model does not own: "refuse", or go by
            their names and shapes and "warn" of it, or "take" them so in silence, also where there
            is no model.

    Raises:
        TypeError, ValueError: for a bad override or example, or parameters that the model does
            not own.
    """
    users = Overrides(overrides)
    given = _checked(model, example)
    aliases = [[unwrapped(name)] if name else [] for name in names]
    if model is None:
        if strangers != "take":
            warnings.warn(f"moonfx: no model was given: {NO_MODEL}", stacklevel=3)
        found = [_nameless(p, name) for p, name in zip(parameters, names, strict=True)]
    else:
        sites = sites_of(model)
        if strangers == "refuse":
            check_owned(model, list(parameters), list(names), sites)
        found = _by_model(parameters, names, innermost(model), sites, given, strangers == "warn")
        own = [[site.name for site in sites.get(id(p), ())] for p in parameters]
        aliases = [list(dict.fromkeys([*a, *b])) for a, b in zip(own, aliases, strict=True)]
    users.check_used(list(zip(aliases, parameters, strict=True)))
    rows = []
    for p, alias, (finding, rule) in zip(parameters, aliases, found, strict=True):
        if is_flattened(p, alias[0] if alias else ""):
            finding = Finding("vector", FLATTENED)
        row = row_of(alias[0] if alias else "", p.shape, finding, rule)
        override = users.find(alias, p)
        rows.append(judged(row if override is None else overridden(row, override), p))
    return rows


class Classifier:
    """Classifies parameters that join an optimizer later, as its first ones were.

    A copy, and one that came out of a file, goes by names and shapes alone.

    Args:
        model, example, overrides: what `classify` was given; the model is not kept alive.
    """

    def __init__(
        self,
        model: nn.Module | None = None,
        example: Any = None,
        overrides: Mapping[Any, Any] | None = None,
    ) -> None:
        self._model = (lambda: None) if model is None else weakref.ref(model)
        self._example, self._overrides = example, overrides or {}

    def __call__(
        self, group: dict[str, Any], overrides: Mapping[Any, Any], optimizer: str | None
    ) -> list[RoleRow]:
        """A row per parameter of a group.

        Args:
            group: as an optimizer holds it.
            overrides: the user's word on this group, which goes before the earlier one.
            optimizer: "muon" or "adamw" for all of them, None where roles decide.
        """
        model, names = self._model(), self.names(group)
        for p, name in zip(group["params"], names, strict=True):
            check_initialized(name or "a parameter", p)
            check_dense(name or "a parameter", p)
        overrides, strangers = {**self._overrides, **overrides}, "warn"
        if optimizer is not None:
            overrides, strangers = {lambda name, parameter: True: optimizer}, "take"
        return classify(group["params"], names, model, self._example, overrides, strangers)

    def names(self, group: dict[str, Any]) -> list[str]:
        """What each parameter of a group is called, the model's own name first; "" if nothing."""
        model = self._model()
        known = {} if model is None else {id(p): name for name, p in model.named_parameters()}
        given = group.get("param_names") or [""] * len(group["params"])
        found = [known.get(id(p), n) for p, n in zip(group["params"], given, strict=True)]
        return [unwrapped(name) for name in found]

    def __reduce__(self) -> tuple[type["Classifier"], tuple[()]]:
        return Classifier, ()


def _checked(model: object, example: object) -> Example | None:
    """The example, as what a model can be called with.

    Raises:
        TypeError, ValueError: naming the argument.
    """
    if model is not None and not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module or None, got {type(model).__name__}")
    if isinstance(example, Mapping):
        example = dict(example)  # also of transformers' tokenizers
    if example is not None and not isinstance(example, tuple | dict):
        raise TypeError(
            "example must be a tuple of positional or a dict of keyword inputs, got "
            f"{type(example).__name__}"
        )
    if example is not None and model is None:
        raise ValueError("example needs model=, which it is the input of")
    return example


def _by_model(
    parameters: Sequence[nn.Parameter],
    names: Sequence[str],
    model: nn.Module,
    sites: dict[int, list[ParameterSite]],
    example: Example | None,
    warn_of_strangers: bool,
) -> list[tuple[Finding, str]]:
    """What a model says of each parameter, and by which rule; strangers go by name and shape."""
    # Whoever gives no model needs none of what traces one.
    from moonfx.optim.roles.by_use import uses_of_call, uses_recorded

    owned = [id(p) in sites for p in parameters]
    if warn_of_strangers and not all(owned):
        warnings.warn(f"moonfx: {owned.count(False)} {STRANGERS}", stacklevel=5)
    known = Modules(model, sites)
    found = [
        (known.of(p), "module") if its else _nameless(p, name)
        for p, name, its in zip(parameters, names, owned, strict=True)
    ]
    uses = uses_recorded(model) if example is None else uses_of_call(model, example)
    if uses is None:
        return found
    if example is not None:
        _warn_of_unseen(uses, [(p, found[i][0]) for i, p in enumerate(parameters) if owned[i]])
    _warn_of_failures(uses)
    return [
        _used(p, finding, uses) if its else (finding, rule)
        for p, (finding, rule), its in zip(parameters, found, owned, strict=True)
    ]


def _used(parameter: Tensor, by_module: Finding, uses: "Uses") -> tuple[Finding, str]:
    """What the graph says, and the module's word where the graph has none."""
    found = uses.found.get(id(parameter))
    if found is None and uses.complete:
        return Finding("unused", "no operator of the traced call reads it"), "graph"
    if found is None:
        note = "no graph that was traced reads it, and not all of the model was traced"
        return by_module._replace(why=f"{by_module.why} ({note})"), "module"
    if found.role is None:
        return by_module._replace(why=f"{by_module.why} ({found.why})"), "module"
    if by_module.role in _BY_PARTS_OF_WEIGHTS and ROLES[found.role].optimizer == MUON:
        return by_module._replace(why=f"{by_module.why} ({found.why})"), "module"
    layout = Layout(found.kind, found.dim, found.outer, found.sizes)
    return Finding(found.role, found.why, layout), "graph"


# Parts of a weight look like weights of their own where a graph shows only one of them.
_BY_PARTS_OF_WEIGHTS = ("LoRA", "weight norm")


def _warn_of_failures(uses: "Uses") -> None:
    if uses.failures:
        warnings.warn(
            f"moonfx: {len(uses.failures)} graphs of the model could not be captured, and what they"
            f" use is classified by module types: {uses.failures[0]}",
            stacklevel=5,
        )


def _warn_of_unseen(uses: "Uses", by_module: Sequence[tuple[Tensor, Finding]]) -> None:
    """Tells of matrices that an example did not show, where no failure says so."""
    if uses.failures or uses.complete:
        return
    # The blocks of an LSTM or nn.MultiheadAttention are certain without a trace.
    unsure = [p for p, found in by_module if p.ndim > 1 and found.role != "fused projection"]
    unseen = [p for p in unsure if id(p) not in uses.found or uses.found[id(p)].role is None]
    if unseen:
        warnings.warn(
            f"moonfx: {len(unseen)} of {len(unsure)} matrices were in no graph that example= "
            "traced, or what follows them was not, and are classified by module types, which do "
            "not show what is split after a fused projection: "
            f"{uses.reason or 'Dynamo left code to Python'}",
            stacklevel=5,
        )


def _nameless(parameter: Tensor, name: str) -> tuple[Finding, str]:
    """What name and shape say without a model."""
    shape = tuple(parameter.shape)
    by_shape_alone = by_shape(shape)
    found = by_name(unwrapped(name), shape) if name else None
    if found is None:
        return by_shape_alone, "shape"
    if ROLES[found.role].optimizer == MUON and by_shape_alone.role == "thin matrix":
        return by_shape_alone, "shape"
    return found, "name"
