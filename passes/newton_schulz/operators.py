"""What one node makes of polynomials in X: the table of operators that a step may be written in."""

from operator import getitem
from typing import Any

import torch
from torch import fx

from moonfx.passes.graph.nodes import argument, dtype, operator_name
from moonfx.passes.newton_schulz import matmuls
from moonfx.passes.newton_schulz.operands import (
    GetTerms,
    TermRule,
    Unclear,
    alike,
    is_tensor,
    number,
    overloads,
    size,
)
from moonfx.passes.newton_schulz.polynomials import Terms, plus, scaled
from moonfx.passes.newton_schulz.views import OF_FIRST, VIEWS, same

aten = torch.ops.aten


def _mul(node: fx.Node, get: GetTerms) -> Terms:
    left, right = node.args[:2]
    tensors = [x for x in (left, right) if isinstance(x, fx.Node) and is_tensor(x)]
    if len(tensors) == 2:
        small = [x for x in tensors if size(x) == 1]
        why = "a coefficient is a tensor, and not a number of the graph"
        raise Unclear(why if small else "two matrices are multiplied entry by entry")
    if isinstance(left, fx.Node) and is_tensor(left):
        return scaled(get(left), number(right))
    return scaled(get(right), number(left))


def _div(node: fx.Node, get: GetTerms) -> Terms:
    terms, divisor = get(node.args[0]), number(node.args[1])
    if not divisor:
        raise Unclear("a division by zero")
    return scaled(terms, 1.0 / divisor)


def _neg(node: fx.Node, get: GetTerms) -> Terms:
    return scaled(get(node.args[0]), -1.0)


def _add(sign: float, swap: bool = False) -> TermRule:
    def summand(node: fx.Node, operand: Any, get: GetTerms) -> Terms:
        if not isinstance(operand, fx.Node) and number(operand) == 0.0:
            return {}  # Python's sum() begins with 0
        alike(node, operand)
        return get(operand)

    def add(node: fx.Node, get: GetTerms) -> Terms:
        alpha = number(argument(node, 2, "alpha", 1))
        left, right = (summand(node, each, get) for each in node.args[:2])
        left, right = (right, left) if swap else (left, right)
        return plus(left, scaled(right, sign * alpha))

    return add


def _lerp(node: fx.Node, get: GetTerms) -> Terms:
    weight = number(argument(node, 2, "weight"))
    alike(node, *node.args[:2])
    return plus(scaled(get(node.args[0]), 1.0 - weight), scaled(get(node.args[1]), weight))


def _copied(node: fx.Node, get: GetTerms) -> Terms:
    alike(node, node.args[1])
    return get(node.args[1])


RULES: dict[Any, TermRule] = {
    **matmuls.RULES,
    **overloads("mul.Tensor mul.Scalar multiply.Tensor multiply.Scalar", _mul),
    **overloads("div.Tensor div.Scalar divide.Tensor divide.Scalar true_divide.Tensor", _div),
    **overloads("neg.default negative.default", _neg),
    **overloads("add.Tensor add.Scalar", _add(1.0)),
    **overloads("sub.Tensor sub.Scalar subtract.Tensor subtract.Scalar", _add(-1.0)),
    **overloads("rsub.Tensor rsub.Scalar", _add(-1.0, swap=True)),
    **overloads("lerp.Scalar", _lerp),
    **VIEWS,
    aten.detach_.default: same,
    aten.copy_.default: _copied,
}

# Arithmetic that is no polynomial -> why a step that holds it is declined.
NO_STEP = {
    "dropout": "dropout inside the step",
    "native_dropout": "dropout inside the step",
    "addcmul": "two matrices are multiplied entry by entry",
}


def read_by(node: fx.Node) -> list[fx.Node]:
    """The operands whose entries a node reads, and not only their sizes or their memory."""
    if node.target in _SIZES:
        return []
    if node.target in OF_FIRST:
        return [n for n in node.args[:1] if isinstance(n, fx.Node)]
    if node.target is aten.copy_.default:
        return [n for n in node.args[1:2] if isinstance(n, fx.Node)]
    out = node.kwargs.get("out")
    given = [n for n in node.all_input_nodes if n is not out]
    return given + ([out] if any(x is out for x in node.args) and out is not None else [])  # type: ignore[list-item]


# Memory of an operand's size and dtype, of which no entry is read.
BUFFERS = {
    *(aten.empty_like.default, aten.new_empty.default, aten.new_empty_strided.default),
    *(aten.zeros_like.default, aten.new_zeros.default),
    *(aten.ones_like.default, aten.new_ones.default),
    *(aten.full_like.default, aten.new_full.default),
}
_SIZES = {*BUFFERS, aten.zero_.default, aten.fill_.Scalar}


def terms_of(node: fx.Node, get: GetTerms) -> Terms:
    """The polynomial that a node makes of its operands'.

    Raises:
        Unclear: if a step may not hold such a node, or not with these operands.
        KeyError: if an operand is no polynomial.
        TooLong: if its degree is more than a step's.
    """
    rule = RULES.get(node.target)
    if rule is None:
        raise Unclear(NO_STEP.get(_plain(node), f"{operator_name(node)} inside the step"))
    matrices = [n for n in read_by(node) if is_tensor(n) and n.meta["val"].dim() >= 2]
    kinds = {(dtype(n), n.meta["val"].device) for n in (*matrices, node)}
    if len(kinds) != 1:
        raise Unclear("the dtype changes inside the step, and with it what is rounded")
    return rule(node, get)


# Operators that make of a step something that is none, which is then declined by name; a graph with
# any other is no step to begin with.
_ARITHMETIC = {str(target).split(".")[1].rstrip("_") for target in RULES} | {
    *("addcmul", "addcdiv", "where", "dropout", "native_dropout", "pow", "sqrt", "clamp", "tanh"),
    *("round", "dot", "bernoulli", "sign", "clamp_min", "clamp_max", "abs", "addbmm"),
}


def is_arithmetic(node: fx.Node) -> bool:
    return _plain(node) in _ARITHMETIC


def _plain(node: fx.Node) -> str:
    """The operator's name without what says that it works in place or on lists; also of a row."""
    if node.target is getitem and isinstance(node.args[0], fx.Node):
        node = node.args[0]
    return operator_name(node).removeprefix("_foreach_").rstrip("_")
