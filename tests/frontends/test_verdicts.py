"""Which of two calls decides whether a layer is sparse, and what is said of the other."""

from typing import Any

import pytest
import torch
from torch import fx

from moonfx.site import AttentionSite, Declined
from moonfx.verdicts import Verdicts
from tests.support.attention_sites import site, sparse_site


def step(layer: str, **fields: Any) -> AttentionSite:
    return site(layer, key_length=40, query_length=1, **fields)


def declined(made: AttentionSite, reason: str = "a window") -> AttentionSite:
    made.action, made.reject = "declined", Declined(reason, made.output)
    return made


def test_a_step_may_not_be_sparse_where_a_call_of_several_queries_was_declined() -> None:
    verdicts = Verdicts()
    assert verdicts.note([declined(site("a")), sparse_site("b")]) == []
    for allowed in (step("b"), site("b"), step("new")):
        verdicts.check(allowed)
    for refused in (step("a"), site("a", keys=8)):
        with pytest.raises(Declined, match="dense in a call of 1024 queries and 1024 keys"):
            verdicts.check(refused)


def test_what_was_sparse_and_is_declined_is_lost_and_stays_sparse_in_calls_like_the_first() -> None:
    verdicts = Verdicts()
    verdicts.note([sparse_site("a"), sparse_site("b", keys=7)])
    (lost,) = verdicts.note([declined(step("a")), sparse_site("b")])
    assert str(lost) == (
        "a was sparse in a call of 1024 queries and 1024 keys and is dense in a call of 1 query "
        "and 40 keys: a window"
    )
    assert not lost.overruled
    verdicts.check(site("a"))
    assert set(verdicts.sparse()) == {("a", 0), ("b", 0)}


def test_a_call_of_several_queries_overrules_what_a_step_showed() -> None:
    verdicts = Verdicts()
    verdicts.note([step("a", action="sparse"), declined(step("b"))])
    (lost,) = verdicts.note([declined(site("a")), sparse_site("b")])
    assert lost.overruled
    assert "a was taken to be sparse in a call of 1 query and 40 keys" in str(lost)
    with pytest.raises(Declined):
        verdicts.check(step("a"))
    verdicts.check(step("b"))


def test_dropout_decides_nothing_and_is_lost_where_the_layer_was_sparse() -> None:
    verdicts, training = Verdicts(), site("a", action="declined")
    training.reject = Declined("dropout", training.output, of_call=True)
    assert verdicts.note([training]) == []
    verdicts.check(site("a"))
    verdicts.note([sparse_site("a")])
    (lost,) = verdicts.note([training])
    assert "a was sparse" in str(lost)
    verdicts.check(site("a"))


def test_the_attentions_of_one_layer_have_verdicts_of_their_own() -> None:
    verdicts = Verdicts()
    verdicts.note([sparse_site("decoder"), declined(site("decoder", ordinal=1))])
    verdicts.check(step("decoder"))
    with pytest.raises(Declined):
        verdicts.check(step("decoder", ordinal=1))


def test_what_the_policy_keeps_dense_and_a_single_key_show_nothing() -> None:
    verdicts = Verdicts()
    kept = site("a", action="kept dense by the policy")
    one = declined(site("b", keys=1))
    assert verdicts.note([kept, one]) == []
    verdicts.check(site("a"))
    verdicts.check(site("b"))
    assert verdicts.sparse() == {}


def test_the_queries_of_a_site_that_was_declined_early_are_those_of_its_output() -> None:
    verdicts = Verdicts()
    output = fx.Graph().placeholder("out")
    output.meta["val"] = torch.empty(1, 4, 1, 8)
    early = declined(site("a", query_length=None, key_length=None, output=output))
    verdicts.note([early])
    verdicts.check(site("a"))  # one query decides nothing
    output.meta["val"] = torch.empty(1, 4, 6, 8)
    verdicts.note([early])
    with pytest.raises(Declined, match="a call of 6 queries,"):
        verdicts.check(site("a"))
