"""Which matrices lie in a fused projection: what a model cuts apart and never joins again.

Each row: the form, what the model makes of y = linear(x, w) with w [48, 8], and the blocks of w's
rows. Beside each form that is a fusion stand look-alikes that cut as well, and are one matrix.
"""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moonfx.optim.matrices import Layout, pieces
from tests.support.optim.projections import (
    COS,
    OUT,
    SIN,
    WIDTH,
    D,
    H,
    Made,
    attend,
    by_hand,
    heads,
    row_of,
)

# --- fusions --------------------------------------------------------------------------------------


def chunks(y: Tensor, x: Tensor) -> Tensor:
    return attend(*map(heads, y.chunk(3, -1)))


def splits_by_hand(y: Tensor, x: Tensor) -> Tensor:
    return by_hand(*map(heads, y.split([16, 16, 16], -1)))


def slices(y: Tensor, x: Tensor) -> Tensor:
    return attend(heads(y[..., :16]), heads(y[..., 16:32]), heads(y[..., 32:]))


def unbinds(y: Tensor, x: Tensor) -> Tensor:
    return attend(*y.view(2, 5, 3, H, D).permute(2, 0, 3, 1, 4).unbind(0))


def selects(y: Tensor, x: Tensor) -> Tensor:
    y = y.view(2, 5, 3, H, D).transpose(1, 3)
    return attend(y[:, :, 0], y[:, :, 1], y[:, :, 2])


def interleaved(y: Tensor, x: Tensor) -> Tensor:
    return attend(*heads(y).chunk(3, -1))


def grouped(y: Tensor, x: Tensor) -> Tensor:
    y = y.view(2, 5, 2, 6, D)  # 2 groups of 4 query heads, a key head and a value head
    q, k, v = y[:, :, :, :-2].flatten(2, 3), y[:, :, :, -2], y[:, :, :, [-1]].squeeze(3)
    k, v = (t.repeat_interleave(4, 2) for t in (k, v))
    return attend(*(t.transpose(1, 2) for t in (q, k, v)))


