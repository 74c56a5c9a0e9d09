"""One verdict per layer, over calls of every kind; and nothing that was sparse dense in silence."""

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import moonfx
from moonfx.backend import rewriter
from moonfx.backend.on_miss import NothingRewritten
from moonfx.capture.retrace import CaptureError

IDS = torch.randint(0, 99, (2, 64), generator=torch.Generator().manual_seed(0))
SPARSE = {"block": 4, "topk": 2, "compiler": "eager"}


class Attention(nn.Module):
    """Causal by a flag that the code computes from its sizes."""

    def __init__(self, flag: Callable[[Tensor, Tensor], bool]) -> None:
        super().__init__()
        self.qkv, self.flag = nn.Linear(32, 96), flag

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (4, 8)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=self.flag(q, k))
        return out.transpose(1, 2).flatten(2)


class Model(nn.Module):
    """Three layers, and what stands between them."""

    def __init__(
        self,
        flag: Callable[[Tensor, Tensor], bool] = lambda q, k: True,
        between: Callable[[Tensor], object] = lambda x: None,
    ) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.e = nn.Embedding(99, 32)
        self.layers = nn.ModuleList(Attention(flag) for _ in range(3))
        self.between = between

    def forward(self, ids: Tensor) -> Tensor:
        x = self.e(ids)
        for layer in self.layers:
            x = x + layer(x)
            self.between(x)
        return x


FLAGS = {
    "and": lambda q, k: k is not None and q.shape[2] > 1,
    "bool": lambda q, k: bool(q.shape[2] > 1),
    "equal": lambda q, k: q.shape[2] == k.shape[2],
    "not": lambda q, k: q.shape[2] not in (1,),
}
BETWEEN = {
    "print": lambda x: print(end=""),  # noqa: T201
    "item": lambda x: x.sum().item(),
}
CASES = [
    *(pytest.param({"flag": flag}, id=name) for name, flag in FLAGS.items()),
    *(pytest.param({"between": between}, id=name) for name, between in BETWEEN.items()),
]


@pytest.mark.parametrize("given", CASES)
def test_a_layer_is_sparse_at_every_length_whatever_breaks_the_graph(given) -> None:
    model = Model(**given)
    expected = moonfx.sparsify(Model(), **SPARSE, on_miss="raise")
    found = moonfx.sparsify(copy.deepcopy(model), **SPARSE, on_miss="raise")
    for length in (40, 64, 40, 1, 56, 64):
        torch.testing.assert_close(found(IDS[:, :length]), expected(IDS[:, :length]))
    assert (found(IDS) - model(IDS)).abs().max() > 0.1


@torch.compiler.disable
def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    hidden = torch.full((q.shape[2],) * 2, -1e9).triu(1)
    return (q @ k.mT * q.shape[-1] ** -0.5 + hidden).softmax(-1).to(v.dtype) @ v


