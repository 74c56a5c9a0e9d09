"""What one node makes of polynomials in X: the table of operators that a step may be written in."""

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from moonfx.passes.newton_schulz_terms import Terms, plus, product, scaled, transposed
from moonfx.passes.nodes import argument, dtype, permutation, short

aten = torch.ops.aten


class Unclear(Exception):
    """A node that a step might hold, but not this way; the message says why."""


class TooLong(Exception):
    """A product of higher degree than a step has."""


# An operand of a node -> its polynomial; raises KeyError for one that is none.
Get = Callable[[Any], Terms]


def _alike(node: fx.Node, *operands: Any) -> None:
    """Checks that no row or column of an operand is repeated to fit the others."""
    for each in operands:
        if not _is_tensor(each):
            raise Unclear("a number is added to every entry")
        if each.meta["val"].shape[-2:] != node.meta["val"].shape[-2:]:
            raise Unclear("a row or column is broadcast over a matrix")


def _number(value: Any) -> float:
    if isinstance(value, fx.Node) and _is_tensor(value):
        raise Unclear("a coefficient is a tensor, and not a number of the graph")
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise Unclear("a coefficient is not known when the graph is compiled")
    return float(value)


def _is_tensor(node: fx.Node) -> bool:
    """Not a size or a learning rate that is a symbol."""
    return isinstance(node.meta.get("val"), torch.Tensor)


def _times(left: Terms, right: Terms) -> Terms:
    out = product(left, right)
    if out is None:
        raise TooLong
    return out


def _matmul(node: fx.Node, get: Get) -> Terms:
    return _times(get(node.args[0]), get(node.args[1]))


def _linear(node: fx.Node, get: Get) -> Terms:
    if argument(node, 2, "bias") is not None:
        raise Unclear("a bias is added to a product")
    return _times(get(node.args[0]), transposed(get(node.args[1])))


def _addmm(node: fx.Node, get: Get) -> Terms:
    beta, alpha = (_number(argument(node, i, k, 1)) for i, k in ((3, "beta"), (4, "alpha")))
    out = scaled(_times(get(node.args[1]), get(node.args[2])), alpha)
    if not beta:
        return out
    _alike(node, node.args[0])
    return plus(scaled(get(node.args[0]), beta), out)


def _power(node: fx.Node, get: Get) -> Terms:
    base, n = get(node.args[0]), argument(node, 1, "n")
    if n != 2:
        raise Unclear(f"a matrix power of {n}")
    return _times(base, base)


def _multi_dot(node: fx.Node, get: Get) -> Terms:
    matrices: Any = node.args[0]
    out = get(matrices[0])
    for each in matrices[1:]:
        out = _times(out, get(each))
    return out


def _einsum(node: fx.Node, get: Get) -> Terms:
    equation, operands = node.args[0], node.args[1]
    given, _, out = str(equation).replace(" ", "").partition("->")
    *words, out = (w.replace("...", ".") for w in (*given.split(","), out))
    if len(words) != 2 or not out or any(len(w) < 2 or "." in w[-2:] for w in (*words, out)):
        raise Unclear(f"the sums of einsum {equation!r} are not one product of two matrices")
    lead = out[:-2]
    if any(w[:-2] != lead or len(set(w)) != len(w) for w in (*words, out)):
        raise Unclear(f"the sums of einsum {equation!r} are not one product of two matrices")
    left, right, out = (w[-2:] for w in (*words, out))
    shared = set(left) & set(right)
    if len(shared) != 1 or set(out) != set(left) ^ set(right):
        raise Unclear(f"the sums of einsum {equation!r} are not one product of two matrices")
    p, q = get(operands[0]), get(operands[1])  # type: ignore[index]
    p = transposed(p) if left[0] in shared else p
    q = transposed(q) if right[1] in shared else q
    whole = _times(p, q)
    return whole if out[0] in left else transposed(whole)


def _mul(node: fx.Node, get: Get) -> Terms:
    left, right = node.args[:2]
    tensors = [x for x in (left, right) if isinstance(x, fx.Node) and _is_tensor(x)]
    if len(tensors) == 2:
        small = [x for x in tensors if _size(x) == 1]
        why = "a coefficient is a tensor, and not a number of the graph"
        raise Unclear(why if small else "two matrices are multiplied entry by entry")
    if isinstance(left, fx.Node) and _is_tensor(left):
        return scaled(get(left), _number(right))
    return scaled(get(right), _number(left))


def _size(node: fx.Node) -> int:
    value = node.meta.get("val")
    size = value.numel() if isinstance(value, torch.Tensor) else 0
    return size if isinstance(size, int) else 0


def _div(node: fx.Node, get: Get) -> Terms:
    terms, divisor = get(node.args[0]), _number(node.args[1])
    if not divisor:
        raise Unclear("a division by zero")
    return scaled(terms, 1.0 / divisor)


def _neg(node: fx.Node, get: Get) -> Terms:
    return scaled(get(node.args[0]), -1.0)


