"""Roles by the graphs that moonfx compiled already, without an example."""

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import moonfx
from moonfx.backend import rewriter
from moonfx.optim.matrices import Layout
from moonfx.optim.roles import by_use as trace
from moonfx.optim.roles.classify import classify
from moonfx.optim.roles.table import RoleRow
from moonfx.passes.parameters.roles import Found
from tests.support.tiny import TinyLM, tokens

TINY: dict[str, Any] = {"block": 16, "topk": 2, "compiler": "eager", "on_miss": "ignore"}


def by_sparsify(model: nn.Module) -> None:
    moonfx.sparsify(model, **TINY)(tokens(16))


def by_backend(model: nn.Module) -> None:
    torch.compile(model, backend="moonfx", options=TINY)(tokens(16))


def rows(model: nn.Module) -> dict[str, RoleRow]:
    names, parameters = zip(*model.named_parameters(), strict=True)
    return {row.name: row for row in classify(parameters, names, model)}


@pytest.mark.parametrize("compiled", [by_sparsify, by_backend])
def test_the_graphs_that_were_compiled_say_what_parameters_are_for(
    compiled: Callable[[nn.Module], None],
) -> None:
    model = TinyLM(layers=1)
    compiled(model)
    found = rows(model)
    assert {row.rule for row in found.values()} == {"graph"}
    assert found["layers.0.kv.weight"].layout == Layout(sizes=(16, 16))
    assert found["head.weight"].role == "head"
    assert found == rows(model)  # asked again


def test_a_model_that_was_not_compiled_is_known_by_its_modules() -> None:
    assert {row.rule for row in rows(TinyLM(layers=1)).values()} == {"module"}


def test_a_recorded_graph_is_not_kept_alive(monkeypatch: pytest.MonkeyPatch) -> None:
    graphs = []

    def watched(gm: Any, example_inputs: Any) -> Any:
        graphs.append(weakref.ref(captured := capture(gm, example_inputs)))
        return captured

    capture = rewriter.capture
    monkeypatch.setattr(rewriter, "capture", watched)
    model = TinyLM(layers=1)
    by_sparsify(model)
    (record,) = trace.records_of_model(model)
    torch.compiler.reset()
    moonfx.restore(model)
    gc.collect()
    assert record.run is not None
    assert [graph() for graph in graphs] == [None]
    assert len(record.uses({})) == len(list(model.parameters()))
    assert record.run is None


def test_a_parameter_that_two_graphs_use_differently_is_unclear() -> None:
    hidden, head = Found("hidden matrix", "here"), Found("head", "there")
    unknown = Found(None, "its use is not clear")
    assert trace._agreed(hidden, hidden._replace(why="there")) == hidden
    assert trace._agreed(unknown, head) == trace._agreed(head, unknown) == head
    both = trace._agreed(hidden, head)
    assert both.role is None
    assert "hidden matrix, here; head, there" in both.why


def test_a_graph_after_a_break_says_nothing_of_what_leaves_it() -> None:
    class Broken(TinyLM):
        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            x = self.embed(ids)
            x = x + self.layers[0](x)
            y = self.head(x)
            torch._dynamo.graph_break()
            return y.relu()

    model = Broken(layers=1)
    by_backend(model)
    found = rows(model)
    assert found["layers.0.kv.weight"].layout == Layout(sizes=(16, 16))
    assert (found["head.weight"].role, found["head.weight"].rule) == ("head", "module")
    assert "goes to code that was not traced" in found["head.weight"].why
