"""The torch kernel against the reference; its memory, its determinism, its laws."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from moonfx.kernels.common.arguments import MobaArguments
from moonfx.kernels.reference import moba as reference
from moonfx.kernels.torch_ops import moba as tiled
from moonfx.kernels.torch_ops import plan as tiled_plan
from moonfx.kernels.torch_ops.problem import Budget, Problem
from tests.support.moba_cases import FEATURES, GIVEN_MEANS, Case, feature_cases

# One rounding of the result to its dtype on each side, and a delta taken from the rounded output:
# two units in the last place (2**-23, 2**-7, 2**-10). Below one, the same for sums of float32
# products (100 * 2**-24), or of terms that carry the error of delta (a few of them).
TOLERANCE = {
    torch.float32: {"rtol": 1e-5, "atol": 2e-5},
    torch.bfloat16: {"rtol": 2**-6, "atol": 2**-6},
    torch.float16: {"rtol": 2**-9, "atol": 2**-9},
}
BUDGETS = [
    ("one pass", Budget(64 << 20, 4 << 20)),
    ("a few tiles at a time", Budget(1 << 16, 1 << 13)),
    ("a pass per head, a batch per tile", Budget(1, 1)),
]


ROWS = [*FEATURES, *GIVEN_MEANS]
NAMES = ("out", "lse", "dq", "dk", "dv", "dbias")


def gradients(case: Case, device: str = "cpu") -> tuple[list[Tensor], list[Tensor]]:
    """out, lse and the gradients: the kernel's, and autograd's through the reference."""
    leaves = [tensor.to(device).requires_grad_() for tensor in case.inputs()]
    arguments = case.arguments(device)
    bias = case.full_bias()
    if bias is not None:
        leaves.append(bias.detach().to(device).requires_grad_())
    with_leaf = arguments._replace(key_bias=None if bias is None else leaves[3])
    out, lse = reference.moba_attention(*leaves[:3], with_leaf)
    # Upstream gradients on the grid as well: exact in every dtype.
    grad_out = (torch.randint(-8, 9, out.shape) / 8).to(out)
    grad_lse = (torch.randint(-8, 9, lse.shape) / 8).to(lse)
    expected = torch.autograd.grad((out, lse), leaves, (grad_out, grad_lse))
    inputs = [leaf.detach() for leaf in leaves[:3]]
    got, got_lse = tiled.forward(*inputs, arguments)
    *grads, grad_bias = tiled.backward(grad_out, grad_lse, *inputs, got, got_lse, arguments)
    assert (grad_bias is None) == (bias is None)
    grads = grads if grad_bias is None else [*grads, grad_bias]
    return [got, got_lse, *grads], [out.detach(), lse.detach(), *expected]


def assert_like_reference(case: Case, device: str = "cpu") -> None:
    got, expected = gradients(case, device)
    for name, mine, theirs in zip(NAMES[: len(got)], got, expected, strict=True):
        assert mine.dtype == theirs.dtype, name
        # lse is float32 whatever the inputs are.
        tolerance = TOLERANCE[torch.float32 if name == "lse" else case.dtype]
        torch.testing.assert_close(mine, theirs, **tolerance, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("case", [case for _, case in ROWS], ids=[name for name, _ in ROWS])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_each_feature_equals_the_reference(case: Case, dtype: torch.dtype) -> None:
    assert_like_reference(case.but(dtype=dtype))


@pytest.mark.gpu
@pytest.mark.parametrize("case", [case for _, case in ROWS], ids=[name for name, _ in ROWS])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_each_feature_equals_the_reference_on_a_gpu(case: Case, dtype: torch.dtype) -> None:
    assert_like_reference(case.but(dtype=dtype), "cuda")


@pytest.mark.parametrize("budget", [b for _, b in BUDGETS], ids=[name for name, _ in BUDGETS])
def test_output_and_gradients_equal_the_reference(
    budget: Budget, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Budget, "on", lambda device: budget)

    @settings(max_examples=100)
    @given(feature_cases())
    def check(case: Case) -> None:
        torch.manual_seed(case.seed)
        assert_like_reference(case)

    check()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("padding", ["none", "left", "holes"])
def test_output_and_gradients_equal_the_reference_on_a_gpu(
    dtype: torch.dtype, padding: str
) -> None:
    case = Case(dtype=dtype, padding=padding, length=500, queries=500, block=32, topk=4, dim=16)
    assert_like_reference(case.but(sinks=1), "cuda")


@pytest.mark.parametrize("grad_lse", [True, False])
def test_the_layouts_are_those_of_the_contract(grad_lse: bool) -> None:
    case = Case(queries=17, value_dim=4)
    inputs = case.inputs()
    out, lse = tiled.forward(*inputs, case.arguments())
    grads = tiled.backward(out, lse if grad_lse else None, *inputs, out, lse, case.arguments())
    assert lse.is_contiguous()
    assert lse.dtype == torch.float32
    assert grads[3] is None
    for tensor, like in zip((out, *grads[:3]), (inputs[0], *inputs), strict=True):
        assert tensor.transpose(1, 2).is_contiguous()
        assert tensor.dtype == like.dtype
    assert out.shape == (2, 4, 17, 4)
    assert [grad.shape for grad in grads[:3]] == [tensor.shape for tensor in inputs]


def test_a_missing_lse_gradient_is_zero() -> None:
    case = Case(topk=3, sinks=1, bias="all", scale=0.25)
    inputs = case.inputs()
    out, lse = tiled.forward(*inputs, case.arguments())
    without = tiled.backward(out, None, *inputs, out, lse, case.arguments())
    with_zero = tiled.backward(out, torch.zeros_like(lse), *inputs, out, lse, case.arguments())
    for left, right in zip(without, with_zero, strict=True):
        assert torch.equal(left, right)


@pytest.mark.parametrize("sizes", [(0, 8, 8), (2, 0, 8), (2, 0, 0)])
def test_nothing_in_gives_nothing_out(sizes: tuple[int, int, int]) -> None:
    batch, queries, length = sizes
    case = Case(batch=batch, queries=queries, length=length, bias="all", scale=0.25)
    inputs = case.inputs()
    out, lse = tiled.forward(*inputs, case.arguments())
    grads = tiled.backward(out, lse, *inputs, out, lse, case.arguments())
    assert out.shape == inputs[0].shape
    assert lse.shape == inputs[0].shape[:3]
    assert all(grad.eq(0).all() for grad in grads)


def test_ties_go_to_the_lower_block() -> None:
    query, value = torch.ones(1, 1, 48, 4), torch.eye(48).view(1, 1, 48, 48)
    key = torch.ones(1, 1, 48, 4)
    key[:, :, 24:32] = -0.0  # scores of block 3 tie with those of block 4, which are 0.0
    key[:, :, 32:40] = 0.0
    query[:, :, 40:] = -1.0
    out, _ = tiled.forward(query, key, value, MobaArguments(8, 2))
    attended = out[0, 0].view(48, 6, 8).sum(-1) > 0
    assert attended[39].tolist() == [True, False, False, False, True, False]
    assert attended[47].tolist() == [False, False, False, True, False, True]


REPEATED = [
    ("causal", {}),
    ("bidirectional", {"causal": False}),
    ("packed", {"segments": torch.arange(600).remainder(7).expand(1, -1)}),
    ("bias and softcap", {"key_bias": torch.randn(1, 4, 600), "softcap": 5.0}),
]


@pytest.mark.parametrize("named", [row[1] for row in REPEATED], ids=[row[0] for row in REPEATED])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_the_backward_repeats_bit_for_bit(device: str, named: dict[str, Any]) -> None:
    # Off the grid, where another order of summation would show, and with a block that all choose.
    inputs = [torch.randn(1, heads, 600, 16, device=device) for heads in (4, 2, 2)]
    named = {name: x.to(device) if isinstance(x, Tensor) else x for name, x in named.items()}
    arguments = MobaArguments(16, 5, 1, **named)
    before = torch.are_deterministic_algorithms_enabled()
    # warn_only: cuBLAS asks for an environment variable that has to be set before the process.
    torch.use_deterministic_algorithms(True, warn_only=device == "cuda")
    try:
        runs = []
        for _ in range(3):
            out, lse = tiled.forward(*inputs, arguments)
            grads = tiled.backward(out, None, *inputs, out, lse, arguments)
            runs.append([x for x in (out, lse, *grads) if x is not None])
    finally:
        torch.use_deterministic_algorithms(before)
    assert len(runs[0]) == 5 + ("key_bias" in named)
    for again in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], again, strict=True))


class Largest(TorchDispatchMode):
    """Records the size of the largest tensor that any operation made, views excepted."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(
        self, func: Callable, types: object, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(result):
            if isinstance(tensor, Tensor):
                elements = tensor.untyped_storage().nbytes() // tensor.element_size()
                self.elements = max(self.elements, elements)
        return result