def _add(sign: float, swap: bool = False) -> Callable[[fx.Node, Get], Terms]:
    def run(node: fx.Node, get: Get) -> Terms:
        left, right = node.args[:2]
        left, right = (right, left) if swap else (left, right)
        if not (isinstance(left, fx.Node) and isinstance(right, fx.Node)):
            raise Unclear("a number is added to every entry")
        _alike(node, left, right)
        return plus(get(left), scaled(get(right), sign * _number(argument(node, 2, "alpha", 1))))

    return run


def _lerp(node: fx.Node, get: Get) -> Terms:
    weight = _number(argument(node, 2, "weight"))
    _alike(node, *node.args[:2])
    return plus(scaled(get(node.args[0]), 1.0 - weight), scaled(get(node.args[1]), weight))


def _same(node: fx.Node, get: Get) -> Terms:
    return get(node.args[0])


def _turned(node: fx.Node, get: Get) -> Terms:
    order = permutation(node)
    if order is None and node.target in (aten.mH.default, aten.adjoint.default):
        return transposed(get(node.args[0]))
    rank = len(order or [])
    if order is None or order[:-2] != list(range(rank - 2)):
        raise Unclear("dims are permuted that are not the matrix's own")
    return transposed(get(node.args[0])) if order[-1] != rank - 1 else get(node.args[0])


# Views of a matrix as its transpose, or that may be.
TURNS = (
    aten.permute.default,
    aten.transpose.int,
    aten.t.default,
    aten.numpy_T.default,
    aten.mT.default,
    aten.mH.default,
    aten.adjoint.default,
    aten.swapaxes.default,
    aten.swapdims.default,
    aten.movedim.int,
)


def _overloads(names: str, run: Callable[[fx.Node, Get], Terms]) -> dict[Any, Any]:
    """Each of "packet.overload", its in-place form and its out= form, where torch has it -> run."""
    found = {}
    for name in names.split():
        packet, overload = name.split(".")
        for each, kind in ((packet, overload), (f"{packet}_", overload), (packet, "out")):
            target = getattr(getattr(aten, each, None), kind, None)
            if target is not None:
                found[target] = run
    return found


TABLE: dict[Any, Callable[[fx.Node, Get], Terms]] = {
    **_overloads("matmul.default mm.default bmm.default", _matmul),
    **_overloads("addmm.default baddbmm.default", _addmm),
    **_overloads("linear.default", _linear),
    **_overloads("matrix_power.default linalg_matrix_power.default", _power),
    **_overloads("linalg_multi_dot.default chain_matmul.default", _multi_dot),
    **_overloads("einsum.default", _einsum),
    **_overloads("mul.Tensor mul.Scalar multiply.Tensor multiply.Scalar", _mul),
    **_overloads("div.Tensor div.Scalar divide.Tensor divide.Scalar true_divide.Tensor", _div),
    **_overloads("neg.default negative.default", _neg),
    **_overloads("add.Tensor add.Scalar", _add(1.0)),
    **_overloads("sub.Tensor sub.Scalar subtract.Tensor subtract.Scalar", _add(-1.0)),
    **_overloads("rsub.Tensor rsub.Scalar", _add(-1.0, swap=True)),
    **_overloads("lerp.Scalar", _lerp),
    **_overloads("clone.default contiguous.default detach.default alias.default", _same),
    **_overloads("to.dtype to.dtype_layout to.other to.device _to_copy.default", _same),
    **_overloads("view.default reshape.default expand.default _unsafe_view.default", _same),
    **dict.fromkeys(TURNS, _turned),
}

# Their result is the operand in another dtype or on another device.
CASTS = {
    *_overloads("to.dtype to.dtype_layout to.other to.device _to_copy.default", _same),
    *_overloads("type_as.default", _same),
}

ADDING = {
    *_overloads("addmm.default baddbmm.default", _addmm),
}
PRODUCTS = {
    *ADDING,
    *_overloads("matmul.default mm.default bmm.default linear.default", _matmul),
}

# Arithmetic that is no polynomial: what stands in the way of a step that holds it.
NO_STEP = {
    "dropout": "dropout inside the step",
    "native_dropout": "dropout inside the step",
    "addcmul": "two matrices are multiplied entry by entry",
}


def read_by(node: fx.Node) -> list[fx.Node]:
    """The operands that a node reads; out= is only written."""
    out = node.kwargs.get("out")
    given = [n for n in node.all_input_nodes if n is not out]
    return given + ([out] if any(x is out for x in node.args) and out is not None else [])  # type: ignore[list-item]


def terms_of(node: fx.Node, get: Get) -> Terms:
    """The polynomial that a node makes of its operands'.

    Raises:
        Unclear: if a step may not hold such a node, or not with these operands.
        KeyError: if an operand is no polynomial.
        TooLong: if its degree is more than a step's.
    """
    run = TABLE.get(node.target)
    if run is None:
        raise Unclear(NO_STEP.get(short(node).rstrip("_"), f"{short(node)} inside the step"))
    matrices = [n for n in read_by(node) if _is_tensor(n) and _size(n) != 1]
    kinds = {(dtype(n), n.meta["val"].device) for n in (*matrices, node)}
    if len(kinds) != 1:
        raise Unclear("the dtype changes inside the step, and with it what is rounded")
    return run(node, get)
