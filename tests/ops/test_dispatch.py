"""Which kernels run where, what they keep for the backward, and what is said where they lack."""

import os
import subprocess
import sys
import warnings
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from moonfx import fallback, moba_attention
from moonfx.kernels.common.arguments import MobaArguments
from moonfx.kernels.cpu import moba as cpu
from moonfx.kernels.torch_ops import moba as tiled
from moonfx.ops import dispatch
from tests.support.moba_cases import Case
from tests.support.moba_operator import BACKWARD, OPERATOR, leaves_of


class Keeping(ModuleType):
    """A kernel that gives routes to keep, as those of a GPU do, and takes them back."""

    def __init__(self) -> None:
        super().__init__("keeping")
        self.taken: list[Tensor | None] = []

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, arguments: MobaArguments
    ) -> tuple[Tensor, Tensor, Tensor]:
        columns = arguments.topk if key.shape[2] > arguments.block * arguments.topk else 1
        rows = query.shape[1] * query.shape[2] // key.shape[1]
        routes = torch.arange(rows * columns, dtype=torch.int32).view(1, 1, rows, columns)
        routes = routes.expand(query.shape[0], key.shape[1], -1, -1)
        return *tiled.forward(query, key, value, arguments), routes

    def backward(self, *given: Any, routes: Tensor | None = None) -> Any:
        self.taken.append(routes)
        return tiled.backward(*given)


@pytest.fixture
def keeping(monkeypatch: pytest.MonkeyPatch) -> Keeping:
    """A CPU tensor is computed as one on a GPU is."""
    kernel = Keeping()
    monkeypatch.setattr(dispatch, "triton_kernels", lambda device: kernel)
    return kernel


KEPT = [  # block, topk, recompute; the routes' last size and how many of them a backward is given
    (8, 3, False, 3, 3),
    (8, 3, True, None, None),
    (16, 9, False, 3, None),  # dense: one column of -1 for each block
    (64, 1, False, 1, None),
    (64, 5, False, 2, None),
]


@pytest.mark.parametrize(("block", "topk", "recompute", "columns", "given"), KEPT)
def test_routes_are_kept_for_the_backward_where_a_kernel_gives_them(
    keeping: Keeping,
    block: int,
    topk: int,
    recompute: bool,
    columns: int | None,
    given: int | None,
) -> None:
    leaves = leaves_of(Case())
    out, _, routes = OPERATOR(*leaves, block, topk, recompute=recompute)
    assert routes.dtype == torch.int32
    assert not routes.requires_grad
    assert routes.shape == ((0,) if columns is None else (2, 2, 80, columns))
    out.sum().backward()
    (taken,) = keeping.taken
    assert (None if taken is None else taken.shape[-1]) == given
    if taken is not None:
        assert torch.equal(taken, routes)
    elif columns is not None:
        assert routes[..., 1:].eq(-1).all()


@pytest.mark.parametrize("block", [8, 16])
@pytest.mark.usefixtures("keeping")
def test_opcheck_passes_where_routes_are_kept(block: int) -> None:
    leaves = leaves_of(Case())
    torch.library.opcheck(OPERATOR, (*leaves, block, 3))
    inputs = [leaf.detach() for leaf in leaves]
    saved = OPERATOR(*inputs, block, 3)
    torch.library.opcheck(BACKWARD, (saved[0], None, *inputs, *saved, block, 3))


def test_kept_routes_need_no_graph_of_their_own_for_a_length(keeping: Keeping) -> None:
    graphs = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(
        lambda *x: moba_attention(*x, 8, 3).sum(), backend=graphs, fullgraph=True
    )
    for length in (40, 20, 25, 24, 7, 64):  # below and above block * topk = 24
        leaves = leaves_of(Case(length=length, queries=length))
        loss = compiled(*leaves)
        torch.testing.assert_close(loss, moba_attention(*leaves, 8, 3).sum())
        loss.backward()
        taken = keeping.taken.pop()
        assert (taken is None) == (length <= 24)
    assert graphs.frame_count == 2


