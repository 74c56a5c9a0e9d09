"""Finds LoRA: a product of two factors beside a weight that reads the same input.

    y = linear(x, w) + scale * linear(linear(dropout(x), a), b)        a [r, K], b [M, r], r < K, M

Two factors in a row are no LoRA by themselves: what makes them one is the weight that they correct.
"""

from moonfx.passes.graph.operators import ADD, DIVIDE, MULTIPLY
from moonfx.passes.parameters.dataflow import DataFlow, FlowValue
from moonfx.passes.parameters.element_positions import REARRANGE, SAME
from moonfx.passes.parameters.weight_products import WeightProduct, input_of, is_product


def is_first_factor(flow: DataFlow, product: WeightProduct, rank: int, size: int) -> bool:
    """Whether a product with a weight [rank, size] is followed by the other factor."""
    below = _product_after(flow, product.op)
    if below is None or not rank < min(size, below.shape[-1]):
        return False
    return _corrects(flow, below, source(_input_of(flow, product.op)))


def is_second_factor(flow: DataFlow, product: WeightProduct, rank: int, size: int) -> bool:
    """Whether a product with a weight [size, rank] follows the other factor."""
    above = source(_input_of(flow, product.op))
    if not is_product(above) or (first := _input_of(flow, above)) is None:
        return False
    if not rank < min(size, first.shape[-1] if first.shape else 0):
        return False
    return _product_after(flow, above) is product.op and _corrects(flow, product.op, source(first))


def source(value: FlowValue | None) -> FlowValue:
    """What a value is, before views, casts, dropout and scales."""
    assert value is not None
    while value.target in REARRANGE | SAME | MULTIPLY | DIVIDE and len(value.reads) == 1:
        value = value.reads[0]
    return value


def _input_of(flow: DataFlow, product: FlowValue) -> FlowValue | None:
    """What a product with a weight reads that the model computes, or that is learned rows."""
    return next((x for x in product.reads if flow.active(x)), input_of(product))


def _product_after(flow: DataFlow, value: FlowValue) -> FlowValue | None:
    """The product with a weight that is all that reads a value, through views and scales."""
    while len(value.users) == 1:
        (value,) = value.users
        if is_product(value):
            return value if any(not flow.active(x) for x in value.reads) else None
        if not _leaves(flow, value):
            return None
    return None


def _leaves(flow: DataFlow, value: FlowValue) -> bool:
    """A view, a cast, dropout or a scale that is no activation."""
    if value.target in REARRANGE | SAME:
        return True
    return value.target in MULTIPLY | DIVIDE and sum(map(flow.active, value.reads)) == 1


def _corrects(flow: DataFlow, value: FlowValue, given: FlowValue) -> bool:
    """Whether a value is added to a product of a weight with `given`."""
    while len(value.users) == 1:
        before, (value,) = value, value.users
        if value.target in ADD:
            others = [x for x in value.reads if x is not before]
            return any(_is_product_of(flow, x, given) for x in others)
        if not _leaves(flow, value):
            return False
    return False


def _is_product_of(flow: DataFlow, value: FlowValue, given: FlowValue) -> bool:
    """Whether a value is, or is a sum that begins with, a product of a weight with `given`."""
    value = source(value)
    while value.target in ADD and value.reads:
        value = source(value.reads[0])
    if not is_product(value):
        return False
    read = _input_of(flow, value)
    return read is not None and source(read) is given
