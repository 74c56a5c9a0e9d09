"""QK-Clip: logits above tau are brought to tau, and nothing else moves."""

import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from moonfx.optim.matrices import Layout
from moonfx.optim.qk_clip import QKClip, largest_logits
from tests.support.optim.by_hand import Row

H, D, N, C = 4, 8, 300, 16  # N is more than one chunk of queries


class Attention(nn.Module):
    """Causal attention of Hkv key heads; returns [B, H, N, D], so that heads can be compared."""

    def __init__(self, Hkv=H, bias=False):
        super().__init__()
        self.q_proj = nn.Linear(C, H * D, bias=bias)
        self.k_proj = nn.Linear(C, Hkv * D, bias=bias)
        self.v_proj = nn.Linear(C, Hkv * D, bias=bias)

    def projected(self, x):
        return self.q_proj(x), self.k_proj(x), self.v_proj(x)

    def forward(self, x):
        q, k, v = (y.unflatten(-1, (-1, D)).transpose(1, 2) for y in self.projected(x))
        mine = F.scaled_dot_product_attention
        return mine(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])


class Conv1D(nn.Module):
    """Hugging Face's: a Linear with its weight transposed."""

    def __init__(self, rows):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(C, rows)), nn.Parameter(torch.ones(rows))

    def forward(self, x):
        return x @ self.weight + self.bias


class Fused(Attention):
    """One projection: blocks q, k, v, or [q, k, v] of each head beside each other."""

    def __init__(self, per_head=False, kind=nn.Linear):
        super().__init__()
        del self.q_proj, self.k_proj, self.v_proj
        self.per_head = per_head
        self.c_attn = Conv1D(3 * H * D) if kind is Conv1D else nn.Linear(C, 3 * H * D)

    def projected(self, x):
        y = self.c_attn(x)
        if self.per_head:
            return [z.flatten(-2) for z in y.unflatten(-1, (H, 3 * D)).split(D, -1)]
        return y.split(H * D, -1)


@torch.no_grad()
def logits(layer, x):
    """The largest per query head, by the definition."""
    q, k, _ = (y.unflatten(-1, (-1, D)).transpose(1, 2).double() for y in layer.projected(x))
    scores = q @ k.repeat_interleave(H // k.shape[1], 1).mT / D**0.5
    shut = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
    return scores.masked_fill(shut, -torch.inf).amax((0, 2, 3))


def loud(layer, head):
    """Makes one query head's logits large."""
    with torch.no_grad():
        if isinstance(layer, Fused):
            rows = slice(head * D * (3 if layer.per_head else 1), None)
            weight = layer.c_attn.weight
            weight = weight.mT if isinstance(layer.c_attn, Conv1D) else weight
            weight[rows][:D] *= 200
        else:
            layer.q_proj.weight[head * D : (head + 1) * D] *= 200


NAMES = dict(query="c_attn", key="c_attn")
PER_HEAD = [Row("0.c_attn.weight", layout=Layout(outer=H, sizes=(D, D, D)))]
CASES = [
    ("heads of their own", lambda: Attention(), {}),
    ("with biases", lambda: Attention(bias=True), {}),
    ("two key heads", lambda: Attention(Hkv=2), {}),
    ("one key head", lambda: Attention(Hkv=1, bias=True), {}),
    ("fused", lambda: Fused(), NAMES),
    ("fused, transposed", lambda: Fused(kind=Conv1D), NAMES),
    ("fused per head", lambda: Fused(per_head=True), dict(**NAMES, table=PER_HEAD)),
]


@pytest.mark.parametrize(("make", "how"), [c[1:] for c in CASES], ids=[c[0] for c in CASES])
@pytest.mark.parametrize("head", [0, 2])
def test_the_largest_logit_becomes_tau_and_other_heads_answer_as_before(make, how, head):
    torch.manual_seed(0)
    model, x = nn.Sequential(make()), torch.randn(2, N, C)
    layer = model[0]
    loud(layer, head)
    before, answers = logits(layer, x), model(x)
    tau = float(before.sort().values[-2]) * 1.5
    clip = QKClip(model, tau=tau, **how)
    with clip.watch():
        model(x)
    # float32 products against float64.
    torch.testing.assert_close(clip.largest["0"].double(), before, rtol=1e-5, atol=1e-5)
    (clipped,) = clip.step()
    assert (clipped.layer, clipped.head) == ("0", head)
    assert clipped.factor == pytest.approx(tau / clipped.largest)
    after = logits(layer, x)
    assert after[head] == pytest.approx(tau, rel=1e-5)
    others = [h for h in range(H) if h != head]
    torch.testing.assert_close(after[others], before[others], rtol=0, atol=0)
    assert torch.equal(model(x)[:, others], answers[:, others])
    assert not torch.equal(model(x)[:, head], answers[:, head])
    assert clip.step() == []  # the records are forgotten


def test_query_and_key_share_the_factor_and_a_shared_key_is_left_alone():
    for Hkv, query, key in ((H, 0.5, 0.5), (2, 0.25, 1.0)):
        model = nn.Sequential(Attention(Hkv))
        q, k = (p.weight.detach().clone() for p in (model[0].q_proj, model[0].k_proj))
        clip = QKClip(model)
        clip.record("0", torch.tensor([400.0, 3.0, 5.0, -7.0]))
        clip.step()
        assert torch.equal(model[0].q_proj.weight[:D], q[:D] * query)
        assert torch.equal(model[0].k_proj.weight[:D], k[:D] * key)
        assert torch.equal(model[0].q_proj.weight[D:], q[D:])
        assert torch.equal(model[0].k_proj.weight[D:], k[D:])


def test_under_tau_nothing_happens():
    torch.manual_seed(0)
    model, x = nn.Sequential(Attention(), nn.Flatten(2), nn.Linear(N * D, 1)), torch.randn(1, N, C)
    before = [p.detach().clone() for p in model.parameters()]
    clip = QKClip(model)
    with clip.watch():
        model(x)
    assert clip.step() == []
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before))


