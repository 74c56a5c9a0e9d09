"""Gradients on a GPU (under Triton's interpreter where there is none) against autograd's."""

import pytest
import torch

pytest.importorskip("triton")

from tests.support.gpu_backward import assert_like_reference
from tests.support.moba_cases import FEATURES, Case


def small(case: Case) -> Case:
    """The interpreter takes a millisecond per operation of a program."""
    length = min(case.length, 48)
    return case.but(kv_heads=1, length=length, queries=min(case.queries, length))


IN_BFLOAT16 = (
    *("bidirectional, sinks", "softcap", "bias: by head", "bias, padding: holes"),
    *("packing and padding: left", "packing, dense", "everything"),
)
SHAPES = [
    ("dense", Case(topk=9)),
    ("dense, padded", Case(topk=9, padding="left")),
    ("dense, some rows see nothing", Case(topk=9, padding="one row empty", bias="all", scale=0.25)),
    ("dense, fewer queries", Case(topk=9, queries=11, group=3)),
    ("own block only, of 1.25 tiles", Case(topk=1, block=40, length=90, queries=90)),
    ("own block only, holes", Case(topk=1, padding="holes", length=70, queries=70)),
    ("values wider", Case(topk=3, sinks=1, value_dim=40)),
    ("values narrower", Case(topk=3, sinks=1, dim=24, value_dim=4, scale=0.25)),
    ("fewer queries", Case(topk=3, queries=9)),
    ("every other number in memory", Case(topk=3, layout="strided")),
    ("one tensor for all heads", Case(topk=3, layout="expanded")),
]


@pytest.mark.parametrize("case", [case for _, case in FEATURES], ids=[name for name, _ in FEATURES])
def test_each_feature_equals_the_reference(case: Case) -> None:
    assert_like_reference(small(case))


@pytest.mark.parametrize("name", IN_BFLOAT16)
def test_features_equal_the_reference_in_bfloat16(name: str) -> None:
    assert_like_reference(small(dict(FEATURES)[name]).but(dtype=torch.bfloat16))


@pytest.mark.parametrize("case", [case for _, case in SHAPES], ids=[name for name, _ in SHAPES])
def test_each_shape_equals_the_reference(case: Case) -> None:
    assert_like_reference(case.but(kv_heads=1))
