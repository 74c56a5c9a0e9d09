"""The operator moonfx::newton_schulz: its contract on every shape and dtype, and its refusals."""

import re

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from moonfx.kernels.reference import newton_schulz as reference
from moonfx.ops.newton_schulz import FORMS, newton_schulz_flops, newton_schulz_form, per_step

OPERATOR = torch.ops.moonfx.newton_schulz
MUON = [3.4445, -4.7750, 2.0315] * 5

SHAPES = [
    (24, 40),
    (40, 24),
    (32, 32),
    (3, 24, 40),
    (3, 40, 24),
    (2, 32, 32),
    (1, 17, 65),
    (2, 1, 9),
    (9, 1),
    (1, 1),
]
# Gaussian matrices only (tests/kernels has the others): 5 steps of sums in the dtype's precision.
TOLERANCE = {
    torch.float64: 1e-12,
    torch.float32: 1e-5,
    torch.float16: 1e-2,
    torch.bfloat16: 5e-2,
}


def gaussian(shape: tuple[int, ...], dtype: torch.dtype = torch.float64) -> Tensor:
    torch.manual_seed(0)
    X = torch.randn(shape, dtype=torch.float64)
    return (X / X.norm(dim=(-2, -1), keepdim=True)).to(dtype)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_each_form_maps_the_singular_values(
    shape: tuple[int, ...], dtype: torch.dtype, form: str
) -> None:
    X = gaussian(shape, dtype)
    before = X.clone()
    out = OPERATOR(X, MUON, form)
    expected = reference.by_singular_values(X.double(), per_step(tuple(MUON)))
    assert out.dtype == dtype
    assert out.shape == X.shape
    assert out.is_contiguous()
    assert X.equal(before)
    error = (out.double() - expected).norm() / expected.norm()
    assert error < TOLERANCE[dtype]


@pytest.mark.parametrize("shape", [(0, 4), (4, 0), (0, 4, 4), (2, 0, 4), (2, 4, 0)], ids=str)
def test_a_matrix_without_entries_stays_one(shape: tuple[int, ...]) -> None:
    assert OPERATOR(torch.empty(shape), MUON).shape == shape


def test_any_strides_give_what_contiguous_memory_gives() -> None:
    X = gaussian((4, 40, 48), torch.float32)
    for view in (X.mT, X[::2], X[:, 3:30], X[:, :, ::2], X.transpose(0, 1), X[0].expand(3, 40, 48)):
        assert OPERATOR(view, MUON).equal(OPERATOR(view.contiguous(), MUON))


BAD = [
    ("a vector", torch.zeros(3), MUON, "auto", ValueError, "got 1 dims: [3]"),
    ("four dims", torch.zeros(1, 1, 2, 3), MUON, "auto", ValueError, "got 4 dims: [1, 1, 2, 3]"),
    ("integers", torch.zeros(2, 3).int(), MUON, "auto", TypeError, "got int32"),
    ("complex", torch.zeros(2, 3) * 1j, MUON, "auto", TypeError, "got complex64"),
    ("no steps", torch.zeros(2, 3), [], "auto", ValueError, "numbers, got 0"),
    ("half a step", torch.zeros(2, 3), MUON[:4], "auto", ValueError, "numbers, got 4"),
    ("NaN", torch.zeros(2, 3), [1.0, float("nan"), 0.0], "auto", ValueError, "finite, got nan"),
    ("no such form", torch.zeros(2, 3), MUON, "fast", ValueError, "'gram', got 'fast'"),
]


@pytest.mark.parametrize(
    ("X", "coefficients", "form", "kind", "message"),
    [row[1:] for row in BAD],
    ids=[r[0] for r in BAD],
)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_what_it_cannot_compute_is_refused_by_name(
    device: str,
    X: Tensor,
    coefficients: list[float],
    form: str,
    kind: type[Exception],
    message: str,
) -> None:
    with pytest.raises(kind, match=re.escape(message)):
        OPERATOR(X.to(device), coefficients, form)


def test_it_says_that_it_has_no_derivative() -> None:
    X = gaussian((4, 8), torch.float32).requires_grad_()
    with pytest.raises(RuntimeError, match="newton_schulz has no derivative"):
        OPERATOR(X, MUON).sum().backward()
    with torch.no_grad():
        assert not OPERATOR(X, MUON).requires_grad


def test_autocast_does_not_change_it() -> None:
    X = gaussian((24, 40), torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        assert OPERATOR(X, MUON).equal(OPERATOR(X, MUON))
        inside = OPERATOR(X, MUON)
    assert inside.equal(OPERATOR(X, MUON))


@pytest.mark.parametrize("shape", [(8, 12), (2, 12, 8)], ids=str)
def test_opcheck_passes(shape: tuple[int, ...]) -> None:
    torch.library.opcheck(OPERATOR, (gaussian(shape, torch.float32), MUON, "auto"))


def test_it_is_one_node_of_a_compiled_graph() -> None:
    graphs = []

    def backend(graph: torch.fx.GraphModule, _: object) -> torch.fx.GraphModule:
        graphs.append([node.target for node in graph.graph.nodes if node.op == "call_function"])
        return graph

    X = gaussian((24, 40), torch.float32)
    compiled = torch.compile(lambda X: OPERATOR(X, MUON), backend=backend, fullgraph=True)
    assert compiled(X).equal(OPERATOR(X, MUON))
    assert graphs == [[OPERATOR]]


def test_it_is_one_node_of_an_exported_program_for_any_batch() -> None:
    class Steps(torch.nn.Module):
        def forward(self, X: Tensor) -> Tensor:
            out: Tensor = OPERATOR(X, MUON)
            return out

    batch = torch.export.Dim("batch", min=2)
    X = gaussian((3, 24, 40), torch.float32)
    program = torch.export.export(Steps(), (X,), dynamic_shapes=((batch, None, None),))
    targets = [node.target for node in program.graph.nodes if node.op == "call_function"]
    assert targets == [OPERATOR.default]
    for size in (2, 5):
        X = gaussian((size, 24, 40), torch.float32)
        assert program.module()(X).equal(OPERATOR(X, MUON))


@pytest.mark.parametrize("shape", [(8, 12), (3, 12, 8), (2, 8, 8)], ids=str)
def test_flops_of_the_plain_form_are_those_of_its_products(shape: tuple[int, ...]) -> None:
    X = gaussian(shape, torch.float32)
    with FlopCounterMode(display=False) as counted:
        OPERATOR(X, MUON, "plain")
    with FlopCounterMode(display=False) as products:
        wide = X.mT if X.shape[-2] > X.shape[-1] else X
        for _ in range(5):
            A = wide @ wide.mT
            _ = A @ A
            _ = A @ wide
    assert counted.get_total_flops() == products.get_total_flops()
    batch = 1 if len(shape) == 2 else shape[0]
    assert newton_schulz_flops(*shape[-2:], 5) * batch == counted.get_total_flops()


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_the_form_that_auto_takes_is_a_form_with_a_reason(device: str, dtype: torch.dtype) -> None:
    for m, n in ((1, 1), (64, 64), (64, 1024), (2048, 576), (4096, 4096)):
        form, why = newton_schulz_form(torch.device(device), dtype, 2, m, n, 5)
        assert form in FORMS[1:]
        assert why
        assert newton_schulz_form(torch.device(device), dtype, 2, n, m, 5) == (form, why)