def rotated(x: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return x * COS + torch.cat([-second, first], -1) * SIN


def rotary(y: Tensor, x: Tensor) -> Tensor:
    q, k, v = map(heads, y.chunk(3, -1))
    return attend(rotated(q), rotated(k), v)


def clipped(y: Tensor, x: Tensor) -> Tensor:
    return chunks(y.clamp(-8, 8), x)


def gated(y: Tensor, x: Tensor) -> Tensor:
    gate, up = y.chunk(2, -1)
    return F.silu(gate) * up


def every_other(y: Tensor, x: Tensor) -> Tensor:
    return F.silu(y[..., ::2]) * y[..., 1::2]


def glu(y: Tensor, x: Tensor) -> Tensor:
    return F.glu(y)


def lstm(y: Tensor, x: Tensor) -> Tensor:
    i, f, g, o = y.chunk(4, -1)
    return o.sigmoid() * (f.sigmoid() * 0.5 + i.sigmoid() * g.tanh()).tanh()


def modulation(y: Tensor, x: Tensor, norm: nn.Module, mlp: nn.Module) -> Tensor:
    shift, scale, gate = y.view(2, 5, 3, 16).unbind(2)
    h = mlp(x)
    return h + gate * (norm(h) * (1 + scale) + shift)


def convolved(y: Tensor, x: Tensor, conv: nn.Module) -> Tensor:
    value, gate = conv(y.transpose(1, 2)).transpose(1, 2).split([32, 16], -1)
    return value[..., :16].softmax(-1) + value.relu().sum(-1, keepdim=True) + gate.sigmoid() * 2


def in_and_out(y: Tensor, x: Tensor) -> Tensor:
    q, k, v = y.chunk(3, -1)
    return chunks(torch.cat([q * 0.5, k, v], -1), x)


FUSIONS = [
    # name, form, width of its result, other parts, outer, sizes
    ("chunk", chunks, 16, {}, 1, (16, 16, 16)),
    ("split, attention by hand", splits_by_hand, 16, {}, 1, (16, 16, 16)),
    ("slices", slices, 16, {}, 1, (16, 16, 16)),
    ("unbind of a view", unbinds, 16, {}, 1, (16, 16, 16)),
    ("select of a view", selects, 16, {}, 1, (16, 16, 16)),
    ("per head", interleaved, 16, {}, 4, (4, 4, 4)),
    ("per group", grouped, 32, {}, 2, (16, 4, 4)),
    ("with rotary embedding", rotary, 16, {}, 1, (16, 16, 16)),
    ("clipped before", clipped, 16, {}, 1, (16, 16, 16)),
    ("gate and up", gated, 24, {}, 1, (24, 24)),
    ("gate and up, every other", every_other, 24, {}, 24, (1, 1)),
    ("glu", glu, 24, {}, 1, (24, 24)),
    ("gates of an LSTM", lstm, 12, {}, 1, (12, 12, 12, 12)),
    (
        "shift, scale and gate",
        modulation,
        16,
        {"norm": nn.LayerNorm(16, elementwise_affine=False), "mlp": nn.Linear(WIDTH, 16)},
        1,
        (16, 16, 16),
    ),
    (
        "split after a depthwise convolution",
        convolved,
        16,
        {"conv": nn.Conv1d(48, 48, 3, padding=1, groups=48)},
        1,
        (32, 16),
    ),
    ("put together and cut again", in_and_out, 16, {}, 1, (16, 16, 16)),
]


@pytest.mark.parametrize(
    ("make", "width", "parts", "outer", "sizes"),
    [r[1:] for r in FUSIONS],
    ids=[r[0] for r in FUSIONS],
)
def test_each_block_of_a_fused_projection_is_found(make, width, parts, outer, sizes) -> None:
    row = row_of(Made(make, width, **parts))
    expected = ("fused projection", "graph", "muon", Layout("matrix", 0, outer, sizes))
    assert (row.role, row.rule, row.optimizer, row.layout) == expected


# --- look-alikes ----------------------------------------------------------------------------------


def halves_turned(y: Tensor, x: Tensor) -> Tensor:
    """Rotary embedding that never reads the whole."""
    first, second = heads(y).chunk(2, -1)
    q = torch.cat([first * COS - second * SIN, second * COS + first * SIN], -1)
    return attend(q, q.detach(), q.detach())


def clipped_halves_turned(y: Tensor, x: Tensor) -> Tensor:
    return halves_turned(y.clamp(-8, 8), x)


def pairs_turned(y: Tensor, x: Tensor) -> Tensor:
    y = heads(y)
    a, b = y[..., ::2], y[..., 1::2]
    q = torch.stack([a * COS - b * SIN, a * SIN + b * COS], -1).flatten(-2)
    return attend(q, q.detach(), q.detach())


def turned_in_part(y: Tensor, x: Tensor) -> Tensor:
    y = heads(y)
    q = torch.cat([rotated(y[..., :4]), y[..., 4:]], -1)
    return attend(q, q.detach(), q.detach())


def written_in_parts(y: Tensor, x: Tensor) -> Tensor:
    q = torch.empty_like(y)
    q[..., :16] = y[..., :16] * 2
    q[..., 16:] = y[..., 16:]
    return attend(*[heads(q)] * 3)


def head_by_head(y: Tensor, x: Tensor) -> Tensor:
    """One projection, of which each head is attended alone."""
    keys, mask = x[..., :4], torch.ones(5, 5).tril().bool()
    attended = [F.scaled_dot_product_attention(q, keys, keys, mask) for q in y.split(4, -1)]
    return torch.cat(attended, -1)


def overlapping(y: Tensor, x: Tensor) -> Tensor:
    return y[..., :32].softmax(-1) * y[..., 16:].softmax(-1)


def not_all_read(y: Tensor, x: Tensor) -> Tensor:
    return attend(*map(heads, y[..., :32].chunk(2, -1)), heads(y[..., 16:32]))


def no_pattern(y: Tensor, x: Tensor) -> Tensor:
    a = torch.cat([y[..., :8], y[..., 40:]], -1)
    return a.softmax(-1) * y[..., 8:24].softmax(-1) * y[..., 24:40].softmax(-1)


def summed(y: Tensor, x: Tensor) -> Tensor:
    a, b = y.chunk(2, -1)
    return a + b


def normed(y: Tensor, x: Tensor) -> Tensor:
    return chunks(F.layer_norm(y, [48]), x)


def turned_and_cut(y: Tensor, x: Tensor) -> Tensor:
    """Cut along tokens, not features."""
    first, last = y[:, :2], y[:, 2:]
    return torch.cat([first.relu(), last.tanh()], 1)


def read_as_a_whole_elsewhere(y: Tensor, x: Tensor) -> Tensor:
    return chunks(y, x) + y.softmax(-1).amax(-1, keepdim=True)


def halves_turned_by_learned_angles(y: Tensor, x: Tensor, angle: nn.Module) -> Tensor:
    """What the model computes multiplies the halves, which are one tensor again all the same."""
    first, second = heads(y).chunk(2, -1)
    cos, sin = angle(x)[:, None].cos(), angle(x)[:, None].sin()
    q = torch.cat([first * cos - second * sin, second * cos + first * sin], -1)
    return attend(q, q.detach(), q.detach())


def one_or_the_other(y: Tensor, x: Tensor) -> Tensor:
    a, b = y.chunk(2, -1)
    return torch.where(x[..., :1] > 0, a, b)


LOOK_ALIKES = [
    # name, form, width of its result, why it is whole, "" if nothing looks cut
    ("rotary embedding of halves", halves_turned, 48, ""),
    ("the same after a clamp", clipped_halves_turned, 48, ""),
    ("rotary embedding of pairs", pairs_turned, 48, ""),
    ("rotary embedding of a part", turned_in_part, 48, ""),
    ("rotary embedding by learned angles", halves_turned_by_learned_angles, 48, ""),
    ("one part or the other", one_or_the_other, 24, ""),
    ("written into one tensor", written_in_parts, 48, ""),
    ("heads one by one", head_by_head, 48, ""),
    ("overlapping slices", overlapping, 32, ""),
    ("a part is not read", not_all_read, 16, "kept whole: a part of its output is not read"),
    ("no pattern", no_pattern, 16, "kept whole: its blocks do not lie in a pattern that repeats"),
    ("parts are added", summed, 24, ""),
    ("a norm over all", normed, 16, ""),
    ("cut along the tokens", turned_and_cut, 48, ""),
    ("read as a whole elsewhere", read_as_a_whole_elsewhere, 16, ""),
]


@pytest.mark.parametrize(
    ("make", "width", "why"), [r[1:] for r in LOOK_ALIKES], ids=[r[0] for r in LOOK_ALIKES]
)
def test_what_is_cut_and_is_one_matrix_stays_whole(make, width, why) -> None:
    parts = {"angle": nn.Linear(WIDTH, 1)} if make is halves_turned_by_learned_angles else {}
    row = row_of(Made(make, width, **parts))
    assert (row.role, row.rule, row.layout) == ("hidden matrix", "graph", Layout())
    assert why in row.why


# --- the blocks are what the model uses -----------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "width"),
    [(chunks, 16), (interleaved, 16), (grouped, 32), (gated, 24), (every_other, 24)],
    ids=lambda x: getattr(x, "__name__", ""),
)
def test_a_block_that_is_zero_leaves_the_others_as_they_are(make, width) -> None:
    """The blocks of the layout equal the slices that the model uses: q, k and v, gate and up."""
    model = Made(make, width)
    layout = row_of(model).layout
    x = torch.randn(2, 5, WIDTH)
    kept: list[Tensor] = []
    for number in range(len(layout.sizes)):
        weight = torch.zeros_like(model.fused.weight)
        pieces(weight, layout)[number].view.fill_(1.0)
        rows = weight[:, 0].bool()
        kept.append(rows)
        y = torch.zeros(2, 5, OUT)
        y[..., rows] = 1.0
        parts = seen_by(make, y, x)
        assert sorted(float(p.min()) for p in parts) == sorted(float(p.max()) for p in parts)
        assert sum(float(p.max()) for p in parts) == 1.0
    assert torch.stack(kept).sum(0).eq(1).all()


