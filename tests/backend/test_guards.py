"""What a proof rests on is checked at each call: masks from outside the graph, and buffers."""

import warnings

import pytest
import torch
from torch import Tensor, nn

import moonfx
from moonfx.kernels.common.arguments import MobaArguments
from moonfx.kernels.reference.moba import moba_attention
from tests.support.given_masks import ONE_OFF, B, H, N, additive, causal, padded, with_padding

D = 8
BLOCK, TOPK = 4, 2


class Model(nn.Module):
    """Two attentions after a graph break, with the mask made before it, or given."""

    def __init__(self, form: str = "sdpa") -> None:
        super().__init__()
        self.lines = nn.ModuleList(nn.Linear(H * D, 3 * H * D) for _ in range(2))
        self.form = form

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        if mask is None:
            n = x.shape[1]
            index = torch.arange(n, device=x.device)
            keep = (index[None, :] <= index[:, None])[None, None].expand(x.shape[0], 1, n, n)
            mask = torch.where(keep, 0.0, torch.finfo(x.dtype).min)
            torch._dynamo.graph_break()
        for line in self.lines:
            q, k, v = (y.unflatten(-1, (H, D)).transpose(1, 2) for y in line(x).chunk(3, -1))
            if self.form == "sdpa":
                y = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
            else:
                scores = q @ k.transpose(-2, -1) * D**-0.5
                y = (scores.masked_fill(~mask, -torch.inf).softmax(-1)) @ v
            x = x + y.transpose(1, 2).flatten(2)
        return x


def reference(model: Model, x: Tensor, real: Tensor | None = None) -> Tensor:
    for line in model.lines:
        q, k, v = (y.unflatten(-1, (H, D)).transpose(1, 2) for y in line(x).chunk(3, -1))
        y = moba_attention(q, k, v, MobaArguments(BLOCK, TOPK, sinks=1, key_mask=real))[0]
        x = x + y.transpose(1, 2).flatten(2)
    return x


def sparse(model: Model) -> Model:
    return moonfx.sparsify(model, BLOCK, TOPK, compiler="aot_eager", on_miss="raise")


def test_a_mask_from_before_a_graph_break_is_proved_and_holds_in_training() -> None:
    model, x = Model(), torch.randn(B, N, H * D)
    expected = reference(model, x)
    grads = torch.autograd.grad(expected.square().sum(), list(model.parameters()))
    for _ in range(2):
        got = sparse(model)(x) if not hasattr(model, "_moonfx") else model(x)
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-4)
    again = torch.autograd.grad(got.square().sum(), list(model.parameters()))
    torch.testing.assert_close(again, grads, atol=1e-4, rtol=1e-3)
    report = moonfx.report(model)
    assert [(r.action, r.mask) for r in report.rows] == [("sparse", "causal & padding")] * 2
    assert report.failures == []


@pytest.mark.parametrize("form", ["sdpa", "eager"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_mask_that_the_user_gives_keeps_its_padding(form: str, side: str) -> None:
    model, x, real = Model(form), torch.randn(B, N, H * D), padded(side)
    mask = with_padding(side)
    got = sparse(model)(x, mask)
    expected = reference(model, x, real)
    torch.testing.assert_close(got[real], expected[real], atol=1e-5, rtol=1e-4)
    assert [r.action for r in moonfx.report(model).rows] == ["sparse"] * 2


def test_lengths_change_without_another_proof() -> None:
    model = sparse(Model())
    for n in (N, 40, 17):
        x = torch.randn(B, n, H * D)
        got = model(x, additive(causal(n, n)[None, None].expand(B, 1, n, n)))
        torch.testing.assert_close(got, reference(model, x), atol=1e-5, rtol=1e-4)


def test_any_other_mask_runs_as_it_was_written_and_says_so() -> None:
    model, x = Model(), torch.randn(B, N, H * D)
    good, other = additive(causal()[None, None]), additive(ONE_OFF[None, None])
    dense = model(x, other)
    sparse(model)(x, good)
    with pytest.warns(RuntimeWarning, match="a mask that comes into the graph"):
        got = model(x, other)
    torch.testing.assert_close(got, dense)
    assert "ran as it was written" in str(moonfx.report(model))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.testing.assert_close(model(x, good), reference(model, x), atol=1e-5, rtol=1e-4)


def test_a_mask_changed_in_place_is_read_again() -> None:
    model, x, mask = Model(), torch.randn(B, N, H * D), additive(causal()[None, None])
    sparse(model)(x, mask)
    mask[0, 0, 3, 7] = 0.0
    with pytest.warns(RuntimeWarning, match="a mask that comes into the graph"):
        model(x, mask)


def test_a_mask_that_was_not_causal_at_first_stays_dense() -> None:
    model, x = Model(), torch.randn(B, N, H * D)
    other = additive(ONE_OFF[None, None])
    dense = model(x, other)
    moonfx.sparsify(model, BLOCK, TOPK, compiler="aot_eager", on_miss="ignore")
    torch.testing.assert_close(model(x, other), dense)
    torch.testing.assert_close(model(x, additive(causal()[None, None])), Model.forward(model, x))
    assert [r.action for r in moonfx.report(model).rows] == ["declined"] * 2
