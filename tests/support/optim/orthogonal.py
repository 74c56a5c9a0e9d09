"""Gaussian matrices, what Newton-Schulz makes of them, and root mean squares."""

import torch

from moonfx.ops.newton_schulz import newton_schulz
from moonfx.optim.coefficients import per_step

SEED = 20


def matrix(*shape, seed=SEED):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def flat(triples):
    return [number for triple in triples for number in triple]


def orthogonal(x, name="muon", dtype=torch.bfloat16, steps=None):
    x = x / torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True)
    return newton_schulz(x.to(dtype), flat(per_step(name, steps)))


def rms(x):
    return x.double().square().mean().sqrt().item()
