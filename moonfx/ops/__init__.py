"""Operators: schema, fake kernel, autograd and FLOP formula. The numerics are in kernels/.

Importing this package registers them as torch.ops.moonfx.*.
"""

from moonfx.ops import flops, moba, newton_schulz

__all__ = ["flops", "moba", "newton_schulz"]
