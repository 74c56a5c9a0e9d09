"""The operator and the public function: contract, autograd, compilation, errors, FLOPs."""

import os
import subprocess
import sys
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from moonfx import fallback, moba_attention
from moonfx.kernels import cpu, reference, tiled
from moonfx.ops import flops, moba
from tests.moba_cases import Case, cases

OPERATOR = torch.ops.moonfx.moba_attention
BACKWARD = torch.ops.moonfx.moba_attention_backward

# float32: sums of at most 100 products of size 1. float16 is computed in float32 and rounded once:
# two units in the last place. bfloat16: the kernel may round the softmax's weights and dS as well,
# 2**-9 of each term, and terms add up to a few units.
TOLERANCE = {
    torch.float32: {"rtol": 1e-5, "atol": 2e-5},
    torch.bfloat16: {"rtol": 2**-6, "atol": 2**-5},
    torch.float16: {"rtol": 2**-9, "atol": 2**-9},
}


@pytest.fixture(params=["C++ kernel", "torch kernel"])
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Runs a test on each kernel that a CPU tensor can get."""
    if request.param == "torch kernel":
        monkeypatch.setattr(cpu, "available", lambda: "switched off by a test")
        fallback.forget()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            fallback.warn_slow("the kernel", "switched off by a test")
            yield
        fallback.forget()
    elif (reason := cpu.available()) is not None:
        pytest.skip(reason)
    else:
        yield


def leaves_of(case: Case) -> list[Tensor]:
    return [tensor.detach().requires_grad_() for tensor in case.inputs()]


def assert_like_reference(case: Case) -> None:
    mine, theirs = leaves_of(case), leaves_of(case)
    out, lse = moba_attention(*mine, case.block, case.topk, **case.named(), return_lse=True)
    expected, expected_lse = reference.moba_attention(
        *theirs, case.block, case.topk, **case.named()
    )
    tolerance = TOLERANCE[case.dtype]
    assert out.dtype == case.dtype
    assert lse.dtype == torch.float32
    torch.testing.assert_close(out, expected, **tolerance)
    torch.testing.assert_close(lse, expected_lse, **TOLERANCE[torch.float32])
    grad_out = (torch.randint(-8, 9, out.shape) / 8).to(out)
    grad_lse = torch.randint(-8, 9, lse.shape) / 8
    grads = torch.autograd.grad((out, lse), mine, (grad_out, grad_lse))
    wanted = torch.autograd.grad((expected, expected_lse), theirs, (grad_out, grad_lse))
    for name, grad, want in zip("qkv", grads, wanted, strict=True):
        torch.testing.assert_close(grad, want, **tolerance, msg=lambda m, n=name: f"d{n}: {m}")


@pytest.mark.usefixtures("kernel")
def test_the_operator_and_its_gradients_equal_the_reference() -> None:
    @settings(max_examples=60)
    @given(cases())
    def check(case: Case) -> None:
        torch.manual_seed(case.seed)
        assert_like_reference(case)

    check()


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("sinks", [0, 1])
@pytest.mark.parametrize("length", [33, 40])
def test_enough_blocks_make_it_dense_attention(length: int, sinks: int) -> None:
    case = Case(length=length, queries=length)
    mine, theirs = leaves_of(case), leaves_of(case)
    out = moba_attention(*mine, 8, 5, sinks=sinks)
    dense = F.scaled_dot_product_attention(*theirs, is_causal=True, enable_gqa=True)
    torch.testing.assert_close(out, dense, **TOLERANCE[torch.float32])
    grad = torch.randn_like(out)
    for left, right in zip(
        torch.autograd.grad(out, mine, grad), torch.autograd.grad(dense, theirs, grad), strict=True
    ):
        torch.testing.assert_close(left, right, **TOLERANCE[torch.float32])


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("padding", ["left", "right", "holes"])
def test_padding_never_changes_a_real_token(padding: str) -> None:
    case = Case(padding=padding, topk=3, sinks=1)
    leaves, mask = leaves_of(case), case.key_mask()
    assert mask is not None
    out = moba_attention(*leaves, 8, 3, sinks=1, key_mask=mask)
    real_rows = mask[:, None, :, None]
    grad_out = torch.randn_like(out).masked_fill(~real_rows, 0.0)
    grads = torch.autograd.grad(out, leaves, grad_out)
    for row, real in enumerate(mask):
        alone = [leaf[row : row + 1, :, real].detach().requires_grad_() for leaf in leaves]
        expected = moba_attention(*alone, 8, 3, sinks=1)
        torch.testing.assert_close(
            out[row : row + 1, :, real], expected, **TOLERANCE[torch.float32]
        )
        wanted = torch.autograd.grad(expected, alone, grad_out[row : row + 1, :, real])
        for grad, want in zip(grads, wanted, strict=True):
            torch.testing.assert_close(
                grad[row : row + 1, :, real], want, **TOLERANCE[torch.float32]
            )
            assert grad[row, :, ~real].eq(0).all()


@pytest.mark.usefixtures("kernel")
def test_equal_scores_go_to_the_lower_block() -> None:
    query, key = torch.ones(1, 1, 48, 8), torch.ones(1, 1, 48, 8)
    value = torch.eye(48).view(1, 1, 48, 48)
    out = moba_attention(query, key, value, 8, 3)
    attended = out[0, 0, 47].view(6, 8).sum(-1) > 0
    assert attended.tolist() == [True, True, False, False, False, True]


@pytest.mark.usefixtures("kernel")
def test_topk_one_is_block_diagonal_attention() -> None:
    query, key, value = Case().inputs()
    out = moba_attention(query, key, value, 8, 1)
    parts = [
        F.scaled_dot_product_attention(*part, is_causal=True, enable_gqa=True)
        for part in zip(*(tensor.split(8, 2) for tensor in (query, key, value)), strict=True)
    ]
    torch.testing.assert_close(out, torch.cat(parts, 2), **TOLERANCE[torch.float32])


@pytest.mark.usefixtures("kernel")
def test_a_permutation_of_key_heads_with_their_groups_permutes_the_output() -> None:
    query, key, value = Case(kv_heads=3).inputs()
    turn, heads = torch.tensor([2, 0, 1]), torch.tensor([4, 5, 0, 1, 2, 3])
    out = moba_attention(query, key, value, 8, 2)
    turned = moba_attention(query[:, heads], key[:, turn], value[:, turn], 8, 2)
    torch.testing.assert_close(turned, out[:, heads], **TOLERANCE[torch.float32])


@pytest.mark.usefixtures("kernel")
def test_the_backward_repeats_bit_for_bit() -> None:
    # Off the grid, where another order of summation would show.
    leaves = [torch.randn(2, heads, 300, 16, requires_grad=True) for heads in (4, 2, 2)]
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        runs = []
        for _ in range(3):
            out = moba_attention(*leaves, 16, 5, sinks=1)
            runs.append([out, *torch.autograd.grad(out.square().sum(), leaves)])
    finally:
        torch.use_deterministic_algorithms(before)
    for again in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], again, strict=True))


CHECKED = [
    ("plain", Case(topk=3)),
    ("own scale, sinks, left padding", Case(topk=3, sinks=1, scale=0.3, padding="left")),
    ("fewer queries, tokens first", Case(queries=9, layout="by token", value_dim=4)),
    ("expanded, float16", Case(layout="expanded", dtype=torch.float16)),
    ("strided, bfloat16", Case(layout="strided", dtype=torch.bfloat16)),
    ("one head, dense", Case(batch=1, kv_heads=1, group=1, length=8, queries=8)),
]


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("case", [case for _, case in CHECKED], ids=[name for name, _ in CHECKED])
def test_opcheck_passes_on_both_operators(case: Case) -> None:
    # opcheck compares runs by value, and NaN is unlike itself: none under the padding here.
    inputs = [tensor.nan_to_num() for tensor in case.inputs()]
    leaves = [tensor.requires_grad_() for tensor in inputs]
    torch.library.opcheck(OPERATOR, (*leaves, *case.policy()))
    plain = [tensor.detach() for tensor in leaves]
    out, lse = OPERATOR(*plain, *case.policy())
    lse = lse.nan_to_num(neginf=0.0)
    expanded = torch.ones((), dtype=out.dtype).expand(out.shape)
    for grads in ((torch.ones_like(out), lse), (expanded, None)):
        torch.library.opcheck(BACKWARD, (*grads, *plain, out, lse, *case.policy()))


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("needed", ["q", "k", "v", "qk", "kv", "qkv"])
def test_only_the_inputs_that_require_a_gradient_get_one(needed: str) -> None:
    full = leaves_of(Case())
    part = [
        leaf.detach().requires_grad_(name in needed) for name, leaf in zip("qkv", full, strict=True)
    ]
    moba_attention(*full, 8, 2).square().sum().backward()
    moba_attention(*part, 8, 2).square().sum().backward()
    for name, leaf, other in zip("qkv", part, full, strict=True):
        if name in needed:
            assert torch.equal(leaf.grad, other.grad)  # type: ignore[arg-type]
        else:
            assert leaf.grad is None


def test_either_result_alone_can_be_differentiated() -> None:
    case = Case(topk=3)
    for index in (0, 1):
        mine, theirs = leaves_of(case), leaves_of(case)
        got = moba_attention(*mine, 8, 3, return_lse=True)[index]
        expected = reference.moba_attention(*theirs, 8, 3)[index]
        grads = torch.autograd.grad(got.sum(), mine, allow_unused=True)
        wanted = torch.autograd.grad(expected.sum(), theirs, allow_unused=True)
        for grad, want in zip(grads, wanted, strict=True):
            zero = torch.zeros(())
            torch.testing.assert_close(
                zero if grad is None else grad.sum(),
                zero if want is None else want.sum(),
                **TOLERANCE[torch.float32],
            )


def test_without_grad_nothing_is_recorded() -> None:
    leaves = leaves_of(Case())
    with torch.no_grad():
        assert not moba_attention(*leaves, 8, 2).requires_grad


def test_a_second_derivative_is_an_error_that_names_the_operator() -> None:
    leaves = leaves_of(Case())
    out = moba_attention(*leaves, 8, 2)
    (grad,) = torch.autograd.grad(out.square().sum(), leaves[0], create_graph=True)
    with pytest.raises(RuntimeError, match=r"moonfx\.moba_attention_backward"):
        grad.sum().backward()


def loss(query: Tensor, key: Tensor, value: Tensor, key_mask: Tensor | None) -> Tensor:
    out, lse = moba_attention(
        query * 1.0, key, value, 8, 3, sinks=1, key_mask=key_mask, return_lse=True
    )
    return out.square().sum() + lse.masked_fill(lse.isneginf(), 0.0).sum()


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("dynamic", [False, True])
def test_it_compiles_in_one_graph_with_the_same_gradients(backend: str, dynamic: bool) -> None:
    compiled = torch.compile(loss, backend=backend, fullgraph=True, dynamic=dynamic)
    # A second length: the same code when dynamic, else another compilation, worth it but once.
    lengths = [40] if backend == "inductor" and not dynamic else [40, 57]
    for length in lengths:
        case = Case(topk=3, length=length, queries=length, padding="left")
        leaves = [tensor.nan_to_num().requires_grad_() for tensor in case.inputs()]
        expected = loss(*leaves, case.key_mask())
        got = compiled(*leaves, case.key_mask())
        torch.testing.assert_close(got, expected, **TOLERANCE[torch.float32])
        for grad, want in zip(
            torch.autograd.grad(got, leaves), torch.autograd.grad(expected, leaves), strict=True
        ):
            torch.testing.assert_close(grad, want, **TOLERANCE[torch.float32])


def test_five_lengths_take_two_graphs() -> None:
    graphs = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(
        lambda q, k, v: moba_attention(q, k, v, 8, 2), backend=graphs, fullgraph=True
    )
    for length in (20, 24, 31, 64, 9):
        inputs = Case(length=length, queries=length).inputs()
        assert torch.equal(compiled(*inputs), moba_attention(*inputs, 8, 2))
    assert graphs.frame_count == 2


def test_every_length_fits_an_export_with_a_dynamic_length() -> None:
    class Module(torch.nn.Module):
        def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            return moba_attention(query, key, value, 8, 2)

    length = torch.export.Dim("length", min=2, max=1024)
    shapes = ({2: length},) * 3
    program = torch.export.export(Module(), Case().inputs(), dynamic_shapes=shapes)
    found = [node for node in program.graph.nodes if node.target is OPERATOR.default]
    assert len(found) == 1
    for tokens in (3, 8, 57):
        inputs = Case(length=tokens, queries=tokens).inputs()
        assert torch.equal(program.module()(*inputs), moba_attention(*inputs, 8, 2))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("compiled", [False, True])
def test_autocast_casts_as_it_does_for_dense_attention(dtype: torch.dtype, compiled: bool) -> None:
    query, key, value = leaves_of(Case())
    mixed = (query, key.detach().to(dtype), value.detach().to(torch.bfloat16))

    def function(*inputs: Tensor) -> Tensor:
        return moba_attention(*inputs, 8, 2)

    if compiled:
        function = torch.compile(function, backend="aot_eager", fullgraph=True)
    expected = moba_attention(query.to(dtype), key.to(dtype), value.to(dtype), 8, 2)
    with torch.autocast("cpu", dtype=dtype):
        dense = F.scaled_dot_product_attention(query, key, value, enable_gqa=True)
        assert function(*mixed).dtype == dtype
        out = function(query, key, value)
    assert out.dtype == dense.dtype == dtype
    assert torch.equal(out, expected)
    out.sum().backward()
    assert query.grad is not None
    assert query.grad.dtype == torch.float32
    with torch.autocast("cpu", enabled=False):
        assert moba_attention(query, key, value, 8, 2).dtype == torch.float32


@pytest.mark.usefixtures("kernel")
def test_autocast_does_not_reach_into_a_kernel() -> None:
    inputs = [torch.randn(1, heads, 300, 16).bfloat16() for heads in (4, 2, 2)]
    out, lse = OPERATOR(*inputs, 16, 3)
    grads = BACKWARD(out, None, *inputs, out, lse, 16, 3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        again, lse_again = OPERATOR(*inputs, 16, 3)
        grads_again = BACKWARD(out, None, *inputs, out, lse, 16, 3)
    assert torch.equal(out, again)
    assert torch.equal(lse, lse_again)
    assert all(torch.equal(a, b) for a, b in zip(grads, grads_again, strict=True))


def test_a_gpu_tensor_gets_the_torch_kernel() -> None:
    assert moba.kernel_for(torch.device("cuda")) is tiled


FALLBACK = """
import warnings
import torch
from moonfx import moba_attention
from moonfx.kernels import cpu

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


