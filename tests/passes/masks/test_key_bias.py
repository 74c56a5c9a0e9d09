"""A bias that is one number per head and key to softmax is kept; others are declined by name."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import moonfx
from moonfx.kernels.common.arguments import MobaArguments
from moonfx.kernels.reference.moba import moba_attention
from tests.passes.attention.forms import NEG, SCALE, B, H, Model, N, causal, inputs, outcome, run
from tests.support.zoo import HEADS, VOCABULARY, WIDTH, build, logits

transformers = pytest.importorskip("transformers")

SLOPES = 2.0 ** -torch.arange(1, H + 1)
BLOCK, TOPK = 4, 3

Bias = Callable[[Any, Tensor, Tensor], Tensor]


def rows(n: int = N) -> Tensor:
    return torch.arange(n)[:, None]


def columns(n: int = N) -> Tensor:
    return torch.arange(n)[None]


def biased(bias: Bias, *, hide: float = NEG, last: float = 1.0) -> Model:
    """Attention with bias(model, rows, columns) beside a causal mask, all scaled by `last`."""

    def body(self: Model, q: Tensor, k: Tensor, v: Tensor, *given: Tensor) -> Tensor:
        self.given = given
        scores = q @ k.transpose(-1, -2) * (SCALE / last) + bias(self, rows(), columns())
        mask = torch.zeros(N, N).masked_fill(columns() > rows(), hide)
        return (scores * last + mask).softmax(-1) @ v

    generator = torch.Generator().manual_seed(2)
    return Model(
        body,
        slopes=SLOPES[:, None, None],
        table=torch.randn(H, N, N, generator=generator),
        line=torch.randn(H, 1, N, generator=generator),
        buckets=torch.randn(17, H, generator=generator),
    )


def expected(value: Tensor, block: int, topk: int) -> Tensor:
    return moba_attention(*inputs(), MobaArguments(block, topk, key_bias=value.expand(1, H, N)))[0]


ALIBI = SLOPES[:, None] * torch.arange(N)

# name, bias, what it is to the operator
BY_KEY: list[tuple[str, Bias, Tensor]] = [
    ("distance", lambda m, i, j: m.slopes * (j - i), ALIBI),
    ("distance, negated", lambda m, i, j: -(m.slopes * (i - j)), ALIBI),
    ("distance, without sign", lambda m, i, j: -m.slopes * (i - j).abs(), ALIBI),
    ("distance, clamped", lambda m, i, j: m.slopes * (j - i).clamp(max=0), ALIBI),
    ("larger of both", lambda m, i, j: -m.slopes * torch.maximum(i - j, j - i), ALIBI),
    ("place of the key", lambda m, i, j: m.slopes * j, ALIBI),
    ("up to the last key", lambda m, i, j: m.slopes * torch.arange(1 - N, 1), ALIBI),
    ("two parts", lambda m, i, j: m.slopes * j - m.slopes * i + 3.0, ALIBI),
    ("slopes of the graph", lambda m, i, j: (0.5 ** (j.mT[:H, None] + 1)) * (j - i), ALIBI),
    ("one slope", lambda m, i, j: 0.25 * (j - i), 0.25 * torch.arange(N)),
    ("learned, of the key", lambda m, i, j: m.line, None),  # type: ignore[list-item]
    ("times two", lambda m, i, j: m.slopes * (2 * j - i), 2 * ALIBI),
]


@pytest.mark.parametrize(("bias", "value"), [x[1:] for x in BY_KEY], ids=[x[0] for x in BY_KEY])
def test_a_bias_of_the_keys_goes_into_the_operator(bias: Bias, value: Tensor | None) -> None:
    model = biased(bias)
    dense = model(*inputs())
    full, report = run(model, *inputs())
    assert outcome(report) == ["causal"]
    alike = value is not None and value.dim() == 1  # for every head
    assert report.rows[0].modifiers == ("key bias" if alike else "ALiBi")
    torch.testing.assert_close(full, dense, atol=5e-6, rtol=1e-4)
    few, _ = run(model, *inputs(), block=BLOCK, topk=TOPK)
    wanted = expected(model.line[:, 0] if value is None else value, BLOCK, TOPK)
    torch.testing.assert_close(few, wanted, atol=5e-6, rtol=1e-4)


TOGETHER = "additive bias: relative position bias"

DECLINED: list[tuple[str, Bias, str]] = [
    ("a table", lambda m, i, j: m.table, f"{TOGETHER} 'table' depends on query and key together"),
    ("buckets", lambda m, i, j: m.buckets[(j - i).clamp(-8, 8) + 8].permute(2, 0, 1), TOGETHER),
    ("squares", lambda m, i, j: m.slopes * (j - i) ** 2, TOGETHER),
    ("a product", lambda m, i, j: m.slopes * j * i, TOGETHER),
    ("distance from an earlier key", lambda m, i, j: m.slopes * (j - i + 4).abs(), TOGETHER),
    ("clamped late", lambda m, i, j: m.slopes * (j - i).clamp(min=-4), TOGETHER),
    ("soft mask", lambda m, i, j: torch.where(j <= i - 3, 0.0, -3.0), TOGETHER),
    ("mask of one head", lambda m, i, j: m.given[0], "additive bias: the mask '"),
    ("shift of queries", lambda m, i, j: m.given[0].mT, "additive bias: whole queries are"),
]


@pytest.mark.parametrize(
    ("bias", "reason"), [x[1:] for x in DECLINED], ids=[x[0] for x in DECLINED]
)
def test_a_bias_of_query_and_key_together_is_declined(bias: Bias, reason: str) -> None:
    given = (*inputs(), torch.zeros(B, H, 1, N))
    model = biased(bias)
    dense = model(*given)
    got, report = run(model, *given)
    assert outcome(report)[0].startswith(reason), outcome(report)
    assert torch.equal(got, dense)


def test_a_mask_that_a_bias_could_outweigh_is_declined() -> None:
    _, report = run(biased(BY_KEY[0][1], hide=-1e4), *inputs())
    assert "hidden by adding -10000, which a bias may outweigh" in outcome(report)[0]


def test_a_distance_without_sign_is_declined_where_a_query_sees_both_sides() -> None:
    def body(self: Model, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        distance = (rows() - columns()).abs()
        return (q @ k.transpose(-1, -2) * SCALE + -self.slopes * distance).softmax(-1) @ v

    model = Model(body, slopes=SLOPES[:, None, None])
    moonfx.sparsify(model, N, 1, sinks=0, compiler="eager", on_miss="ignore", causal_only=False)
    model(*inputs())
    (reason,) = outcome(moonfx.report(model))
    assert reason.startswith(TOGETHER)
    assert "unless a causal mask hides the later keys of each query" in reason


@pytest.mark.parametrize("hidden", [-torch.inf, NEG, -1e9], ids=["-inf", "min", "-1e9"])
def test_a_float_mask_of_the_keys_is_padding_and_a_bias_at_once(hidden: float) -> None:
    def body(self: Model, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        scores = q @ k.transpose(-1, -2) * SCALE + torch.where(causal(), 0.0, NEG)
        return (scores + mask[:, None, None]).softmax(-1) @ v

    mask = torch.randn(B, N, generator=torch.Generator().manual_seed(3))
    mask[0, :6] = hidden
    q, k, v = inputs()
    dense = body(Model(body), q, k, v, mask)
    full, report = run(Model(body), q, k, v, mask)
    assert outcome(report) == ["causal & padding"]
    assert report.rows[0].modifiers == "key bias, 0 for queries without a key"
    real = mask > -1e4
    torch.testing.assert_close(full[1], dense[1], atol=5e-6, rtol=1e-4)
    torch.testing.assert_close(full[0, :, 6:], dense[0, :, 6:], atol=5e-6, rtol=1e-4)
    few, _ = run(Model(body), q, k, v, mask, block=BLOCK, topk=TOPK)
    bias = mask.clamp(min=-1e30)[:, None]
    wanted = moba_attention(q, k, v, MobaArguments(BLOCK, TOPK, key_mask=real, key_bias=bias))[0]
    torch.testing.assert_close(few[0, :, 6:], wanted[0, :, 6:], atol=5e-6, rtol=1e-4)
    torch.testing.assert_close(few[1], wanted[1], atol=5e-6, rtol=1e-4)


@pytest.mark.parametrize("m", [0, 1, 2], ids=["0", "1", "2"])
def test_one_minus_an_integer_mask_is_what_it_is_for_every_integer(m: int) -> None:
    def body(self: Model, q: Tensor, k: Tensor, v: Tensor, real: Tensor) -> Tensor:
        scores = q @ k.transpose(-1, -2) * SCALE + torch.where(causal(), 0.0, -1e9)
        return (scores + (1 - real[:, None, None]) * -2e4).softmax(-1) @ v

    real = torch.ones(B, N, dtype=torch.long)
    real[0, 3] = m
    given = (*inputs(), real)
    full, report = run(Model(body), *given)
    assert outcome(report) == ["causal & padding"]
    torch.testing.assert_close(full, body(Model(body), *given), atol=5e-6, rtol=1e-4)


def test_gradients_reach_slopes_and_a_learned_bias() -> None:
    class Learned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.slopes = nn.Parameter(SLOPES[:, None, None].clone())
            self.line = nn.Parameter(torch.linspace(-1, 1, N).expand(H, 1, N).clone())

        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            bias = self.slopes * (columns() - rows()) + self.line
            scores = q @ k.transpose(-1, -2) * SCALE + bias
            return scores.masked_fill(~causal(), NEG).softmax(-1) @ v

    model, grads = Learned(), []
    for make in (lambda m: m, lambda m: moonfx.sparsify(m, 8, 3, compiler="aot_eager")):
        model.zero_grad()
        make(model)(*inputs()).square().sum().backward()
        grads.append([p.grad for p in model.parameters()])
    assert outcome(moonfx.report(model)) == ["causal"]
    for dense, sparse in zip(*grads, strict=True):
        torch.testing.assert_close(sparse, dense, atol=2e-5, rtol=1e-4)


def frozen(make: Callable[[], Tensor]) -> Tensor:
    with torch.no_grad():
        return make()


def distances(slopes: Tensor) -> Tensor:
    return slopes * (columns() - rows())


# name, bias of the slopes, whether it is rewritten
NO_GRADIENT: list[tuple[str, Callable[[Tensor], Tensor], bool]] = [
    ("slopes", lambda s: distances(s.detach()), True),
    ("slopes, by no_grad", lambda s: distances(frozen(lambda: s * 2)), True),
    ("bias", lambda s: distances(s).detach(), False),
    ("bias, by no_grad", lambda s: frozen(lambda: distances(s)), False),
    ("bias of the keys", lambda s: (s * columns()).detach(), True),
    ("constants", lambda s: frozen(lambda: distances(SLOPES[:, None, None])), True),
]


@pytest.mark.parametrize(
    ("bias", "sparse"), [x[1:] for x in NO_GRADIENT], ids=[x[0] for x in NO_GRADIENT]
)
def test_a_bias_without_a_gradient_keeps_without_one(
    bias: Callable[[Tensor], Tensor], sparse: bool
) -> None:
    def body(self: Model, q: Tensor, k: Tensor, v: Tensor, slopes: Tensor) -> Tensor:
        scores = q @ k.transpose(-1, -2) * SCALE + bias(slopes)
        return scores.masked_fill(~causal(), NEG).softmax(-1) @ v

    q, k, v = inputs()
    slopes = SLOPES[:, None, None].clone().requires_grad_()
    dense = body(Model(body), q, k, v, slopes)
    out, report = run(Model(body), q.requires_grad_(), k, v, slopes)
    assert [r.action for r in report.rows] == ["sparse" if sparse else "declined"]
    torch.testing.assert_close(out, dense, atol=5e-6, rtol=1e-4)
    out.sum().backward()
    assert slopes.grad is None


def test_attention_under_no_grad_shares_no_bias_with_attention_that_learns() -> None:
    """As a teacher's and a student's, whose bias is the same expression."""

    def body(self: Model, q: Tensor, k: Tensor, v: Tensor, slopes: Tensor) -> Tensor:
        def attention() -> Tensor:
            scores = q @ k.transpose(-1, -2) * SCALE + distances(slopes)
            return scores.masked_fill(~causal(), NEG).softmax(-1) @ v

        return frozen(attention) * attention()

    grads = []
    for compile in (False, True):
        given = (*inputs(), SLOPES[:, None, None].clone().requires_grad_())
        out, report = run(Model(body), *given) if compile else (body(Model(body), *given), None)
        out.sum().backward()
        grads.append(given[-1].grad)
        assert report is None or outcome(report) == ["causal"] * 2
    torch.testing.assert_close(*grads, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["abs", "place"])
def test_a_bias_holds_for_every_length(name: str) -> None:
    def body(self: Model, x: Tensor) -> Tensor:
        q, k, v = x.chunk(3, dim=1)
        i, j = rows(x.shape[2]), columns(x.shape[2])
        bias = -self.slopes * (i - j).abs() if name == "abs" else self.slopes * j
        scores = q @ k.transpose(-1, -2) * SCALE + bias
        return scores.masked_fill(j > i, -torch.inf).softmax(-1) @ v

    model = Model(body, slopes=SLOPES[:, None, None])
    moonfx.sparsify(model, BLOCK, TOPK, sinks=0, compiler="eager")
    for n in (12, 20, 24, 33):
        q, k, v = inputs(n=n)
        bias = (SLOPES[:, None] * torch.arange(n))[None]
        wanted = moba_attention(q, k, v, MobaArguments(BLOCK, TOPK, key_bias=bias))[0]
        got = model(torch.cat([q, k, v], 1))
        torch.testing.assert_close(got, wanted, atol=5e-6, rtol=1e-4)
    report = moonfx.report(model)
    assert (report.graphs, {r.action for r in report.rows}) == (2, {"sparse"})


# --- models ---------------------------------------------------------------------------------------


def alibi_model(name: str) -> nn.Module:
    torch.manual_seed(0)
    if name == "bloom":
        return build("bloom", "eager")
    if name.startswith("mpt"):
        heads = int(name[3:])
        config = transformers.MptConfig(
            d_model=16 * heads, n_heads=heads, n_layers=2, vocab_size=VOCABULARY, max_seq_len=64
        )
        return transformers.MptForCausalLM(config).eval()
    config = transformers.FalconConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=HEADS,
        alibi=True,
        multi_query=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
    )
    form = name.removeprefix("falcon-")
    return transformers.FalconForCausalLM._from_config(config, attn_implementation=form).eval()


MODELS = ["bloom", "mpt4", "mpt6", "falcon-sdpa", "falcon-eager"]


def tokens() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(2, VOCABULARY, (2, 40), generator=generator)
    padding = torch.ones_like(ids)
    padding[0, :13] = 0
    return ids, padding


@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize("name", MODELS)
def test_an_alibi_model_is_dense_at_full_topk_forward_and_backward(name: str, padded: bool) -> None:
    model, (ids, padding) = alibi_model(name), tokens()
    given = padding if padded else None
    results = []
    for make in (lambda m: m, lambda m: moonfx.sparsify(m, 8, 5, compiler="eager")):
        model.zero_grad()
        out = logits(make(model), ids, given)[padding == 1]
        out.square().mean().backward()
        results.append((out.detach(), {n: p.grad for n, p in model.named_parameters()}))
    rows = moonfx.report(model).rows
    kind = "causal & padding" if padded else "causal"
    assert [(r.mask, r.modifiers, r.action) for r in rows] == [(kind, "ALiBi", "sparse")] * 2
    (dense, dense_grads), (full, grads) = results
    torch.testing.assert_close(full, dense, atol=5e-6, rtol=1e-4)
    for parameter, grad in grads.items():
        torch.testing.assert_close(grad, dense_grads[parameter], atol=5e-6, rtol=1e-3)


def bloom_by_definition(self: Any, x: Tensor, residual: Tensor, alibi: Tensor, **other: Any) -> Any:
    """BloomAttention.forward with the reference in the place of its attention."""
    q, k, v = self._reshape(self.query_key_value(x))
    (batch, n), mask = x.shape[:2], other["attention_mask"]
    real = None if mask is None else (mask == 0)[:, 0, -1]
    bias = alibi.view(batch, self.num_heads, n)
    given = {"sinks": 1, "scale": self.inv_norm_factor, "key_mask": real, "key_bias": bias}
    out, _ = moba_attention(q, k, v, MobaArguments(BLOCK, TOPK, **given))
    return residual + self.dense(out.transpose(1, 2).flatten(2)), None


@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
def test_bloom_with_fewer_blocks_is_the_reference(
    padded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, (ids, padding) = alibi_model("bloom"), tokens()
    given = padding if padded else None
    moonfx.sparsify(model, BLOCK, TOPK, compiler="eager")
    got = logits(model, ids, given)
    moonfx.restore(model)
    dense = logits(model, ids, given)
    attention = transformers.models.bloom.modeling_bloom.BloomAttention
    monkeypatch.setattr(attention, "forward", bloom_by_definition)
    wanted = logits(model, ids, given)
    seen = padding == 1 if padded else torch.ones_like(ids) == 1
    torch.testing.assert_close(got[seen], wanted[seen], atol=5e-6, rtol=1e-4)
    assert not torch.allclose(got[seen], dense[seen], atol=1e-3)


@pytest.mark.parametrize("name", ["bloom", "mpt4", "falcon-sdpa"])
def test_padding_never_changes_a_real_token_of_an_alibi_model(name: str) -> None:
    model, (ids, padding) = alibi_model(name), tokens()
    moonfx.sparsify(model, BLOCK, TOPK, compiler="eager")
    got = logits(model, ids, padding)
    alone = logits(model, ids[:1, 13:].contiguous())
    torch.testing.assert_close(got[0, 13:], alone[0], atol=5e-6, rtol=1e-4)
    assert {r.action for r in moonfx.report(model).rows} == {"sparse"}
