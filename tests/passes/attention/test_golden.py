"""The rewritten attention of three canonical graphs, so that a change of form is seen and approved.

EXPECTTEST_ACCEPT=1 pytest tests/passes/attention/test_golden.py writes the new text.
"""

import expecttest
import torch
from torch import fx

from moonfx.backend.rewriter import Backend
from moonfx.capture.compiled_calls import compile_call
from moonfx.policy import LayerPolicy, Policies
from tests.support.zoo import build, logits


def rewritten(name: str, form: str, *, padded: bool = False) -> str:
    """The first attention of the model's graph: the operator, and what its operands come from."""
    model, ids = build(name, form), torch.arange(2, 74).repeat(2, 1)
    padding = torch.ones_like(ids) if padded else None
    backend = Backend(Policies(LayerPolicy(8, 3, 1)), "eager")
    graphs: list[fx.Graph] = []

    def keep(gm: fx.GraphModule, given: list[torch.Tensor]) -> object:
        graphs.append(backend.rewrite(gm, given)[0].graph)
        return gm.forward

    compile_call(lambda *x: logits(model, *x), keep)(ids, padding)
    operator = torch.ops.moonfx.moba_attention.default
    (graph,) = graphs
    first = next(n for n in graph.nodes if n.target is operator)
    return "\n".join([*_cone(first, depth=3), f"leftover masks: {_masks(graph)}"])


def _cone(node: fx.Node, depth: int) -> list[str]:
    lines: list[str] = []
    for source in dict.fromkeys(node.all_input_nodes):
        if depth and source.op == "call_function":
            lines += [x for x in _cone(source, depth - 1) if x not in lines]
    shape = getattr(node.meta["val"], "shape", None)
    where = "" if shape is None else f" : {list(shape)}"
    return [*lines, f"{_name(node)}({', '.join(map(_argument, node.args))}){where}"]


def _argument(value: object) -> str:
    return _name(value) if isinstance(value, fx.Node) else str(value)


def _name(node: fx.Node) -> str:
    if node.op != "call_function":
        return "input"
    return str(node.target).removeprefix("aten.").removesuffix(".default")


def _masks(graph: fx.Graph) -> int:
    """Nodes of a whole [.., N, N] mask or score that the rewrite left alive."""
    shapes = [getattr(n.meta.get("val"), "shape", ()) for n in graph.nodes]
    return sum(list(s[-2:]) == [72, 72] for s in shapes)


class TestGolden(expecttest.TestCase):
    def test_llama_sdpa(self) -> None:
        self.assertExpectedInline(
            rewritten("llama", "sdpa"),
            """\
transpose.int(view, 1, 2) : [2, 4, 72, 16]
unsqueeze(to.dtype, 1) : [1, 1, 72, 16]
mul.Tensor(transpose.int, unsqueeze) : [2, 4, 72, 16]
cat([neg, slice_2], -1) : [2, 4, 72, 16]
mul.Tensor(cat, unsqueeze) : [2, 4, 72, 16]
add.Tensor(mul.Tensor, mul.Tensor) : [2, 4, 72, 16]
transpose.int(view, 1, 2) : [2, 2, 72, 16]
mul.Tensor(transpose.int, unsqueeze) : [2, 2, 72, 16]
cat([neg_1, slice_4], -1) : [2, 2, 72, 16]
mul.Tensor(cat, unsqueeze) : [2, 2, 72, 16]
add.Tensor(mul.Tensor, mul.Tensor) : [2, 2, 72, 16]
linear(mul.Tensor, input) : [2, 72, 32]
view(linear, [2, 72, -1, 16]) : [2, 72, 2, 16]
moonfx.moba_attention(add.Tensor, add.Tensor, transpose.int, 8, 3, 1, 0.25, None)
leftover masks: 0""",
        )

    def test_llama_eager_with_padding(self) -> None:
        self.assertExpectedInline(
            rewritten("llama", "eager", padded=True),
            """\
transpose.int(view, 1, 2) : [2, 4, 72, 16]
unsqueeze(to.dtype, 1) : [1, 1, 72, 16]
mul.Tensor(transpose.int, unsqueeze) : [2, 4, 72, 16]
cat([neg, slice_1], -1) : [2, 4, 72, 16]
mul.Tensor(cat, unsqueeze) : [2, 4, 72, 16]
add.Tensor(mul.Tensor, mul.Tensor) : [2, 4, 72, 16]
transpose.int(view, 1, 2) : [2, 2, 72, 16]
mul.Tensor(transpose.int, unsqueeze) : [2, 2, 72, 16]
cat([neg_1, slice_3], -1) : [2, 2, 72, 16]
mul.Tensor(cat, unsqueeze) : [2, 2, 72, 16]
add.Tensor(mul.Tensor, mul.Tensor) : [2, 2, 72, 16]
linear(mul.Tensor, input) : [2, 72, 32]
view(linear, [2, 72, -1, 16]) : [2, 72, 2, 16]
ne.Scalar(input, 0) : [2, 72]
moonfx.moba_attention(add.Tensor, add.Tensor, transpose.int, 8, 3, 1, 0.25, ne.Scalar)
leftover masks: 0""",
        )

    def test_nanogpt_by_hand(self) -> None:
        self.assertExpectedInline(
            rewritten("nano", "eager"),
            """\
<built-in function getitem>(split.Tensor, 0) : [2, 72, 64]
view(<built-in function getitem>, [2, 72, 4, 16]) : [2, 72, 4, 16]
transpose.int(view, 1, 2) : [2, 4, 72, 16]
<built-in function getitem>(split.Tensor, 1) : [2, 72, 64]
<built-in function getitem>(split.Tensor, 2) : [2, 72, 64]
moonfx.moba_attention(transpose.int, transpose.int, transpose.int, 8, 3, 1, 0.25, None)
leftover masks: 0""",
        )
