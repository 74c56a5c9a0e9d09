"""What a Muon knows of each parameter, by the parameter itself, and as a checkpoint carries it.

Groups are lists that users and libraries take apart, reorder and join, so no fact lies at a place
of one. In a checkpoint the facts of a parameter lie in its own state, beside its momentum: whoever
matches states with parameters, as torch.distributed.checkpoint does by names, matches them too. All
are numbers, for its flat form takes nothing else.

    name            crc32 of the name; 0 if the parameter has none
    layout          kind, dim, outer, and each run of equal sizes as (how many, how long): 32 bits
                    each, the first ones lowest
    target_rms      of the parameter's update at learning rate 1
    second_moment   the ratio of mean g^2 to mean momentum^2 to be expected; -1 if unknown
"""

import itertools
import zlib
from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol, Self

from moonfx.capture.marks import constant_when_traced
from moonfx.optim.matrices import KINDS, Layout

# What a parameter's state holds beside its step and its momentum.
KEYS = ("name", "layout", "target_rms", "second_moment")
# Begins what errors and tables call a parameter that has no name: where it was.
PLACE = "param_groups["
_DIGIT = 32
_UNKNOWN = -1.0


class Row(Protocol):
    """As much of a parameter's row in the table of roles as a step and a checkpoint look at."""

    @property
    def name(self) -> str: ...
    @property
    def optimizer(self) -> str: ...
    @property
    def layout(self) -> Layout: ...
    def with_layout(self, layout: Layout) -> Self: ...


class Fact(NamedTuple):
    """What is known of one parameter.

    Attributes:
        row: its row in the table of roles.
        target_rms: of its update at learning rate 1; None where AdamW steps it.
        second_moment: the ratio of mean g^2 to mean momentum^2 to be expected, for the way back;
            None if unknown.
    """

    row: Any
    target_rms: float | None = None
    second_moment: float | None = None


def saved(fact: Fact) -> dict[str, int | float]:
    """A Muon parameter's facts, as its state holds them."""
    row: Row = fact.row
    assert fact.target_rms is not None
    ratio = _UNKNOWN if fact.second_moment is None else fact.second_moment
    codes = _codes(row.name, row.layout)
    return dict(zip(KEYS, (*codes, fact.target_rms, ratio), strict=True))


def loaded(fact: Fact, state: Mapping[str, Any]) -> Fact:
    """A fact with what a state says; found by another rule, a layout that was saved goes on."""
    row: Row = fact.row
    layout, ratio = layout_of(state["layout"]), float(state["second_moment"])
    return Fact(
        row if row.layout == layout else row.with_layout(layout),
        float(state["target_rms"]),
        None if ratio == _UNKNOWN else ratio,
    )


@constant_when_traced
def _codes(name: str, layout: Layout) -> tuple[int, int]:
    return name_code(name), layout_code(layout)


def name_code(name: str) -> int:
    return 0 if name.startswith(PLACE) else zlib.crc32(name.encode())


def layout_code(layout: Layout) -> int:
    """A layout as one number."""
    runs = [(len(list(run)), size) for size, run in itertools.groupby(layout.sizes)]
    digits = [KINDS.index(layout.kind), layout.dim, layout.outer, *itertools.chain(*runs)]
    return sum(digit << (_DIGIT * i) for i, digit in enumerate(digits))


def layout_of(code: int) -> Layout:
    """The layout that a number says.

    Raises:
        ValueError: if it says none.
    """
    digits, rest = [], int(code)
    while rest > 0:
        digits.append(rest & ((1 << _DIGIT) - 1))
        rest >>= _DIGIT
    # The first digit may be 0, the last one is not.
    kind, dim, outer, *runs = digits if len(digits) > 2 else (-1, 0, 0)
    if kind not in range(len(KINDS)) or len(runs) % 2:
        raise ValueError(f"{code} is no number of a layout")
    pairs = zip(runs[::2], runs[1::2], strict=True)
    sizes = itertools.chain.from_iterable([size] * count for count, size in pairs)
    return Layout(KINDS[kind], dim, outer, tuple(sizes))
