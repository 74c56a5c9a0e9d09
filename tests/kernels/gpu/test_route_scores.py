"""The gate's scores, as exact as float32's own product, from parts in bfloat16."""

import pytest
import torch

from moonfx.kernels.gpu import block_means as gpu_means
from moonfx.kernels.gpu import route as gpu_route
from tests.support.routes import ROADS, random_call, take


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("form", ["parts", "split"])
def test_scores_are_as_exact_as_float32(
    dtype: torch.dtype, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    take(ROADS[0], monkeypatch)
    monkeypatch.setattr(gpu_route, "REUSE", 1 if form == "parts" else 100)
    query, key, of = random_call(dtype)
    means = gpu_means.block_means(key, of)
    got = gpu_route.route(query, means, None, of, 1.0).long()
    rows = query.double().unflatten(1, (2, 2)).transpose(2, 3).flatten(2, 3)
    exact = means.double()[:, :, None].mul(rows[:, :, :, None]).sum(-1)  # [B, Hkv, R, n]
    row = torch.arange(rows.shape[2]) // of.group
    own = of.queries.own[0, row, None].long()
    block = torch.arange(of.n)
    able = (block >= 1) & (block < own)
    chosen = torch.zeros_like(exact, dtype=torch.bool).scatter(-1, got.clamp(min=0), value=True)
    worst = exact.masked_fill(~(chosen & able), torch.inf).amin(-1)
    missed = exact.masked_fill(chosen | ~able, -torch.inf).amax(-1)
    # 64 products of order 1 / 2, whose sum is rounded to 2**-24 of itself some times.
    assert (missed - worst).max() < 64 * 2**-24
    assert torch.equal(chosen.sum(-1), torch.full_like(chosen.sum(-1), of.topk))
