"""The Triton kernels' forward against the reference; without a GPU by Triton's interpreter."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from moonfx.kernels.common.arguments import MobaArguments
from moonfx.kernels.reference import moba as reference
from tests.support.moba_cases import FEATURES, Case

gpu = pytest.importorskip("moonfx.kernels.gpu.moba", reason="needs Triton")
from moonfx.kernels.gpu import block_index as gpu_index  # noqa: E402
from moonfx.kernels.gpu import configs as gpu_configs  # noqa: E402
from moonfx.kernels.gpu import counting_sort as gpu_sort  # noqa: E402
from moonfx.kernels.gpu import tile as gpu_tile  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# As torch_ops/test_moba.py's. bfloat16 results are merged from rounded ones: two more roundings.
TOLERANCE = {
    torch.float32: {"rtol": 1e-5, "atol": 2e-5},
    torch.bfloat16: {"rtol": 2**-6, "atol": 2**-6},
    torch.float16: {"rtol": 2**-9, "atol": 2**-9},
}


def small(case: Case) -> Case:
    """A case with fewer tokens: the interpreter takes milliseconds for a tile."""
    length = min(case.length, 44)
    queries = length if case.queries == case.length else min(case.queries, 36)
    alike = case.padding == case.packing == "none" and case.bias not in ("all", "by row")
    return case.but(batch=1 if alike else 2, kv_heads=1, length=length, queries=queries)


def call(case: Case) -> tuple[Tensor, Tensor]:
    inputs = [x.to(DEVICE) for x in case.inputs()]
    arguments = case.arguments(DEVICE)
    out, lse, _ = gpu.forward(*inputs, arguments)
    return out.cpu(), lse.cpu()


def assert_like_reference(case: Case) -> None:
    out, lse = call(case)
    expected, expected_lse = reference.moba_attention(*case.inputs(), case.arguments())
    assert out.dtype == case.dtype
    torch.testing.assert_close(out, expected, **TOLERANCE[case.dtype])
    torch.testing.assert_close(lse, expected_lse, **TOLERANCE[torch.float32])


@pytest.mark.parametrize("case", [case for _, case in FEATURES], ids=[name for name, _ in FEATURES])
def test_each_feature_equals_the_reference(case: Case) -> None:
    assert_like_reference(small(case))


# The interpreter is slow: most rows of the second dtype are left to `make sweep`.
@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, id=name, marks=[pytest.mark.sweep] if place % 3 else [])
        for place, (name, case) in enumerate(FEATURES)
    ],
)
def test_each_feature_equals_the_reference_in_bfloat16(case: Case) -> None:
    assert_like_reference(small(case).but(dtype=torch.bfloat16))


SHAPES = [
    ("half precision", Case(dtype=torch.float16, topk=3)),
    ("blocks of 5", Case(block=5, topk=3, sinks=1)),
    ("blocks of 33, two steps of keys", Case(block=33, length=120, queries=50)),
    ("blocks of 33 in bfloat16", Case(block=33, length=76, queries=45, dtype=torch.bfloat16)),
    ("blocks of 20 in bfloat16", Case(block=20, topk=1, dtype=torch.bfloat16, padding="left")),
    ("head dims 24 and 40 in half precision", Case(dim=24, value_dim=40, dtype=torch.float16)),
    ("strided in bfloat16", Case(layout="strided", dtype=torch.bfloat16, topk=3)),
    ("a block of one key", Case(block=1, topk=4, length=45)),
    ("head dim 12", Case(dim=12, value_dim=12)),
    ("head dim 1", Case(dim=1, value_dim=1)),
    ("head dim 24, value dim 40", Case(dim=24, value_dim=40)),
    ("head dim 40, value dim 8", Case(dim=40, value_dim=8)),
    ("groups of 5", Case(group=5, queries=15)),
    ("one head", Case(group=1, kv_heads=2, length=70, queries=70)),
    ("dense", Case(topk=5)),
    ("dense, fewer queries, a group of 3", Case(topk=9, queries=33, length=72, group=3)),
    ("dense, left padding", Case(topk=5, padding="left")),
    ("only the own block", Case(topk=1)),
    ("only the own block, left padding", Case(topk=1, padding="left")),
    ("by token", Case(layout="by token", topk=3)),
    ("expanded", Case(layout="expanded", topk=3)),
    ("strided", Case(layout="strided", topk=3)),
    ("strided, dense", Case(layout="strided", topk=5)),
    ("a scale of zero", Case(scale=0.0)),
    ("a scale below zero", Case(scale=-0.5)),
    ("more columns than blocks", Case(topk=6, block=7, length=45, queries=45)),
]  # fmt: skip


@pytest.mark.parametrize("case", [case for _, case in SHAPES], ids=[name for name, _ in SHAPES])
def test_each_shape_equals_the_reference(case: Case) -> None:
    kv_heads = 2 if case.group == 1 else 1
    assert_like_reference(case.but(kv_heads=kv_heads))


@pytest.mark.parametrize("topk", [1, 3, 9], ids=["own block", "routed", "dense"])
def test_a_row_that_sees_nothing_gives_zero(topk: int) -> None:
    case = Case(topk=topk, padding="left", kv_heads=1)  # row 1 has 8 padding tokens
    out, lse = call(case)
    assert out[1, :, :8].eq(0).all()
    assert lse[1, :, :8].eq(-torch.inf).all()
    assert lse[1, :, 8:].isfinite().all()


@pytest.mark.parametrize("topk", [1, 3])
def test_many_passes_give_the_bits_of_one(topk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = (2, 4, 70, 12), (2, 2, 70, 12), (2, 2, 70, 20)
    inputs = [torch.randn(shape, device=DEVICE) for shape in shapes]
    whole = gpu.forward(*inputs, MobaArguments(8, topk))
    seen, within = [], gpu_index.passes

    def passes(index: gpu_index.Index, bytes_per_route: int) -> list[gpu_index.Pass]:
        seen.extend(within(index, bytes_per_route, 1))
        return seen

    monkeypatch.setattr(gpu_index, "passes", passes)
    monkeypatch.setattr(gpu_sort, "PROGRAMS", 12)
    parts = gpu.forward(*inputs, MobaArguments(8, topk))
    assert len(seen) == (0 if topk == 1 else 12), seen  # results of one route need no merge
    for one, many in zip(whole, parts, strict=True):
        assert torch.equal(one, many)


@pytest.mark.parametrize("sizes", [(0, 8, 8), (2, 0, 8), (2, 0, 0)])
def test_nothing_in_gives_nothing_out(sizes: tuple[int, int, int]) -> None:
    batch, queries, length = sizes
    case = Case(batch=batch, queries=queries, length=length, bias="all", scale=0.25)
    out, lse = call(case)
    assert out.shape == case.inputs()[0].shape
    assert lse.shape == out.shape[:3]


def test_the_layouts_are_those_of_the_contract() -> None:
    case = Case(queries=36, value_dim=4, kv_heads=1)
    out, lse = call(case)
    assert out.transpose(1, 2).is_contiguous()
    assert out.shape == (2, 2, 36, 4)
    assert lse.is_contiguous()
    assert lse.dtype == torch.float32


@pytest.mark.parametrize("topk", [2, 9], ids=["routed", "dense"])
@pytest.mark.parametrize("bulk", [True, False], ids=["by descriptor", "by pointer"])
def test_offsets_beyond_32_bits_are_read(
    topk: int, bulk: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_tile, "bulk", lambda tensor: bulk)
    case = Case(topk=topk, kv_heads=1, dtype=torch.bfloat16)
    # Memory that nobody writes to is never given out: two rows of a batch far apart cost nothing.
    apart = 2**31 + 64
    far = torch.empty(apart + 4096, dtype=case.dtype, device=DEVICE)
    inputs = []
    for number, tensor in enumerate(case.inputs()):
        strides = apart, *tensor.stride()[1:]
        view = far.as_strided(tensor.shape, strides, 1024 * number)
        assert tensor[0].numel() <= 1024
        inputs.append(view.copy_(tensor))
    out, lse, _ = gpu.forward(*inputs, case.arguments())
    expected, expected_lse = call(case)
    assert torch.equal(out.cpu(), expected)
    assert torch.equal(lse.cpu(), expected_lse)


def test_the_largest_and_the_smallest_scores_are_exact() -> None:
    query = torch.full((1, 1, 80, 4), 100.0, device=DEVICE)
    key = torch.zeros(1, 1, 80, 4, device=DEVICE)
    key[:, :, 3], key[:, :, 5] = 100.0, -100.0
    value = torch.arange(80.0, device=DEVICE).view(1, 1, 80, 1).expand(1, 1, 80, 4)
    out, lse, _ = gpu.forward(query, key, value, MobaArguments(8, 9))
    assert out[0, 0, 3:].eq(3.0).all()
    assert lse[0, 0, 3:].eq(20000.0).all()


@pytest.mark.parametrize("topk", [3, 9], ids=["routed", "dense"])
def test_biases_of_minus_infinity_hide_keys(topk: int) -> None:
    case = Case(topk=topk, kv_heads=1, length=72, queries=72, block=8)
    query, key, value = (x.to(DEVICE) for x in case.inputs())
    bias = torch.zeros(1, 1, 72, device=DEVICE)
    bias[..., :40] = -torch.inf  # more than a step of keys; their blocks are chosen last
    hidden = MobaArguments(8, topk, key_bias=bias)
    out, lse, routes = gpu.forward(query, key, value, hidden)
    assert lse[:, :, :40].eq(-torch.inf).all()
    assert out[:, :, :40].eq(0).all()
    expected, expected_lse = reference.moba_attention(
        *(query[:, :, 40:], key[:, :, 40:], value[:, :, 40:]), MobaArguments(8, topk)
    )
    torch.testing.assert_close(out[:, :, 40:], expected, **TOLERANCE[torch.float32])
    torch.testing.assert_close(lse[:, :, 40:], expected_lse, **TOLERANCE[torch.float32])
    # Of rows that see nothing not even the gradient of a logarithm of 0 may count.
    grads = torch.ones_like(out), torch.ones_like(lse).masked_fill(lse.isneginf(), torch.nan)
    dq, dk, dv, dbias = gpu.backward(*grads, query, key, value, out, lse, hidden, routes=routes)
    assert dbias is not None
    for grad in (dq, dk, dv, dbias.unsqueeze(-1)):
        assert grad.isfinite().all()
        assert grad[:, :, :40].eq(0).all()


@pytest.mark.parametrize("length", [90, 16], ids=["prefill", "few rows"])
def test_kernels_launch_on_the_device_of_their_tensors(
    length: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    inside, launched, launch = [], [], gpu_configs.launch

    @contextmanager
    def device_of(tensor: Tensor) -> Iterator[None]:
        inside.append(tensor.device)
        yield
        inside.pop()

    def launch_there(kernel: Any, *arguments: Any, **constants: Any) -> None:
        launched.append(kernel)
        assert inside
        launch(kernel, *arguments, **constants)

    case = Case(kv_heads=1, length=length, queries=length, block=4, topk=2)
    inputs, arguments = [x.to(DEVICE) for x in case.inputs()], case.arguments()
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "device_of", device_of)
        patch.setattr(gpu_configs, "launch", launch_there)
        out, lse, _ = gpu.forward(*inputs, arguments)
        forward = len(launched)
        gpu.backward(out, lse, *inputs, out, lse, arguments)
    assert 0 < forward < len(launched)


def test_heads_that_no_tile_holds_are_refused() -> None:
    narrow, wide = (torch.zeros(1, 1, 8, dim, device=DEVICE) for dim in (16, 576))
    for inputs in ((wide, wide, narrow), (narrow, narrow, wide)):
        with pytest.raises(ValueError, match="at most 512"):
            gpu.forward(*inputs, MobaArguments(4, 1))


def test_it_is_available_to_the_interpreter_and_to_a_gpu() -> None:
    assert gpu.available() is None


def test_routes_are_found_in_the_forward_and_say_the_own_block_first() -> None:
    case = Case(kv_heads=1, topk=3)
    *_, routes = gpu.forward(*(x.to(DEVICE) for x in case.inputs()), case.arguments())
    assert routes.shape == (2, 1, 80, 3)
    assert routes.dtype == torch.int32
    own = torch.arange(40, device=DEVICE).repeat_interleave(2) // 8
    assert routes[..., 0].eq(own).all()
