"""Operators: schema, fake kernel, autograd and FLOP formula. The numerics are in kernels/."""