def test_on_the_cpu_no_routes_are_kept() -> None:
    routes = OPERATOR(*Case().inputs(), 8, 2)[2]
    assert (routes.shape, routes.dtype) == ((0,), torch.int32)


@pytest.mark.usefixtures("kernel")
def test_recomputed_routing_gives_the_same_gradients() -> None:
    runs = []
    for recompute in (False, True):
        leaves = leaves_of(Case(topk=3))
        out = moba_attention(*leaves, 8, 3, recompute_routing=recompute)
        runs.append([out, *torch.autograd.grad(out.square().sum(), leaves)])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.fixture
def nothing_found() -> Iterator[None]:
    """Nobody has looked for kernels in Triton, or been warned; nor has anybody after the test."""
    tags = [getattr(torch.ops.moonfx, name).default.tags for name in dispatch.OPERATORS]
    before = [list(x) for x in tags]
    dispatch.find_triton_kernels.cache_clear()
    fallback.forget()
    yield
    dispatch.find_triton_kernels.cache_clear()
    fallback.forget()
    for now, then in zip(tags, before, strict=True):
        now[:] = then


@pytest.mark.usefixtures("nothing_found")
def test_a_gpu_without_triton_gets_the_torch_kernel_and_is_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def missing(name: str) -> ModuleType:
        raise ImportError("No module named 'triton'")

    monkeypatch.setattr(dispatch.importlib, "import_module", missing)
    with pytest.warns(RuntimeWarning, match="No module named 'triton'.*pip install 'triton"):
        assert dispatch.kernel_for(torch.device("cuda")) is tiled
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert dispatch.kernel_for(torch.device("cuda")) is tiled
        assert dispatch.kernel_for(torch.device("meta")) is tiled


@pytest.mark.usefixtures("nothing_found")
@pytest.mark.parametrize("reason", [None, "an old GPU has compute capability (7, 5)"])
def test_a_gpu_that_triton_does_not_serve_stays_out_of_cuda_graphs(
    reason: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = ModuleType("gpu")
    module.available = lambda: reason  # type: ignore[attr-defined]
    monkeypatch.setattr(dispatch.importlib, "import_module", lambda name: module)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = dispatch.kernel_for(torch.device("cuda"))
    assert found is (tiled if reason else module)
    assert [str(reason) in str(x.message) for x in caught] == ([True] if reason else [])
    for operator in (OPERATOR, BACKWARD):
        assert (torch.Tag.cudagraph_unsafe in operator.default.tags) == (reason is not None)


FALLBACK = """
import warnings
import torch
from moonfx import moba_attention
from moonfx.kernels.cpu import moba as cpu

cpu.available = lambda: "no C++ compiler found: install g++"
x = torch.randn(1, 2, 40, 8, requires_grad=True)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for _ in range(3):
        moba_attention(x, x, x, 8, 2).sum().backward()
for one in caught:
    print(one.category.__name__, one.message)
"""


def test_a_missing_compiler_warns_once_and_says_how_to_get_the_speed() -> None:
    run = subprocess.run(
        [sys.executable, "-c", FALLBACK],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )
    lines = [line for line in run.stdout.splitlines() if "moonfx" in line]
    assert len(lines) == 1, run.stdout
    assert lines[0].startswith("RuntimeWarning moonfx: ")
    assert "no C++ compiler found: install g++" in lines[0]


@pytest.mark.parametrize(
    ("reason", "said"),
    [
        (None, "runs in moonfx.kernels.cpu.moba"),
        ("no g++", "runs in moonfx.kernels.torch_ops.moba, because no g++"),
    ],
)
def test_what_runs_is_logged_once_with_its_reason(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    reason: str | None,
    said: str,
) -> None:
    monkeypatch.setattr(cpu, "available", lambda: reason)
    dispatch._log_once.cache_clear()
    with warnings.catch_warnings(), caplog.at_level("INFO", "moonfx.ops"):
        warnings.simplefilter("ignore", RuntimeWarning)
        for _ in range(3):
            dispatch.kernel_for(torch.device("cpu"))
    dispatch._log_once.cache_clear()
    fallback.forget()
    assert caplog.messages == [f"attention of cpu tensors {said}"]