@torch.compiler.disable
def fused(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


@torch.compiler.disable
def router(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """No attention: the softmax enters no product."""
    return v * q.softmax(-1)


class Outside(Attention):
    """Calls something else from some length on."""

    def __init__(self, attention: Callable[..., Tensor], least: int = 0) -> None:
        super().__init__(lambda q, k: True)
        self.attention, self.least = attention, least

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[1] < self.least:
            return super().forward(x)
        q, k, v = (t.unflatten(-1, (4, 8)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        return self.attention(q, k, v).transpose(1, 2).flatten(2)


@pytest.mark.parametrize("compiler", ["eager", "inductor"])
@pytest.mark.parametrize(("attention", "form"), [(attend, "softmax"), (fused, "scaled_dot")])
def test_attention_that_is_kept_from_compilation_has_a_row_at_the_first_call(
    attention, form, compiler
) -> None:
    model = Model()
    model.layers[1] = Outside(attention)
    moonfx.sparsify(model, 4, 2, compiler=compiler, on_miss="raise")
    model(IDS)
    rows = {row.layer: row for row in moonfx.report(model).rows}
    outside = rows["layers.1"]
    assert outside.action == "declined"
    assert form in outside.form
    assert "outside of every compiled graph: " in outside.reason
    assert "torch.compiler.disable" in outside.reason
    assert (outside.queries, outside.keys) == (64, 64)
    assert rows["layers.0"].action == "sparse"


def test_a_softmax_outside_that_is_no_attention_has_no_row() -> None:
    model = Model()
    model.layers[1] = Outside(router)
    moonfx.sparsify(model, **SPARSE, on_miss="raise")(IDS)
    assert {row.action for row in moonfx.report(model).rows} == {"sparse"}


@pytest.mark.parametrize("attention", [attend, fused])
def test_a_layer_that_leaves_the_graphs_in_a_later_call_is_not_silent(attention) -> None:
    model = Model()
    model.layers[1] = Outside(attention, least=50)
    moonfx.sparsify(model, **SPARSE, on_miss="raise")
    model(IDS[:, :40])
    lost = r"layers.1 was sparse in a call of 40 queries and 40 keys and runs outside"
    for _ in range(3):  # not at its first such call only
        with pytest.raises(NothingRewritten, match=lost):
            model(IDS)
        model(IDS[:, :40])
    moonfx.sparsify(model, **SPARSE)
    model(IDS[:, :40])
    with pytest.warns(UserWarning, match=lost):
        model(IDS)


def test_a_piece_that_is_not_captured_is_not_silent_beside_one_that_is(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    capture, failing = rewriter.capture, []

    def sometimes(*given: Any) -> Any:
        if failing and failing.pop():
            raise CaptureError("no")
        return capture(*given)

    monkeypatch.setattr(rewriter, "capture", sometimes)
    model = nn.Sequential(Attention(FLAGS["equal"]), nn.Identity(), Attention(FLAGS["and"]))
    model[1].forward = torch.compiler.disable(lambda x: x)
    moonfx.sparsify(model, **SPARSE)
    x = torch.randn(1, 64, 32)
    model(x[:, :40])
    failing[:] = [True]
    with pytest.warns(UserWarning, match=r"new kind of call of Sequential is dense[\s\S]*not capt"):
        model(x)


def test_a_call_in_which_no_graph_runs_is_not_silent() -> None:
    model = moonfx.sparsify(Model(), **SPARSE)
    model(IDS)
    with torch.compiler.set_stance("force_eager"), pytest.warns(UserWarning, match="no compiled"):
        model(IDS)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(IDS)


class Relative(nn.Module):
    """A bias by a table of distances, and a cache: a step's row of it looks like ALiBi's."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.e, self.qkv, self.t = nn.Embedding(99, 32), nn.Linear(32, 96), nn.Embedding(64, 4)

    def bias(self, distance: Tensor) -> Tensor:
        return self.t(distance.clamp(0, 63)).permute(2, 0, 1)[None]

    def hidden(self, distance: Tensor) -> Tensor:
        return distance < 0

    def forward(
        self, ids: Tensor, past: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        heads = (t.unflatten(-1, (4, 8)) for t in self.qkv(self.e(ids)).chunk(3, -1))
        q, k, v = (t.transpose(1, 2) for t in heads)
        if past is not None:
            k, v = torch.cat([past[0], k], 2), torch.cat([past[1], v], 2)
        n, keys = q.shape[2], k.shape[2]
        distance = torch.arange(keys - n, keys)[:, None] - torch.arange(keys)[None]
        mask = self.bias(distance).masked_fill(self.hidden(distance), float("-inf"))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return out.transpose(1, 2).flatten(2), (k, v)


class Window(Relative):
    def bias(self, distance: Tensor) -> Tensor:
        return torch.zeros(1, 1, 1, 1)

    def hidden(self, distance: Tensor) -> Tensor:
        return (distance < 0) | (distance >= 48)


class Chunks(Window):
    """Blocks of 16 queries see the blocks of 16 keys up to their own."""

    def hidden(self, distance: Tensor) -> Tensor:
        n, keys = distance.shape
        return torch.arange(keys - n, keys)[:, None] // 16 < torch.arange(keys)[None] // 16


class Logits(Relative):
    def bias(self, distance: Tensor) -> Tensor:
        return self.t(distance.clamp(0, 63)).permute(2, 0, 1)[None].sigmoid() * 3


class Causal(Window):
    def hidden(self, distance: Tensor) -> Tensor:
        return distance < 0


def whole(model: nn.Module) -> Tensor:
    return model(IDS[:1])[0][:, -1]


def by_step(model: nn.Module, prompt: int = 63) -> Tensor:
    past = model(IDS[:1, :prompt])[1]
    for at in range(prompt, 64):
        out, past = model(IDS[:1, at : at + 1], past)
    return out[:, -1]


def by_chunk(model: nn.Module) -> Tensor:
    return model(IDS[:1, 50:], model(IDS[:1, :50])[1])[0][:, -1]


def short(model: nn.Module) -> Tensor:
    return model(IDS[:1, :40])[0]


ORDERS = {
    "whole": (whole, by_step, by_chunk),
    "step": (by_step, by_chunk, whole),
    "chunk": (by_chunk, short, whole, by_step),
    "short": (short, by_step, whole, by_chunk),
}


@pytest.mark.parametrize("order", ORDERS.values(), ids=ORDERS.keys())
@pytest.mark.parametrize("kind", [Relative, Window, Chunks, Logits, Causal])
def test_a_step_and_a_chunk_are_what_the_whole_pass_is_in_any_order(kind, order) -> None:
    model = moonfx.sparsify(kind(), block=8, topk=2, compiler="eager", on_miss="ignore")
    found = {call.__name__: call(model) for call in order}
    for name in ("by_step", "by_chunk"):
        torch.testing.assert_close(found[name], found["whole"], atol=1e-5, rtol=1e-4)
    actions = {row.action for row in moonfx.report(model).rows}
    assert actions == ({"sparse"} if kind is Causal else {"declined"})


def test_a_window_is_one_at_a_length_that_it_holds_all_of() -> None:
    model = moonfx.sparsify(Window(), block=8, topk=2, compiler="eager", on_miss="ignore")
    short(model)
    (row,) = moonfx.report(model).rows
    assert "sliding window of 48 tokens" in row.reason


def test_a_step_alone_is_believed_until_a_call_shows_the_mask() -> None:
    model, (ids, last) = Relative(), IDS[:1].split([63, 1], 1)
    past = model(ids)[1]
    moonfx.sparsify(model, block=8, topk=2, compiler="eager")
    first = model(last, past)[0]
    assert [row.action for row in moonfx.report(model).rows] == ["sparse"]
    with pytest.warns(UserWarning, match="was taken to be sparse in a call of 1 query"):
        expected = model(IDS[:1])[0][:, -1:]
    with pytest.warns(RuntimeWarning, match="ran as it was written"):
        again = model(last, past)[0]
    torch.testing.assert_close(again, expected, atol=1e-5, rtol=1e-4)
    assert (first - expected).abs().max() > 1e-3


def test_a_new_sparsify_forgets_the_verdicts() -> None:
    class Twofold(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(x, x, x, is_causal=not self.training)

    x = torch.randn(1, 2, 64, 8)
    model = moonfx.sparsify(Twofold(), **SPARSE, on_miss="ignore")
    model.train()(x)
    model.eval()(x)
    (last,) = (row for row in moonfx.report(model).rows if "one verdict" in row.reason)
    assert "moonfx.sparsify called anew, or torch._dynamo.reset()" in last.reason
    moonfx.sparsify(model, **SPARSE, on_miss="raise")(x)
