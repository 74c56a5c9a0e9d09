"""Operators: schema, fake kernel, autograd and FLOP formula. The numerics are in kernels/.

Importing this package registers them as torch.ops.moonfx.*.
"""

from moonfx.ops import flops, moba

__all__ = ["flops", "moba"]
