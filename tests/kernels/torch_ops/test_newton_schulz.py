"""Newton-Schulz in torch operations: the reference's values, a loop's bits, the input unchanged."""

import pytest
import torch

from moonfx.kernels.reference.newton_schulz import JORDAN, by_products
from moonfx.kernels.torch_ops.newton_schulz import batched, one, plain

STEPS = [JORDAN] * 5
# A step may enlarge a rounding error by a = 3.4; five steps, 8 sums of the dtype's own error each.
TOLERANCES = {torch.float32: 1e-3, torch.bfloat16: 0.2, torch.float16: 0.05}


def matrices(dtype: torch.dtype) -> torch.Tensor:
    torch.manual_seed(0)
    x = torch.randn(3, 8, 12)
    return (x / torch.linalg.matrix_norm(x, keepdim=True)).to(dtype)


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("run", [plain, batched])
def test_the_steps_are_those_of_the_reference(run, dtype) -> None:
    x = matrices(dtype)
    before = x.clone()
    found = run(x, STEPS)
    assert found.dtype == dtype
    assert torch.equal(x, before)
    expected = by_products(x.double(), STEPS)
    assert (found.double() - expected).abs().max() < TOLERANCES[dtype]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_batch_has_the_bits_of_its_matrices_one_by_one(dtype) -> None:
    x = matrices(dtype)
    assert torch.equal(plain(x, STEPS), torch.stack([one(each, STEPS) for each in x]))


def test_float16_is_computed_in_float32_and_rounded_once() -> None:
    x = matrices(torch.float16)
    assert torch.equal(plain(x, STEPS), plain(x.float(), STEPS).half())
