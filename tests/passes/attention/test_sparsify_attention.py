"""One operator for each attention that the policy makes sparse, with what was proved of it."""

import operator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx

from moonfx.kernels.common.arguments import MobaArguments
from moonfx.passes.attention.sparsify_attention import OPERATOR
from moonfx.passes.context import Context
from moonfx.passes.pass_manager import run_passes
from moonfx.policy import LayerPolicy
from tests.passes.attention.forms import (
    SCALE,
    B,
    D,
    H,
    N,
    captured,
    hidden,
    inputs,
    rewritten,
)


def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return hidden(q @ k.mT * SCALE).softmax(-1) @ v


def calls(gm: fx.GraphModule) -> list[fx.Node]:
    return [n for n in gm.graph.nodes if n.target is OPERATOR]


def arguments_of(call: fx.Node) -> dict[str, Any]:
    names = [a.name for a in OPERATOR._schema.arguments]
    return dict(zip(names, call.args))


def test_the_operator_has_the_policy_and_what_was_read_of_the_attention() -> None:
    gm = rewritten(plain, policy=lambda *site: LayerPolicy(4, 3, 1))
    (call,) = calls(gm)
    given = arguments_of(call)
    assert [given[x].name for x in ("query", "key", "value")] == ["q_1", "k_1", "v_1"]
    expected = MobaArguments(4, 3, 1, SCALE)._asdict()
    assert {x: given[x] for x in expected if x in given} == {
        x: y for x, y in expected.items() if x in given
    }
    assert given["scale"] == pytest.approx(SCALE)
    (out,) = call.users
    assert (out.target, out.args[1]) == (operator.getitem, 0)


def test_no_scores_are_left_in_the_graph() -> None:
    gm = rewritten(plain)
    shapes = [n.meta["val"].shape for n in gm.graph.nodes if isinstance(n.meta.get("val"), Tensor)]
    assert not [s for s in shapes if s[-2:] == (N, N)]


def test_a_layer_that_the_policy_keeps_is_left_as_it_was_and_says_why() -> None:
    gm = captured(plain)
    context = Context(gm, lambda site, sites, root: "kept for a test")
    before = [n.target for n in gm.graph.nodes]
    run_passes(context, check=True)
    assert [site.action for site in context.sites] == ["kept for a test"]
    assert [n.target for n in gm.graph.nodes] == before


def test_each_layer_has_its_own_policy() -> None:
    def body(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return plain(plain(plain(q, k, v), k, v), k, v)

    def policy(site: Any, sites: Any, root: Any) -> LayerPolicy | str:
        index = sites.index(site)
        return "dense" if index == 1 else LayerPolicy(4 + index, 2, 0)

    found = [arguments_of(call)["block"] for call in calls(rewritten(body, policy=policy))]
    assert found == [4, 6]


def test_the_choice_is_made_again_where_that_is_asked_for() -> None:
    (call,) = calls(rewritten(plain, recompute_routing=True))
    assert arguments_of(call)["recompute"] is True
    (call,) = calls(rewritten(plain))
    assert not arguments_of(call).get("recompute", False)


def test_operands_have_the_dtype_of_the_output() -> None:
    def body(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        p = hidden(q.float() @ k.float().mT * SCALE).softmax(-1)
        return p.to(v.dtype) @ v

    (call,) = calls(rewritten(body, inputs(dtype=torch.bfloat16)))
    assert {n.meta["val"].dtype for n in call.args[:3]} == {torch.bfloat16}  # type: ignore[union-attr]


def test_keys_that_the_graph_holds_transposed_are_transposed_back() -> None:
    def body(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return hidden(q @ (k.mT * SCALE)).softmax(-1) @ v

    (call,) = calls(rewritten(body))
    assert [n.meta["val"].shape for n in call.args[:3]] == [(B, H, N, D)] * 3  # type: ignore[union-attr]


def test_heads_in_the_batch_are_told_apart_and_folded_again() -> None:
    def body(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.view(B * H, N, D) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True) * 2

    gm = rewritten(body)
    (call,) = calls(gm)
    assert [n.meta["val"].shape for n in call.args[:3]] == [(B, H, N, D)] * 3  # type: ignore[union-attr]
    (output,) = gm.graph.output_node().all_input_nodes
    assert output.meta["val"].shape == (B * H, N, D)
