"""Where an operator's tokens come from: what is said of them is what torch makes them of."""

from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx

from moonfx.passes.graph.walks import reachable
from moonfx.passes.masks.places import Place, all_tokens, before, of_features, of_parts
from tests.support.reading import returned, traced

B, N, C, H = 2, 6, 8, 2
Run = Callable[[Tensor, Tensor], Tensor]


def heads(x: Tensor) -> Tensor:
    return x.view(x.shape[0], x.shape[1], H, -1).transpose(1, 2)


FOLLOWED: list[tuple[str, Run]] = [
    ("a projection in heads", lambda x, w: heads(x @ w)),
    ("rows and tokens folded", lambda x, w: heads((x.view(-1, C) @ w).view(B, N, C))),
    ("one of three parts", lambda x, w: F.linear(x, w.repeat(3, 1)).chunk(3, -1)[1]),
    ("unbound heads", lambda x, w: torch.unbind(heads(x @ w), 1)[1]),
    ("a norm of features", lambda x, w: F.layer_norm(x, (C,))),
    ("half of the features turned", lambda x, w: torch.cat([-x[..., 4:], x[..., :4]], -1)),
    ("a table of positions", lambda x, w: x + w[:N]),
    ("later tokens", lambda x, w: x[:, 2:]),
    ("the last two tokens", lambda x, w: x[:, -2:]),
    ("tokens in the middle", lambda x, w: x[:, 1:][:, :3]),
    ("a part of the tokens", lambda x, w: torch.split(x, [1, 3, 2], 1)[1]),
    ("a token cut off and back", lambda x, w: torch.cat([x[:, :1], x[:, 1:] @ w], 1)),
    ("two texts in another order", lambda x, w: torch.cat([x[:, 4:], x[:, :4]], 1)),
    ("one of the heads", lambda x, w: heads(x @ w)[:, 1]),
    ("later tokens beside earlier", lambda x, w: torch.cat([x[:, :3], x[:, 3:]], -1)),
    ("repeated in heads", lambda x, w: x[:, None].repeat(1, H, 1, 1)),
]

LOST: list[tuple[str, Run]] = [
    ("in another order", lambda x, w: x.flip(1)),
    ("moved by one", lambda x, w: x.roll(1, 1)),
    ("every other token", lambda x, w: x[:, ::2]),
    ("gathered tokens", lambda x, w: x[:, torch.tensor([1, 0, 2])]),
    ("a running sum", lambda x, w: x.cumsum(1)),
    ("a softmax over tokens", lambda x, w: x.softmax(1)),
    ("a norm over tokens", lambda x, w: F.layer_norm(x, (N, C))),
    ("mixed by a projection", lambda x, w: (x.mT @ w[:N, :N]).mT),
    ("a product of two texts", lambda x, w: x @ x.mT @ x),
    ("features for tokens", lambda x, w: x.reshape(B, C, N)),
    ("repeated tokens", lambda x, w: x.repeat(1, 2, 1)),
    ("rows in another order", lambda x, w: x.flip(0)),
    ("some of the rows", lambda x, w: torch.cat([x[1:], x[:1]], 0)),
]


def given() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(B, N, C, generator=generator), torch.randn(C, C, generator=generator)


def ends(node: fx.Node, dim: int) -> Iterator[Place]:
    """The places at the graph's first input that a result's tokens are made of."""
    for place in reachable([all_tokens(node, dim)], before):
        if place.node.op == "placeholder" and place.node.name.startswith("x"):
            yield place


def changed(run: Run, row: int, token: int, dim: int) -> set[tuple[int, int]]:
    """The rows and tokens of a result that one token of one row of x changes."""
    x, w = given()
    other = x.clone()
    other[row, token] += torch.randn(C, generator=torch.Generator().manual_seed(1))
    differs = (run(x, w) != run(other, w)).movedim(dim, 1).flatten(2).any(-1)
    return {(int(b), int(n)) for b, n in differs.nonzero()}


@pytest.mark.parametrize("run", [c[1] for c in FOLLOWED], ids=[c[0] for c in FOLLOWED])
def test_a_token_is_made_of_those_that_it_is_followed_to(run: Run) -> None:
    node = returned(traced(run, *given()))
    said: dict[tuple[int, int], set[tuple[int, int]]] = {}
    for place in ends(node, -2):
        assert [p.dim for p in place.rows + place.tokens] == [0, 1]
        assert [p.size for p in place.rows + place.tokens] == [B, N]
        for n, b in ((n, b) for n in range(int(place.count)) for b in range(B)):
            said.setdefault((b, int(place.first) + n), set()).add((b, int(place.at) + n))
    assert said
    for row, token in ((b, n) for b in range(B) for n in range(N)):
        assert changed(run, row, token, -2) == said.get((row, token), set())


@pytest.mark.parametrize("run", [c[1] for c in LOST], ids=[c[0] for c in LOST])
def test_mixed_or_moved_tokens_are_of_no_place(run: Run) -> None:
    node = returned(traced(run, *given()))
    assert list(ends(node, 1)) == []


def test_places_are_one_whatever_became_of_heads_and_apart_for_other_tokens() -> None:
    def key(run: Run, dim: int = -2) -> object:
        (place,) = before(all_tokens(returned(traced(run, *given())), dim))
        return (place.node.name, *place.key[1:])

    whole = key(lambda x, w: x * 2)
    assert key(lambda x, w: x[:, None], -2) == whole
    assert key(lambda x, w: x[:, :3]) != key(lambda x, w: x[:, 3:])
    assert key(lambda x, w: x[:, :3]) != whole


def test_a_shorter_batch_that_is_spread_is_of_no_row() -> None:
    """One row for all is not the row of each."""
    (place,) = before(all_tokens(returned(traced(lambda x: x.expand(B, N, C), given()[0][:1])), 1))
    assert [p.dim for p in place.rows] == [None]
    assert [p.dim for p in place.tokens] == [1]


def test_one_token_for_all_is_of_no_place() -> None:
    gm = traced(lambda x, y: x + y, given()[0], given()[0][:, :1])
    places = before(all_tokens(returned(gm), 1))
    assert [p.node.name for p in places] == ["x_1"]
    (x, y) = gm.graph.find_nodes(op="placeholder")
    assert [p.node for p in of_parts(all_tokens(returned(gm), 1), [x, y])] == [x]


def test_features_are_the_last_dim_or_made_by_a_projection() -> None:
    x, w = given()
    assert of_features(returned(traced(lambda x, w: x @ w, x, w)), 2)
    assert of_features(returned(traced(lambda x, w: heads(x @ w), x, w)), 1)
    assert not of_features(returned(traced(lambda x, w: heads(x @ w), x, w)), 2)
    assert not of_features(returned(traced(lambda x: x.view(B, H, N // H, C), x)), 1)
