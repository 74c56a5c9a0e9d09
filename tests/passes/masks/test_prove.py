"""Several masks of one attention, brought to one conjunction: what they are together."""

from typing import Any

import pytest
import sympy
import torch

from moonfx.passes.masks.prove import ANTI_CAUSAL, Proof, ReadMask, prove
from moonfx.passes.symbolic.expressions import load_symbol
from moonfx.passes.symbolic.indices import BATCH, HEAD, KEY, QUERY, Lengths
from tests.support.reading import plain_reader, traced

i, j = QUERY, KEY
N = sympy.Symbol("N", integer=True, positive=True)
LENGTHS = Lengths((N,), (N,), one_query=False)
REAL = sympy.Ne(load_symbol("real")(BATCH, KEY), 0)
LOW = sympy.Integer(-(10**9))


def added(keep: Any, hidden: Any = LOW) -> Any:
    return sympy.Piecewise((0, keep), (hidden, True))


def zero_or_one(keep: Any) -> Any:
    return sympy.Piecewise((1, keep), (0, True))


def proof(*masks: ReadMask, is_causal: bool = False, sees_constants: bool = False) -> Proof:
    return prove(masks, LENGTHS, plain_reader(), is_causal=is_causal, sees_constants=sees_constants)


CAUSAL = ReadMask(j <= i, "keep")
PROVED: list[tuple[str, tuple[ReadMask, ...], bool, Any]] = [
    ("no mask", (), False, None),
    ("kept", (CAUSAL,), True, None),
    ("dropped", (ReadMask(j > i, "drop"),), True, None),
    ("added", (ReadMask(added(j <= i), "additive"),), True, None),
    ("added and scaled", (ReadMask(added(j <= i), "additive", 0.5),), True, None),
    ("two masks", (CAUSAL, ReadMask(added(REAL), "additive")), True, REAL),
    ("one of numbers", (ReadMask(zero_or_one(j <= i), "keep"),), True, None),
    (
        "multiplied under the same",
        (ReadMask(added(j <= i), "additive"), ReadMask(zero_or_one(j <= i), "times")),
        True,
        None,
    ),
    ("padding alone", (ReadMask(sympy.Not(REAL), "drop"),), False, REAL),
]


@pytest.mark.parametrize(
    ("masks", "causal", "padding"), [p[1:] for p in PROVED], ids=[p[0] for p in PROVED]
)
def test_masks_are_proved_together(masks: tuple[ReadMask, ...], causal: bool, padding: Any) -> None:
    assert proof(*masks) == Proof(causal=causal, padding=padding)


def test_an_operator_that_is_told_to_be_causal_is() -> None:
    assert proof(is_causal=True) == Proof(causal=True)
    assert proof(ReadMask(REAL, "keep"), is_causal=True) == Proof(causal=True, padding=REAL)


DECLINED: list[tuple[str, tuple[ReadMask, ...], str, int]] = [
    ("inf added", (CAUSAL, ReadMask(sympy.oo, "additive")), "additive bias: the constant oo", 1),
    (
        "scaled to nothing",
        (ReadMask(added(j <= i, LOW), "additive", 1e-6),),
        "additive bias: ",
        0,
    ),
    ("multiplied by more", (CAUSAL, ReadMask(2 * i, "times")), "the scores are scaled by", 1),
    (
        "multiplied by what hides more",
        (CAUSAL, ReadMask(zero_or_one(REAL), "times")),
        "the scores are multiplied by a mask, which makes them 0 and does not hide them",
        1,
    ),
    ("anti-causal", (ReadMask(j >= i, "keep"),), ANTI_CAUSAL, 0),
    ("window", (CAUSAL, ReadMask(j > i - 4, "keep")), "sliding window of 4 tokens", 0),
    (
        "two kinds of segments",
        tuple(
            ReadMask(sympy.Eq(load_symbol(x)(BATCH, i), load_symbol(x)(BATCH, j)), "keep")
            for x in ("a", "b")
        ),
        "packed sequences, told apart by 2 tensors at once",
        0,
    ),
]


@pytest.mark.parametrize(
    ("masks", "reason", "at"), [d[1:] for d in DECLINED], ids=[d[0] for d in DECLINED]
)
def test_what_is_not_proved_says_why_and_which_mask(
    masks: tuple[ReadMask, ...], reason: str, at: int
) -> None:
    found = proof(*masks)
    assert found.reason.startswith(reason)
    assert (found.at, found.causal) == (at, False)


def test_segment_ids_are_packed_sequences_beside_a_causal_mask() -> None:
    gm = traced(lambda ids: ids + 1, torch.ones(2, 5, dtype=torch.long))
    ids, reader = next(iter(gm.graph.nodes)), plain_reader()
    of_query, of_key = (reader.read(ids, (BATCH, at)) for at in (i, j))
    masks = CAUSAL, ReadMask(sympy.Eq(of_query, of_key), "keep")
    found = prove(masks, LENGTHS, reader, is_causal=False, sees_constants=False)
    assert (found.causal, found.reason, found.segments) == (True, "", of_key)


def test_a_bias_of_the_keys_is_kept_and_one_of_both_is_not() -> None:
    slope = load_symbol("slope", whole=False)(HEAD)
    found = proof(CAUSAL, ReadMask(slope * (j - i), "additive"))
    assert (found.causal, found.reason) == (True, "")
    assert found.bias is not None
    assert proof(CAUSAL, ReadMask(slope * (j - i) ** 2, "additive")).reason.startswith("additive")


def test_a_constant_of_a_query_counts_where_something_sees_it() -> None:
    slope = load_symbol("slope", whole=False)(HEAD)
    constant = ReadMask(slope * (j - i), "additive")
    unseen, seen = (proof(CAUSAL, constant, sees_constants=x) for x in (False, True))
    assert unseen.reason == ""
    assert seen != unseen