def largest(case: Case) -> int:
    inputs = case.inputs()
    with Largest() as seen:
        out, lse = tiled.forward(*inputs, case.arguments())
        tiled.backward(out, None, *inputs, out, lse, case.arguments())
    return seen.elements


LINEAR = [
    ("causal", Case(batch=1)),
    ("left padding", Case(batch=1, padding="left")),
    ("bidirectional", Case(batch=1, causal=False)),
    ("bias", Case(batch=1, bias="by key", scale=0.25)),
    ("packed, three at once", Case(batch=1, packing="interleaved", causal=False)),
    ("packed, short ones", Case(packing="one row whole")),
    ("packed, a token each", Case(batch=1, packing="one token each")),
]


@pytest.mark.parametrize("case", [case for _, case in LINEAR], ids=[name for name, _ in LINEAR])
def test_no_tensor_grows_with_the_square_of_the_length(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Budget, "on", lambda device: Budget(1 << 17, 1 << 16))
    heads, dim = 4, 8
    for length in (1024, 2048):
        # An input, an output, or a float32 gradient of a kind: 4 heads of 8 numbers a token.
        bound = case.batch * heads * length * dim
        assert largest(case.but(length=length, queries=length, block=16, topk=4)) <= bound
        assert bound < length * (length // 16) * heads / 2  # less than any N x n gate


def test_the_dense_case_stays_linear_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Budget, "on", lambda device: Budget(1 << 17, 1 << 16))
    case = Case(batch=1, length=2048, queries=2048, block=2048)
    inputs = case.inputs()
    with Largest() as seen:
        out, lse = tiled.forward(*inputs, case.arguments())
        tiled.backward(out, None, *inputs, out, lse, case.arguments())
    assert seen.elements <= tiled_plan.TILE * 2048  # one tile of scores


def test_passes_cover_every_row_once(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, budget in BUDGETS:
        monkeypatch.setattr(Budget, "on", lambda device, budget=budget: budget)
        case = Case(batch=3, queries=300, length=300)
        problem = Problem(*case.inputs(), case.arguments())
        covered = torch.zeros(3, 2, 300, dtype=torch.int64)
        for rows, heads in problem.head_passes():
            for queries in problem.query_passes():
                covered[rows, heads, queries] += 1
        assert covered.eq(1).all(), name
