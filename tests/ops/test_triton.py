"""The operator on Triton's kernels, by the interpreter: routes kept, gradients, fake values."""

import importlib
import os
from typing import Any

import pytest
import torch
from torch import Tensor

from moonfx import moba_attention
from moonfx.kernels.common.arguments import MobaArguments
from moonfx.kernels.reference import moba as reference
from moonfx.ops import dispatch
from tests.support.moba_cases import Case

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("a CPU tensor needs Triton's interpreter", allow_module_level=True)
pytest.importorskip("triton")
gpu = importlib.import_module("moonfx.kernels.gpu.moba")

OPERATOR = torch.ops.moonfx.moba_attention
BACKWARD = torch.ops.moonfx.moba_attention_backward
# float32: sums of at most 100 products of size 1, in another order.
TOLERANCE = {"rtol": 1e-5, "atol": 2e-5}

SMALL = Case(batch=1, kv_heads=1, length=20, queries=20)  # the interpreter is slow
CASES = [
    ("sparse", SMALL.but(sinks=1)),
    ("dense", SMALL.but(topk=3)),
    ("one block", SMALL.but(block=64)),
    ("packed, bias", SMALL.but(packing="runs", bias="by head", scale=0.25)),
    ("one query, means given, padding", SMALL.but(queries=1, means="other", padding="left")),
]


@pytest.fixture(autouse=True)
def on_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "triton_kernels", lambda device: gpu)


def by_definition(*tensors: Tensor, **named: Any) -> tuple[Tensor, Tensor]:
    return reference.moba_attention(*tensors, MobaArguments(**named))


def prepared(case: Case) -> tuple[list[Tensor], dict[str, Any]]:
    """query, key, value and the bias if there is one, as leaves; and the named arguments."""
    named = case.named()
    leaves = [x.nan_to_num().requires_grad_() for x in case.inputs()]
    if (bias := named.get("key_bias")) is not None:
        named["key_bias"] = bias.nan_to_num().requires_grad_()
        leaves.append(named["key_bias"])
    return leaves, named


@pytest.mark.parametrize("case", [case for _, case in CASES], ids=[name for name, _ in CASES])
def test_the_operator_and_its_gradients_equal_the_reference(case: Case) -> None:
    runs = []
    for function in (moba_attention, by_definition):
        leaves, named = prepared(case)
        more = {"return_lse": True} if function is moba_attention else {}
        out, lse = function(*leaves[:3], block=case.block, topk=case.topk, **named, **more)
        seen = lse.masked_fill(lse.isneginf(), 0.0)
        runs.append([out, seen, *torch.autograd.grad(out.square().sum() + seen.sum(), leaves)])
    for mine, theirs in zip(*runs, strict=True):
        torch.testing.assert_close(mine, theirs, **TOLERANCE)


def test_routes_kept_or_found_again_give_the_same_bits() -> None:
    runs = []
    for recompute in (False, True):
        leaves, _ = prepared(CASES[0][1])
        out = moba_attention(*leaves, 8, 2, sinks=1, recompute_routing=recompute)
        runs.append([out, *torch.autograd.grad(out.square().sum(), leaves)])
    assert all(torch.equal(x, y) for x, y in zip(*runs, strict=True))


@pytest.mark.parametrize("case", [case for _, case in CASES[:2]], ids=[x for x, _ in CASES[:2]])
def test_fake_results_are_like_the_real_ones(case: Case) -> None:
    leaves, _ = prepared(case)
    arguments = case.arguments()
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(OPERATOR, (*leaves, *arguments), test_utils=tests)
    inputs = [x.detach() for x in leaves]
    saved = OPERATOR(*inputs, *arguments)
    given = (saved[0], None, *inputs, *saved, *arguments)
    torch.library.opcheck(BACKWARD, given, test_utils=tests)
