"""Which products read pixels or samples: the first convolution, and a linear map of patches.

    conv2d(images, w, stride=16)                            by kernels
    linear(images.unflatten(...).permute(...).flatten(3), w)    the same map, by patches cut by hand
    linear(pixel_values [B, N, 3 P P], w)                   the same, of patches that were given

What a caller gives with three dims or fewer may be the activations of another model: it is pixels
only where its name says so, or a convolution reads it.
"""

import torch

from moonfx.passes.parameters.dataflow import INPUT, DataFlow, FlowValue
from moonfx.passes.parameters.element_positions import REARRANGE, SAME, is_pointwise
from moonfx.passes.parameters.values import is_float

_CUTS = {torch.ops.aten.unfold.default, torch.ops.aten.im2col.default}
_NAMES = ("pixel", "patches")


def reads_pixels(flow: DataFlow, product: FlowValue) -> bool:
    """Whether a product with a weight reads patches of an image that the model is given."""
    read = next((x for x in product.reads if flow.active(x)), None)
    if read is None or flow.trained(read):
        return False
    given = read
    while given.target != INPUT:
        above = [x for x in given.reads if flow.active(x)]
        if len(above) != 1 or not _keeps_pixels(given):
            return False
        (given,) = above
    if not is_float(given):
        return False
    named = any(name in str(given.key).lower() for name in _NAMES)
    return named or (len(given.shape) > 3 and read.shape[-1] != given.shape[-1])


def _keeps_pixels(value: FlowValue) -> bool:
    return value.target in REARRANGE | SAME | _CUTS or is_pointwise(value)
