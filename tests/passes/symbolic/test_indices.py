"""The lengths that a proof may use: every symbol that the number of queries or keys goes by."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx

from moonfx.passes.symbolic.indices import lengths_of
from moonfx.site import AttentionSite
from tests.support.reading import traced

aten = torch.ops.aten


def attention(x: Tensor, y: Tensor, z: Tensor, mask: Tensor) -> Tensor:
    q, k, v = (t[None, None, :, None].expand(1, 2, -1, 4) for t in (x, y, z))
    return F.scaled_dot_product_attention(q, k, v, mask)


def site(gm: fx.GraphModule, transposed: bool = False) -> AttentionSite:
    (node,) = (n for n in gm.graph.nodes if "scaled_dot" in str(n.target))
    query, key, value, mask = node.args[:4]
    if transposed:
        with gm.graph.inserting_before(node):
            key = gm.graph.call_function(aten.transpose.int, (key, -2, -1))
            key.meta["val"] = node.args[1].meta["val"].transpose(-2, -1)
    masks = [(mask, "additive")]
    found = AttentionSite(node, query, key, value, "sdpa", "", "", masks=masks)
    found.key_transposed = transposed
    return found


@pytest.mark.parametrize("transposed", [False, True], ids=["key", "key transposed"])
def test_a_length_goes_by_the_symbol_of_each_tensor_that_has_it(transposed: bool) -> None:
    given = torch.zeros(5), torch.zeros(9), torch.zeros(9), torch.zeros(5, 9)
    gm = traced(attention, *given, dynamic=True)
    x, y, z, mask = (n.meta["val"].shape for n in gm.graph.nodes if n.op == "placeholder")
    lengths = lengths_of(site(gm, transposed))
    assert set(lengths.queries) == {n.node.expr for n in (x[0], mask[0])}
    assert set(lengths.keys) == {n.node.expr for n in (y[0], z[0], mask[1])}
    assert {k - q for k in lengths.keys for q in lengths.queries} == set(lengths.offsets)
    assert not lengths.one_query


def test_a_mask_that_is_broadcast_says_nothing_of_a_length() -> None:
    gm = traced(attention, torch.zeros(5), torch.zeros(9), torch.zeros(9), torch.zeros(1, 1))
    lengths = lengths_of(site(gm))
    assert (lengths.queries, lengths.keys, lengths.offsets) == ((5,), (9,), (4,))


def test_one_query_is_one_for_every_shape() -> None:
    gm = traced(attention, torch.zeros(1), torch.zeros(9), torch.zeros(9), torch.zeros(1, 9))
    assert lengths_of(site(gm)).one_query
