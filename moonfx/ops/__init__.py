"""Operators: schema, fake kernel, autograd and FLOP formula. The numerics are in kernels/.

Importing this package registers them as torch.ops.moonfx.*.
"""

from moonfx.ops import moba

__all__ = ["moba"]
