"""What an index of a gather is made of: the best of some scores, positions, or tokens."""

from moonfx.passes.graph.nodes import aten
from moonfx.passes.graph.walks import reachable
from moonfx.passes.parameters.dataflow import INPUT, FlowValue
from moonfx.passes.parameters.heads_and_routers import CHOICES
from moonfx.passes.parameters.values import is_float, op_name
from moonfx.passes.parameters.weight_products import is_product

_POSITIONS = {aten.arange.default, aten.arange.start, aten.arange.start_step, aten.cumsum.default}
# What these give is made of their first operand; the others say where in it.
_GATHERS = {"gather", "index", "index_select", "take"}
# What these give says nothing of the numbers that they compare.
_COMPARES = {"eq", "ne", "lt", "le", "gt", "ge"}


def is_of_choices(index: FlowValue) -> bool:
    """Whether an index is made of the best of some scores."""
    values = reachable([index], lambda value: () if is_product(value) else value.reads)
    return any(value.target in CHOICES for value in values)


def is_of_positions(index: FlowValue) -> bool:
    """Whether an index says where a token is, and not what it is."""
    values = reachable([index], _decided_by)
    return any(map(_is_position, values)) and not any(map(_is_tokens, values))


def _decided_by(value: FlowValue) -> list[FlowValue]:
    """What the numbers of an index are made of."""
    if op_name(value) in _COMPARES or value.target == INPUT or _is_position(value):
        return []
    return value.reads[:1] if op_name(value) in _GATHERS else value.reads


def _is_position(value: FlowValue) -> bool:
    """Whether a value is positions by itself: an arange, a constant of several numbers."""
    if op_name(value) in _COMPARES:
        return False
    if value.target == INPUT:
        return "pos" in str(value.key).lower()
    known = value.known
    differs = known is not None and bool((known != known.flatten()[:1]).any())
    return differs or value.target in _POSITIONS


def _is_tokens(value: FlowValue) -> bool:
    return value.target == INPUT and not _is_position(value) and not is_float(value)