def seen_by(make: Callable[..., Tensor], y: Tensor, x: Tensor) -> list[Tensor]:
    """The tensors that attention, or a gate, is called with."""
    seen: list[Tensor] = []

    class Watch(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            if func is F.scaled_dot_product_attention:
                seen.extend(args[:3])
            if func is F.silu:
                seen.append(args[0])
            if func in (torch.Tensor.mul, torch.Tensor.__mul__):
                seen.append(args[1])
            return func(*args, **(kwargs or {}))

    with Watch():
        make(y, x)
    return seen


class Columns(nn.Module):
    """Hugging Face's Conv1D: x W + b, the blocks are columns."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(WIDTH, OUT))
        self.bias = nn.Parameter(torch.zeros(OUT))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x.view(-1, WIDTH), self.weight).view(*x.shape[:-1], OUT)


@pytest.mark.parametrize(
    "kind",
    [
        lambda x, w: torch.addmm(torch.zeros(OUT), x.flatten(0, 1), w).view(2, 5, OUT),
        lambda x, w: x @ w,
        lambda x, w: F.linear(x, w.t()),
        lambda x, w: torch.einsum("bni,io->bno", x, w),
        lambda x, w: (w.t() @ x.transpose(1, 2)).transpose(1, 2),
        lambda x, w: F.linear(x, w.double().float().t().contiguous()),
    ],
    ids=["addmm", "matmul", "linear of t", "einsum", "from the left", "through casts"],
)
def test_the_blocks_of_a_matrix_that_is_read_by_columns_are_columns(kind) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w, self.out = nn.Parameter(torch.randn(WIDTH, OUT)), nn.Linear(16, 4)

        def forward(self, x: Tensor) -> Tensor:
            return F.layer_norm(self.out(chunks(kind(x, self.w), x)), [4])

    row = row_of(Model(), "w")
    assert row.layout == Layout("matrix", 1, 1, (16, 16, 16))


def test_a_parameter_that_is_itself_cut_is_fused() -> None:
    """nn.MultiheadAttention with keys that are not the queries cuts the weight, not the output."""

    class Cross(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w, self.out = nn.Parameter(torch.randn(OUT, WIDTH)), nn.Linear(16, 4)

        def forward(self, x: Tensor) -> Tensor:
            q, kv = self.w.split([16, 32])
            k, v = F.linear(x.flip(1), kv).chunk(2, -1)
            y = attend(heads(F.linear(x, q)), heads(k), heads(v))
            return F.layer_norm(self.out(y), [4])

    assert row_of(Cross(), "w").layout == Layout("matrix", 0, 1, (16, 16, 16))


def test_a_block_of_one_row_is_not_orthogonalized_alone() -> None:
    def with_a_gate(y: Tensor, x: Tensor) -> Tensor:
        value, gate = y.split([47, 1], -1)
        return value.softmax(-1) * gate.sigmoid()

    row = row_of(Made(with_a_gate, 47))
    assert row.layout == Layout()
    assert "kept whole: one of its blocks is a single row" in row.why
