"""Gradients of the operator: which there are, of what, and opcheck."""

from typing import Any

import pytest
import torch

from moonfx import moba_attention
from moonfx.kernels.common.arguments import MobaArguments
from moonfx.kernels.reference import moba as reference
from tests.support.moba_cases import Case
from tests.support.moba_operator import BACKWARD, OPERATOR, TOLERANCE, leaves_of

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
            arguments = arguments._replace(**{name: tensor.nan_to_num()})
    with_leaf = arguments
    if arguments.key_bias is not None:
        with_leaf = arguments._replace(key_bias=arguments.key_bias.clone().requires_grad_())
    torch.library.opcheck(OPERATOR, (*leaves, *with_leaf))
    out, lse, routes = OPERATOR(*plain, *arguments)
    lse = lse.nan_to_num(neginf=0.0)
    expanded = torch.ones((), dtype=out.dtype).expand(out.shape)
    for grads in ((torch.ones_like(out), lse), (expanded, None)):
        torch.library.opcheck(BACKWARD, (*grads, *plain, out, lse, routes, *arguments))


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


@pytest.mark.parametrize("operator", [OPERATOR, BACKWARD], ids=["forward", "backward"])
def test_the_schema_has_each_argument_of_a_kernel_with_its_default(operator: Any) -> None:
    named = {x.name: x for x in operator.default._schema.arguments}
    defaults = MobaArguments._field_defaults
    for name in MobaArguments._fields:
        assert named[name].has_default_value() == (name in defaults)
        if name in defaults:
            assert named[name].default_value == defaults[name]