def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.zeros(shape, dtype=dtype)


def mask(*shape: int, dtype: torch.dtype = torch.bool) -> Tensor:
    return torch.ones(shape, dtype=dtype)


BAD: list[tuple[str, dict[str, Any], type[Exception], str]] = [
    ("block 0", {"block": 0}, ValueError, "block must be at least 1 token, got 0"),
    ("block a float", {"block": 8.0}, TypeError, "block must be an int, got 8.0 (float)"),
    ("block a bool", {"block": True}, TypeError, "block must be an int, got True (bool)"),
    ("topk 0", {"topk": 0}, ValueError, "topk must be at least 1 block (the query's own), got 0"),
    ("topk a string", {"topk": "3"}, TypeError, "topk must be an int, got '3' (str)"),
    ("sinks -1", {"sinks": -1}, ValueError, "got sinks=-1 with topk=2"),
    ("sinks topk", {"sinks": 2}, ValueError, "got sinks=2 with topk=2 (topk=2 takes 0 to 1)"),
    ("sinks, topk 1", {"topk": 1, "sinks": 1}, ValueError, "topk=1 needs sinks=0"),
    ("sinks a bool", {"sinks": False}, TypeError, "sinks must be an int, got False (bool)"),
    ("scale a string", {"scale": "1"}, TypeError, "scale must be a number or None, got '1' (str)"),
    ("scale a bool", {"scale": True}, TypeError, "scale must be a number or None, got True (bool)"),
    ("scale nan", {"scale": float("nan")}, ValueError, "scale must be finite, got nan"),
    ("no tensor", {"key": [1.0]}, TypeError, "key must be a tensor, got list"),
    (
        "float64",
        {"query": zeros(2, 4, 10, 8, dtype=torch.float64)},
        TypeError,
        "query must be float32, bfloat16 or float16, got float64",
    ),
    (
        "integers",
        {"value": zeros(2, 2, 16, 8, dtype=torch.int32)},
        TypeError,
        "value must be float32, bfloat16 or float16, got int32",
    ),
    (
        "mixed dtypes",
        {"key": zeros(2, 2, 16, 8, dtype=torch.bfloat16)},
        TypeError,
        "key must have query's dtype, float32, got bfloat16",
    ),
    (
        "3-D",
        {"query": zeros(4, 10, 8)},
        ValueError,
        "query must have 4 dimensions [batch, heads, tokens, head_dim], got 3: [4, 10, 8]",
    ),
    (
        "another batch size",
        {"value": zeros(3, 2, 16, 8)},
        ValueError,
        "value must have query's batch size, 2, got 3",
    ),
    (
        "heads not a multiple",
        {"query": zeros(2, 5, 10, 8)},
        ValueError,
        "query's head count must be a multiple of key's, got 5 query heads and 2 key heads",
    ),
    (
        "no key head",
        {"key": zeros(2, 0, 16, 8), "value": zeros(2, 0, 16, 8)},
        ValueError,
        "query's head count must be a multiple of key's, got 4 query heads and 0 key heads",
    ),
    (
        "another value head count",
        {"value": zeros(2, 4, 16, 8)},
        ValueError,
        "value must have as many heads as key, 2, got 4",
    ),
    (
        "another head_dim",
        {"key": zeros(2, 2, 16, 6)},
        ValueError,
        "key must have query's head_dim, 8, got 6",
    ),
    (
        "another value length",
        {"value": zeros(2, 2, 15, 8)},
        ValueError,
        "value must have as many tokens as key, 16, got 15",
    ),
    (
        "more queries than keys",
        {"query": zeros(2, 4, 17, 8)},
        ValueError,
        "query must have no more tokens than key, 16 (attention is causal",
    ),
    ("mask a list", {"key_mask": [True]}, TypeError, "key_mask must be a tensor or None, got list"),
    (
        "mask of integers",
        {"key_mask": mask(2, 16, dtype=torch.int64)},
        TypeError,
        "key_mask must be bool, True for a real token, got int64",
    ),
    (
        "mask of queries",
        {"key_mask": mask(2, 10)},
        ValueError,
        "key_mask must be [batch, key tokens], [2, 16], got [2, 10]",
    ),
    (
        "mask 4-D",
        {"key_mask": mask(2, 1, 1, 16)},
        ValueError,
        "key_mask must be [batch, key tokens], [2, 16], got [2, 1, 1, 16]",
    ),
    (
        "key on another device",
        {"key": zeros(2, 2, 16, 8).to("meta")},
        ValueError,
        "key must be on query's device, cpu, got meta",
    ),
    (
        "mask on another device",
        {"key_mask": mask(2, 16).to("meta")},
        ValueError,
        "key_mask must be on query's device, cpu, got meta",
    ),
]


