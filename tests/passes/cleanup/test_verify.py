"""Each thing that must hold of a graph: a graph that breaks it is caught, by the row's name."""

import operator
import re
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from moonfx.capture.graph_nodes import CAPTURED
from moonfx.passes.cleanup import verify
from moonfx.passes.context import Context
from tests.passes.attention.forms import B, D, H, N, inputs

aten = torch.ops.aten
Break = Callable[[fx.GraphModule], None]


def attention(q: Tensor, k: Tensor, v: Tensor, real: Tensor, bias: Tensor, ids: Tensor) -> Tensor:
    """Sparse attention with all that it can be given, and a node that follows it."""
    given = (8, 2, 1, None, real, True, 0.0, bias, ids)
    out, _, _ = torch.ops.moonfx.moba_attention(q, k, v, *given)
    return out.transpose(1, 2)


def sound() -> fx.GraphModule:
    """A graph in which all holds."""
    masks = torch.ones(B, N, dtype=torch.bool), torch.zeros(1, H, N), torch.zeros(B, N).long()
    return make_fx(attention, pre_dispatch=True, tracing_mode="fake")(*inputs(), *masks)


def context_of(gm: fx.GraphModule) -> Context:
    return Context(gm, lambda site, sites, root: "dense")


def the_operator(gm: fx.GraphModule) -> fx.Node:
    return next(n for n in gm.graph.nodes if n.target is verify.OPERATOR)


def give(name: str, change: Callable[[Any], Any]) -> Break:
    """Changes the fake value of one of the operator's tensors, or the number itself."""

    def breaks(gm: fx.GraphModule) -> None:
        node = the_operator(gm)
        names = [a.name for a in node.target._schema.arguments]  # type: ignore[union-attr]
        at = names.index(name)
        value = node.args[at]
        if isinstance(value, fx.Node):
            value.meta["val"] = change(value.meta["val"])
        else:
            node.update_arg(at, change(value))

    return breaks


def a_module_is_called(gm: fx.GraphModule) -> None:
    gm.add_module("layer", torch.nn.Identity())
    with gm.graph.inserting_before(the_operator(gm)):
        gm.graph.call_module("layer", (next(iter(gm.graph.nodes)),))


def an_operator_without_overload(gm: fx.GraphModule) -> None:
    next(n for n in gm.graph.nodes if n.target is aten.transpose.int).target = aten.transpose


def no_fake_value(gm: fx.GraphModule) -> None:
    del next(n for n in gm.graph.nodes if n.target is aten.transpose.int).meta["val"]


def a_fake_constant(gm: fx.GraphModule) -> None:
    with FakeTensorMode():
        gm.register_buffer("table", torch.zeros(3))
    with gm.graph.inserting_before(the_operator(gm)):
        gm.graph.get_attr("table")


def a_body_with_an_operand_too_few(gm: fx.GraphModule) -> None:
    body = fx.Graph()
    body.output(body.placeholder("x"))
    inner = fx.GraphModule({}, body)
    inner.meta[CAPTURED] = True
    gm.add_module("body", inner)
    with gm.graph.inserting_before(the_operator(gm)):
        gm.graph.call_function(torch.ops.higher_order.wrap, (gm.graph.get_attr("body"),))


BREAKS: list[tuple[str, str, Break]] = [
    ("a module is called", "kinds", a_module_is_called),
    ("an operator without overload", "overloads", an_operator_without_overload),
    ("a node without fake value", "values", no_fake_value),
    ("a fake constant", "constants", a_fake_constant),
    ("a body with an operand too few", "bodies", a_body_with_an_operand_too_few),
    ("a query of three dims", "operands", give("query", lambda x: x[0])),
    ("keys of another dtype", "dtypes", give("key", lambda x: x.half())),
    ("block 0", "policy", give("block", lambda x: 0)),
    ("topk 0", "policy", give("topk", lambda x: 0)),
    ("sinks -1", "policy", give("sinks", lambda x: -1)),
    ("a key_mask of numbers", "key_mask", give("key_mask", lambda x: x.float())),
    ("a key_mask of four dims", "key_mask", give("key_mask", lambda x: x[:, None, None])),
    ("a key_bias in half", "key_bias", give("key_bias", lambda x: x.half())),
    ("a key_bias without heads", "key_bias", give("key_bias", lambda x: x[:, 0])),
    ("segments that are floats", "segments", give("segments", lambda x: x.float())),
    ("segments of one row", "segments", give("segments", lambda x: x[0])),
]


@pytest.mark.parametrize(
    ("row", "breaks"), [b[1:] for b in BREAKS], ids=[b[0].replace(" ", "-") for b in BREAKS]
)
def test_what_does_not_hold_is_named(row: str, breaks: Break) -> None:
    gm = sound()
    assert verify.run(gm.graph, context_of(gm)) == 0
    breaks(gm)
    with pytest.raises(verify.InvalidGraph, match=f": {row}: "):
        verify.run(gm.graph, context_of(gm))


@pytest.mark.parametrize("used", [True, False])
def test_the_output_of_a_sparse_attention_is_used(used: bool) -> None:
    gm = sound()
    out = next(n for n in gm.graph.nodes if n.target is operator.getitem and n.args[1] == 0)
    context = context_of(gm)
    site: Any = SimpleNamespace(output=out, action="sparse", layer="layers.0")
    context.sites.append(site)
    if used:
        assert verify.run(gm.graph, context) == 0
        return
    out.replace_all_uses_with(the_operator(gm).args[0])
    with pytest.raises(verify.InvalidGraph, match=r"layers\.0: output: "):
        verify.run(gm.graph, context)


def test_a_graph_that_is_not_well_formed_is_refused() -> None:
    gm = sound()
    the_operator(gm).append(next(n for n in gm.graph.nodes if n.op == "placeholder"))
    with pytest.raises(RuntimeError, match="before it has been defined"):
        verify.run(gm.graph, context_of(gm))


def test_the_written_spec_has_each_row_and_no_other() -> None:
    text = str(verify.__doc__)
    written = re.findall(r"^    (\w+)  +\S", text, re.MULTILINE)
    assert written == [r.name for r in (*verify.FORM, *verify.OPERANDS, *verify.SPARSE)]
    broken = {row for _, row, _ in BREAKS} | {"output"}
    assert broken == set(written)


def test_the_sizes_of_the_sound_graph_are_those_of_the_rows() -> None:
    gm = sound()
    given = verify.given_to(the_operator(gm))
    assert list(given["query"].shape) == [B, H, N, D]
    assert list(given["key_mask"].shape) == list(given["segments"].shape) == [B, N]
    assert list(given["key_bias"].shape) == [1, H, N]
