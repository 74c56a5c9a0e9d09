"""Values of tensors as sympy expressions: truth values, choices, and what a dtype can hold.

A number that a tensor holds is the number rounded to its dtype. An expression over indices is only
kept where every value of it is exact: an index in bfloat16 is not, above 256.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import sympy
import torch
from torch import fx

from moonfx.passes.graph.nodes import shape

Expr = Any  # sympy.Expr or sympy.logic.boolalg.Boolean

# Below this an additive mask value is a mask: exp(-1e4 + score) is zero in float32 for every score
# that attention can have (|score| < 9e3).
MASKED_BELOW = -1e4

# Indices and lengths stay exact in these (float32 up to 2**24 tokens).
_EXACT = {torch.int64, torch.int32, torch.float64, torch.float32}
_SMALL_NUMBER = 2**20


_BOUNDS: dict[sympy.Symbol, int] = {}


@functools.cache
def head_symbol(heads: int) -> sympy.Symbol:
    """The index of a head, known to be below `heads`."""
    symbol = sympy.Symbol(f"h_of_{heads}", integer=True, nonnegative=True)
    _BOUNDS[symbol] = heads
    return symbol


def head_symbols() -> set[sympy.Symbol]:
    return set(_BOUNDS)


def divided(index: Expr, size: Expr) -> tuple[Expr, Expr]:
    """(index // size, index % size): for size * x + head, with head < size, x and head."""
    for symbol in index.free_symbols:
        if symbol in _BOUNDS and size.is_Integer and _BOUNDS[symbol] <= size:
            quotient = sympy.expand((index - symbol) / size)
            if quotient.is_integer:
                return quotient, symbol
    return sympy.floor(index / size), sympy.Mod(index, size)


def load_symbol(name: str, *, whole: bool = True) -> Any:
    """The unknown tensor `name` as a function of its index; `whole`: its values are integers."""
    return sympy.Function(f"load_{name}", integer=True) if whole else sympy.Function(f"load_{name}")


def is_load(expr: Expr) -> bool:
    return getattr(getattr(expr, "func", None), "__name__", "").startswith("load_")


def name_of(load: Expr) -> str:
    """The name of the unknown tensor that a load reads."""
    return str(load.func.__name__).removeprefix("load_")


def loads(expr: Expr) -> list[Expr]:
    """The unknown values in an expression."""
    if is_load(expr):
        return [expr]
    return [x for x in expr.atoms(sympy.Function) if is_load(x)]


def is_boolean(expr: Expr) -> bool:
    """Whether an expression is a truth value. (To sympy every Symbol is one too.)"""
    return isinstance(expr, sympy.logic.boolalg.Boolean) and not isinstance(expr, sympy.Symbol)


def to_bool(expr: Expr) -> Expr:
    if is_boolean(expr):
        return expr
    if isinstance(expr, sympy.Piecewise):
        return choose(expr.args[0][1], to_bool(expr.args[0][0]), to_bool(rest_of(expr)))
    return sympy.Ne(expr, 0)


def to_number(expr: Expr) -> Expr:
    if is_boolean(expr):
        return choose(expr, sympy.Integer(1), sympy.Integer(0))
    return expr


def rest_of(expr: sympy.Piecewise) -> Expr:
    """A Piecewise without its first piece."""
    rest = expr.args[1:]
    return rest[0][0] if rest[0][1] == True else sympy.Piecewise(*rest)  # noqa: E712


def choose(condition: Expr, yes: Expr, no: Expr) -> Expr:
    """where(condition, yes, no), both of one kind."""
    if condition == True:  # noqa: E712
        return yes
    if condition == False:  # noqa: E712
        return no
    if yes == no:
        return yes
    if is_boolean(yes) or is_boolean(no):
        yes, no = to_bool(yes), to_bool(no)
        return sympy.Or(sympy.And(condition, yes), sympy.And(sympy.Not(condition), no))
    return sympy.Piecewise((yes, condition), (no, True))


def constant(value: object) -> Expr:
    """A Python or tensor scalar as an expression."""
    if isinstance(value, bool):
        return sympy.true if value else sympy.false
    if isinstance(value, float) and value != value:
        return sympy.nan
    if isinstance(value, float) and value in (float("inf"), float("-inf")):
        return sympy.oo if value > 0 else -sympy.oo
    if isinstance(value, float) and value == int(value):
        return sympy.Integer(int(value))
    return sympy.sympify(value)


def stored(expr: Expr, dtype: torch.dtype | None) -> Expr | None:
    """The expression as a tensor of this dtype holds it; None if that is not known exactly."""
    if dtype is None:
        return expr
    if dtype == torch.bool:
        return to_bool(expr)
    expr = to_number(expr)
    if expr.has(sympy.Piecewise) and not isinstance(expr, sympy.Piecewise):
        expr = sympy.piecewise_fold(expr)
    if isinstance(expr, sympy.Piecewise):
        branches = [(stored(value, dtype), condition) for value, condition in expr.args]
        return None if any(v is None for v, _ in branches) else sympy.Piecewise(*branches)
    if expr.is_number:
        return _stored_number(expr, dtype)
    if is_load(expr):
        return expr
    if dtype not in _EXACT or expr.has(sympy.nan, sympy.oo, -sympy.oo, sympy.zoo):
        return None
    if dtype.is_floating_point:
        # Sums of these round, or carry NaN: x - x is not always 0.
        exact = expr.is_integer and all(abs(n) <= _SMALL_NUMBER for n in expr.atoms(sympy.Number))
        return expr if exact and all(x.is_integer for x in loads(expr)) else None
    return expr


def _stored_number(expr: Expr, dtype: torch.dtype) -> Expr | None:
    if dtype.is_complex or expr is sympy.zoo or (expr.is_real is False and expr.is_finite):
        return None
    if dtype.is_floating_point:
        rounded = torch.tensor(float(expr), dtype=torch.float64, device="cpu").to(dtype)
        return constant(rounded.item())
    info = torch.iinfo(dtype)
    return expr if expr.is_Integer and info.min <= expr <= info.max else None


def describe(expr: Expr) -> str:
    """An expression for a reason: short, with loads as reads."""
    text = str(expr).replace("load_", "")
    return text if len(text) <= 120 else text[:117] + "..."


Index = tuple[Expr, ...]


def aligned(node: fx.Node, index: Sequence[Expr]) -> Index:
    """The part of an index of equal or higher rank that a node is read at."""
    sizes = shape(node)
    own = tuple(index)[len(index) - len(sizes) :]
    return tuple(sympy.S.Zero if n == 1 else x for n, x in zip(sizes, own, strict=True))


class Reader(Protocol):
    """What a rule asks of symbolic/reader.py for."""

    def read(self, node: object, index: Sequence[Expr]) -> Expr: ...

    def broadcast(self, node: object, index: Index) -> Expr: ...


Rule = Callable[[Reader, fx.Node, Index], Expr | None]
