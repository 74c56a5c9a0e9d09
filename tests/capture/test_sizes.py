"""Sizes as symbols: what is proved of them, without a guard, and what they were at the trace."""

import sympy
import torch
from torch import Tensor, fx

from moonfx.capture.sizes import (
    expression,
    fake_mode_of,
    fake_values,
    hint,
    hint_or_none,
    is_plain,
    proved,
    same_size,
    storage_of,
)
from tests.support.reading import traced


def graph() -> fx.GraphModule:
    return traced(
        lambda x, y: torch.cat([x, x]) * 2 + y.sum(), torch.ones(5, 3), torch.ones(7), dynamic=True
    )


def sizes() -> tuple[torch.SymInt, torch.SymInt]:
    x, y = (n.meta["val"] for n in graph().graph.nodes if n.op == "placeholder")
    return x.shape[0], y.shape[0]


def test_what_holds_for_every_shape_is_proved_and_nothing_else() -> None:
    n, m = sizes()
    assert same_size(n, n)
    assert same_size(n + n, 2 * n)
    assert proved(n * m >= n)
    assert not same_size(n, m)
    assert not same_size(n, 5), "it was 5 at the trace"
    assert not proved(n < m)
    assert same_size(3, 3)


def test_asking_adds_no_guard() -> None:
    n, m = sizes()
    env = n.node.shape_env
    before = len(env.guards)
    same_size(n, m)
    proved(n + 2 == m)
    assert (hint(n), hint(m), hint_or_none(n + m)) == (5, 7, 12)
    assert len(env.guards) == before


def test_a_size_is_an_expression_of_its_symbols() -> None:
    n, m = sizes()
    assert expression(4) == sympy.Integer(4)
    assert expression(2 * n + m) == 2 * expression(n) + expression(m)
    assert expression(n).is_Symbol


def test_a_size_that_only_the_run_knows_has_no_hint() -> None:
    x = next(iter(graph().graph.nodes)).meta["val"]
    unknown = x.shape[0].node.shape_env.create_unbacked_symint()
    assert hint_or_none(unknown) is None
    assert hint_or_none(3) == 3


def test_tensors_share_a_storage_if_they_lie_in_one() -> None:
    x = torch.ones(4, 4)
    assert storage_of(x) == storage_of(x.view(16)[3:])
    assert storage_of(x) != storage_of(x.clone())
    assert storage_of(x.to_sparse()) is None


def test_a_subclass_is_not_plain_and_a_parameter_is() -> None:
    class Own(Tensor):
        pass

    assert is_plain(torch.nn.Parameter(torch.ones(2)))
    assert is_plain(graph().graph.output_node().all_input_nodes[0].meta["val"])
    assert not is_plain(torch.ones(2).as_subclass(Own))
    assert not is_plain(torch.ones(2, 2).to_sparse())


def test_operators_run_on_the_values_of_a_graph() -> None:
    gm = graph()
    x = next(iter(gm.graph.nodes)).meta["val"]
    with fake_values(gm):
        made = torch.ops.aten.mul.Tensor(x, 2)
    assert made.fake_mode is fake_mode_of(gm)
    assert same_size(made.shape[0], x.shape[0])
    assert fake_mode_of(fx.GraphModule({}, fx.Graph())) is None
