"""torch.compile(model, backend="moonfx") keeps one verdict per layer too, with the module."""

import pytest
import torch
from torch import Tensor, nn

from moonfx.backend.on_miss import NothingRewritten
from tests.frontends.test_judged import IDS, Causal, Relative, Window, by_chunk, by_step, whole

OPTIONS = {"block": 8, "topk": 2, "compiler": "eager", "on_miss": "ignore"}


@pytest.fixture(autouse=True)
def fresh() -> None:
    torch._dynamo.reset()


def compiled(model: nn.Module, **options: object) -> nn.Module:
    made: nn.Module = torch.compile(model, backend="moonfx", options={**OPTIONS, **options})
    return made


@pytest.mark.parametrize("order", [(whole, by_step, by_chunk), (by_step, by_chunk, whole)])
@pytest.mark.parametrize("kind", [Relative, Window, Causal])
def test_a_step_is_what_the_whole_pass_is(kind, order) -> None:
    model = compiled(kind())
    found = {call.__name__: call(model) for call in order}
    for name in ("by_step", "by_chunk"):
        torch.testing.assert_close(found[name], found["whole"], atol=1e-5, rtol=1e-4)


def test_a_step_that_was_believed_runs_as_it_was_once_a_call_shows_the_mask() -> None:
    plain = Relative()
    past = plain(IDS[:1, :63])[1]
    model = compiled(plain, on_miss="warn")
    model(IDS[:1, 63:], past)
    with pytest.warns(UserWarning, match="was taken to be sparse in a call of 1 query"):
        expected = whole(model)
    with pytest.warns(RuntimeWarning, match="ran as it was written"):
        again = model(IDS[:1, 63:], past)[0][:, -1]
    torch.testing.assert_close(again, expected, atol=1e-5, rtol=1e-4)


class Twofold(nn.Module):
    """Causal, and bidirectional in training."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.scaled_dot_product_attention(x, x, x, is_causal=not self.training)


def test_what_was_sparse_and_is_not_is_an_error_where_that_is_asked_for() -> None:
    x, model = torch.randn(1, 2, 64, 8), compiled(Twofold().eval(), on_miss="raise")
    model(x)
    with pytest.raises(Exception, match="was sparse in a call of 64 queries") as found:
        model.train()(x)
    assert isinstance(found.value, NothingRewritten) or "NothingRewritten" in str(found.value)


def test_a_reset_of_dynamo_forgets_the_verdicts() -> None:
    x, plain = torch.randn(1, 2, 64, 8), Twofold()
    dense = plain.eval()(x)
    model = compiled(plain)
    model.train()(x)
    torch.testing.assert_close(model.eval()(x), dense)
    torch._dynamo.reset()
    assert (model.eval()(x) - dense).abs().max() > 1e-3


def test_verdicts_go_with_their_module_and_are_no_other_modules() -> None:
    x = torch.randn(1, 2, 64, 8)
    compiled(Twofold().train())(x)
    other = Twofold().eval()
    assert (compiled(other)(x) - other(x)).abs().max() > 1e-3
