"""Self-attention without a causal mask: sparse where asked for, and never cross-attention."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import moonfx
from moonfx.kernels.common.arguments import MobaArguments
from moonfx.kernels.reference.moba import moba_attention
from moonfx.report.report import Report
from tests.passes.attention.forms import outcome

transformers = pytest.importorskip("transformers")

N, BLOCK, TOPK, HEADS, WIDTH = 36, 4, 3, 4, 32
SIZES = {
    "hidden_size": WIDTH,
    "num_hidden_layers": 2,
    "num_attention_heads": HEADS,
    "intermediate_size": 48,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
BOTH = {"compiler": "eager", "on_miss": "ignore", "causal_only": False}


def encoder(name: str) -> nn.Module:
    torch.manual_seed(0)
    family, form = name.split("-")
    if family == "bert":
        config = transformers.BertConfig(vocab_size=100, **SIZES)
        made = transformers.BertModel
    else:
        config = transformers.ViTConfig(image_size=24, patch_size=4, **SIZES)
        made = transformers.ViTModel
    return made._from_config(config, attn_implementation=form).eval()


def given(name: str) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    if name.startswith("vit"):
        return {"pixel_values": torch.randn(2, 3, 24, 24, generator=generator)}
    return {"input_ids": torch.randint(2, 100, (2, N), generator=generator)}


ENCODERS = ["bert-sdpa", "bert-eager", "vit-sdpa", "vit-eager"]


def by_reference(
    monkeypatch: pytest.MonkeyPatch, call: Callable[[], Tensor], block: int, topk: int
) -> Tensor:
    def sdpa(q: Tensor, k: Tensor, v: Tensor, attn_mask: Any = None, **other: Any) -> Tensor:
        real = None if attn_mask is None else attn_mask[:, 0, 0]
        scale = other.get("scale")
        return moba_attention(
            q, k, v, MobaArguments(block, topk, sinks=1, scale=scale, key_mask=real, causal=False)
        )[0]

    with monkeypatch.context() as patched:
        patched.setattr(F, "scaled_dot_product_attention", sdpa)
        return call()


@pytest.mark.parametrize("name", ENCODERS)
def test_an_encoder_is_dense_at_full_topk_forward_and_backward(name: str) -> None:
    model, results = encoder(name), []
    for make in (lambda m: m, lambda m: moonfx.sparsify(m, 8, 5, **BOTH)):
        model.zero_grad()
        out = make(model)(**given(name)).last_hidden_state
        out.square().mean().backward()
        grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        results.append((out.detach(), grads))
    assert outcome(moonfx.report(model)) == ["all"] * 2
    (dense, dense_grads), (full, grads) = results
    torch.testing.assert_close(full, dense, atol=5e-6, rtol=1e-4)
    for parameter, grad in grads.items():
        torch.testing.assert_close(grad, dense_grads[parameter], atol=5e-6, rtol=1e-3)


@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize("name", ENCODERS)
def test_fewer_blocks_are_the_reference(
    name: str, padded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = given(name)
    seen = torch.ones(2, N, dtype=torch.bool)
    if padded:
        if name.startswith("vit"):
            pytest.skip("an image has no padding")
        seen[0, 25:], seen[1, :6] = False, False
        inputs["attention_mask"] = seen.long()
    reference = encoder(name.replace("eager", "sdpa"))
    wanted = by_reference(monkeypatch, lambda: reference(**inputs).last_hidden_state, BLOCK, TOPK)
    model = moonfx.sparsify(encoder(name), BLOCK, TOPK, **BOTH)
    got = model(**inputs).last_hidden_state
    assert outcome(moonfx.report(model)) == ["all & padding" if padded else "all"] * 2
    if padded:
        got, wanted = got[seen], wanted[seen]
    torch.testing.assert_close(got, wanted, atol=5e-6, rtol=1e-4)


@pytest.mark.parametrize("name", ENCODERS)
def test_an_encoder_stays_dense_unless_asked_for(name: str) -> None:
    model = encoder(name)
    dense = model(**given(name)).last_hidden_state
    moonfx.sparsify(model, BLOCK, TOPK, compiler="eager", on_miss="ignore")
    torch.testing.assert_close(model(**given(name)).last_hidden_state, dense)
    for reason in outcome(moonfx.report(model)):
        assert reason.startswith("bidirectional: ")
        assert "causal_only=False makes self-attention sparse" in reason


def test_the_decoder_of_an_encoder_decoder_attends_across_and_stays_dense() -> None:
    config = transformers.BartConfig(
        vocab_size=100,
        d_model=WIDTH,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=HEADS,
        decoder_attention_heads=HEADS,
        encoder_ffn_dim=48,
        decoder_ffn_dim=48,
        max_position_embeddings=64,
    )
    model, ids = transformers.BartModel(config).eval(), given("bert")["input_ids"]
    call = {"input_ids": ids, "decoder_input_ids": ids, "use_cache": False}
    dense = model(**call).last_hidden_state
    moonfx.sparsify(model, 8, 5, **BOTH)
    torch.testing.assert_close(model(**call).last_hidden_state, dense, atol=5e-6, rtol=1e-4)
    first, second, across = outcome(moonfx.report(model))
    assert (first, second) == ("all", "causal")
    assert across.startswith("bidirectional (no mask and not causal), and query and key are not")


# --- which tokens query and key come from ---------------------------------------------------------


class Projected(nn.Module):
    """Attention of `query(self, x, y)` to `key(self, x, y)`, both [B, N, WIDTH]."""

    def __init__(self, query: Any, key: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.query, self.key = query, key
        self.q, self.k, self.v = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.both = nn.Linear(WIDTH, 2 * WIDTH)
        self.low, self.high = nn.Linear(WIDTH, 4), nn.Linear(4, WIDTH)
        self.norm, self.norms = nn.LayerNorm(WIDTH), nn.LayerNorm(4)
        self.table = nn.Parameter(torch.randn(N, WIDTH))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        given = (self.query(self, x, y), self.key(self, x, y), self.v(x))
        q, k, v = (z.unflatten(-1, (HEADS, -1)).transpose(1, 2) for z in given)
        return F.scaled_dot_product_attention(q, k, v)


def rope(m: Projected, x: Tensor) -> Tensor:
    turn = torch.arange(N)[:, None] * torch.linspace(0.1, 1, WIDTH)
    first, second = x.chunk(2, -1)
    return x * turn.cos() + torch.cat([-second, first], -1) * turn.sin()


def rows(x: Tensor, *order: int) -> Tensor:
    return torch.cat([x[n : n + 1] for n in order])


def pair(x: Tensor, y: Tensor) -> Tensor:
    return torch.stack([x, y])


def joint(text: Tensor, image: Tensor, cut: int = 10) -> Tensor:
    """Two streams in one sequence."""
    return torch.cat([text[:, :cut], image[:, cut:]], 1)


SELF: list[tuple[str, Any, Any]] = [
    ("linear", lambda m, x, y: m.q(x), lambda m, x, y: m.k(x)),
    ("matmul", lambda m, x, y: x @ m.q.weight, lambda m, x, y: x @ m.k.weight),
    ("rope", lambda m, x, y: rope(m, m.q(x)), lambda m, x, y: rope(m, m.k(x))),
    ("norms", lambda m, x, y: m.norm(m.q(x)), lambda m, x, y: m.k(x) * 0.5),
    ("low rank", lambda m, x, y: m.high(m.norms(m.low(x))), lambda m, x, y: m.k(x)),
    ("adapter", lambda m, x, y: m.q(x) + m.high(m.low(x)) * 0.1, lambda m, x, y: m.k(x)),
    ("places", lambda m, x, y: m.q(x) + m.table, lambda m, x, y: m.k(x) + m.table),
    (
        "one projection",
        lambda m, x, y: m.both(x).chunk(2, -1)[0],
        lambda m, x, y: m.both(x)[..., WIDTH:],
    ),
    (
        "one projection, by part",
        lambda m, x, y: m.both(x).view(2, N, 2, WIDTH).permute(2, 0, 1, 3)[0],
        lambda m, x, y: m.both(x).view(2, N, 2, WIDTH).unbind(2)[1],
    ),
    ("no projection", lambda m, x, y: x * 0.5, lambda m, x, y: x),
    ("two streams", lambda m, x, y: joint(m.q(x), m.k(y)), lambda m, x, y: joint(m.k(x), m.q(y))),
    (
        "two streams, turned together",
        lambda m, x, y: rope(m, joint(m.q(x), m.norm(y))),
        lambda m, x, y: rope(m, joint(m.k(x), m.k(y))),
    ),
    (
        "two streams that were one before",
        lambda m, x, y: m.q(m.norm(torch.cat([x[:, :10], y], 1)[:, :N])),
        lambda m, x, y: torch.cat([m.k(m.norm(x[:, :10])), m.k(m.norm(y))], 1)[:, :N],
    ),
]
ACROSS: list[tuple[str, Any, Any]] = [
    ("two inputs", lambda m, x, y: m.q(x), lambda m, x, y: m.k(y)),
    ("two raw inputs", lambda m, x, y: x, lambda m, x, y: y),
    ("same places", lambda m, x, y: rope(m, m.q(x)), lambda m, x, y: rope(m, m.k(y))),
    ("same learned places", lambda m, x, y: m.q(x) + m.table, lambda m, x, y: m.k(y) + m.table),
    (
        "same projected places",
        lambda m, x, y: m.q(x) + m.low(m.table).repeat(1, 8),
        lambda m, x, y: m.k(y) + m.low(m.table).repeat(1, 8),
    ),
    (
        "places before the projection",
        lambda m, x, y: m.q(x + m.high(m.low(m.table))),
        lambda m, x, y: m.k(y + m.high(m.low(m.table))),
    ),
    ("the other way round", lambda m, x, y: m.q(x), lambda m, x, y: m.k(x).flip(1)),
    ("shifted", lambda m, x, y: m.q(x), lambda m, x, y: m.k(x.roll(1, 1))),
    ("mixed", lambda m, x, y: m.q(x), lambda m, x, y: m.k(x @ x.mT @ y)),
    ("two rows", lambda m, x, y: rows(m.q(x), 0, 1), lambda m, x, y: rows(m.k(x), 1, 0)),
    ("neighbours", lambda m, x, y: m.q(rows(x, 0, 1)), lambda m, x, y: m.k(rows(x, 1, 0))),
    ("a pair", lambda m, x, y: m.q(pair(x, y)[0]), lambda m, x, y: m.k(pair(x, y)[1])),
    ("a projected pair", lambda m, x, y: m.q(pair(x, y))[0], lambda m, x, y: m.k(pair(x, y))[1]),
    (
        "halves of a batch",
        lambda m, x, y: m.q(torch.cat([x, y])).chunk(2)[0],
        lambda m, x, y: m.k(torch.cat([x, y])).chunk(2)[1],
    ),
    (
        "a pair of projections",
        lambda m, x, y: pair(m.q(x), m.k(y)).unbind()[0],
        lambda m, x, y: pair(m.q(x), m.k(y)).unbind()[1],
    ),
    (
        "streams in turn",
        lambda m, x, y: joint(m.q(x), m.q(y)),
        lambda m, x, y: joint(m.k(y), m.k(x)),
    ),
    (
        "streams of other lengths",
        lambda m, x, y: joint(m.q(x), m.q(y)),
        lambda m, x, y: joint(m.k(x), m.k(y), 12),
    ),
    ("one stream of two", lambda m, x, y: m.q(x), lambda m, x, y: joint(m.k(x), m.k(y))),
    (
        "another part of a stream",
        lambda m, x, y: joint(m.q(x), m.q(y)),
        lambda m, x, y: torch.cat([m.k(x[:, :10]), m.k(y[:, :-10])], 1),
    ),
    (
        "rows of the batch by views",
        lambda m, x, y: m.q(x.expand(2, -1, -1)),
        lambda m, x, y: m.k(x.transpose(0, 1).reshape(2, N, WIDTH)),
    ),
    ("sum of both", lambda m, x, y: m.q(x) + m.q(y), lambda m, x, y: m.k(x)),
]


def explained(query: Any, key: Any) -> Report:
    x, y = torch.randn(2, N, WIDTH), torch.randn(2, N, WIDTH)
    model = Projected(query, key)
    return moonfx.explain(model, x, y, block=BLOCK, topk=TOPK, causal_only=False)


@pytest.mark.parametrize(("query", "key"), [x[1:] for x in SELF], ids=[x[0] for x in SELF])
def test_projections_of_the_same_tokens_are_self_attention(query: Any, key: Any) -> None:
    assert outcome(explained(query, key)) == ["all"]


@pytest.mark.parametrize(("query", "key"), [x[1:] for x in ACROSS], ids=[x[0] for x in ACROSS])
def test_what_may_be_cross_attention_is_declined(query: Any, key: Any) -> None:
    (reason,) = outcome(explained(query, key))
    assert "query and key are not proved to be projections of the same tokens" in reason
