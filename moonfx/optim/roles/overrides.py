"""The user's own word on some parameters: roles={name | "re:<regex>" | predicate: what}.

What is "muon", "adamw", one of ROLES, or a Layout. The first that fits wins: name, regex,
predicate. A predicate is asked for each name of a parameter, and with "" for one that has none.
"""

import difflib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from moonfx.optim.matrices import BATCHED, Layout, shapes
from moonfx.optim.roles.by_name import unwrapped
from moonfx.optim.roles.table import OPTIMIZERS, ROLES, RoleRow
from moonfx.optim.settings import ADAMW, MUON

Predicate = Callable[[str, Tensor], bool]
Key = str | Predicate
What = str | Layout
Override = tuple[str, What]

_KEYS = "a parameter's name, 're:<regex>' or a predicate(name, parameter)"


class Overrides:
    """The user's word on parameters.

    Args:
        given: the argument `roles`.

    Raises:
        TypeError: for a key or a value of the wrong type.
        ValueError: for an unknown role, or what is not a regular expression.
    """

    def __init__(self, given: Mapping[Any, Any] | None) -> None:
        self.names: dict[str, What] = {}
        self.patterns: list[tuple[re.Pattern[str], What]] = []
        self.predicates: list[tuple[Predicate, What]] = []
        if given is not None and not isinstance(given, Mapping):
            raise TypeError(
                "roles must be a mapping {name | 're:<regex>' | predicate: 'muon' | 'adamw' | role "
                f"| Layout}}, got {type(given).__name__}"
            )
        for key, what in (given or {}).items():
            self._add(key, _checked(key, what))

    def _add(self, key: Any, what: What) -> None:
        if isinstance(key, str) and key.startswith("re:"):
            try:
                self.patterns.append((re.compile(key[3:]), what))
            except re.error as error:
                raise ValueError(f"roles[{key!r}] is not a regular expression: {error}") from None
        elif isinstance(key, str):
            self.names[key] = what
        elif callable(key):
            self.predicates.append((key, what))
        else:
            raise TypeError(f"a key of roles must be {_KEYS}, got {key!r}")

    def find(self, names: Sequence[str], parameter: Tensor) -> Override | None:
        """The user's word on a parameter, with the key that fits; `names`: all of its names."""
        for key, what in self.names.items():
            if _is_called(key, names):
                return repr(key), what
        for pattern, what in self.patterns:
            if any(pattern.search(name) for name in names):
                return f"'re:{pattern.pattern}'", what
        for predicate, what in self.predicates:
            if _is_true(predicate, names, parameter):
                return _called(predicate), what
        return None

    def check_used(self, named: Sequence[tuple[Sequence[str], Tensor]]) -> None:
        """Checks that each key fits a parameter.

        Raises:
            ValueError: naming the key, with the nearest names.
        """
        every = [name for names, _ in named for name in names]
        for name in self.names:
            if not _is_called(name, every):
                near = difflib.get_close_matches(name, every, n=3, cutoff=0.3)
                hint = f"; nearest: {', '.join(near)}" if near else ""
                raise ValueError(f"roles[{name!r}]: no parameter has that name{hint}")
        for pattern, _ in self.patterns:
            if not any(pattern.search(name) for name in every):
                raise ValueError(f"roles['re:{pattern.pattern}'] matches no parameter")
        for predicate, _ in self.predicates:
            if not any(_is_true(predicate, names, p) for names, p in named):
                raise ValueError(f"roles[{_called(predicate)}] is true of no parameter")


def _is_called(key: str, names: Sequence[str]) -> bool:
    """Whether a name, with or without the prefixes of wrappers, is among some names."""
    return key in names or unwrapped(key) in map(unwrapped, names)


def _is_true(predicate: Predicate, names: Sequence[str], parameter: Tensor) -> bool:
    return any(predicate(name, parameter) for name in names or [""])


def _called(predicate: Predicate) -> str:
    return str(getattr(predicate, "__name__", repr(predicate)))


def _checked(key: object, what: object) -> What:
    if isinstance(what, Layout):
        return what
    known = [*OPTIMIZERS, *ROLES]
    if not isinstance(what, str):
        raise TypeError(
            f"roles[{key!r}] must be 'muon', 'adamw', a role's name or a Layout, got {what!r}"
        )
    if what not in known:
        near = difflib.get_close_matches(what, known, n=1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        raise ValueError(
            f"roles[{key!r}]: no optimizer and no role {what!r}{hint}; known: {', '.join(known)}"
        )
    return what


def overridden(row: RoleRow, override: Override) -> RoleRow:
    """A row as the user wants it.

    Raises:
        ValueError: if Muon, or the layout, does not fit the parameter's shape.
    """
    key, what = override
    why = f"roles[{key}] says so; {row.rule}: {row.role}"
    if isinstance(what, Layout):
        role, optimizer, layout = _role_of(what), MUON, what
    elif what in OPTIMIZERS:
        role, optimizer, layout = row.role, what, row.layout
    else:
        role, optimizer, layout = what, ROLES[what].optimizer, row.layout
    if optimizer == ADAMW:
        return RoleRow(row.name, row.shape, role, "override", ADAMW, why)
    if row.optimizer != MUON and not isinstance(what, Layout):
        layout = natural(row.shape)
    try:
        shapes(row.shape, layout)
    except ValueError as error:
        raise ValueError(f"roles[{key}]: {row.name or 'a parameter'}: {error}") from None
    return RoleRow(row.name, row.shape, role, "override", MUON, why, layout)


def natural(shape: Sequence[int]) -> Layout:
    """The layout of a parameter of which nothing but its shape is known."""
    return Layout({3: "batch"}.get(len(shape), "flatten" if len(shape) > 3 else "matrix"))


def _role_of(layout: Layout) -> str:
    kinds = {**dict.fromkeys(BATCHED, "experts"), "flatten": "convolution"}
    return "fused projection" if layout.sizes else kinds.get(layout.kind, "hidden matrix")
