"""A call that is written as an equal one before it is written as if it had been traced."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from moonfx.capture import retrace
from moonfx.capture.retrace import capture

X = torch.ones(2, 3, 4)


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(4), nn.Linear(4, 8), nn.Linear(8, 4)

    def forward(self, x):
        hidden = self.up(self.norm(x.to(torch.float32)))  # x itself, under another name
        hidden = nn.functional.dropout(nn.functional.silu(hidden), 0.5, self.training)
        return x + self.down(hidden.transpose(0, 1).contiguous().transpose(0, 1))


class Stack(nn.Module):
    def __init__(self, through=lambda layer, x: layer(x)):
        super().__init__()
        self.layers, self.through = nn.ModuleList(Layer() for _ in range(3)), through

    def forward(self, x):
        for layer in self.layers:
            x = self.through(layer, x)
        return x


class Constants(nn.Module):
    """Constants that == does not tell apart."""

    def forward(self, x):
        a = torch.add(x, 1) + torch.add(x, 1.0) + torch.add(x, True)
        b = torch.full((2,), 0.0).sum() / torch.full((2,), -0.0).sum()
        return a + b + torch.arange(4) + torch.arange(4)


def in_place(x):
    a, b = x * 2, x * 2
    a.add_(1)
    b.unsqueeze_(0)
    return a * 2 + b[0] * 2 + (x * 2).unsqueeze(0)[0]


def modes(x):
    y = x * 2
    with torch.no_grad():
        z = x * 2
    with torch.autocast("cpu", torch.bfloat16):
        a = x @ x.mT
    return y + z + x * 2, a, x @ x.mT


def pieces(x):
    for _ in range(2):
        a, b = torch.chunk(x, 2, dim=-1)
        values, places = torch.topk(x, 2)
        x = torch.cat((a, b), -1) + values.sum() + places.sum() + torch.tensor(1.0)
    return x


def again(layer, x):
    return checkpoint(layer, x, use_reentrant=False)


def same_and_other(x):
    y = x + 1
    return x * x + x * y + y * y + y * x


# name, module or function, its input
CASES = [
    ("layers", Stack().eval(), X),
    ("training", Stack(), X),
    ("input that needs gradients", Stack(), X.clone().requires_grad_()),
    ("checkpointed", Stack(again), X),
    ("constants", Constants(), X),
    ("in place", in_place, X),
    ("in place under gradients", lambda x: in_place(x * 1), X.clone().requires_grad_()),
    ("modes", modes, X.clone().requires_grad_()),
    ("several results", pieces, X),
    ("one tensor twice", same_and_other, X),
]


def described(gm):
    """All that the passes and compilers read of a graph."""
    rows = []
    for node in gm.graph.nodes:
        value = node.meta.get("val")
        known = value.stride() if isinstance(value, torch.Tensor) else None
        origin = [str(node.meta.get(k)) for k in ("stack_trace", "nn_module_stack", "torch_fn")]
        rows.append((node.format_node(), str(value), known, *origin))
        held = getattr(gm, str(node.target), None) if node.op == "get_attr" else None
        if hasattr(held, "graph"):
            rows += described(held)
    return rows


def captured(call, *args, grad=True, dynamic=False):
    """The graph as it is, and as it is if every call is traced; and how often one was not."""
    found = []

    def backend(gm, inputs):
        skipped = []
        was, known = retrace.key_of, retrace.Written.replay
        retrace.Written.replay = lambda *a: skipped.append(1) or known(*a)
        try:
            ours = described(capture(gm, inputs))
            retrace.key_of = lambda *a: None
            traced = described(capture(gm, inputs))
        finally:
            retrace.key_of, retrace.Written.replay = was, known
        found.append((ours, traced, len(skipped)))
        return gm.forward

    with torch.set_grad_enabled(grad):
        torch.compile(call, backend=backend, dynamic=dynamic)(*args)
    ((ours, traced, skipped),) = found
    return ours, traced, skipped


@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no_grad"])
@pytest.mark.parametrize(("call", "x"), [c[1:] for c in CASES], ids=[c[0] for c in CASES])
def test_the_graph_is_the_one_that_tracing_every_call_gives(call, x, grad):
    ours, traced, _ = captured(call, x, grad=grad)
    assert ours == traced


def test_layers_that_are_alike_are_traced_once():
    """Of 3 layers, all of the second and third but for x.to(x.dtype), which gives x itself."""
    _, _, skipped = captured(Stack().eval(), X, grad=False)
    assert skipped == 2 * 9


def test_the_bodies_of_checkpoints_that_are_alike_are_traced_once():
    _, _, skipped = captured(Stack(again), X, grad=False)
    assert skipped == 2 * 9


def test_symbolic_sizes_are_traced_at_every_call():
    _, _, skipped = captured(Stack().eval(), X, grad=False, dynamic=True)
    assert skipped == 0