@pytest.mark.parametrize(
    ("changes", "error", "message"), [row[1:] for row in BAD], ids=[row[0] for row in BAD]
)
def test_bad_input_is_named_before_any_work(
    changes: dict[str, Any],
    error: type[Exception],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def work(device: torch.device) -> None:
        raise AssertionError("a kernel was asked for")

    monkeypatch.setattr(moba, "kernel_for", work)
    arguments: dict[str, Any] = {
        "query": zeros(2, 4, 10, 8),
        "key": zeros(2, 2, 16, 8),
        "value": zeros(2, 2, 16, 8),
        "block": 4,
        "topk": 2,
    }
    with pytest.raises(error) as raised:
        moba_attention(**(arguments | changes))
    assert message in str(raised.value)


def test_the_operator_itself_refuses_shapes_that_do_not_fit() -> None:
    query, key = zeros(2, 4, 10, 8), zeros(2, 2, 16, 8)
    with pytest.raises(ValueError, match="value must have as many tokens as key"):
        OPERATOR(query, key, key[:, :, :9], 4, 2)
    with pytest.raises(ValueError, match="topk=1 needs sinks=0"):
        OPERATOR(query, key, key, 4, 1, 1)


SIZES = [
    (1, 1, 8, 2),
    (5, 5, 8, 2),
    (40, 40, 8, 2),
    (40, 40, 8, 1),
    (37, 37, 8, 3),
    (9, 61, 8, 2),
    (1, 64, 8, 3),
    (1, 65, 8, 3),
    (50, 50, 7, 3),
    (12, 30, 1, 4),
    (40, 40, 8, 9),
]


@pytest.mark.parametrize(("queries", "length", "block", "topk"), SIZES)
def test_flops_are_those_of_the_keys_attended(
    queries: int, length: int, block: int, topk: int
) -> None:
    case = Case(
        queries=queries, length=length, block=block, topk=topk, dim=8, value_dim=4, scale=1.0
    )
    leaves = leaves_of(case)
    chosen = reference.select_blocks(*leaves[:2], block, topk)
    keys = chosen.repeat_interleave(block, -1)[..., :length]
    keys &= torch.ones(queries, length, dtype=torch.bool).tril(length - queries)
    attended = int(keys.sum())
    heads = case.batch * case.kv_heads * case.group
    assert flops.attended_keys(queries, length, block, topk) * heads == attended

    with FlopCounterMode(display=False) as forward:
        out = moba_attention(*leaves, block, topk)
    assert forward.get_total_flops() == attended * 2 * (8 + 4)
    with FlopCounterMode(display=False) as backward:
        out.sum().backward()
    assert backward.get_total_flops() == attended * (6 * 8 + 4 * 4)


def test_backward_flops_are_two_and_a_half_times_the_forward() -> None:
    shape = torch.Size((2, 4, 40, 8))
    forward = flops.forward_flops(shape, shape, shape, 8, 2, out_val=None)
    backward = flops.backward_flops(*[shape] * 7, 8, 2, out_val=None)
    assert backward * 2 == forward * 5
