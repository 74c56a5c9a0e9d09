"""Whether query i and key i are the same token, followed back to what is projected."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from moonfx.passes.context import Context
from moonfx.passes.masks.self_attention import same_tokens
from moonfx.policy import LayerPolicy
from moonfx.site import AttentionSite
from tests.support.reading import traced

B, N, C, H = 2, 6, 8, 2
X, Y = torch.zeros(B, N, C), torch.zeros(B, N, C)
W, V = torch.eye(C), torch.eye(C)
Pair = tuple[Tensor, Tensor]
Run = Callable[[Tensor, Tensor, Tensor, Tensor], Pair]


def heads(x: Tensor) -> Tensor:
    return x.view(x.shape[0], x.shape[1], H, -1).transpose(1, 2)


def rope(x: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    table = torch.ones(N, C // H)
    return x * table + torch.cat([-second, first], -1) * table


def fused(x: Tensor, w: Tensor) -> Pair:
    q, k = F.linear(x, w.repeat(2, 1)).chunk(2, -1)
    return heads(q), heads(k)


def unbound(x: Tensor, w: Tensor) -> Pair:
    both = F.linear(x, w.repeat(2, 1)).view(B, N, 2, H, C // H)
    q, k = both.permute(2, 0, 3, 1, 4).unbind(0)
    return q, k


def narrow(x: Tensor, w: Tensor, v: Tensor) -> Tensor:
    """A projection to few features and back."""
    return F.linear(F.linear(x, w[:3]), v[:, :3])


def flat(x: Tensor) -> Tensor:
    """All tokens as one text, without a batch."""
    return x.view(B * N, C)


def one(x: Tensor) -> Tensor:
    return heads(x[None])


def pooled(x: Tensor, y: Tensor) -> Tensor:
    """For each token of x the tokens of y that it is like."""
    return (x @ y.mT).softmax(-1) @ y


def biased(x: Tensor, w: Tensor) -> Tensor:
    return torch.addmm(torch.ones(C), x, w)


def added(x: Tensor, y: Tensor, w: Tensor) -> Tensor:
    return torch.addmm(flat(y), flat(x), w)


def moved(x: Tensor) -> Tensor:
    """All tokens as one text, the last of them first."""
    return torch.eye(B * N).roll(1, 0) @ flat(x)


SAME: list[tuple[str, Run]] = [
    ("two projections", lambda x, y, w, v: (heads(F.linear(x, w)), heads(F.linear(x, v)))),
    ("matmul", lambda x, y, w, v: (heads(x @ w), heads(x @ v))),
    ("rope", lambda x, y, w, v: (rope(heads(x @ w)), rope(heads(x @ v)))),
    ("one projection in chunks", lambda x, y, w, v: fused(x, w)),
    ("one projection, unbound", lambda x, y, w, v: unbound(x, w)),
    ("a norm of the query", lambda x, y, w, v: (F.layer_norm(heads(x @ w), (4,)), heads(x @ v))),
    ("low rank", lambda x, y, w, v: (heads(narrow(x, w, v)), heads(x @ v))),
    ("a norm before", lambda x, y, w, v: (heads(F.layer_norm(x, (C,)) @ w), heads(x @ v))),
    ("a bias and one product", lambda x, y, w, v: (one(flat(x) @ w), one(biased(flat(x), v)))),
    ("what is added to a product", lambda x, y, w, v: (one(flat(x)), one(added(x, x, w)))),
    ("no projection", lambda x, y, w, v: (heads(x), heads(x))),
]

OTHERS: list[tuple[str, Run]] = [
    ("cross-attention", lambda x, y, w, v: (heads(x @ w), heads(y @ v))),
    ("both are mixed in", lambda x, y, w, v: (heads(x @ w), heads(x @ v + y @ v))),
    ("tokens in another order", lambda x, y, w, v: (heads(x @ w), heads(x.flip(1) @ v))),
    ("tokens moved by one", lambda x, y, w, v: (heads(x @ w), heads(x.roll(1, 1) @ v))),
    ("another row of the batch", lambda x, y, w, v: (heads(x[:1] @ w), heads(x[1:] @ v))),
    ("rows in another order", lambda x, y, w, v: (heads(x @ w), heads(x.flip(0) @ v))),
    (
        "other tokens of a text",
        lambda x, y, w, v: (heads(x[:, :3] @ w), heads(x[:, 3:] @ v)),
    ),
    ("mixed along the tokens", lambda x, y, w, v: (heads(x @ w), heads((x.mT @ w[:N, :N]).mT @ v))),
    ("more tokens", lambda x, y, w, v: (heads(x @ w), heads(torch.cat([x @ w, x @ v], 1)))),
    ("added to a product", lambda x, y, w, v: (one(flat(x)), one(added(x, y, w)))),
    (
        "added as a bias",
        lambda x, y, w, v: (one(flat(x)), one(F.linear(flat(x), w, flat(y)))),
    ),
    ("pooled, of one text", lambda x, y, w, v: (one(flat(x)), one(pooled(flat(x), flat(y))))),
    ("pooled of one text for all", lambda x, y, w, v: (heads(x), heads(pooled(x, flat(y))))),
    ("pooled of itself", lambda x, y, w, v: (one(flat(x)), one(pooled(flat(x), flat(x))))),
    ("mixed by a table", lambda x, y, w, v: (one(flat(x)), one(flat(x) + moved(x)))),
    ("mixed by a table of others", lambda x, y, w, v: (one(flat(x)), one(flat(x) + moved(y)))),
    ("tokens as features", lambda x, y, w, v: (heads(x @ w), heads(x.view(B, C, N).mT @ v))),
]


def verdict(run: Run) -> bool:
    gm = traced(run, X, Y, W, V)
    query, key = gm.graph.output_node().args[0]
    site = AttentionSite(query, query, key, key, "sdpa", "", "")
    return same_tokens(site, Context(gm, lambda *given: LayerPolicy()))


@pytest.mark.parametrize("run", [s[1] for s in SAME], ids=[s[0] for s in SAME])
def test_projections_of_one_tensor_token_for_token_are_self_attention(run: Run) -> None:
    assert verdict(run)


@pytest.mark.parametrize("run", [s[1] for s in OTHERS], ids=[s[0] for s in OTHERS])
def test_what_may_be_other_tokens_is_not(run: Run) -> None:
    assert not verdict(run)


def test_a_transposed_key_is_followed_by_its_own_token_dim() -> None:
    gm = traced(lambda x, w, v: (heads(x @ w), heads(x @ v).mT), X, W, V)
    query, key = gm.graph.output_node().args[0]
    site = AttentionSite(query, query, key, key, "sdpa", "", "", key_transposed=True)
    context = Context(gm, lambda *given: LayerPolicy())
    assert same_tokens(site, context)
    site.key_transposed = False
    assert not same_tokens(site, context)
