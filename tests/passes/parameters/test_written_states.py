"""A state that is written and not read joins no blocks of a fused projection; a read one does.

Each row: how the state of a cache is kept beside a causal convolution of q, k and v, as models of
transformers do it.
"""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moonfx.optim.matrices import Layout
from tests.support.optim.projections import OUT, WIDTH, attend, heads, row_of

THREE = Layout(sizes=(16, 16, 16))


class Cached(nn.Module):
    """q, k and v in one projection, a convolution of each channel, and what keeps its inputs."""

    def __init__(self, keep: Callable[["Cached", Tensor], Tensor]) -> None:
        super().__init__()
        self.fused, self.out, self.norm = nn.Linear(WIDTH, OUT), nn.Linear(16, 5), nn.LayerNorm(5)
        self.conv = nn.Conv1d(OUT, OUT, 3, padding=2, groups=OUT)
        self.register_buffer("state", torch.zeros(2, OUT, 3))
        self.register_buffer("long", torch.zeros(2, OUT, 9))
        self.keep = keep

    def forward(self, x: Tensor) -> Tensor:
        h = self.keep(self, self.fused(x).transpose(1, 2))
        y = self.conv(h)[..., : x.shape[1]].transpose(1, 2)
        return self.norm(self.out(attend(*map(heads, y.chunk(3, -1)))))


def copied(m: Cached, h: Tensor) -> Tensor:
    m.state.copy_(h[..., -3:])
    return h


def padded(m: Cached, h: Tensor) -> Tensor:
    m.long.copy_(F.pad(h, (m.long.shape[-1] - h.shape[-1], 0)))
    return h


def assigned(m: Cached, h: Tensor) -> Tensor:
    m.state[..., 1:] = h[..., -2:]
    return h


def by_index(m: Cached, h: Tensor) -> Tensor:
    m.long.index_copy_(2, torch.arange(5), h)
    return h


def with_the_past(m: Cached, h: Tensor) -> Tensor:
    """The next chunk: what was kept goes before, through the convolution as well."""
    h = torch.cat([m.state.clone(), h], -1)
    m.state.copy_(h[..., -3:])
    return h[..., 3:]


def padded_by_hand(m: Cached, h: Tensor) -> Tensor:
    return F.pad(h, (2, 0))[..., 2:]


KEPT = [copied, padded, assigned, by_index, with_the_past, padded_by_hand]


@pytest.mark.parametrize("keep", KEPT, ids=lambda keep: keep.__name__)
def test_a_state_that_nothing_reads_joins_no_blocks(keep) -> None:
    row = row_of(Cached(keep))
    assert (row.role, row.rule, row.layout) == ("fused projection", "graph", THREE)


def read_after(m: Cached, h: Tensor) -> Tensor:
    m.state.copy_(h[..., -3:])
    return h + m.state.softmax(1).sum(-1, keepdim=True)


def read_through_a_view(m: Cached, h: Tensor) -> Tensor:
    view = m.state[..., 1:]
    m.state.copy_(h[..., -3:])
    return h + view.softmax(1).sum(-1, keepdim=True)


def padded_among_the_features(m: Cached, h: Tensor) -> Tensor:
    """What is padded along the features is no sequence that grew: the blocks move."""
    return F.pad(h, (0, 0, 8, 8)).softmax(1)[:, 8:-8]


READ = [read_after, read_through_a_view, padded_among_the_features]


@pytest.mark.parametrize("keep", READ, ids=lambda keep: keep.__name__)
def test_a_state_that_is_read_as_a_whole_is_one_matrix(keep) -> None:
    row = row_of(Cached(keep))
    assert (row.role, row.layout) == ("hidden matrix", Layout())


def test_a_cache_that_is_made_and_given_back_joins_no_blocks() -> None:
    class Gives(Cached):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            h = self.fused(x).transpose(1, 2)
            kept = torch.zeros(2, OUT, 3)
            kept.copy_(h[..., -3:])
            y = self.conv(h)[..., : x.shape[1]].transpose(1, 2)
            return self.norm(self.out(attend(*map(heads, y.chunk(3, -1))))), kept

    assert row_of(Gives(copied)).layout == THREE


def test_a_cache_that_is_joined_before_the_split_joins_no_blocks() -> None:
    """Keys and values of the past go before those of the chunk, and are cut apart together."""

    class Joined(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fused, self.q = nn.Linear(WIDTH, 32), nn.Linear(WIDTH, 16)
            self.out, self.norm = nn.Linear(16, 5), nn.LayerNorm(5)

        def forward(self, x: Tensor, past: Tensor) -> Tensor:
            k, v = torch.cat([past, self.fused(x)], 1).chunk(2, -1)
            y = F.scaled_dot_product_attention(*map(heads, (self.q(x), k, v)))
            return self.norm(self.out(y.transpose(1, 2).flatten(2)))

    example = (torch.randn(2, 5, WIDTH), torch.randn(2, 3, 32))
    assert row_of(Joined(), example=example).layout == Layout(sizes=(16, 16))
