"""The operator in standard ONNX operators: onnxruntime gives what the reference gives."""

import warnings
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

import moonfx
from moonfx.kernels.common.arguments import MobaArguments
from moonfx.kernels.reference import moba as reference
from tests.support.moba_cases import Case

onnxruntime = pytest.importorskip("onnxruntime")

BASE = Case(value_dim=24)  # two query heads per key head, and values wider than keys


@dataclass(frozen=True)
class Row:
    """One use of the operator.

    Args:
        setting: block, topk, sinks, and the rest by name.
        given: which of key_mask, segments, key_bias and block_means the call has.
        query: "all"; "last" for fewer queries than keys; "zero" makes every gate score a tie.
        heads: "one each" gives every query head its own key head.
    """

    name: str
    setting: dict[str, Any]
    given: tuple[str, ...] = ()
    query: str = "all"
    heads: str = "grouped"


def row(name: str, *given: str, query: str = "all", heads: str = "grouped", **setting: Any) -> Row:
    return Row(name, {"block": 8, "topk": 2, "sinks": 0} | setting, given, query, heads)


ROWS = (
    row("the paper's rule"),
    row("own block alone", topk=1),
    row("blocks of one token", block=1, topk=3),
    row("more blocks chosen than there are", topk=100),
    row("a block longer than the sequence", block=128),
    row("sinks", topk=3, sinks=2),
    row("sinks take every place but the own", topk=3, sinks=2, query="last"),
    row("ties go to the lower block", topk=3, query="zero"),
    row("ties with sinks", topk=3, sinks=1, query="zero"),
    row("fewer queries than keys", query="last"),
    row("a head of keys for each of queries", heads="one each"),
    row("scale", scale=0.25),
    row("softcap", softcap=2.0),
    row("key bias", "key_bias", scale=0.25),
    row("key bias and softcap", "key_bias", scale=0.5, softcap=3.0, topk=3, sinks=1),
    row("padding", "key_mask"),
    row("padding, sinks, fewer queries", "key_mask", topk=3, sinks=1, query="last"),
    row("padding and bias", "key_mask", "key_bias", scale=0.25),
    row("means given", "block_means"),
    row(
        "means given, padding, bias, sinks",
        *("block_means", "key_mask", "key_bias"),
        scale=0.5,
        topk=3,
        sinks=1,
    ),
    row("both ways", causal=False),
    row("both ways, ties", causal=False, topk=3, query="zero"),
    row("both ways, sinks", causal=False, topk=3, sinks=1),
    row("both ways, two sinks, ties", causal=False, topk=4, sinks=2, query="zero"),
    row("both ways, padding", "key_mask", causal=False, topk=3, sinks=1),
    row("packed", "segments", block=4),
    row("packed, ties", "segments", block=2, topk=3, query="zero"),
    row("packed, padding, sinks", "segments", "key_mask", block=4, topk=3, sinks=1),
    row("packed, both ways", "segments", "key_mask", block=4, causal=False),
    row(
        "everything",
        *("segments", "key_mask", "key_bias"),
        block=4,
        topk=3,
        sinks=1,
        scale=0.5,
        softcap=3.0,
        causal=False,
    ),
)

TRACED = BASE.but(padding="left", packing="runs", bias="by head", means="other")
CASES = {
    "as traced": TRACED,
    "one token": TRACED.but(batch=1, length=1, queries=1),
    "less than a block": TRACED.but(batch=3, length=7, queries=7, packing="interleaved"),
    "a whole number of blocks": TRACED.but(length=32, queries=32, padding="right"),
    "one token more": TRACED.but(
        length=33, queries=33, padding="one row empty", packing="one token each"
    ),
    "holes": TRACED.but(batch=3, length=64, queries=64, padding="holes", packing="one row whole"),
    "long": TRACED.but(batch=1, length=200, queries=200, packing="interleaved", bias="alibi"),
}


def operands(row: Row, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor, dict[str, Any]]:
    """A row's query, key and value, and the named tensors that it is given."""
    query, key, value = inputs["query"], inputs["key"], inputs["value"]
    if row.heads == "one each":
        query = query[:, ::2]
    if row.query == "last":
        query = inputs["last"]
    elif row.query == "zero":
        query = query * 0.0
    if "key_mask" in row.given:  # not even NaN may count
        hidden = ~inputs["key_mask"][:, None, :, None]
        key, value = (x.masked_fill(hidden, torch.nan) for x in (key, value))
    return query, key, value, {name: inputs[name] for name in row.given}


