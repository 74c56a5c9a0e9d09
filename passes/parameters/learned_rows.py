"""Which values are made of weights alone and are activations all the same: learned queries.

    q = linear(rows, wq)                          rows [5, D] are learned, and wq is a matrix
    y = scaled_dot_product_attention(q, k, v)     between activations, as that of k and v is

    w = original0 * original1 / norm              a weight is computed of these: the product that
    y = linear(x, w)                              reads it takes it for a matrix

What a value becomes says which of both it is. One that joins the activations, is added to them, is
gathered by them or attends is rows, and the products and norms above it acted on rows.
"""

from moonfx.passes.graph.nodes import aten
from moonfx.passes.graph.operators import (
    ADD,
    DIVIDE,
    MASKED_FILL,
    MULTIPLY,
    SOFTMAX,
    SUBTRACT,
    WHERE,
)
from moonfx.passes.parameters.dataflow import PARAMETER, DataFlow, FlowValue, Worklist
from moonfx.passes.parameters.element_positions import REARRANGE, SAME
from moonfx.passes.parameters.lora import source
from moonfx.passes.parameters.norms import NORMS, is_normalized
from moonfx.passes.parameters.values import argument_name, op_name
from moonfx.passes.parameters.weight_products import input_of, is_product
from moonfx.passes.parameters.weight_uses import GATHERS, TABLES

_ATTENDS = {aten.scaled_dot_product_attention.default}
_JOINS = {aten.cat.default, aten.stack.default}
_SUMS, _SCALES = ADD | SUBTRACT, MULTIPLY | DIVIDE
# What may stand between the scores of attention and their softmax.
_SCORES = _SUMS | _SCALES | WHERE | MASKED_FILL | REARRANGE | SAME | {aten.pad.default}


def learned_rows(flow: DataFlow) -> list[FlowValue]:
    """What acts on rows that are learned: from there on, what is made of them is an activation."""
    rows = _rows(flow)
    return [value for value in rows if _acts(flow, value, rows)]


def _rows(flow: DataFlow) -> set[FlowValue]:
    """Values of weights and constants alone that become activations."""
    found: set[FlowValue] = set()
    for value in reversed(flow.values):
        if not flow.active(value) and any(_takes_rows(flow, x, value, found) for x in value.users):
            found.add(value)
    return found


def _takes_rows(flow: DataFlow, op: FlowValue, value: FlowValue, rows: set[FlowValue]) -> bool:
    """Whether an operator reads a value as rows."""
    active = flow.active(op)
    if not active and op not in rows:
        return False
    if op.target in _ATTENDS:
        return argument_name(op, value) in ("query", "key", "value")
    if is_product(op):
        return _attends(op) if active else input_of(op) is value or _attends(op)
    if op_name(op) in NORMS or op_name(op).startswith("conv"):
        return op.args[0] is value and not active
    if op.target in TABLES | GATHERS:
        return value in op.args[:1] and len(value.shape) > 1
    if active:
        return op.target in _SUMS | _JOINS
    return True


def _attends(product: FlowValue) -> bool:
    """Whether a product gives the scores of attention, or weighs values by its probabilities."""
    operands = [x for x in product.reads if len(x.shape) > 2]
    if len(operands) < 2:
        return False
    if any(source(x).target in SOFTMAX for x in operands):
        return True
    waiting, known = [product], {product}
    while waiting:
        for user in waiting.pop().users:
            if user.target in SOFTMAX:
                return True
            if user.target in _SCORES and user not in known:
                known.add(user)
                waiting.append(user)
    return False


def _acts(flow: DataFlow, value: FlowValue, rows: set[FlowValue]) -> bool:
    """Whether an operator of weights alone does what only activations undergo."""
    if value.target in _ATTENDS or op_name(value) in NORMS:
        return True
    if is_product(value):
        return not _is_low_rank(flow, value)
    others = [x for x in value.reads if flow.trained(x)]
    return value.target in MULTIPLY and len(others) > 1 and any(map(is_normalized, others))


def _is_low_rank(flow: DataFlow, product: FlowValue) -> bool:
    """Whether a product of two parameters corrects a third, as LoRA's does where it is merged."""
    factors = [source(x) for x in product.reads if flow.trained(x)]
    if len(factors) != 2 or any(x.target != PARAMETER or len(x.shape) != 2 for x in factors):
        return False
    rank = set(factors[0].shape) & set(factors[1].shape)
    if not rank or min(rank) >= min(product.shape[-2:], default=0):
        return False
    after = Worklist(flow, [product])
    for value in after:
        others = [x for x in value.reads if x not in after]
        if value.target in ADD and any(source(x).target == PARAMETER for x in others):
            return True
        if value is product or value.target in REARRANGE | SAME | _SCALES:
            after.add(value.users)
    return False
