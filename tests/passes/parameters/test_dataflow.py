"""One data flow of a whole run: graphs joined by what they hand on, writes read again."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.fx.experimental.proxy_tensor import make_fx

from moonfx.passes.graph.nodes import aten
from moonfx.passes.parameters.dataflow import (
    INPUT,
    PARAMETER,
    DataFlow,
    GraphCall,
    Worklist,
    base_of,
)
from tests.support.optim.uses import X, flow_of

W = nn.Parameter(torch.randn(8, 8))


def traced(body: Callable[..., Any], *inputs: Any) -> fx.GraphModule:
    return make_fx(body, pre_dispatch=True, tracing_mode="fake")(*inputs)


def names(flow: DataFlow) -> list[str]:
    return [v.target if isinstance(v.target, str) else str(v.target) for v in flow.values]


def two_calls(returned: list[Any] | None = None) -> tuple[DataFlow, list[Tensor]]:
    """linear(x, W), a graph break, and relu() of what the first graph gave."""
    x, middle, end = X, torch.zeros_like(X), torch.zeros_like(X)
    first = traced(lambda x, w: (F.linear(x, w),), x, W)
    second = traced(lambda y: (y.relu(),), middle)
    calls = [GraphCall(first, (x, W), (middle,)), GraphCall(second, (middle,), (end,))]
    return DataFlow(calls, [end] if returned is None else returned), [middle, end]


def test_graphs_are_joined_by_what_one_gives_and_the_next_is_given() -> None:
    flow, _ = two_calls()
    assert names(flow) == [INPUT, PARAMETER, "aten.linear.default", "aten.relu.default"]
    linear, relu = flow.values[2:]
    assert linear.users == [relu]
    assert (linear.returned, linear.escapes) == (False, False)
    assert relu.returned


def test_what_no_graph_reads_may_be_read_by_code_between_them() -> None:
    x = X
    gm = traced(lambda x, w: (F.linear(x, w), x * 2), x, W)
    given = (torch.zeros_like(X), torch.zeros_like(X))
    flow = DataFlow([GraphCall(gm, (x, W), given)], [given[0]])
    linear, doubled = flow.values[2:]
    assert (linear.returned, linear.escapes) == (True, False)
    assert (doubled.returned, doubled.escapes) == (False, True)


def test_a_graph_that_runs_for_two_layers_reads_the_parameters_of_each() -> None:
    other = nn.Parameter(torch.randn(8, 8))
    gm = traced(lambda x, w: (F.linear(x, w),), X, W)
    middle = torch.zeros_like(X)
    flow = DataFlow([GraphCall(gm, (X, W), (middle,)), GraphCall(gm, (middle, other))], [])
    assert set(flow.parameters) == {id(W), id(other)}
    first, second = (v for v in flow.values if v.target is aten.linear.default)
    assert (first.users, second.reads) == ([second], [first, flow.parameters[id(other)]])
    assert all(v.shared for v in flow.values)
    assert not any(v.shared for v in two_calls()[0].values)


def test_what_depends_on_inputs_and_what_on_parameters_are_told_apart() -> None:
    flow = flow_of(lambda x, w: F.linear(x.relu(), w.t() * 2) + torch.ones(8), X, W)
    by = {v.target: v for v in flow.values}
    relu, transposed, total = by[aten.relu.default], by[aten.t.default], by[aten.add.Tensor]
    assert (flow.active(relu), flow.trained(relu)) == (True, False)
    assert (flow.active(transposed), flow.trained(transposed)) == (False, True)
    assert (flow.active(total), flow.trained(total)) == (True, True)
    assert not flow.active(8)


def test_a_part_that_is_written_makes_the_whole_depend_on_it() -> None:
    def body(x: Tensor, w: Tensor) -> Tensor:
        made = torch.zeros(8, 8)
        made[:4].copy_(w[:4])
        return F.linear(x, made)

    flow = flow_of(body, X, W)
    whole = next(v for v in flow.values if v.target is aten.zeros.default)
    part = next(v for v in flow.values if v.target is aten.slice.Tensor and base_of(v) is whole)
    assert base_of(part) is whole
    assert flow.trained(whole)


def test_a_buffer_that_one_graph_writes_is_read_as_written_by_the_next() -> None:
    buffer = torch.zeros(2, 5, 8)
    writes = traced(lambda b, x, w: (b.add_(F.linear(x, w)),), buffer, X, W)
    reads = traced(lambda b: (b.relu(),), buffer)
    calls = [GraphCall(writes, (buffer, X, W), (torch.zeros(1),)), GraphCall(reads, (buffer,))]
    flow = DataFlow(calls)
    relu = next(v for v in flow.values if v.target is aten.relu.default)
    assert [v.target for v in relu.reads] == [aten.add_.Tensor]
    assert flow.trained(relu)


def test_of_what_makes_a_tensor_only_the_shape_is_read() -> None:
    flow = flow_of(lambda x: x.new_zeros(x.shape[0]) + 1, X)
    made = next(v for v in flow.values if v.target is aten.new_zeros.default)
    assert made.reads == []
    assert not flow.active(made)


def test_a_worklist_gives_each_value_once_in_the_order_of_the_run() -> None:
    flow = flow_of(lambda x: (x.relu() + 1) * x.relu().sum(), X)
    worklist = Worklist(flow, [flow.values[-1], flow.values[1], flow.values[1]])
    seen = []
    for value in worklist:
        seen.append(value)
        worklist.add(value.users)
    assert seen == sorted(seen, key=flow.place.__getitem__)
    assert len(seen) == len(set(map(id, seen)))
    assert flow.values[1] in worklist
    assert flow.values[0] not in worklist
