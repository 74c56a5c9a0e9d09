"""A query from which every key is hidden gets what its author wrote, or the report says not."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import moonfx
from moonfx.kernels.common.arguments import MobaArguments
from moonfx.kernels.reference.moba import moba_attention
from moonfx.report.report import Report
from tests.passes.attention.forms import NEG, SCALE, B, D, H, Model, N, causal, inputs

ZEROED = "0 for queries without a key"
PADDED = 7
SEGMENTS = torch.arange(N).ge(12).long().expand(3, N).contiguous()

# The first row has padding on the left, and the second (if there is one more) nothing but padding.
Body = Callable[..., Tensor]


def real(rows: int = B) -> Tensor:
    made = torch.ones(rows, N, dtype=torch.bool)
    made[0, :PADDED] = False
    made[2:] = False
    return made


def keep(padding: Tensor) -> Tensor:
    return causal() & padding[:, None, None, :]


def scores(q: Tensor, k: Tensor) -> Tensor:
    return q @ k.transpose(-2, -1) * SCALE


def added(value: float) -> Body:
    def body(self: Model, q: Tensor, k: Tensor, v: Tensor, padding: Tensor) -> Tensor:
        return (scores(q, k) + torch.where(keep(padding), 0.0, value)).softmax(-1) @ v

    return body


def filled(value: float) -> Body:
    def body(self: Model, q: Tensor, k: Tensor, v: Tensor, padding: Tensor) -> Tensor:
        return scores(q, k).masked_fill(~keep(padding), value).softmax(-1) @ v

    return body


def filled_twice(self: Model, q: Tensor, k: Tensor, v: Tensor, padding: Tensor) -> Tensor:
    s = torch.where(causal(), scores(q, k), NEG)
    return s.masked_fill(~padding[:, None, None], NEG).softmax(-1) @ v


def beside_a_bias(self: Model, q: Tensor, k: Tensor, v: Tensor, padding: Tensor) -> Tensor:
    slopes = torch.tensor([0.5, 0.25, 0.125, 0.0625]).view(1, H, 1, 1)
    s = scores(q, k) + slopes * torch.arange(N)
    return (s + torch.where(keep(padding), 0.0, NEG)).softmax(-1) @ v


def biased_after(self: Model, q: Tensor, k: Tensor, v: Tensor, padding: Tensor) -> Tensor:
    s = scores(q, k).masked_fill(~keep(padding), -1e4)
    return (s + 0.25 * torch.arange(N)).softmax(-1) @ v


def with_a_trained_bias(self: Model, q: Tensor, k: Tensor, v: Tensor, padding: Tensor) -> Tensor:
    s = scores(q, k) + q[:1, :, :1, :1] * torch.arange(N)
    return (s + torch.where(keep(padding), 0.0, NEG)).softmax(-1) @ v


def in_one_dim(self: Model, q: Tensor, k: Tensor, v: Tensor, padding: Tensor) -> Tensor:
    q, k, v = (x.reshape(-1, N, D) for x in (q, k, v))
    mask = torch.where(keep(padding).expand(-1, H, -1, -1), 0.0, NEG).reshape(-1, N, N)
    return torch.baddbmm(mask, q, k.mT, alpha=SCALE).softmax(-1).bmm(v).view(-1, H, N, D)


def grouped(self: Model, q: Tensor, k: Tensor, v: Tensor, padding: Tensor) -> Tensor:
    k, v = (x[:, :2].repeat_interleave(2, 1) for x in (k, v))
    return (scores(q, k) + torch.where(keep(padding), 0.0, NEG)).softmax(-1) @ v


def later_queries(self: Model, q: Tensor, k: Tensor, v: Tensor, padding: Tensor) -> Tensor:
    """A chunk of queries behind keys from a cache."""
    mask = torch.where(keep(padding)[:, :, 3:], 0.0, NEG)
    return (scores(q[:, :, 3:], k) + mask).softmax(-1) @ v


def packed(self: Model, q: Tensor, k: Tensor, v: Tensor, padding: Tensor) -> Tensor:
    ids = SEGMENTS[: len(q)]
    same = ids[:, None, :, None] == ids[:, None, None, :]
    mask = torch.where(keep(padding) & same, 0.0, NEG)
    return (scores(q, k) + mask).softmax(-1) @ v


def cleared(self: Model, q: Tensor, k: Tensor, v: Tensor, padding: Tensor) -> Tensor:
    p = (scores(q, k) + torch.where(keep(padding), 0.0, NEG)).softmax(-1)
    return p.masked_fill(~keep(padding), 0.0) @ v


def by_boolean_mask(self: Model, q: Tensor, k: Tensor, v: Tensor, padding: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, keep(padding))


def capped(self: Model, q: Tensor, k: Tensor, v: Tensor, padding: Tensor) -> Tensor:
    s = 5.0 * torch.tanh(scores(q, k) / 5.0)
    return (s + torch.where(keep(padding), 0.0, NEG)).softmax(-1) @ v


def two_planes(self: Model, q: Tensor, k: Tensor, v: Tensor, padding: Tensor) -> Tensor:
    later = torch.where(causal(), 0.0, -1e9)
    return (scores(q, k) + later + torch.where(padding, 0.0, -1e9)[:, None, None]).softmax(-1) @ v


def cleared_in_part(self: Model, q: Tensor, k: Tensor, v: Tensor, padding: Tensor) -> Tensor:
    p = (scores(q, k) + torch.where(keep(padding), 0.0, NEG)).softmax(-1)
    return p.masked_fill(~padding[:, None, None], 0.0) @ v


def with_gradients(model: nn.Module, *given: Tensor) -> list[Tensor]:
    leaves = [x.detach().clone().requires_grad_() for x in given[:3]]
    out = model(*leaves, *given[3:])
    weights = torch.arange(out.numel(), dtype=out.dtype).view(out.shape).sin()
    (out * weights).sum().backward()
    return [out.detach(), *(x.grad for x in leaves)]  # type: ignore[misc]


def with_all_blocks(body: Body, *given: Tensor) -> tuple[list[Tensor], list[Tensor], Report]:
    """Output and gradients dense, the same sparse with every block, and the report."""
    dense, model = with_gradients(Model(body), *given), Model(body)
    moonfx.sparsify(model, N, 1, sinks=0, compiler="aot_eager", on_miss="raise")
    sparse = with_gradients(model, *given)
    return dense, sparse, moonfx.report(model)


KEPT = [
    ("finfo.min added", added(NEG)),
    ("-1e9 added", added(-1e9)),
    ("finfo.min filled in", filled(NEG)),
    ("-1e9 filled in", filled(-1e9)),
    ("-1e4 filled in", filled(-1e4)),
    ("filled twice", filled_twice),
    ("beside a bias", beside_a_bias),
    ("heads in the batch", in_one_dim),
    ("grouped heads", grouped),
    ("fewer queries than keys", later_queries),
    ("packed", packed),
    ("cleared after the softmax", cleared),
    ("scaled_dot_product_attention", by_boolean_mask),
]


@pytest.mark.parametrize("rows", [2, 3], ids=["left padding", "and a row of padding alone"])
@pytest.mark.parametrize("body", [r[1] for r in KEPT], ids=[r[0] for r in KEPT])
def test_keyless_queries_and_their_gradients_are_as_they_were(body: Body, rows: int) -> None:
    dense, sparse, report = with_all_blocks(body, *inputs(b=rows), real(rows))
    assert [(r.action, r.modifiers.replace("ALiBi", "")) for r in report.rows] == [("sparse", "")]
    for got, wanted in zip(sparse, dense, strict=True):
        # The same sums in another order, in float32.
        torch.testing.assert_close(got, wanted, atol=5e-6, rtol=1e-4)


def test_keyless_queries_are_kept_for_every_length() -> None:
    def body(self: Model, q: Tensor, k: Tensor, v: Tensor, padding: Tensor) -> Tensor:
        n = q.shape[2]
        mask = torch.ones(n, n, dtype=torch.bool).tril() & padding[:, None, None]
        return (scores(q, k) + torch.where(mask, 0.0, NEG)).softmax(-1) @ v

    model = Model(body)
    moonfx.sparsify(model, 64, 1, sinks=0, compiler="aot_eager", on_miss="raise")
    for n in (N, N + 9, N + 14):
        padding = torch.arange(n).ge(torch.tensor([[PADDED], [0]]))
        given = (*inputs(n=n), padding)
        dense = with_gradients(Model(body), *given)
        for got, wanted in zip(with_gradients(model, *given), dense, strict=True):
            torch.testing.assert_close(got, wanted, atol=5e-6, rtol=1e-4)
    assert moonfx.report(model).graphs == 2, "the second graph has symbolic sizes"


def test_an_operator_given_finite_masks_keeps_keyless_queries_too() -> None:
    """Torch's own gradients of such queries are Nk times too large on a CPU: by hand, then."""

    def fused(self: Model, q: Tensor, k: Tensor, v: Tensor, padding: Tensor) -> Tensor:
        mask = torch.where(keep(padding), 0.0, NEG)
        return F.scaled_dot_product_attention(q, k, v, mask)

    given = (*inputs(), real())
    _, sparse, report = with_all_blocks(fused, *given)
    assert [r.modifiers for r in report.rows] == [""]
    for got, wanted in zip(sparse, with_gradients(Model(added(NEG)), *given), strict=True):
        torch.testing.assert_close(got, wanted, atol=5e-6, rtol=1e-4)


