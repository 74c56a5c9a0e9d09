"""Which value a name stands for when: versions of a tensor's memory."""

import pytest
import torch
from torch import Tensor, fx, nn

from moonfx.passes.graph.memory_versions import (
    Memory,
    TensorVersion,
    is_barrier,
    is_random,
    writes_to_parameters,
)
from tests.support.reading import traced

X, Y = torch.ones(3, 4), torch.ones(3, 4)


def named(gm: fx.GraphModule) -> dict[str, fx.Node]:
    return {n.name: n for n in gm.graph.nodes}


def test_a_name_stands_for_what_was_last_written_to_it() -> None:
    gm = traced(lambda x, y: (x * y, x.mul_(2), x + 1)[-1], X, Y)
    n, memory = named(gm), Memory(gm.graph)
    before, after = memory.read(n["mul"], n["x_1"]), memory.read(n["add"], n["x_1"])
    assert before == TensorVersion(n["x_1"], 0)
    assert memory.read(n["mul_"], n["x_1"]) == before, "a write reads what was there before"
    assert after == TensorVersion(n["mul_"], 1) == memory.result(n["mul_"])


def test_a_view_goes_with_the_memory_of_its_source() -> None:
    gm = traced(lambda x, y: (t := x.mT, x.add_(1), t @ x)[-1], X, Y)
    n, memory = named(gm), Memory(gm.graph)
    matmul = n["matmul"]
    view = matmul.args[0]
    assert memory.of(view) is memory.of(n["x_1"])
    assert memory.result(view) != memory.read(matmul, view)
    assert memory.writers(view, matmul) == [n["add_"]]
    assert memory.writers(view, view) == []


def test_a_cast_that_copies_is_another_memory() -> None:
    gm = traced(lambda x, y: (x.to(torch.float32), x.to(torch.float64), x.mT.contiguous()), X, Y)
    same, other, copied = gm.graph.output_node().all_input_nodes
    memory = Memory(gm.graph)
    x = next(iter(gm.graph.nodes))
    assert [memory.of(n) is memory.of(x) for n in (same, other, copied)] == [True, False, False]


def test_inputs_of_one_storage_share_memory_and_in_a_body_all_do() -> None:
    gm = traced(lambda x, y: x.add_(1) + y, X, Y)
    x, y = (n for n in gm.graph.nodes if n.op == "placeholder")
    assert Memory(gm.graph).of(x) is not Memory(gm.graph).of(y)
    body = Memory(gm.graph, distinct_inputs=False)
    assert body.of(x) is body.of(y)
    y.meta["val"] = x.meta["val"].view(12)
    shared = Memory(gm.graph)
    assert shared.of(x) is shared.of(y)


def test_what_is_returned_is_known_through_a_view() -> None:
    gm = traced(lambda x, y: (z := x * 2, y + 1, z.view(12))[-1], X, Y)
    n, memory = named(gm), Memory(gm.graph)
    assert memory.is_returned(n["mul"])
    assert not memory.is_returned(n["x_1"])


def test_one_of_several_new_tensors_is_no_view_of_another() -> None:
    gm = traced(lambda x, y: x.topk(2), X, Y)
    memory = Memory(gm.graph)
    values, indices = gm.graph.output_node().all_input_nodes
    assert memory.of(values) is not memory.of(indices)
    gm = traced(lambda x, y: x.chunk(2), X, Y)
    memory = Memory(gm.graph)
    first, second = gm.graph.output_node().all_input_nodes
    assert memory.of(first) is memory.of(second)


@pytest.mark.parametrize("through", [lambda p: p, lambda p: p.view(12), lambda p: p[0]])
def test_a_write_to_a_parameter_is_seen_through_a_view(through) -> None:
    def run(p: Tensor, g: Tensor) -> Tensor:
        with torch.no_grad():
            through(p).sub_(1)
        return g * 2

    gm = traced(run, X, Y)
    parameter = nn.Parameter(X.clone())
    assert writes_to_parameters(gm, [parameter, Y])
    assert not writes_to_parameters(gm, [X, nn.Parameter(Y.clone())])


def test_what_keeps_its_place_and_what_is_drawn() -> None:
    def run(x: Tensor, y: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            z = torch.rand_like(x) * y
        return z.add_(1)

    gm = traced(run, X, Y)
    n = named(gm)
    barriers = [name for name, node in n.items() if is_barrier(node) and node.op != "output"]
    assert [name for name in n if is_random(n[name])] == ["rand_like"]
    assert not set(barriers) & {"rand_like", "mul", "add_"}
    x = n["x_1"]
    with gm.graph.inserting_after(x):
        assertion = gm.graph.call_function(torch.ops.aten._assert_async.msg, (x, "why"))
        unknown = gm.graph.call_method("to_local", (x,))
    assert is_barrier(assertion)
    assert is_barrier(unknown)
