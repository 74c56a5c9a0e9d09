"""The CPU's own passes around Newton-Schulz, against the torch operations they stand for."""

import pytest
import torch
from torch import Tensor

from moonfx.kernels.cpu import library as cpu_build
from moonfx.optim.matrices import Layout
from moonfx.optim.step import cpu_passes as muon

pytestmark = pytest.mark.skipif(
    cpu_build.library()[0] is None, reason=f"no CPU kernel: {cpu_build.library()[1]}"
)

# A single vector, less than one, more than one slab, rows with gaps between them.
SHAPES = [(4, 4), (1, 3), (2, 1), (37, 51), (100, 301), (3, 9000)]
VIEWS = [
    ("whole", lambda x: x),
    ("columns of a fused one", lambda x: x[:, 1 : 1 + (x.shape[1] + 1) // 2]),
    ("every other row", lambda x: x[::2]),
]


def tensors(shape: tuple[int, int], dtype: torch.dtype) -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(shape[0], shape[1] + 1).to(dtype) for _ in range(3)]


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("view", [v[1] for v in VIEWS], ids=[v[0] for v in VIEWS])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gathering_is_lerp_and_a_division_by_the_norm(dtype, view, threads, monkeypatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    for shape in SHAPES:
        for nesterov in (True, False):
            weight, grad, buffer = (view(x) for x in tensors(shape, dtype))
            expected = buffer.lerp(grad, 1 - 0.9)
            u = expected.float()
            u = grad.float().lerp(u, 0.9) if nesterov else u
            out = torch.empty(u.shape, dtype=torch.bfloat16)
            how = dict(momentum=0.9, nesterov=nesterov, sign=1.0, decay=0.0, eps=1e-12)
            muon.gather(weight, grad, buffer, out, **how)
            assert torch.equal(buffer, expected)
            # The norm's last bit decides between two neighbours in bfloat16 here and there.
            torch.testing.assert_close(out.float(), u / u.norm(), rtol=2**-8, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gathering_takes_the_sign_and_the_coupled_decay_first(dtype) -> None:
    weight, grad, buffer = tensors((5, 40), dtype)
    mixed = 0.5 * weight.float() - grad.float()
    expected = buffer.float().lerp(mixed, 1 - 0.9)
    out = torch.empty(buffer.shape, dtype=torch.bfloat16)
    how = dict(momentum=0.9, nesterov=False, sign=-1.0, decay=0.5, eps=1e-12)
    muon.gather(weight, grad, buffer, out, **how)
    torch.testing.assert_close(buffer.float(), expected, rtol=2**-8, atol=1e-6)


@pytest.mark.parametrize("view", [v[1] for v in VIEWS], ids=[v[0] for v in VIEWS])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scattering_is_a_product_and_a_sum(dtype, view) -> None:
    for shape in SHAPES:
        weight = view(tensors(shape, dtype)[0])
        update = torch.randn(weight.shape).bfloat16()
        how = dict(keep=0.75, amount=-0.3, decay=0.25, eps=1e-12)
        o, w = update.float(), weight.float()
        rms = float(o.square().mean().sqrt())
        for cautious, exact in ((False, False), (True, False), (False, True)):
            kept = torch.where(o * w > 0, w * 0.75, w) if cautious else w * 0.75
            expected = kept - 0.3 / (rms if exact else 1.0) * o
            found = view(tensors(shape, dtype)[0])
            muon.scatter(found, update, cautious=cautious, exact=exact, **how)
            rounding = 2**-8 if dtype == torch.bfloat16 else 1e-5
            torch.testing.assert_close(found.float(), expected, rtol=rounding, atol=1e-6)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_not_finite_is_not_hidden(bad, dtype) -> None:
    weight, grad, buffer = tensors((4, 20), dtype)
    grad[1, 3] = bad
    out = torch.empty(buffer.shape, dtype=torch.bfloat16)
    how = dict(momentum=0.9, nesterov=True, sign=1.0, decay=0.0, eps=1e-12)
    muon.gather(weight, grad, buffer, out, **how)
    assert not buffer[1, 3].isfinite()
    assert out[1, 3].isnan()


# Below 1e-37 a direction (0.0975 of the gradient) is no normal number any more.
@pytest.mark.parametrize("size", [1e-36, 1e-20, 1e-10, 1e19, 5e37])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_squares_that_overflow_or_vanish_leave_the_norm_right(dtype, size) -> None:
    for shape in ((4, 20), (3, 9000)):
        grad = (tensors(shape, dtype)[0].double() * size).to(dtype)
        out = torch.empty(grad.shape, dtype=torch.bfloat16)
        how = dict(momentum=0.5, nesterov=False, sign=1.0, decay=0.0)
        how["eps"] = torch.finfo(torch.float32).tiny
        muon.gather(grad, grad, torch.zeros_like(grad), out, **how)
        expected = grad.double() / grad.double().norm()
        # Of bfloat16, and of the buffer where that is in bfloat16.
        torch.testing.assert_close(out.double(), expected, rtol=2**-7, atol=1e-6)


def test_zeros_stay_zeros() -> None:
    zero = torch.zeros(4, 20)
    out = torch.ones(4, 20, dtype=torch.bfloat16)
    how = dict(momentum=0.9, nesterov=True, sign=1.0, decay=0.0, eps=1e-12)
    muon.gather(zero, zero, zero.clone(), out, **how)
    assert not out.any()
    weight = torch.ones(4, 20)
    how = dict(keep=1.0, amount=-0.3, decay=0.0, eps=1e-12)
    muon.scatter(weight, out, cautious=False, exact=True, **how)
    assert bool((weight == 1).all())


class Watch(torch.utils._python_dispatch.TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        return func(*args, **(kwargs or {}))


def test_only_plain_contiguous_tensors_of_one_dtype_that_nobody_watches_are_taken() -> None:
    plain = torch.zeros(4, 8)
    supported = [
        muon.supports(plain, plain, plain, Layout()),
        muon.supports(plain.bfloat16(), plain.bfloat16(), plain.bfloat16(), Layout()),
        muon.supports(torch.nn.Parameter(plain), plain, plain, Layout(sizes=(2, 2))),
    ]
    assert supported == [True] * 3
    with Watch():
        watched = muon.supports(plain, plain, plain, Layout())
    declined = [
        watched,
        muon.supports(plain, plain, plain.bfloat16(), Layout()),
        muon.supports(plain, plain.mT, plain, Layout()),
        muon.supports(plain.half(), plain.half(), plain.half(), Layout()),
        muon.supports(plain.to("meta"), plain.to("meta"), plain.to("meta"), Layout()),
        muon.supports(plain, plain, plain, Layout(dim=1, outer=2, sizes=(2, 2))),
    ]
    assert declined == [False] * 6
