"""What cannot be stepped shows at the conversion, and nothing is refused after it."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import AdamW

import moonfx
from moonfx.optim.matrices import Layout, shapes
from moonfx.optim.roles.steppable import judged
from moonfx.optim.roles.table import RoleRow
from tests.support.optim.by_hand import Row


class Layers(nn.Module):
    """A stack of routers, indexed by layer."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 16)
        self.own = nn.Parameter(torch.randn(3, 16, 4) * 0.1)
        self.experts = nn.ModuleList(nn.Linear(16, 16) for _ in range(4))
        self.head = nn.Linear(16, 50)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for layer in range(3):
            weight, chosen = (x @ self.own[layer]).topk(2, -1)
            for i, expert in enumerate(self.experts):
                share = (weight.softmax(-1) * (chosen == i)).sum(-1, keepdim=True)
                x = x + share * expert(x)
        out: Tensor = self.head(x)
        return out


class ProductKeys(nn.Module):
    """Keys [heads, keys, 2, D] of a memory, as PEER and product-key memories have them."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 16)
        self.query = nn.Linear(16, 2 * 2 * 8)
        self.own = nn.Parameter(torch.randn(2, 8, 2, 8) * 0.1)
        self.down, self.up = nn.Embedding(64, 16), nn.Embedding(64, 16)
        self.head = nn.Linear(16, 50)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        q = self.query(x).unflatten(-1, (2, 2, 8)).permute(2, 0, 1, 3, 4)
        (sx, sy), (ix, iy) = torch.einsum("pbnhd,hkpd->pbnhk", q, self.own).topk(2, -1)
        scores, places = (
            (a[..., :, None] + b[..., None, :]).flatten(-2) for a, b in ((sx, sy), (ix * 8, iy))
        )
        best, chosen = scores.topk(2, -1)
        index = places.gather(-1, chosen)
        h = F.gelu(torch.einsum("bnd,bnhkd->bnhk", x, self.down(index))) * best.softmax(-1)
        out: Tensor = self.head(x + torch.einsum("bnhk,bnhkd->bnd", h, self.up(index)))
        return out


@pytest.mark.parametrize("example", [True, False])
@pytest.mark.parametrize("kind", [Layers, ProductKeys])
def test_a_stack_steps_as_it_was_judged(kind, example) -> None:
    ids = torch.randint(0, 50, (2, 6))
    model = kind()
    adamw = AdamW(model.parameters(), lr=0.1)
    muon = moonfx.convert_optimizer(adamw, model, example=(ids,) if example else None)
    (row,) = [row for row in moonfx.roles(muon) if row.name == "own"]
    if row.optimizer == "muon":
        assert shapes(row.shape, row.layout)
    model(ids).square().mean().backward()
    before = model.own.detach().clone()
    muon.step()
    assert not torch.equal(before, model.own)


UNFIT: list[tuple[str, tuple[int, ...], Layout, str]] = [
    ("a stack taken for a matrix", (3, 16, 4), Layout(), "has no matrix of layout 'matrix'"),
    ("keys taken for a matrix", (2, 8, 2, 8), Layout(), "has no matrix of layout 'matrix'"),
    ("a vector", (16,), Layout("flatten"), "has no matrix of layout 'flatten'"),
    (
        "blocks that are not all",
        (16, 4),
        Layout(sizes=(4, 4)),
        r"blocks of \(4, 4\) are not the 16",
    ),
]
FIT = [((3, 16, 4), Layout("batch")), ((16, 4), Layout()), ((2, 8, 2, 8), Layout("flatten"))]


@pytest.mark.parametrize(
    ("shape", "layout", "words"), [x[1:] for x in UNFIT], ids=[x[0] for x in UNFIT]
)
def test_what_no_layout_fits_stays_on_adamw_and_says_why(shape, layout, words) -> None:
    p = nn.Parameter(torch.zeros(shape))
    row = RoleRow("w", shape, "router", "graph", "muon", "seen", layout)
    found = judged(row, p)
    assert (found.optimizer, found.role, found.layout) == ("adamw", "router", Layout())
    assert "roles={name: Layout(...)}" in found.why
    with pytest.raises(ValueError, match=words):
        shapes(shape, layout)


@pytest.mark.parametrize(("shape", "layout"), FIT)
def test_what_a_layout_fits_stays_on_muon(shape, layout) -> None:
    row = RoleRow("w", shape, "router", "graph", "muon", "seen", layout)
    assert judged(row, nn.Parameter(torch.zeros(shape))) is row


class Spectral(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(8, 8, bias=False)
        self.w = nn.Parameter(torch.randn(8, 8, dtype=torch.complex64))
        self.gain = nn.Parameter(torch.ones(8, dtype=torch.complex64))

    def forward(self, x: Tensor) -> Tensor:
        return torch.fft.ifft((torch.fft.fft(self.mix(x)) * self.gain) @ self.w).real


@pytest.mark.parametrize("roles", [{"w": "adamw"}, {"re:^w$": "adamw"}])
def test_complex_parameters_on_adamw_step_as_adamw_steps_them(roles: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model = Spectral()
    adamw = AdamW(model.parameters(), lr=0.01)
    for step in range(4):
        if step == 1:
            muon = moonfx.convert_optimizer(adamw, model, example=(torch.randn(3, 8),), roles=roles)
            alone = [nn.Parameter(p.detach().clone()) for p in (model.w, model.gain)]
            plain = AdamW(alone, lr=0.01)
            for p, q in zip((model.w, model.gain), alone, strict=True):
                plain.state[q] = {key: value.clone() for key, value in muon.state[p].items()}
        model.zero_grad()
        model(torch.randn(3, 8)).square().sum().backward()
        if step:
            for p, q in zip((model.w, model.gain), alone, strict=True):
                q.grad = p.grad.clone()
            muon.step()
            plain.step()
            assert torch.equal(model.w, alone[0])
            assert torch.equal(model.gain, alone[1])
        else:
            adamw.step()
    moonfx.to_adamw(muon).step()


def test_a_complex_matrix_that_would_go_to_muon_is_refused_with_the_way_out() -> None:
    model = Spectral()
    with pytest.raises(ValueError, match=r"w is complex .*roles=\{name: 'adamw'\}"):
        moonfx.convert_optimizer(AdamW(model.parameters()), model, roles={"w": "muon"})


LAZY = [nn.LazyLinear(8), nn.LazyConv2d(4, 3), nn.LazyBatchNorm1d()]


@pytest.mark.parametrize("module", LAZY, ids=[type(x).__name__ for x in LAZY])
@pytest.mark.parametrize("given", ["the optimizer", "the model alone"])
def test_a_lazy_module_must_see_a_batch_first(module, given) -> None:
    model = nn.Sequential(nn.Linear(8, 8), module)
    of = model if given == "the optimizer" else model[0]
    with pytest.raises(ValueError, match="weight has no shape yet: .* must see a batch first"):
        moonfx.convert_optimizer(AdamW(of.parameters()), model, example=(torch.randn(2, 8),))


def test_a_row_of_adamws_is_not_judged() -> None:
    row = Row("w", "adamw", Layout("batch"))
    assert judged(row, nn.Parameter(torch.zeros(3, dtype=torch.complex64))) is row


def test_a_parameter_that_outgrew_its_layout_is_said_before_adamws_half_moves() -> None:
    model = nn.Sequential(nn.Linear(8, 12), nn.Linear(12, 8))
    layout = Layout(sizes=(4, 8))
    muon = moonfx.convert_optimizer(
        AdamW(model.parameters(), lr=0.1), model, roles={"0.weight": layout}
    )
    model[0].weight.data = torch.zeros(11, 8)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(ValueError, match=r"blocks of \(4, 8\) are not the 11 numbers"):
        muon.step()
    assert all(torch.equal(p, q) for p, q in zip(before, model.parameters(), strict=True))
