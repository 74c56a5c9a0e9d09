"""What a GPU's threads could do to each other or to memory, found by the interpreter's memory."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from tests.support.moba_cases import FEATURES, Case

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402

from moonfx.kernels.gpu import block_index as gpu_index  # noqa: E402
from moonfx.kernels.gpu import counting_sort as gpu_sort  # noqa: E402
from moonfx.kernels.gpu import moba as gpu  # noqa: E402
from tests.support.interpreter_memory import watched  # noqa: E402

pytestmark = pytest.mark.skipif(
    not triton.knobs.runtime.interpret,
    reason="needs Triton's interpreter, which it watches: TRITON_INTERPRET=1",
)
BLOCK = 8


@triton.jit
def shift(table, by, DISTANCE: tl.constexpr, BARRIER: tl.constexpr, SIZE: tl.constexpr):
    """table[i + DISTANCE] = table[i] + by, in place."""
    place = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    number = tl.load(table + place)
    if BARRIER:
        tl.debug_barrier()
    tl.store(table + place + DISTANCE, number + by)


@triton.jit
def gather(table, out, SIZE: tl.constexpr):
    """out[i // 2] = table[i]."""
    place = tl.arange(0, SIZE)
    tl.store(out + place // 2, tl.load(table + place))


KERNELS = [
    # programs, distance, barrier, places, what is wrong
    (1, BLOCK, False, 2 * BLOCK, None),
    (1, BLOCK, False, 2 * BLOCK - 1, "outside"),
    (2, BLOCK, False, 3 * BLOCK, "race"),
    (2, 2 * BLOCK, False, 4 * BLOCK, None),
    (1, 1, False, 2 * BLOCK, "hurry"),
    (1, 1, True, 2 * BLOCK, None),
]


@pytest.mark.parametrize(("programs", "distance", "barrier", "places", "wrong"), KERNELS)
def test_accesses_that_depend_on_an_order_are_seen(
    programs: int, distance: int, barrier: bool, places: int, wrong: str | None
) -> None:
    table = torch.zeros(places)
    with watched() as watch:
        if wrong is None:
            shift[(programs,)](table, 1.0, DISTANCE=distance, BARRIER=barrier, SIZE=BLOCK)
            assert watch.accesses == 2 * programs * BLOCK
            return
        with pytest.raises(Exception, match=wrong):
            shift[(programs,)](table, 1.0, DISTANCE=distance, BARRIER=barrier, SIZE=BLOCK)


def test_two_elements_stored_to_one_place_are_seen() -> None:
    with watched():
        gather[(1,)](torch.zeros(BLOCK), torch.zeros(BLOCK), SIZE=BLOCK)  # all alike
    with watched(), pytest.raises(Exception, match="twice"):
        gather[(1,)](torch.arange(BLOCK), torch.zeros(BLOCK), SIZE=BLOCK)


CASES = [
    *((name, case) for name, case in FEATURES if name == "everything"),
    ("causal", Case(topk=3, sinks=1)),
    ("bidirectional", Case(topk=3, causal=False)),
    ("dense", Case(topk=9)),
    ("only the own block, holes", Case(topk=1, padding="holes")),
    ("blocks of one", Case(block=1, topk=4, length=16, queries=16)),
    ("blocks of 33", Case(block=33, length=120, queries=50)),
    ("head dims 12 and 20", Case(dim=12, value_dim=20, topk=3)),
    (
        "packed, causal",
        Case(packing="runs", padding="holes", softcap=2.0, topk=3, length=50, queries=50),
    ),
    ("one query", Case(queries=1, topk=3, length=45)),
    ("one query, left padding", Case(queries=1, topk=3, length=45, padding="left")),
    ("nine queries, packed", Case(queries=9, topk=3, length=90, packing="runs", bias="by head")),
    ("strided", Case(layout="strided", topk=3)),
]


def run(case: Case) -> list[Tensor]:
    """Outputs and gradients."""
    inputs, arguments = case.inputs(), case.arguments()
    out, lse, routes = gpu.forward(*inputs, arguments)
    grads = torch.ones_like(out), torch.ones_like(lse).masked_fill(lse.isneginf(), 0.0)
    made = gpu.backward(*grads, *inputs, out, lse, arguments, routes=routes)
    return [x for x in (out, lse, routes, *made) if x is not None]


@pytest.fixture
def nan_when_empty() -> Iterator[None]:
    """New memory is full of NaN, or of the largest integer."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(1).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("nan_when_empty")
# The interpreter is slow, and slower when watched: every other case is left to `make sweep`.
@pytest.mark.parametrize(
    ("name", "case"),
    [
        pytest.param(name, case, id=name, marks=[pytest.mark.sweep] if place % 2 else [])
        for place, (name, case) in enumerate(CASES)
    ],
)
def test_no_access_depends_on_the_order_of_threads_or_on_what_memory_held(
    name: str, case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_index, "BUDGET", 1 << 13)  # several passes
    monkeypatch.setattr(gpu_sort, "PROGRAMS", 8)  # several steps
    case = case.but(kv_heads=1, queries=min(case.queries, 40), length=min(case.length, 90))
    with watched() as watch:
        results = run(case)
    assert watch.accesses > 0
    assert not any(result.isnan().any() for result in results)
