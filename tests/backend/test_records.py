"""What is kept of compiled graphs: for as long as what they are of lives, each under its owner."""

import gc
import weakref
from typing import Any

import pytest
import torch
from torch import nn

from moonfx.backend import records
from moonfx.backend.records import (
    Record,
    records_of,
    records_of_step,
    remember,
    report_of,
    report_of_step,
    report_on,
)
from tests.support.attention_sites import SPARSE, changed


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "_records", [])


def record(*parameters: nn.Parameter, **fields: Any) -> Record:
    rows = fields.pop("rows", [SPARSE])
    return Record(rows, fields.pop("failure", None), [weakref.ref(p) for p in parameters], **fields)


def parameter() -> nn.Parameter:
    return nn.Parameter(torch.ones(2))


def test_a_record_goes_with_the_last_parameter_that_its_graph_read() -> None:
    p, q = parameter(), parameter()
    remember([record(p, q)])
    del p
    gc.collect()
    remember([])
    assert len(records_of([q])) == 1
    del q
    gc.collect()
    remember([])
    assert records._records == []


def test_a_record_of_a_step_stays_while_its_optimizer_lives() -> None:
    p = parameter()
    optimizer = torch.optim.SGD([p])
    remember([record(of_optimizer=True, optimizer=weakref.ref(optimizer))])
    remember([])
    assert len(records_of_step(optimizer)) == 1
    del optimizer
    gc.collect()
    remember([])
    assert records._records == []


def test_a_models_graphs_and_its_optimizers_are_apart() -> None:
    p, q = parameter(), parameter()
    optimizer, other = torch.optim.SGD([p]), torch.optim.SGD([q])
    model = record(p, rows=[changed(layer="model")])
    step = record(
        p, of_optimizer=True, optimizer=weakref.ref(optimizer), rows=[changed(layer="step")]
    )
    remember([model, step])
    assert records_of([p]) == [model]
    assert records_of([q]) == []
    assert [r.layer for r in report_of([p]).rows] == ["model"]  # type: ignore[union-attr]
    assert [r.layer for r in report_of_step(optimizer).rows] == ["step"]  # type: ignore[union-attr]
    assert report_of_step(other) is None
    assert len(report_of(None).rows) == 2  # type: ignore[union-attr]
    assert report_of([q]) is None


def test_a_step_that_no_optimizer_is_known_of_is_found_by_its_parameters() -> None:
    p = parameter()
    optimizer = torch.optim.SGD([p])
    remember([record(p, of_optimizer=True)])
    assert report_of_step(optimizer) is not None
    assert records_of_step(optimizer) == []


def test_the_code_of_a_record_is_the_same_for_what_was_compiled_anew() -> None:
    p, q = parameter(), parameter()
    first, again, other, unknown = (
        record(p, frame=3),
        record(p, frame=3),
        record(q, frame=3),
        record(p),
    )
    # Records keep references of their own, the same for the same parameter.
    assert first.code == again.code
    assert first.code != other.code
    assert unknown.code != record(p).code


def test_a_report_holds_failures_and_disabled_passes_of_all_graphs() -> None:
    report = report_on(
        [
            record(failure="one", disabled=("b", "a")),
            record(disabled=("a",), rows=[changed(layer="second")]),
        ]
    )
    assert (report.graphs, len(report.rows)) == (2, 2)
    assert (report.failures, report.disabled) == (["one"], ("a", "b"))
    assert not report.of_steps
    assert report_on([record(of_optimizer=True)]).of_steps


def test_uses_are_read_once_and_of_parameters_that_live() -> None:
    p, q = parameter(), parameter()
    kept = record(p, q)
    kept.found = {id(p): "found p", id(q): "found q"}  # type: ignore[dict-item]
    assert kept.uses({}) == {id(p): "found p", id(q): "found q"}
    gone = id(q)
    del q
    gc.collect()
    assert gone not in kept.uses({})
    assert kept.uses({}) == {id(p): "found p"}
