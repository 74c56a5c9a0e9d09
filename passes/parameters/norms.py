"""Which values are normalized: by an operator, or by hand, x * rsqrt(mean(x ** 2) + eps)."""

from moonfx.passes.graph.nodes import aten
from moonfx.passes.graph.operators import ADD, DIVIDE, MULTIPLY, SUBTRACT
from moonfx.passes.parameters.dataflow import FlowValue
from moonfx.passes.parameters.element_positions import REARRANGE, SAME
from moonfx.passes.parameters.values import op_name

NORMS = {
    "layer_norm", "native_layer_norm", "rms_norm", "_fused_rms_norm", "group_norm",
    "native_group_norm", "batch_norm", "native_batch_norm", "_native_batch_norm_legit",
    "cudnn_batch_norm", "instance_norm",
}  # fmt: skip
ROOTS = {
    aten.rsqrt.default,
    aten.sqrt.default,
    aten.linalg_vector_norm.default,
    aten.norm.ScalarOpt_dim,
}
_SUMS, _SCALES = ADD | SUBTRACT, MULTIPLY | DIVIDE


def is_normalized(value: FlowValue) -> bool:
    """Whether a value was divided by a root of its squares, or is what a norm gives."""
    for _ in range(6):
        if value.target in ROOTS or op_name(value) in NORMS:
            return True
        if value.target in _SCALES:
            if any(_is_root(x) for x in value.reads):
                return True
        elif value.target not in REARRANGE | SAME | _SUMS:
            return False
        if not value.reads:
            return False
        value = value.reads[0]
    return False


def _is_root(value: FlowValue) -> bool:
    for _ in range(4):
        if value.target in ROOTS:
            return True
        if value.target not in SAME | _SUMS or not value.reads:
            return False
        value = value.reads[0]
    return False
