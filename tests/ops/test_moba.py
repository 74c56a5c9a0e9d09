"""The operator and the public function: contract, autograd, compilation, errors, FLOPs."""

import os
import subprocess
import sys
import warnings
from collections.abc import Iterator
from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from moonfx import fallback, moba_attention
from moonfx.kernels.common.arguments import MobaArguments
from moonfx.kernels.cpu import moba as cpu
from moonfx.kernels.reference import moba as reference
from moonfx.kernels.torch_ops import moba as tiled
from moonfx.ops import dispatch
from tests.support.moba_cases import FEATURES, GIVEN_MEANS, PACKINGS, Case, feature_cases

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


ROWS = FEATURES + GIVEN_MEANS


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
    named, bias = case.named(), case.key_bias()
    calls = []
    for leaves in (mine, theirs):
        leaves += [] if bias is None else [bias.clone().requires_grad_()]
        calls.append(named | ({} if bias is None else {"key_bias": leaves[3]}))
    out, lse = moba_attention(*mine[:3], case.block, case.topk, **calls[0], return_lse=True)
    expected, expected_lse = reference.moba_attention(
        *theirs[:3], MobaArguments(case.block, case.topk, **calls[1])
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
    for name, grad, want in zip("qkvb"[: len(mine)], grads, wanted, strict=True):
        assert grad.shape == want.shape
        torch.testing.assert_close(grad, want, **tolerance, msg=lambda m, n=name: f"d{n}: {m}")


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("case", [case for _, case in ROWS], ids=[name for name, _ in ROWS])
def test_each_feature_and_its_gradients_equal_the_reference(case: Case) -> None:
    assert_like_reference(case)


@pytest.mark.usefixtures("kernel")
def test_the_operator_and_its_gradients_equal_the_reference() -> None:
    @settings(max_examples=60)
    @given(feature_cases())
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
@pytest.mark.parametrize("packing", PACKINGS[1:])
@pytest.mark.parametrize("causal", [True, False])
def test_a_packed_sequence_is_what_it_is_alone(packing: str, causal: bool) -> None:
    case = Case(length=60, queries=60, topk=3, sinks=1, packing=packing, causal=causal)
    leaves, segments = leaves_of(case), case.segments()
    assert segments is not None
    out = moba_attention(*leaves, 8, 3, sinks=1, causal=causal, segments=segments)
    grad_out = torch.randn_like(out)
    grads = torch.autograd.grad(out, leaves, grad_out)
    for row, ids in enumerate(segments):
        for one in ids.unique():
            here = ids.eq(one)
            alone = [leaf[row : row + 1, :, here].detach().requires_grad_() for leaf in leaves]
            expected = moba_attention(*alone, 8, 3, sinks=1, causal=causal)
            torch.testing.assert_close(
                out[row : row + 1, :, here], expected, **TOLERANCE[torch.float32]
            )
            wanted = torch.autograd.grad(expected, alone, grad_out[row : row + 1, :, here])
            for grad, want in zip(grads, wanted, strict=True):
                torch.testing.assert_close(
                    grad[row : row + 1, :, here], want, **TOLERANCE[torch.float32]
                )


def extra_column(leaves: list[Tensor], mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Dense causal attention with one more logit per head, whose value is 0: out and lse."""
    query, key, value, sink = leaves
    score = query @ key.repeat_interleave(2, 1).mT * query.shape[3] ** -0.5
    hidden = torch.ones(score.shape[2:], dtype=torch.bool).triu(1)
    if mask is not None:
        hidden = hidden | ~mask[:, None, None]
    score = score.masked_fill(hidden, -torch.inf)
    column = sink[:, None, None].expand(score.shape[0], -1, score.shape[2], 1)
    score = torch.cat([score, column.to(score)], -1)
    out = score.softmax(-1)[..., :-1] @ value.repeat_interleave(2, 1)
    return out, score.logsumexp(-1)


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("padding", ["none", "left", "one row empty"])
def test_sink_logits_are_one_more_column_of_the_softmax(padding: str) -> None:
    case = Case(padding=padding)
    mask = case.key_mask()
    inputs = [tensor.nan_to_num() for tensor in case.inputs()]
    inputs.append(torch.tensor([-2.0, 0.0, 1.5, 30.0]))
    mine, theirs = ([x.clone().requires_grad_() for x in inputs] for _ in range(2))
    got = moba_attention(*mine[:3], 8, 5, key_mask=mask, sink_logits=mine[3], return_lse=True)
    expected = extra_column(theirs, mask)
    upstream = [torch.randn_like(x) for x in got]
    grads = torch.autograd.grad(got, mine, upstream)
    wanted = torch.autograd.grad(expected, theirs, upstream)
    for left, right in zip((*got, *grads), (*expected, *wanted), strict=True):
        assert left.isfinite().all()
        torch.testing.assert_close(left, right, **TOLERANCE[torch.float32])


@pytest.mark.usefixtures("kernel")
def test_sink_logits_take_part_of_what_a_query_would_attend() -> None:
    case = Case(topk=3, dtype=torch.bfloat16)
    leaves = leaves_of(case)
    sink = torch.randn(4, dtype=torch.bfloat16, requires_grad=True)
    plain, lse = moba_attention(*leaves, 8, 3, return_lse=True)
    out, more = moba_attention(*leaves, 8, 3, sink_logits=sink, return_lse=True)
    assert out.dtype == torch.bfloat16
    assert more.dtype == torch.float32
    kept = (lse - more).exp()[..., None]
    torch.testing.assert_close(out, (plain * kept).bfloat16(), **TOLERANCE[torch.bfloat16])
    out.float().sum().backward()
    assert sink.grad is not None
    assert sink.grad.dtype == torch.bfloat16


NOTHING_SEEN = [
    ("plain", {}),
    ("bidirectional", {"causal": False}),
    ("softcap", {"softcap": 1.0}),
    ("bias", {"key_bias": torch.randn(2, 4, 40)}),
    ("packed", {"segments": torch.arange(40).remainder(3).expand(2, 40)}),
    ("sink logits", {"sink_logits": torch.randn(4)}),
    ("all", {"causal": False, "softcap": 1.0, "key_bias": torch.randn(1, 1, 40),
             "segments": torch.arange(40).expand(2, 40), "sink_logits": torch.randn(4)}),
]  # fmt: skip


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize(
    "named", [row[1] for row in NOTHING_SEEN], ids=[r[0] for r in NOTHING_SEEN]
)
def test_a_row_without_a_real_key_gives_zero_and_finite_gradients(named: dict[str, Any]) -> None:
    case = Case(padding="one row empty", topk=3)
    leaves = leaves_of(case)
    named = {name: x.clone() if isinstance(x, Tensor) else x for name, x in named.items()}
    more = [named[name].requires_grad_() for name in ("key_bias", "sink_logits") if name in named]
    out, lse = moba_attention(*leaves, 8, 3, key_mask=case.key_mask(), **named, return_lse=True)
    assert out[0].eq(0).all()
    assert out.isfinite().all()
    loss = out.square().sum() + lse[lse.isfinite()].sum()
    for grad in torch.autograd.grad(loss, leaves + more):
        assert grad.isfinite().all()


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
    ("bidirectional, holes", Case(topk=3, causal=False, padding="holes")),
    ("softcap", Case(topk=3, softcap=1.0)),
    ("bias", Case(topk=3, bias="all", scale=0.25)),
    ("bias of all rows, fewer queries", Case(bias="by head", scale=0.25, queries=9)),
    ("bias of all rows and heads, bfloat16", Case(bias="by key", scale=1.0, dtype=torch.bfloat16)),
    ("packed", Case(topk=3, packing="runs")),
    ("means given, holes", Case(topk=3, means="other", padding="holes")),
    ("everything", Case(topk=3, causal=False, softcap=2.0, bias="by row", scale=0.25,
                        packing="interleaved", padding="left", value_dim=4)),
]  # fmt: skip


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("case", [case for _, case in CHECKED], ids=[name for name, _ in CHECKED])
def test_opcheck_passes_on_both_operators(case: Case) -> None:
    # opcheck compares runs by value, and NaN is unlike itself: none under the padding here.
    plain = [tensor.nan_to_num() for tensor in case.inputs()]
    leaves = [tensor.clone().requires_grad_() for tensor in plain]
    arguments = case.arguments()
    for name in ("key_bias", "block_means"):
        if (tensor := getattr(arguments, name)) is not None:
            arguments = replace(arguments, **{name: tensor.nan_to_num()})
    with_leaf = arguments
    if arguments.key_bias is not None:
        with_leaf = replace(arguments, key_bias=arguments.key_bias.clone().requires_grad_())
    torch.library.opcheck(OPERATOR, (*leaves, *with_leaf.values()))
    out, lse, routes = OPERATOR(*plain, *arguments.values())
    lse = lse.nan_to_num(neginf=0.0)
    expanded = torch.ones((), dtype=out.dtype).expand(out.shape)
    for grads in ((torch.ones_like(out), lse), (expanded, None)):
        torch.library.opcheck(BACKWARD, (*grads, *plain, out, lse, routes, *arguments.values()))


def test_a_graph_written_for_the_first_eight_arguments_still_runs() -> None:
    case = Case(topk=3, padding="left")
    old = OPERATOR(*case.inputs(), 8, 3, 1, None, case.key_mask())[:2]
    new = moba_attention(*case.inputs(), 8, 3, sinks=1, key_mask=case.key_mask(), return_lse=True)
    assert all(torch.equal(a, b) for a, b in zip(old, new, strict=True))


def test_without_a_bias_the_backward_gives_an_empty_one() -> None:
    inputs = Case().inputs()
    saved = OPERATOR(*inputs, 8, 2)
    bias = BACKWARD(saved[0], None, *inputs, *saved, 8, 2)[3]
    assert (bias.shape, bias.dtype) == ((0,), torch.float32)


@pytest.mark.usefixtures("kernel")
def test_only_the_bias_may_require_a_gradient() -> None:
    case = Case(topk=3, bias="by head", scale=0.25)
    bias = case.key_bias()
    assert bias is not None
    bias.requires_grad_()
    leaves = leaves_of(case)
    named = case.named() | {"key_bias": bias}
    (alone,) = torch.autograd.grad(moba_attention(*case.inputs(), 8, 3, **named).sum(), bias)
    *_, both = torch.autograd.grad(moba_attention(*leaves, 8, 3, **named).sum(), [*leaves, bias])
    assert alone.shape == bias.shape
    assert torch.equal(alone, both)


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
        expected = reference.moba_attention(*theirs, MobaArguments(8, 3))[index]
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


@pytest.mark.parametrize("dynamic", [False, True])
def test_every_feature_compiles_in_one_graph_with_the_same_gradients(dynamic: bool) -> None:
    def function(*leaves: Tensor, segments: Tensor) -> Tensor:
        out, lse = moba_attention(
            *leaves[:3],
            8,
            3,
            scale=0.25,
            causal=False,
            softcap=2.0,
            key_bias=leaves[3],
            segments=segments,
            sink_logits=leaves[4],
            return_lse=True,
        )
        return out.square().sum() + lse.sum()

    compiled = torch.compile(function, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    for length in (40, 57):
        case = Case(length=length, queries=length, bias="by head", packing="runs")
        leaves = [*leaves_of(case), case.key_bias().requires_grad_()]  # type: ignore[union-attr]
        leaves.append(torch.randn(4, requires_grad=True))
        expected = function(*leaves, segments=case.segments())
        got = compiled(*leaves, segments=case.segments())
        torch.testing.assert_close(got, expected, **TOLERANCE[torch.float32])
        for grad, want in zip(
            torch.autograd.grad(got, leaves), torch.autograd.grad(expected, leaves), strict=True
        ):
            torch.testing.assert_close(grad, want, **TOLERANCE[torch.float32])


def test_five_lengths_take_two_graphs() -> None:
    graphs = CompileCounterWithBackend("aot_eager")
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


def test_autocast_leaves_the_bias_in_float32_and_its_gradient_too() -> None:
    case = Case(topk=3, bias="by head", scale=0.25, causal=False, softcap=2.0, packing="runs")
    leaves, named = leaves_of(case), case.named()
    bias = named["key_bias"] = named["key_bias"].requires_grad_()
    sink = torch.randn(4, requires_grad=True)
    halves = [leaf.bfloat16() for leaf in leaves]
    expected = moba_attention(*halves, 8, 3, **named, sink_logits=sink)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = moba_attention(*leaves, 8, 3, **named, sink_logits=sink)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, expected)
    wanted = torch.autograd.grad(expected.sum(), [bias, sink])
    for grad, want in zip(torch.autograd.grad(out.sum(), [bias, sink]), wanted, strict=True):
        assert grad.dtype == torch.float32
        assert torch.equal(grad, want)


@pytest.mark.usefixtures("kernel")
def test_autocast_does_not_reach_into_a_kernel() -> None:
    inputs = [torch.randn(1, heads, 300, 16).bfloat16() for heads in (4, 2, 2)]
    saved = OPERATOR(*inputs, 16, 3)
    grads = BACKWARD(saved[0], None, *inputs, *saved, 16, 3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        again = OPERATOR(*inputs, 16, 3)
        grads_again = BACKWARD(saved[0], None, *inputs, *saved, 16, 3)
    both = zip((*saved, *grads), (*again, *grads_again), strict=True)
    assert all(torch.equal(a, b) for a, b in both)


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


@pytest.mark.usefixtures("kernel")
def test_given_means_decide_the_choice_and_have_no_gradient() -> None:
    leaves = leaves_of(Case(topk=2, length=64, queries=64))
    means = torch.zeros(2, 2, 7, 8)
    means[:, :, 3] = 8.0
    query = leaves[0].abs()
    means.requires_grad_()
    out = moba_attention(query, *leaves[1:], 8, 2, block_means=means)
    own = [leaf[:, :, 56:] for leaf in leaves[1:]]
    best = [leaf[:, :, 24:32] for leaf in leaves[1:]]
    both = [torch.cat(pair, 2) for pair in zip(best, own, strict=True)]
    expected = F.scaled_dot_product_attention(
        query[:, :, 56:],
        *both,
        attn_mask=torch.ones(8, 16).tril(8).bool(),
        enable_gqa=True,
    )
    torch.testing.assert_close(out[:, :, 56:], expected, **TOLERANCE[torch.float32])
    assert torch.autograd.grad(out.sum(), means, allow_unused=True) == (None,)


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