class EveryRow(nn.Module):
    """The operator once for every row; out and lse of each."""

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        last: Tensor,
        key_mask: Tensor,
        segments: Tensor,
        key_bias: Tensor,
        block_means: Tensor,
    ) -> list[Tensor]:
        inputs = {
            "query": query,
            "key": key,
            "value": value,
            "last": last,
            "key_mask": key_mask,
            "segments": segments,
            "key_bias": key_bias,
            "block_means": block_means,
        }
        results: list[Tensor] = []
        for each in ROWS:
            q, k, v, given = operands(each, inputs)
            results += torch.ops.moonfx.moba_attention(q, k, v, **each.setting, **given)[:2]
        return results


def inputs_of(case: Case) -> dict[str, Tensor]:
    query, key, value = (x.nan_to_num(0.0) for x in case.inputs())
    key_mask, segments, key_bias = case.key_mask(), case.segments(), case.key_bias()
    block_means = case.block_means()
    assert block_means is not None
    assert key_mask is not None
    assert segments is not None
    assert key_bias is not None
    return {
        "query": query,
        "key": key,
        "value": value,
        "last": query[:, :, -max(1, case.length // 3) :],
        "key_mask": key_mask,
        "segments": segments,
        "key_bias": key_bias,
        "block_means": block_means.nan_to_num(0.0),
    }


def translated(program: torch.export.ExportedProgram) -> Any:
    """The ONNX program, as moonfx translates it and not optimised."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.onnx.export(
            program,
            dynamo=True,
            custom_translation_table=moonfx.onnx_table(),
            optimize=False,
            verbose=False,
        )


@pytest.fixture(scope="module")
def found() -> dict[str, list[Tensor]]:
    """What onnxruntime gives for each case, from one file traced at one of them."""
    size = Dim.DYNAMIC
    heads, tokens = {0: size, 2: size}, {0: size, 1: size}
    shapes = (heads, heads, heads, heads, tokens, tokens, {2: size}, heads)
    inputs = tuple(inputs_of(TRACED).values())
    program = translated(torch.export.export(EveryRow().eval(), inputs, dynamic_shapes=shapes))
    session = onnxruntime.InferenceSession(program.model_proto.SerializeToString())
    return {
        name: [
            torch.from_numpy(x)
            for x in session.run(None, {k: v.numpy() for k, v in inputs_of(case).items()})
        ]
        for name, case in CASES.items()
    }


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("index", range(len(ROWS)), ids=[r.name for r in ROWS])
def test_onnxruntime_gives_what_the_reference_gives(
    index: int, case: str, found: dict[str, list[Tensor]]
) -> None:
    each = ROWS[index]
    query, key, value, given = operands(each, inputs_of(CASES[case]))
    out, lse = reference.moba_attention(query, key, value, MobaArguments(**each.setting, **given))
    # The inputs lie on a grid that makes the routing exact; the rest is rounding of float32 sums.
    close = {"atol": 3e-6, "rtol": 1e-5}
    torch.testing.assert_close(found[case][2 * index], out, **close)
    torch.testing.assert_close(found[case][2 * index + 1], lse, **close)


def test_the_rows_route_differently(found: dict[str, list[Tensor]]) -> None:
    results = {r.name: found["long"][2 * i] for i, r in enumerate(ROWS) if r.query == "all"}
    base = results.pop("the paper's rule")
    same = [k for k, x in results.items() if x.shape == base.shape and torch.allclose(x, base)]
    assert same == []


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32_and_cast_back(dtype: torch.dtype) -> None:
    class Once(nn.Module):
        def forward(self, *inputs: Tensor) -> tuple[Tensor, Tensor]:
            halves = (x.to(dtype) for x in inputs)
            out, lse, _ = torch.ops.moonfx.moba_attention(*halves, 8, 2)
            return out.float(), lse

    inputs = BASE.inputs()
    program = translated(torch.export.export(Once().eval(), inputs))
    session = onnxruntime.InferenceSession(program.model_proto.SerializeToString())
    feed = {i.name: x.numpy() for i, x in zip(session.get_inputs(), inputs, strict=True)}
    out, lse = (torch.from_numpy(x) for x in session.run(None, feed))
    expected, expected_lse = reference.moba_attention(
        *(x.to(dtype) for x in inputs), MobaArguments(8, 2)
    )
    # One rounding to the dtype, at the end: it may fall the other way, by one unit.
    torch.testing.assert_close(out, expected.float(), atol=torch.finfo(dtype).eps / 2, rtol=0)
    assert torch.equal(out, out.to(dtype).float())
    torch.testing.assert_close(lse, expected_lse, atol=3e-6, rtol=1e-5)
