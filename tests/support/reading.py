"""Reads what a function computes as an expression of its indices, and computes that again.

What torch computes is the oracle: an expression that is read must be it at every index.
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from moonfx.passes.graph.own_tensors import OwnTensors
from moonfx.passes.symbolic.expressions import Expr, is_load, name_of
from moonfx.passes.symbolic.reader import Reader

# The indices of a result's dims.
AXES = tuple(sympy.Symbol(f"i{n}", integer=True, nonnegative=True) for n in range(5))


class _Values(fx.Interpreter):
    """Runs a graph and keeps the value of each node."""

    def __init__(self, gm: fx.GraphModule) -> None:
        super().__init__(gm)
        self.of: dict[fx.Node, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        self.of[n] = super().run_node(n)
        return self.of[n]


@dataclass
class Read:
    """What was read of a function's result.

    Args:
        expr: its value at AXES.
        unknown: whether nothing is known of it: it is a leaf itself.
        result: what torch computes.
        leaves: each tensor that is read as an unknown, by its name.
    """

    expr: Expr
    unknown: bool
    result: Tensor
    leaves: dict[str, Tensor]

    def at(self, place: tuple[int, ...]) -> Any:
        """What the expression says at an index."""

        def loaded(load: Expr) -> Expr:
            value = self.leaves[name_of(load)][tuple(map(int, load.args))].item()
            return sympy.sympify(int(value) if isinstance(value, bool) else value)

        value = sympy.sympify(self.expr).subs(dict(zip(AXES, place, strict=False)))
        return value.replace(is_load, loaded)


def tensors_of(node: fx.Node) -> OwnTensors:
    """What a node's graph makes and writes to."""
    return OwnTensors(node.graph)


def plain_reader() -> Reader:
    """A reader of a graph without bodies, to which nothing is written."""
    return Reader(lambda node: None, lambda node: False, lambda node: node.name, tensors_of)


def traced(run: Callable[..., Any], *given: Tensor, dynamic: bool = False) -> fx.GraphModule:
    """A function in pre-dispatch ATen."""
    mode = "symbolic" if dynamic else "fake"
    gm: fx.GraphModule = make_fx(run, pre_dispatch=True, tracing_mode=mode)(*given)
    return gm


def returned(gm: fx.GraphModule) -> fx.Node:
    """The one node that a graph returns."""
    (node,) = gm.graph.output_node().all_input_nodes
    return node


def read(run: Callable[..., Tensor], *given: Tensor) -> Read:
    """Reads the result of a function of tensors."""
    gm = traced(run, *given)
    reader, node = plain_reader(), returned(gm)
    expr = reader.read(node, AXES[: node.meta["val"].dim()])
    values = _Values(gm)
    result = values.run(*given)
    leaves = {name: values.of[leaf] for name, leaf in reader.leaves.items()}
    return Read(expr, node in reader.leaves.values(), result, leaves)


def assert_read_exactly(run: Callable[..., Tensor], *given: Tensor) -> None:
    """Checks that the result is known, and at each index what torch computes."""
    found = read(run, *given)
    assert not found.unknown, f"not read: {found.expr}"
    for place in itertools.product(*map(range, found.result.shape)):
        expected = found.result[place].item()
        value = found.at(place)
        if value in (sympy.true, sympy.false):
            assert bool(value) == expected, (place, found.expr)
        else:
            torch.testing.assert_close(float(value), float(expected), rtol=0, atol=0)
