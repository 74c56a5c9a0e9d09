"""What the operator refuses, before any work, and how it says so."""

from typing import Any

import pytest
import torch
from torch import Tensor

from moonfx import moba_attention
from moonfx.ops import checks, moba
from tests.support.moba_cases import Case

OPERATOR = torch.ops.moonfx.moba_attention


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
    ("softcap a bool", {"softcap": True}, TypeError, "softcap must be a number, got True (bool)"),
    ("softcap None", {"softcap": None}, TypeError, "softcap must be a number, got None"),
    ("softcap -1", {"softcap": -1.0}, ValueError, "softcap must be 0 (none) or more, got -1.0"),
    ("softcap inf", {"softcap": float("inf")}, ValueError, "softcap must be finite, got inf"),
    ("causal 1", {"causal": 1}, TypeError, "causal must be a bool, got 1 (int)"),
    (
        "fewer queries, not causal",
        {"causal": False},
        ValueError,
        "query must have as many tokens as key, 16, with causal=False (query i is at key i), "
        "got 10",
    ),
    (
        "more queries, not causal",
        {"causal": False, "query": zeros(2, 4, 17, 8)},
        ValueError,
        "query must have as many tokens as key, 16, with causal=False (query i is at key i), "
        "got 17",
    ),
    ("bias a float", {"key_bias": 1.0}, TypeError, "key_bias must be a tensor or None, got float"),
    (
        "bias in bfloat16",
        {"key_bias": zeros(2, 4, 16, dtype=torch.bfloat16)},
        TypeError,
        "key_bias must be float32, got bfloat16",
    ),
    *(
        (
            f"bias {size}",
            {"key_bias": zeros(*size)},
            ValueError,
            "key_bias must be [batch or 1, query heads or 1, key tokens], [2 or 1, 4 or 1, 16], "
            f"got {list(size)}",
        )
        for size in ((2, 2, 16), (3, 4, 16), (2, 4, 10), (4, 16), (2, 4, 10, 16))
    ),
    (
        "bias on another device",
        {"key_bias": zeros(2, 4, 16).to("meta")},
        ValueError,
        "key_bias must be on query's device, cpu, got meta",
    ),
    (
        "bias with a negative scale",
        {"key_bias": zeros(1, 1, 16), "scale": -0.5},
        ValueError,
        "scale must be above 0 with a key_bias (the gate divides by it), got -0.5",
    ),
    (
        "bias with scale 0",
        {"key_bias": zeros(1, 1, 16), "scale": 0},
        ValueError,
        "scale must be above 0 with a key_bias (the gate divides by it), got 0",
    ),
    (
        "segments a list",
        {"segments": [0]},
        TypeError,
        "segments must be a tensor or None, got list",
    ),
    (
        "segments bool",
        {"segments": mask(2, 16)},
        TypeError,
        "segments must be integers, one number per sequence, got bool",
    ),
    (
        "segments float",
        {"segments": zeros(2, 16)},
        TypeError,
        "segments must be integers, one number per sequence, got float32",
    ),
    (
        "segments of queries",
        {"segments": mask(2, 10, dtype=torch.int64)},
        ValueError,
        "segments must be [batch, key tokens], [2, 16], got [2, 10]",
    ),
    (
        "segments on another device",
        {"segments": mask(2, 16, dtype=torch.int32).to("meta")},
        ValueError,
        "segments must be on query's device, cpu, got meta",
    ),
    ("means a list", {"block_means": [0.0]}, TypeError, "block_means must be a tensor or None"),
    (
        "means in bfloat16",
        {"block_means": zeros(2, 2, 3, 8, dtype=torch.bfloat16)},
        TypeError,
        "block_means must be float32, got bfloat16",
    ),
    *(
        (
            f"means {size}",
            {"block_means": zeros(*size)},
            ValueError,
            "block_means must be [batch, key heads, blocks, head_dim], [2, 2, 3 or more, 8], "
            f"got {list(size)}",
        )
        for size in ((2, 4, 3, 8), (1, 2, 3, 8), (2, 2, 2, 8), (2, 2, 3, 4), (2, 2, 3))
    ),
    (
        "means with segments",
        {"block_means": zeros(2, 2, 3, 8), "segments": mask(2, 16, dtype=torch.int64)},
        ValueError,
        "block_means must be None with segments",
    ),
    (
        "means, not causal",
        {"block_means": zeros(2, 2, 4, 8), "query": zeros(2, 4, 16, 8), "causal": False},
        ValueError,
        "block_means must be None with causal=False",
    ),
    (
        "means on another device",
        {"block_means": zeros(2, 2, 3, 8).to("meta")},
        ValueError,
        "block_means must be on query's device, cpu, got meta",
    ),
    (
        "recompute_routing 1",
        {"recompute_routing": 1},
        TypeError,
        "recompute_routing must be True or False, got 1",
    ),
    (
        "sink logits a float",
        {"sink_logits": 0.0},
        TypeError,
        "sink_logits must be a tensor or None, got float",
    ),
    (
        "sink logits integers",
        {"sink_logits": mask(4, dtype=torch.int64)},
        TypeError,
        "sink_logits must be float32, bfloat16 or float16, got int64",
    ),
    (
        "sink logits of key heads",
        {"sink_logits": zeros(2)},
        ValueError,
        "sink_logits must be [query heads], [4], got [2]",
    ),
    (
        "sink logits on another device",
        {"sink_logits": zeros(4).to("meta")},
        ValueError,
        "sink_logits must be on query's device, cpu, got meta",
    ),
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
    with pytest.raises(ValueError, match="query must have as many tokens as key"):
        OPERATOR(query, key, key, 4, 2, causal=False)
    with pytest.raises(ValueError, match=r"key_bias must be \[batch or 1"):
        OPERATOR(query, key, key, 4, 2, key_bias=zeros(2, 4, 10))
    with pytest.raises(ValueError, match=r"segments must be \[batch, key tokens\]"):
        OPERATOR(query, key, key, 4, 2, segments=mask(2, 10, dtype=torch.int64))
    one = mask(2, 16, dtype=torch.int64)
    with pytest.raises(ValueError, match="block_means must be None with segments"):
        OPERATOR(query, key, key, 4, 2, segments=one, block_means=zeros(2, 2, 3, 8))
    with pytest.raises(ValueError, match="softcap must be 0"):
        OPERATOR(query, key, key, 4, 2, softcap=-2.0)


@pytest.mark.parametrize("dtype", checks.INTEGERS, ids=str)
def test_segments_are_integers_of_any_width(dtype: torch.dtype) -> None:
    case = Case(topk=2, packing="runs")
    segments = torch.arange(40).div(9, rounding_mode="floor").expand(2, -1)
    expected = moba_attention(*case.inputs(), 8, 2, segments=segments)
    assert torch.equal(moba_attention(*case.inputs(), 8, 2, segments=segments.to(dtype)), expected)
