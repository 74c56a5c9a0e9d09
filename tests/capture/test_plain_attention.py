"""Attention that runs outside of every graph is seen, by its layer and line; nothing else is."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode, _len_torch_dispatch_stack

from moonfx.capture.plain_attention import UNKNOWN, PlainAttention, Watch, unwatched

X = torch.randn(2, 4, 6, 8)


class Layer(nn.Module):
    def __init__(self, attention: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.attention = attention

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x)


def sdpa(x: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(x, x, x, is_causal=True)


def by_hand(x: Tensor) -> Tensor:
    return (x @ x.mT).softmax(-1) @ x


def cast_and_dropped(x: Tensor) -> Tensor:
    weights = F.dropout((x @ x.mT).softmax(-1, dtype=torch.float64).to(x.dtype), 0.5)
    return (weights * 0.5).flatten(0, 1) @ x.flatten(0, 1)


def einsum(x: Tensor) -> Tensor:
    return torch.einsum("bhij,bhjd->bhid", torch.einsum("bhid,bhjd->bhij", x, x).softmax(-1), x)


def multi_head(x: Tensor) -> Tensor:
    layer = nn.MultiheadAttention(8, 2, batch_first=True)
    return layer(x[0], x[0], x[0])[0]


def loss(x: Tensor) -> Tensor:
    return F.cross_entropy(x.flatten(0, 2), torch.zeros(48, dtype=torch.long))


def router(x: Tensor) -> Tensor:
    return (x @ x.mT.softmax(-1)) * x.softmax(-1).amax(-1, keepdim=True)[..., :1]


def over_queries(x: Tensor) -> Tensor:
    return (x @ x.mT).softmax(-2) @ x


def seen_in(attention: Callable[[Tensor], Tensor], x: Tensor = X) -> list[PlainAttention]:
    model = nn.Sequential(nn.Identity(), Layer(attention))
    with Watch(model) as watch:
        model(x)
    return list(watch.seen.values())


@pytest.mark.parametrize("attention", [sdpa, by_hand, cast_and_dropped, einsum])
@pytest.mark.parametrize("gradients", [True, False])
def test_attention_of_every_form_is_seen_once(attention, gradients) -> None:
    with torch.set_grad_enabled(gradients):
        (found,) = seen_in(attention, X.clone().requires_grad_(gradients))
    assert (found.layer, found.queries, found.keys) == ("1", 6, 6)
    assert found.line.startswith("test_plain_attention.py:")
    assert found.reason == UNKNOWN


def test_attention_of_torchs_own_layer_is_seen() -> None:
    (found,) = seen_in(multi_head)
    assert (found.queries, found.keys) == (6, 6)


@pytest.mark.parametrize("other", [loss, router, over_queries])
def test_a_softmax_that_is_no_attention_is_not_seen(other) -> None:
    assert seen_in(other) == []


def test_the_backward_is_not_seen() -> None:
    x = X.clone().requires_grad_()
    out = sdpa(x)
    with Watch(nn.Identity()) as watch:
        out.sum().backward()
    assert watch.seen == {}


def test_a_late_watch_is_on_from_the_first_compilation() -> None:
    torch._dynamo.reset()
    model = nn.Sequential(Layer(torch.compiler.disable(sdpa)))
    model.compile(backend="eager")
    with Watch(model, late=True) as first:
        sdpa(X)  # before it
        model(X)
    with Watch(model, late=True) as second:
        model(X)
    assert first.on
    assert [each.layer for each in first.seen.values()] == ["0"]
    assert not second.on
    assert second.seen == {}


def test_a_graph_of_ours_is_not_looked_at_and_the_watch_goes_on_after_it() -> None:
    with Watch(nn.Identity()) as watch:
        with unwatched():
            assert _len_torch_dispatch_stack() == 0
            sdpa(X)
        assert watch.seen == {}
        by_hand(X)
        with pytest.raises(ValueError, match="no"), unwatched():
            raise ValueError("no")
        assert _len_torch_dispatch_stack() == 1
    assert len(watch.seen) == 1
    assert _len_torch_dispatch_stack() == 0


def test_a_mode_of_someone_else_stays_where_it_is() -> None:
    class Theirs(TorchDispatchMode):
        seen = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            Theirs.seen += 1
            return func(*args, **(kwargs or {}))

    with Watch(nn.Identity(), late=True) as late:
        with Theirs():
            late.turn_on()  # it would be shut out by the other's end
        assert not late.on
    with Watch(nn.Identity()), Theirs(), unwatched():
        before = Theirs.seen
        sdpa(X)
        assert Theirs.seen > before
    assert _len_torch_dispatch_stack() == 0