def test_after_an_optimizer_each_step_clips_what_was_watched():
    torch.manual_seed(0)
    model, x = nn.Sequential(Attention()), torch.randn(2, 20, C)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    clip = QKClip(model, tau=0.01)
    handle = clip.after(optimizer)
    with clip.watch(sequences=1):
        model(x).sum().backward()
    torch.testing.assert_close(clip.largest["0"].double(), logits(model[0], x[:1]))
    optimizer.step()
    torch.testing.assert_close(logits(model[0], x[:1]), torch.full((H,), 0.01).double())
    handle.remove()
    with clip.watch():
        model(x * 10)
    optimizer.step()
    assert clip.largest


MASKS = [
    ("boolean", lambda keep: keep),
    ("additive", lambda keep: torch.zeros(keep.shape).masked_fill(~keep, -torch.inf)),
    ("the smallest number", lambda keep: (~keep).float() * torch.finfo(torch.float32).min),
]


@pytest.mark.parametrize("mask", [m[1] for m in MASKS], ids=[m[0] for m in MASKS])
def test_only_what_the_mask_lets_through_counts(mask):
    torch.manual_seed(0)
    q, k = torch.randn(2, H, N, D), torch.randn(2, 1, 50, D)
    keep = torch.rand(2, 1, N, 50) < 0.1
    scores = (q @ k.expand(-1, H, -1, -1).mT) * 0.3
    expected = scores.masked_fill(~keep, -torch.inf).amax((0, 2, 3))
    torch.testing.assert_close(largest_logits(q, k, mask(keep), False, 0.3), expected)
    assert (expected < scores.amax((0, 2, 3))).all()


def test_a_logit_that_is_not_finite_is_named_before_any_change():
    model = nn.Sequential(Attention(), Attention())
    before = [p.detach().clone() for p in model.parameters()]
    clip = QKClip(model, tau=1.0)
    clip.record("0", torch.full((H,), 9.0))
    clip.record("1", torch.tensor([1.0, float("nan"), 1.0, 1.0]))
    with pytest.raises(ValueError, match="an attention logit of 1 is NaN or infinite"):
        clip.step()
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before))


def with_norm():
    layer = Attention()
    layer.q_norm = nn.RMSNorm(D)
    return nn.Sequential(layer)


WRONG = [
    (lambda: QKClip(nn.Sequential(Attention()), tau=0), ValueError, "tau must be a positive"),
    (lambda: QKClip(nn.Linear(2, 2)), ValueError, "no module of Linear has children 'q_proj'"),
    (lambda: QKClip(with_norm()), ValueError, "0 normalizes its queries or keys (q_norm)"),
    (
        lambda: QKClip(nn.Sequential(Attention())).record("1", torch.ones(H)),
        ValueError,
        "layer must be one of 0",
    ),
    (
        lambda: QKClip(nn.Sequential(Attention())).record("0", torch.ones(5)),
        ValueError,
        "largest must be [heads], one logit per query head of 0, got [5]",
    ),
]


@pytest.mark.parametrize(("call", "error", "message"), WRONG)
def test_wrong_use_is_named(call, error, message):
    with pytest.raises(error, match=re.escape(message)):
        call()


def test_a_fused_projection_with_fewer_key_heads_is_not_taken_for_thirds():
    class Grouped(Fused):
        def __init__(self):
            super().__init__()
            self.c_attn = nn.Linear(C, (H + 2) * D)

        def projected(self, x):
            return self.c_attn(x).split([H * D, D, D], -1)

    torch.manual_seed(0)
    model, x = nn.Sequential(Grouped()), torch.randn(1, 9, C)
    with pytest.raises(ValueError, match="16 outputs"), QKClip(model, **NAMES).watch():
        model(x)
    before = logits(model[0], x)
    table = [Row("0.c_attn.weight", layout=Layout(sizes=(H * D, D, D)))]
    clip = QKClip(model, tau=float(before.min()) / 2, **NAMES, table=table)
    with clip.watch():
        model(x)
    assert len(clip.step()) == H
    after = logits(model[0], x)
    torch.testing.assert_close(after, torch.full_like(after, clip.tau))


def test_a_model_that_writes_its_attention_out_is_told_what_to_do():
    model = nn.Sequential(Attention())
    message = "saw no scaled_dot_product_attention"
    with pytest.raises(RuntimeError, match=message), QKClip(model).watch():
        model[0].q_proj(torch.randn(1, 2, C))


def test_a_llama_with_rotary_positions_and_shared_keys_is_clipped_to_tau():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 32, "vocab_size": 64, "num_hidden_layers": 2}
    config = transformers.LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2)
    model = transformers.LlamaForCausalLM(config).eval()
    clip = QKClip(model, tau=0.01)
    tokens, padding = torch.randint(64, (2, 12)), torch.ones(2, 12).long()
    padding[0, :4] = 0
    found = []
    for _ in range(2):
        with torch.no_grad(), clip.watch():
            model(tokens, attention_mask=padding, use_cache=False)
        found.append(clip.largest["model.layers.0.self_attn"])
        clip.step()
    assert (found[0] > 0.01).all()
    # Of the first layer: what deeper ones get to read has moved with it.
    torch.testing.assert_close(found[1], torch.full((4,), 0.01))
