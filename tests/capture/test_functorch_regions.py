"""What lies around attention: regions, transforms, shared layers. It is found there, or named."""

import pytest
import torch
from torch import Tensor, nn
from torch._higher_order_ops.map import map as mapped_over
from torch.compiler import nested_compile_region
from torch.utils.checkpoint import checkpoint

import moonfx
from moonfx import LayerPolicy
from moonfx.backend import rewriter
from tests.support.tiny import Attention, TinyLM, tokens


@pytest.fixture(autouse=True)
def strict(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOONFX_VERIFY", "1")


def gradients(model: torch.nn.Module, loss: Tensor) -> dict[str, Tensor]:
    """Every parameter's gradient, by backward(): reentrant checkpoints refuse autograd.grad."""
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


class Around(TinyLM):
    """A model whose layers run in `step`."""

    def step(self, layer: Attention, x: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = self.step(layer, x)
        return self.head(x)


class Nested(Around):
    @nested_compile_region
    def step(self, layer: Attention, x: Tensor) -> Tensor:
        return x + layer(x)


class Reentrant(Around):
    def step(self, layer: Attention, x: Tensor) -> Tensor:
        return x + checkpoint(layer, x, use_reentrant=True)


class Recomputed(Around):
    def step(self, layer: Attention, x: Tensor) -> Tensor:
        return x + checkpoint(layer, x, use_reentrant=False)


class NestedInCheckpoint(Around):
    @nested_compile_region
    def inner(self, layer: Attention, x: Tensor) -> Tensor:
        return x + layer(x)

    def step(self, layer: Attention, x: Tensor) -> Tensor:
        return checkpoint(self.inner, layer, x, use_reentrant=False)


class SharedAndTied(TinyLM):
    """Every layer runs twice, and the head is the embedding."""

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for _ in range(2):
            for layer in self.layers:
                x = x + 0.1 * layer(x)
        return x @ self.embed.weight.T + 0 * self.head(x)


TWICE = [f"layers.{i}" for i in (0, 1)]
FOUND = [
    (Nested, TWICE),
    (Reentrant, TWICE),
    (Recomputed, TWICE),
    (NestedInCheckpoint, TWICE),
    (SharedAndTied, [*TWICE, *TWICE]),
]


@pytest.mark.parametrize(("kind", "layers"), FOUND, ids=[k.__name__ for k, _ in FOUND])
def test_attention_is_found_inside_and_full_topk_is_dense_with_its_gradients(kind, layers) -> None:
    model, x = kind(), tokens()
    dense = model(x)
    expected = gradients(model, dense.square().mean())
    moonfx.sparsify(model, 16, 6, compiler="aot_eager")
    full = model(x)
    found = gradients(model, full.square().mean())
    assert [r.layer for r in moonfx.report(model).rewritten] == layers
    # float32 sums in another order
    torch.testing.assert_close(full, dense, atol=5e-6, rtol=1e-5)
    for name, grad in expected.items():
        torch.testing.assert_close(found[name], grad, atol=2e-6, rtol=1e-3, msg=name)
    moonfx.sparsify(model, 16, 2, compiler="aot_eager")
    assert (model(x) - dense).abs().max() > 1e-3


def test_regions_compiled_once_take_policies_of_their_own_and_share_code_where_alike(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    graphs: list[torch.fx.GraphModule] = []
    original = rewriter.compile_graph

    def spy(gm, *rest):  # type: ignore[no-untyped-def]
        graphs.append(gm)
        return original(gm, *rest)

    monkeypatch.setattr(rewriter, "compile_graph", spy)
    torch.manual_seed(0)
    model, plain = Nested(layers=4), TinyLM(layers=4)
    plain.load_state_dict(model.state_dict())
    policy = {"layers": {"layers.1": None, "layers.3": LayerPolicy(8, 3)}, "compiler": "aot_eager"}
    out = moonfx.sparsify(model, 16, 2, **policy)(tokens := torch.arange(96)[None] % 50)
    rows = moonfx.report(model).rows
    assert [str(r.policy or "dense") for r in rows] == ["16/2/1", "dense", "16/2/1", "8/3/1"]
    torch.testing.assert_close(out, moonfx.sparsify(plain, 16, 2, **policy)(tokens))
    calls = [n.args[1] for n in graphs[0].graph.nodes if str(n.target) == "invoke_subgraph"]
    assert calls[0] == calls[2], "alike, and still compiled once"
    assert len(set(calls)) == 3


class OneParameter(nn.Module):
    """An attention in a region that holds a single parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(16, 48, bias=False)

    @nested_compile_region
    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unsqueeze(1) for t in self.qkv(x).chunk(3, -1))
        return nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True).squeeze(1)


def test_regions_with_one_parameter_each_take_the_policies_of_their_own_layers() -> None:
    model = nn.Sequential(*(OneParameter() for _ in range(3)))
    moonfx.sparsify(model, 8, 2, layers={"1": None}, compiler="eager")(torch.randn(1, 64, 16))
    rows = [(r.layer, r.action) for r in moonfx.report(model).rows]
    assert rows == [("0", "sparse"), ("1", "kept dense"), ("2", "sparse")]


def attend(x: Tensor) -> Tensor:
    scores = x @ x.transpose(-1, -2)
    hidden = torch.ones_like(scores, dtype=torch.bool).triu(1)
    return scores.masked_fill(hidden, float("-inf")).softmax(-1) @ x


class InCond(Around):
    def step(self, layer: Attention, x: Tensor) -> Tensor:
        return torch.cond(x.sum() > 0, lambda y: y + layer(y), lambda y: y + 1, (x,))


class SoftmaxInCond(Around):
    def step(self, layer: Attention, x: Tensor) -> Tensor:
        return torch.cond(x.sum() > 0, lambda y: attend(y), lambda y: y + 1, (x,))


class InVmap(Around):
    def step(self, layer: Attention, x: Tensor) -> Tensor:
        return x + torch.vmap(lambda y: layer(y[None])[0])(x)


class SoftmaxInVmap(Around):
    def step(self, layer: Attention, x: Tensor) -> Tensor:
        return x + torch.vmap(attend)(x)


class InMap(Around):
    def step(self, layer: Attention, x: Tensor) -> Tensor:
        return x + mapped_over(lambda y: layer(y[None])[0], x)


DECLINED = [
    (InCond, TWICE, "inside cond"),
    (SoftmaxInCond, ["(root)"] * 2, "inside cond"),
    (InVmap, TWICE, "inside torch.vmap or torch.func"),
    (SoftmaxInVmap, ["(root)"] * 2, "inside torch.vmap or torch.func"),
    (InMap, TWICE, "inside map_impl"),
]


@pytest.mark.parametrize(
    ("kind", "layers", "where"), DECLINED, ids=[r[0].__name__ for r in DECLINED]
)
def test_attention_in_a_body_that_stays_opaque_is_declined_by_name(kind, layers, where) -> None:
    model, x = kind(), tokens()
    dense = model(x)
    moonfx.sparsify(model, 16, 2, compiler="eager", on_miss="ignore")
    assert torch.equal(model(x), dense)
    report = moonfx.report(model)
    assert report.failures == []
    assert [r.layer for r in report.declined] == layers
    assert all(where in r.reason and "call the attention outside" in r.reason for r in report.rows)
    assert report.rewritten == []


class VmapBeside(TinyLM):
    """A layer under vmap, one as it is, and a mask of the second that vmap computed."""

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        x = x + torch.vmap(lambda y: self.layers[0](y[None])[0])(x)
        scaled = torch.vmap(torch.sin)(x)
        return self.head(x + self.layers[1](scaled))


def test_a_region_under_vmap_keeps_its_meaning_beside_an_attention_that_is_rewritten() -> None:
    """A retrace through vmap would put its batched tensors into the graph, as constants."""
    model, x = VmapBeside(), tokens()
    dense = model(x)
    expected = gradients(model, dense.square().mean())
    moonfx.sparsify(model, 16, 6, compiler="aot_eager")
    full = model(x)
    found = gradients(model, full.square().mean())
    assert [(r.layer, r.action) for r in moonfx.report(model).rows] == [
        ("layers.0", "declined"),
        ("layers.1", "sparse"),
    ]
    torch.testing.assert_close(full, dense, atol=5e-6, rtol=1e-5)
    for name, grad in expected.items():
        torch.testing.assert_close(found[name], grad, atol=2e-6, rtol=1e-3, msg=name)