def test_the_other_queries_are_those_of_the_reference_with_fewer_blocks() -> None:
    q, k, v = inputs()
    model = Model(added(NEG))
    moonfx.sparsify(model, 4, 2, sinks=0, compiler="eager", on_miss="raise")
    expected, _ = moba_attention(q, k, v, MobaArguments(4, 2, key_mask=real()))
    expected[0, :, :PADDED] = v[0].mean(1, keepdim=True)
    torch.testing.assert_close(model(q, k, v, real()), expected, atol=2e-6, rtol=1e-5)


ZERO = [
    # of -1e4 scores leave something, of two planes the mean is over a part of the keys
    ("-1e4 added", added(-1e4)),
    ("two planes", two_planes),
    ("cleared in part", cleared_in_part),
    ("softcap", capped),
    ("a bias of a filled score", biased_after),
    ("a bias that is trained", with_a_trained_bias),
]


@pytest.mark.parametrize("body", [r[1] for r in ZERO], ids=[r[0] for r in ZERO])
def test_the_report_says_where_keyless_queries_are_not_kept(body: Body) -> None:
    dense, sparse, report = with_all_blocks(body, *inputs(), real())
    (row,) = report.rows
    assert row.action == "sparse"
    assert row.modifiers.endswith(ZEROED)
    assert sparse[0][0, :, :PADDED].count_nonzero() == 0
    torch.testing.assert_close(sparse[0][0, :, PADDED:], dense[0][0, :, PADDED:])
    torch.testing.assert_close(sparse[0][1], dense[0][1])


def test_a_softcap_keeps_keyless_queries_where_nothing_is_differentiated() -> None:
    given, model = (*inputs(), real()), Model(capped)
    moonfx.sparsify(model, N, 1, sinks=0, compiler="eager", on_miss="raise")
    with torch.no_grad():
        torch.testing.assert_close(model(*given), Model(capped)(*given), atol=2e-6, rtol=1e-5)
    assert [r.modifiers for r in moonfx.report(model).rows] == ["softcap 5"]
