"""Multiples of the identity matrix among a graph's nodes, and matrices of zeros.

    torch.eye(n)    torch.diag(torch.ones(n)).to(X)    torch.zeros_like(A).fill_diagonal_(s)

They are polynomials of any X: {"": s}, and {} for zeros. In a batch each matrix is such.
"""

from typing import Any

import torch
from torch import fx

from moonfx.passes.graph.memory_versions import Memory, TensorVersion
from moonfx.passes.graph.nodes import argument, operator_name
from moonfx.passes.graph.operators import CASTS
from moonfx.passes.newton_schulz.operands import TooLong, Unclear, shape
from moonfx.passes.newton_schulz.operators import RULES, read_by, terms_of
from moonfx.passes.newton_schulz.polynomials import Terms
from moonfx.passes.newton_schulz.views import VIEWS

aten = torch.ops.aten

_EYES = {aten.eye.default, aten.eye.m, aten.eye.out, aten.eye.m_out}
_DIAGONALS = {aten.diag.default, aten.diag_embed.default}
# Every entry is one number -> the number, or where among the arguments it is.
_FILLED: dict[Any, int | float] = {
    **dict.fromkeys((aten.zeros.default, aten.zeros_like.default, aten.new_zeros.default), 0.0),
    **dict.fromkeys((aten.ones.default, aten.ones_like.default, aten.new_ones.default), 1.0),
    **dict.fromkeys((aten.full.default, aten.full_like.default, aten.fill_.Scalar), 1),
    aten.new_full.default: 2,
    aten.zero_.default: 0.0,
}
# Where the last two sizes stay, these repeat matrices and not parts of them.
_REPEATS = {aten.repeat.default, aten.expand.default, aten.expand_as.default}


def identity(value: TensorVersion, memory: Memory) -> Terms | None:
    """The polynomial of a multiple of the identity matrix or of zeros, None for anything else."""
    node = value.node
    if node.op != "call_function" or memory.result(node) != value or len(shape(node)) < 2:
        return None
    if node.target in _EYES:
        return {"": 1.0} if shape(node)[-1] == shape(node)[-2] else None
    if node.target in _FILLED:
        return {} if _fill(value, memory) == 0.0 else None
    if node.target in _DIAGONALS:
        return _diagonal(node, memory)
    if node.target is aten.fill_diagonal_.default:
        zeros = identity(memory.read(node, node.args[0]), memory)  # type: ignore[arg-type]
        number = argument(node, 1, "fill_value")
        square = len(shape(node)) == 2 and shape(node)[0] == shape(node)[1]
        plain = zeros == {} and square and type(number) in (int, float)
        return {"": float(number)} if plain else None
    return _of_one(node, memory)


def _of_one(node: fx.Node, memory: Memory) -> Terms | None:
    """What an operator of one operand makes of an identity."""
    if node.target not in RULES and node.target not in _REPEATS:
        return None
    operands = read_by(node)
    if len(operands) != 1 or shape(node)[-2:] != shape(operands[0])[-2:]:
        return None  # its entries are viewed as other matrices, or one of them is repeated

    def get(operand: Any) -> Terms:
        found = identity(memory.read(node, operand), memory)
        if found is None:
            raise KeyError("not made of the identity")
        return found

    try:
        if node.target in CASTS:  # ones and zeros are exact in any dtype
            exact = get(operands[0])
            return exact if set(exact.values()) <= {1.0} else None
        return get(operands[0]) if node.target in _REPEATS else terms_of(node, get)
    except (KeyError, TooLong, Unclear):
        return None


def _diagonal(node: fx.Node, memory: Memory) -> Terms | None:
    """diag(v) of a vector v that is one number throughout."""
    vector: Any = node.args[0]
    if operator_name(node) == "diag" and len(shape(vector)) != 1:
        return None  # the diagonal of a matrix
    offset = argument(node, 1, "offset", argument(node, 1, "diagonal", 0))
    dims = argument(node, 2, "dim1", -2), argument(node, 3, "dim2", -1)
    if offset != 0 or dims != (-2, -1):
        return None
    found = _fill(memory.read(node, vector), memory)
    return None if found is None else {"": found}


def _fill(value: TensorVersion, memory: Memory) -> float | None:
    """The one number that all entries of a tensor are, None if the graph does not say so."""
    node = value.node
    if node.op != "call_function" or memory.result(node) != value:
        return None
    where = _FILLED.get(node.target)
    if isinstance(where, int):
        number = argument(node, where, "fill_value", argument(node, where, "value"))
        return float(number) if type(number) in (int, float) else None
    if where is None and node.target in VIEWS and node.target not in CASTS:
        return _fill(memory.read(node, node.args[0]), memory)  # type: ignore[arg-type]
    return where
