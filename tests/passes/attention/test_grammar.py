"""Attention composed at random from the grammar, half of it made illegal in one place.

A legal composition must be rewritten, equal to dense where every block is attended and to the
reference where not. An illegal one must be declined and left as it is, and nothing may be passed
over in silence.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor

from moonfx.kernels.common.arguments import MobaArguments
from moonfx.kernels.reference.moba import moba_attention
from tests.passes.attention.forms import NEG, SCALE, B, D, H, Model, N, causal, inputs, run

CAP = 0.8
SINK = torch.tensor([0.3, -1.0, 2.0, 0.0]).view(H, 1, 1)


@dataclass(frozen=True)
class Attention:
    """One way to write attention; a field's first choice is the plainest.

    `wrong` is what makes it illegal, or "".
    """

    product: str
    scale: str
    cap: str
    mask: str
    sink: str
    shift: str
    softmax: str
    guard: str
    dropout: str
    heads: str
    values: str
    wrong: str = ""

    def __call__(self, model: Model, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if self.heads != "own":
            k, v = (REPEATS[self.heads](x) for x in (k, v))
        s = self._masked(self._scores(q, k))
        s = self._with_sink(s, q)
        if self.shift != "none":
            s = s - self._peak(s)
        p = self._softmax(s)
        if p is None:
            return self._divided_last(s, v)
        p = self._guarded(p)
        if self.wrong == "probabilities scaled":
            p = p * 0.5
        out = self._output(p, v)
        if self.wrong == "probabilities read again":
            out = out + p.sum(-1)[..., None]
        return out

    def _scores(self, q: Tensor, k: Tensor) -> Tensor:
        factor = SCALE if self.wrong != "negative scale" else -SCALE
        if self.cap == "constants merged":
            factor /= CAP
        if self.scale == "query":
            q = q * factor
        elif self.scale == "keys":
            k = factor * k
        s = PRODUCTS[self.product](q, k)
        if self.scale == "times":
            s = s * factor
        elif self.scale == "before":
            s = factor * s
        elif self.scale == "divided":
            s = s / (1 / factor)
        elif self.scale == "in place":
            s *= factor
        elif self.scale == "tensor":
            s = s * torch.full((), factor)
        if self.wrong == "scaled by head":
            s = s * SINK.abs()
        if self.wrong == "biased":
            s = s + torch.linspace(0, 1, N)[:, None] * torch.linspace(0, 3, N)
        if self.wrong == "mask under softcap":
            s = s.masked_fill(~causal(), NEG)
        if self.cap == "none":
            return s
        s = torch.tanh(s if self.cap == "constants merged" else s / CAP)
        s = s * CAP
        return s * torch.rand(()).add(1) if self.wrong == "softcap unknown" else s

    def _masked(self, s: Tensor) -> Tensor:
        keep = causal()
        if self.wrong == "mask anti-causal":
            keep = ~causal() | torch.eye(N, dtype=torch.bool)
        elif self.wrong == "mask shifted":
            keep = torch.ones(N, N, dtype=torch.bool).tril(1)
        low = -3.0 if self.wrong == "mask that does not hide" else -torch.inf
        if self.mask == "filled":
            return s.masked_fill(~keep, low)
        if self.mask == "where":
            return torch.where(keep, s, low)
        if self.mask == "where, other way":
            return torch.where(~keep, torch.full_like(s, low), s)
        if self.mask == "subtracted":
            return s - (1.0 - keep.float()) * (3.0 if low == -3.0 else 1e9)
        added = torch.where(keep, 0.0, low)
        return s + added if self.mask == "added" else added + s

    def _with_sink(self, s: Tensor, q: Tensor) -> Tensor:
        if self.sink == "none":
            return s
        column = SINK.reshape(1, -1, 1, 1).expand(B, H, N, 1)
        if self.wrong == "sink by query":
            column = q[..., :1]
        return torch.cat([s, column] if self.sink == "last" else [column, s], -1)

    def _peak(self, s: Tensor) -> Tensor:
        dim = -2 if self.wrong == "maximum of the queries" else -1
        if self.shift == "amax":
            return s.amax(dim, keepdim=True)
        return s.max(dim=dim, keepdim=True).values.detach()

    def _softmax(self, s: Tensor) -> Tensor | None:
        dim = -2 if self.wrong == "softmax of the queries" else -1
        if self.softmax == "softmax":
            return s.softmax(dim)
        if self.softmax == "positive dim":
            return F.softmax(s, s.dim() + dim, dtype=torch.float32)
        if self.softmax == "log":
            return s.log_softmax(dim).exp()
        if self.softmax == "logsumexp":
            return (s - s.logsumexp(dim, keepdim=True)).exp()
        if self.softmax == "by hand":
            e = s.exp()
            return e / e.sum(dim, keepdim=True)
        return None

    def _divided_last(self, s: Tensor, v: Tensor) -> Tensor:
        e = s.exp()
        total = e.sum(-2 if self.wrong == "softmax of the queries" else -1, keepdim=True)
        if self.wrong == "probabilities scaled":
            total = total * 2
        out = (e @ v) / (total if total.shape[-1] == 1 else total.mT)
        return out + e.sum(-1)[..., None] if self.wrong == "probabilities read again" else out

    def _guarded(self, p: Tensor) -> Tensor:
        if self.guard == "nan_to_num":
            p = p.nan_to_num(0.5 if self.wrong == "NaN to one half" else 0.0)
        elif self.guard == "isnan":
            p = p.masked_fill(p.isnan(), 0.5 if self.wrong == "NaN to one half" else 0.0)
        if self.sink != "none":
            first = self.sink == "first"
            if self.wrong == "key cut off":
                first = not first
            p = p[..., 1:] if first else p[..., :-1]
        if self.guard == "hidden":
            hides = causal() if self.wrong == "seen keys set to 0" else ~causal()
            p = p.masked_fill(hides, 0.0)
        elif self.guard == "empty rows":
            dim = -2 if self.wrong == "seen keys set to 0" else -1
            p = torch.where(causal().any(dim, keepdim=True), p, 0.0)
            p = p.masked_fill(~causal().T, 0.0) if self.wrong == "seen keys set to 0" else p
        if self.dropout == "p is 0":
            p = F.dropout(p, 0.0, training=True)
        elif self.dropout == "inference":
            p = F.dropout(p, 0.3, training=self.wrong == "dropout")
        return p

    def _output(self, p: Tensor, v: Tensor) -> Tensor:
        if self.product == "bmm":
            return torch.bmm(p.reshape(B * H, N, N), v.reshape(B * H, N, D)).view(B, H, N, D)
        if self.values == "einsum":
            return torch.einsum("bhij,bhjd->bhid", p, v)
        if self.values == "tokens":
            return torch.einsum("bhij,bjhd->bihd", p, v.transpose(1, 2)).transpose(1, 2)
        return p @ v


def by_bmm(q: Tensor, k: Tensor) -> Tensor:
    q, k = (x.reshape(B * H, N, D) for x in (q, k))
    return torch.bmm(q, k.transpose(1, 2)).view(B, H, N, N)


PRODUCTS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "matmul": lambda q, k: q @ k.transpose(-2, -1),
    "einsum": lambda q, k: torch.einsum("bhid,bhjd->bhij", q, k),
    "keys first": lambda q, k: torch.einsum("...jd,...id->...ij", k, q),
    "tokens": lambda q, k: torch.einsum("bihd,bjhd->bhij", q.transpose(1, 2), k.transpose(1, 2)),
    "bmm": by_bmm,
}
REPEATS: dict[str, Callable[[Tensor], Tensor]] = {
    "expanded": lambda x: x[:, ::2, None].expand(B, 2, 2, N, D).reshape(B, H, N, D),
    "interleaved": lambda x: x[:, ::2].repeat_interleave(2, 1),
    "stacked": lambda x: torch.stack([x[:, ::2]] * 2, 2).flatten(1, 2),
    "one": lambda x: x[:, :1].expand(B, H, N, D),
}
CHOICES: dict[str, list[str]] = {
    "product": list(PRODUCTS),
    "scale": ["times", "before", "divided", "in place", "tensor", "query", "keys"],
    "cap": ["none", "none", "divided", "constants merged"],
    "mask": ["filled", "where", "where, other way", "added", "added to", "subtracted"],
    "sink": ["none", "none", "last", "first"],
    "shift": ["none", "amax", "max"],
    "softmax": ["softmax", "positive dim", "log", "logsumexp", "by hand", "divided last"],
    "guard": ["none", "nan_to_num", "isnan", "hidden", "empty rows"],
    "dropout": ["none", "p is 0", "inference"],
    "heads": ["own", *REPEATS],
    "values": ["matmul", "einsum", "tokens"],
}
# what is wrong -> what the composition must have, so that it is
WRONG: dict[str, dict[str, Any]] = {
    "negative scale": {},
    "scaled by head": {},
    "biased": {},
    "mask under softcap": {"cap": "divided", "mask": "filled"},
    "softcap unknown": {"cap": "divided"},
    "mask anti-causal": {"guard": "none"},
    "mask shifted": {"guard": "none"},
    "mask that does not hide": {"guard": "none"},
    "sink by query": {"sink": "last", "softmax": "softmax"},
    "key cut off": {"sink": "first", "softmax": "softmax"},
    "maximum of the queries": {"shift": "amax"},
    "softmax of the queries": {"sink": "none", "guard": "none"},
    "probabilities scaled": {},
    "probabilities read again": {},
    "NaN to one half": {"guard": "nan_to_num", "softmax": "softmax"},
    "seen keys set to 0": {"guard": "hidden", "softmax": "softmax"},
    "dropout": {"dropout": "inference", "softmax": "softmax"},
}


def sensible(attention: Attention) -> Attention:
    """The nearest composition that can be written: some choices leave no place for others."""
    if attention.softmax == "divided last":
        attention = replace(
            attention, sink="none", guard="none", dropout="none", product="matmul", values="matmul"
        )
    return attention


legal = st.builds(Attention, **{n: st.sampled_from(c) for n, c in CHOICES.items()}).map(sensible)
illegal = st.builds(
    lambda base, wrong: sensible(replace(base, wrong=wrong, **WRONG[wrong])),
    legal,
    st.sampled_from(list(WRONG)),
)
# Each example compiles once or twice, at half a second; a failure is not made smaller.
few = settings(
    max_examples=14,
    phases=[Phase.generate],
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)


def called(attention: Attention, **policy: int) -> tuple[Tensor, Any]:
    torch.manual_seed(7)
    return run(Model(attention), *inputs(), **policy)


@few
@given(legal)
def test_what_is_legal_is_rewritten_and_right(attention: Attention) -> None:
    q, k, v = inputs()
    dense = attention(Model(attention), q, k, v)
    out, report = called(attention)
    cap, sink = attention.cap != "none", attention.sink != "none"
    modifiers = ", ".join(["softcap 0.8"] * cap + ["sink logits"] * sink)
    assert [(r.mask, r.action, r.modifiers, r.reason) for r in report.rows] == [
        ("causal", "sparse", modifiers, "")
    ]
    # The same sums in another order, in float32.
    torch.testing.assert_close(out, dense, atol=5e-6, rtol=1e-4)
    sparse, _ = called(attention, block=4, topk=2)
    if attention.heads != "own":
        k, v = (REPEATS[attention.heads](x) for x in (k, v))
    expected, lse = moba_attention(q, k, v, MobaArguments(4, 2, softcap=CAP if cap else 0.0))
    if sink:
        expected = expected * torch.sigmoid(lse - SINK[None, :, 0])[..., None]
    torch.testing.assert_close(sparse, expected, atol=5e-6, rtol=1e-4)


@few
@given(illegal)
def test_what_is_illegal_is_declined_and_left_alone(attention: Attention) -> None:
    torch.manual_seed(7)
    expected = attention(Model(attention), *inputs())
    out, report = called(attention, block=4, topk=2)
    assert [r.action for r in report.rows] == ["declined"]
    assert "(node " in report.rows[0].reason
    torch.testing.assert_close(out, expected, atol=0, rtol=0, equal_nan=True)


def test_every_field_of_the_grammar_has_choices() -> None:
    assert {f.name for f in fields(Attention)} == {*CHOICES, "wrong"}
