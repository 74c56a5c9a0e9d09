"""Roles by use: what the traced model does with each parameter, whatever it is called.

Each row: the form, the model, what to call it with, and the role of each parameter. Names are those
of the form alone (`a`, `b`): no rule by name or module type could give these answers.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moonfx.optim.matrices import Layout
from moonfx.optim.roles.classify import classify
from moonfx.optim.roles.table import ROLES, RoleRow

HIDDEN = "hidden matrix"
IDS = torch.arange(10).view(2, 5)
X = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(1))


class Use(nn.Module):
    """Parameters of the given shapes, each under one letter, and what is done with them."""

    def __init__(self, forward: Callable[..., Any], **shapes: tuple[int, ...]) -> None:
        super().__init__()
        for name, shape in shapes.items():
            setattr(self, name, nn.Parameter(torch.randn(shape)))
        self.use = forward

    def forward(self, *inputs: Tensor) -> Any:
        return self.use(self, *inputs)


def rows(model: nn.Module, *inputs: Any, **given: Any) -> dict[str, RoleRow]:
    names, parameters = zip(*model.named_parameters(), strict=True)
    found = classify(parameters, names, model, inputs or (X,), **given)
    return {row.name: row for row in found}


def normed(x: Tensor) -> Tensor:
    """Ends a model, so that the matrix before is no head."""
    return F.layer_norm(x, x.shape[-1:])


USES = [
    # name, forward, the shapes of its parameters, what to call it with, roles
    # --- tables -----------------------------------------------------------------------------------
    ("embedding", lambda m, i: normed(F.embedding(i, m.a)), {"a": (20, 8)}, IDS, "embedding"),
    ("gathered by index", lambda m, i: normed(m.a[i]), {"a": (20, 8)}, IDS, "embedding"),
    (
        "gathered by rows",
        lambda m, i: normed(m.a.index_select(0, i[0])),
        {"a": (20, 8)},
        IDS,
        "embedding",
    ),
    (
        "positions",
        lambda m, x: normed(x + F.embedding(torch.arange(x.shape[1]), m.a)),
        {"a": (20, 8)},
        X,
        "position embedding",
    ),
    (
        "positions of what is not padding",
        lambda m, i: normed(F.embedding((i != 0).cumsum(1), m.a)),
        {"a": (20, 8)},
        IDS,
        "position embedding",
    ),
    (
        "positions, added",
        lambda m, x: normed(x + m.a[:, :5]),
        {"a": (1, 9, 8)},
        X,
        "position embedding",
    ),
    (
        "tokens at an offset, which is no position",
        lambda m, i: normed(F.embedding(i + 10 * torch.arange(2)[:, None], m.a)),
        {"a": (20, 8)},
        IDS,
        "embedding",
    ),
    (
        "learned rows",
        lambda m, x: normed(torch.cat([m.a.expand(2, 3, 8), x], 1)),
        {"a": (3, 8)},
        X,
        "embedding",
    ),
    (
        "a class token",
        lambda m, x: normed(torch.cat([m.a.expand(2, 1, 8), x], 1)),
        {"a": (1, 1, 8)},
        X,
        "vector",
    ),
    # --- heads ------------------------------------------------------------------------------------
    ("logits", lambda m, x: x @ m.a, {"a": (8, 20)}, X, "head"),
    (
        "logits of the last token",
        lambda m, x: F.linear(x[:, -1:], m.a).float(),
        {"a": (20, 8)},
        X,
        "head",
    ),
    (
        "softcapped logits",
        lambda m, x: torch.tanh(F.linear(x, m.a) / 30) * 30,
        {"a": (20, 8)},
        X,
        "head",
    ),
    (
        "logits and their loss",
        lambda m, x: ((y := F.linear(x, m.a)), F.cross_entropy(y.flatten(0, 1), IDS.view(-1))),
        {"a": (20, 8)},
        X,
        "head",
    ),
    (
        "a loss alone",
        lambda m, x: F.log_softmax(F.linear(x, m.a), -1)[..., 0].mean(),
        {"a": (20, 8)},
        X,
        "head",
    ),
    (
        "a loss by hand",
        lambda m, x: (F.linear(x, m.a) - x).square().mean(),
        {"a": (8, 8)},
        X,
        "head",
    ),
    ("a pooler is no head", lambda m, x: F.linear(x[:, 0], m.a).tanh(), {"a": (8, 8)}, X, HIDDEN),
    ("a residual is no head", lambda m, x: x + F.linear(x, m.a).relu(), {"a": (8, 8)}, X, HIDDEN),
    (
        "values kept for a cache are no logits",
        lambda m, x: (normed(F.scaled_dot_product_attention(x, x, v := F.linear(x, m.a))), v),
        {"a": (8, 8)},
        X,
        HIDDEN,
    ),
    (
        "what is read again is no head",
        lambda m, x: (y := F.linear(x, m.a), normed(F.linear(y.relu(), m.b))),
        {"a": (6, 8), "b": (5, 6)},
        X,
        {"a": HIDDEN, "b": HIDDEN},
    ),
    (
        "tied head",
        lambda m, i: F.linear(normed(F.embedding(i, m.a)), m.a),
        {"a": (20, 8)},
        IDS,
        "tied head",
    ),
    # --- vectors ----------------------------------------------------------------------------------
    (
        "layer norm",
        lambda m, x: F.layer_norm(x, [8], m.a, m.b),
        {"a": (8,), "b": (8,)},
        X,
        {"a": "norm gain", "b": "bias"},
    ),
    ("RMS norm", lambda m, x: F.rms_norm(x, [8], m.a), {"a": (8,)}, X, "norm gain"),
    (
        "RMS norm by hand, from zero",
        lambda m, x: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * (1 + m.a),
        {"a": (8,)},
        X,
        "norm gain",
    ),
    ("a scale that is no gain", lambda m, x: x.relu() * m.a, {"a": (8,)}, X, "vector"),
    ("a temperature", lambda m, x: normed(x) * m.a.exp(), {"a": ()}, X, "vector"),
    ("bias", lambda m, x: normed(x + m.a), {"a": (8,)}, X, "bias"),
    (
        "bias of a linear",
        lambda m, x: normed(F.linear(x, m.a, m.b)),
        {"a": (6, 8), "b": (6,)},
        X,
        {"a": HIDDEN, "b": "bias"},
    ),
    # --- matrices ---------------------------------------------------------------------------------
    (
        "thin matrix",
        lambda m, x: normed(F.linear(x, m.a).sigmoid() * F.linear(x, m.b)),
        {"a": (1, 8), "b": (6, 8)},
        X,
        {"a": "thin matrix", "b": HIDDEN},
    ),
    (
        "weight norm by hand",
        lambda m, x: normed(F.linear(x, m.a * m.b / m.b.norm(dim=1, keepdim=True))),
        {"a": (6, 1), "b": (6, 8)},
        X,
        {"a": "weight norm", "b": "weight norm"},
    ),
    (
        "LoRA",
        lambda m, x: normed(F.linear(x, m.a) + 0.5 * F.linear(F.linear(F.dropout(x), m.b), m.c)),
        {"a": (6, 8), "b": (2, 8), "c": (6, 2)},
        X,
        {"a": HIDDEN, "b": "LoRA", "c": "LoRA"},
    ),
    (
        "a bottleneck is no LoRA",
        lambda m, x: normed(x + F.linear(F.linear(x, m.b), m.c)),
        {"b": (2, 8), "c": (8, 2)},
        X,
        {"b": HIDDEN, "c": HIDDEN},
    ),
    (
        "two layers beside one are no LoRA",
        lambda m, x: normed(F.linear(x, m.a) + F.linear(F.linear(x, m.b).relu(), m.c)),
        {"a": (6, 8), "b": (2, 8), "c": (6, 2)},
        X,
        {"a": HIDDEN, "b": HIDDEN, "c": HIDDEN},
    ),
    (
        "two wide layers beside one are no LoRA",
        lambda m, x: normed(F.linear(x, m.a) + F.linear(F.linear(x, m.b), m.c)),
        {"a": (6, 8), "b": (8, 8), "c": (6, 8)},
        X,
        {"a": HIDDEN, "b": HIDDEN, "c": HIDDEN},
    ),
    # --- convolutions -----------------------------------------------------------------------------
    (
        "convolutions",
        lambda m, x: normed(F.conv1d(F.conv1d(F.conv1d(x, m.a).relu(), m.b, groups=6), m.c)),
        {"a": (6, 5, 1), "b": (6, 1, 3), "c": (4, 6, 2)},
        X,
        {"a": "first convolution", "b": "depthwise convolution", "c": "convolution"},
    ),
    (
        "a convolution of embeddings is not the first",
        lambda m, i: normed(F.conv1d(F.embedding(i, m.a), m.b)),
        {"a": (20, 8), "b": (6, 5, 3)},
        IDS,
        {"a": "embedding", "b": "convolution"},
    ),
    (
        "a convolution that gives what the model returns",
        lambda m, x: F.conv1d(F.conv1d(x, m.a).relu(), m.b),
        {"a": (6, 5, 3), "b": (4, 6, 1)},
        X,
        {"a": "first convolution", "b": "head"},
    ),
    # --- experts ----------------------------------------------------------------------------------
    ("experts by bmm", lambda m, x: normed(x @ m.a), {"a": (2, 8, 6)}, X, "experts"),
    (
        "experts by einsum",
        lambda m, x: normed(torch.einsum("bnd,bfd->bnf", x, m.a)),
        {"a": (2, 6, 8)},
        X,
        "experts",
    ),
    (
        "experts one by one",
        lambda m, x: normed(F.linear(x[0], m.a[0]) + F.linear(x[1], m.a[1])),
        {"a": (2, 6, 8)},
        X,
        "experts",
    ),
    (
        "experts by choice, and their router",
        lambda m, x: normed(_chosen(m, x)),
        {"a": (4, 8), "b": (4, 6, 8)},
        X,
        {"a": "router", "b": "experts"},
    ),
    (
        "the best of the logits choose no experts",
        lambda m, x: F.linear(x, m.a).topk(2),
        {"a": (20, 8)},
        X,
        HIDDEN,
    ),
    (
        "one matrix in three dimensions",
        lambda m, x: normed(torch.einsum("bnd,dhe->bnhe", x, m.a)),
        {"a": (8, 2, 3)},
        X,
        HIDDEN,
    ),
    # --- recurrences ------------------------------------------------------------------------------
    (
        "a state-space scan",
        lambda m, x: normed(_scan(m, x) + x * m.c),
        {"a": (8,), "b": (8,), "c": (8,)},
        X,
        {"a": "scan parameter", "b": "scan parameter", "c": "scan parameter"},
    ),
    (
        "an exponential that is no decay",
        lambda m, x: x.relu() * m.a.exp(),
        {"a": (8,)},
        X,
        "vector",
    ),
    # --- what is not seen -------------------------------------------------------------------------
    (
        "unused",
        lambda m, x: normed(F.linear(x, m.a)),
        {"a": (6, 8), "b": (6, 8)},
        X,
        {"a": HIDDEN, "b": "unused"},
    ),
]


def _chosen(m: Any, x: Tensor) -> Tensor:
    """A softmax, the two best, and a batched product with the chosen experts' weights."""
    scores, chosen = F.linear(x, m.a).softmax(-1).topk(2)
    made = torch.einsum("bnd,bnkfd->bnkf", x, m.b[chosen])
    return (made * scores[..., None]).sum(2)


def _scan(m: Any, x: Tensor) -> Tensor:
    step = F.softplus(x + m.b)
    decay = torch.exp(-torch.exp(m.a) * step)
    state = x[:, 0]
    for i in range(x.shape[1]):
        state = decay[:, i] * state + step[:, i] * x[:, i]
    return state[:, None]


@pytest.mark.parametrize(
    ("forward", "shapes", "given", "expected"), [r[1:] for r in USES], ids=[r[0] for r in USES]
)
def test_what_a_model_does_with_a_parameter_is_its_role(
    forward: Callable[..., Any], shapes: dict, given: Tensor, expected: Any
) -> None:
    found = rows(Use(forward, **shapes), given)
    expected = {"a": expected} if isinstance(expected, str) else expected
    assert {name: row.role for name, row in found.items()} == expected
    for row in found.values():
        assert row.rule == "graph"
        assert row.optimizer == ROLES[row.role].optimizer


LAYOUTS = [
    # name, forward, shape, layout
    ("linear", lambda m, x: normed(F.linear(x, m.a)), (6, 8), Layout()),
    ("experts", lambda m, x: normed(x @ m.a), (2, 8, 6), Layout("batch")),
    (
        "gate and up of experts",
        lambda m, x: normed((y := x @ m.a)[..., :3].relu() * y[..., 3:]),
        (2, 8, 6),
        Layout("batch", 1, 1, (3, 3)),
    ),
    (
        "heads of one matrix",
        lambda m, x: normed(torch.einsum("bnd,dhe->bnhe", x, m.a)),
        (8, 2, 3),
        Layout("flatten"),
    ),
    (
        "experts under each other",
        lambda m, x: normed(F.linear(x[0], m.a.view(2, 6, 8)[0]) + F.linear(x[1], m.a[6:])),
        (12, 8),
        Layout("matrix", 0, 1, (6, 6)),
    ),
    (
        "filters",
        lambda m, x: normed(F.conv1d(x * x.mean() * m.b, m.a)),
        (6, 5, 3),
        Layout("flatten"),
    ),
]


@pytest.mark.parametrize(
    ("forward", "shape", "layout"), [r[1:] for r in LAYOUTS], ids=[r[0] for r in LAYOUTS]
)
def test_the_use_says_where_the_matrices_lie(
    forward: Callable[..., Any], shape: tuple[int, ...], layout: Layout
) -> None:
    shapes = {"a": shape, "b": (8,)} if layout == Layout("flatten") else {"a": shape}
    row = rows(Use(forward, **shapes))["a"]
    assert (row.layout, row.rule, row.optimizer) == (layout, "graph", "muon")


# --- where the use is not clear -------------------------------------------------------------------


class Holds(nn.Module):
    """A Linear, of whose weight another use is made."""

    def __init__(self, use: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.line, self.use = nn.Linear(8, 6, bias=False), use

    def forward(self, x: Tensor) -> Tensor:
        return normed(self.use(x, self.line.weight))


UNCLEAR = [
    (
        "a gain as well",
        lambda x, w: F.linear(x, w).sum(-1, keepdim=True) + x * w[:5],
        "and read by mul",
    ),
    # name, use of the weight, what is said
    ("masked weight", lambda x, w: F.linear(x, w * (w > 0)), "the weight at linear"),
    (
        "quantized weight",
        lambda x, w: F.linear(x, w + (w.round() - w).detach()),
        "is computed of it by",
    ),
    (
        "bilinear form",
        lambda x, w: F.bilinear(x, x, w.view(6, 8, 1).expand(6, 8, 8)),
        "read by bilinear",
    ),
]


@pytest.mark.parametrize(("use", "said"), [r[1:] for r in UNCLEAR], ids=[r[0] for r in UNCLEAR])
def test_where_the_use_is_not_clear_the_module_decides_and_the_reason_is_said(use, said) -> None:
    row = rows(Holds(use))["line.weight"]
    assert (row.role, row.rule, row.layout) == (HIDDEN, "module", Layout())
    assert row.why.startswith("a Linear (its use is not clear: ")
    assert said in row.why


def test_a_matrix_that_no_layout_says_is_left_to_adamw() -> None:
    """Summed over its first two of three dims, it would be [2 4, 6]; flattened it is [2, 4 6]."""
    use = Use(
        lambda m, x: normed(torch.einsum("bnhe,hed->bnd", x.view(2, 5, 2, 4), m.a)), a=(2, 4, 6)
    )
    row = rows(use)["a"]
    assert (row.role, row.rule, row.optimizer) == ("unclear", "module", "adamw")
    assert "no layout says where the matrices are that einsum" in row.why


class Broken(nn.Module):
    """Layers of one class with a graph break in each: Dynamo makes one graph for all of them."""

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv, self.out = nn.Linear(8, 24), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            y = self.qkv(x)
            torch._dynamo.graph_break()
            return normed(x + self.out(F.scaled_dot_product_attention(*y.chunk(3, -1))))

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(20, 8)
        self.layers = nn.ModuleList(self.Layer() for _ in range(3))
        self.last = nn.Linear(8, 20, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.layers[1](self.layers[0](self.table(ids)))
        return self.last(self.layers[2](x))


def test_the_graphs_after_graph_breaks_are_read_as_one() -> None:
    found = rows(Broken(), IDS)
    assert {row.rule for row in found.values()} == {"graph"}
    expected = {"table.weight": "embedding", "last.weight": "head"}
    for i in range(3):
        expected |= {f"layers.{i}.qkv.weight": "fused projection", f"layers.{i}.qkv.bias": "bias"}
        expected |= {f"layers.{i}.out.weight": HIDDEN, f"layers.{i}.out.bias": "bias"}
        assert found[f"layers.{i}.qkv.weight"].layout == Layout(sizes=(8, 8, 8))
    assert {name: row.role for name, row in found.items()} == expected


def test_what_dynamo_leaves_to_python_is_known_by_its_module() -> None:
    class InALoop(Broken):
        """A break inside a loop: the layers are traced, and what is around them is not."""

        def forward(self, ids: Tensor) -> Tensor:
            x = self.table(ids)
            for layer in self.layers:
                x = layer(x)
            return self.last(x)

    said = (
        "3 of 8 matrices were in no graph .* which do not .*: graph break in loop .*frame skipped"
    )
    with pytest.warns(UserWarning, match=said):
        found = rows(InALoop(), IDS)
    by_module = {name for name, row in found.items() if row.rule == "module"}
    assert by_module == {"table.weight", "layers.2.out.weight", "last.weight"}
    assert found["layers.1.qkv.weight"].layout == Layout(sizes=(8, 8, 8))
    assert "linear in a layer, test_by_use.py:" in found["layers.1.qkv.weight"].why
    assert "no graph that was traced reads it" in found["last.weight"].why


def test_what_goes_to_code_that_was_not_traced_is_not_guessed() -> None:
    class Leaves(Broken.Layer):
        @torch.compiler.disable
        def outside(self, y: Tensor) -> Tensor:
            return y[..., :8] + y[..., 8:16] + y[..., 16:]

        def forward(self, x: Tensor) -> Tensor:
            return normed(self.out(self.outside(self.qkv(x))))

    found = rows(Leaves())
    assert found["qkv.weight"].rule == "module"
    assert "goes to code that was not traced" in found["qkv.weight"].why
    assert found["out.weight"].rule == "graph"


def test_what_only_untraced_code_reads_is_not_called_unused() -> None:
    class Hidden(Broken.Layer):
        @torch.compiler.disable
        def outside(self, x: Tensor) -> Tensor:
            return self.qkv(x)[..., :8]

        def forward(self, x: Tensor) -> Tensor:
            return normed(self.out(self.outside(x.relu())))

    row = rows(Hidden())["qkv.weight"]
    assert (row.role, row.rule) == (HIDDEN, "module")
    assert "no graph that was traced reads it" in row.why


# --- a dry run ------------------------------------------------------------------------------------


class Stateful(nn.Module):
    """Statistics, random numbers and a counter that a real call would change."""

    def __init__(self) -> None:
        super().__init__()
        self.line, self.norm, self.drop = nn.Linear(8, 8), nn.BatchNorm1d(5), nn.Dropout(0.5)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        x = self.drop(self.norm(self.line(x)))
        torch._dynamo.graph_break()
        return x + torch.rand(())


def test_the_model_is_traced_and_not_run() -> None:
    model = Stateful().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    random, call = torch.get_rng_state(), model._compiled_call_impl
    found = rows(model)
    assert found["line.weight"].rule == "graph"
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)
    assert model._compiled_call_impl is call
    assert all(p.grad is None for p in model.parameters())


class LeftToPython(nn.Module):
    """Dynamo leaves all of it to Python: a break in a loop."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.norm = nn.Linear(8, 16), nn.BatchNorm1d(16)
        self.layers = nn.ModuleList(nn.Linear(16, 16) for _ in range(2))
        self.last, self.fails = nn.Linear(16, 3), False
        self.register_buffer("mean", torch.full((), torch.nan))
        self.register_buffer("wide", torch.zeros(1).expand(4))

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.up(x))
        self.mean = 0.9 * self.mean + 0.1 * x.detach().mean()
        for layer in self.layers:
            x = layer(x)
            torch._dynamo.graph_break()
        if self.fails:
            raise ValueError("after the statistics")
        return self.last(x)


@pytest.mark.parametrize("fails", [False, True], ids=["that returns", "that fails"])
def test_a_model_left_to_python_keeps_its_buffers_and_its_user_is_told(fails: bool) -> None:
    """The statistics of a batch norm, of which the CPU's kernel leaves no trace in the version."""
    model = LeftToPython().train()
    model.fails = fails
    buffers = dict(model.named_buffers())
    before = {name: value.clone() for name, value in buffers.items()}
    if fails:
        with pytest.raises(ValueError, match="cannot be traced with it: .*after the statistics"):
            rows(model, torch.randn(4, 8))
    else:
        with pytest.warns(UserWarning, match="4 of 4 matrices were in no graph"):
            found = rows(model, torch.randn(4, 8))
        assert {row.rule for row in found.values()} == {"module"}
    for name, value in model.named_buffers():
        assert value is buffers[name]
        torch.testing.assert_close(value, before[name], rtol=0, atol=0, equal_nan=True)


class Recurrent(nn.Module):
    """Dynamo breaks at an LSTM."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(8, 6, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return normed(self.lstm(x)[0])


@pytest.mark.parametrize(
    ("model", "given"), [(Broken(), IDS), (Recurrent(), X)], ids=["all matrices seen", "an LSTM"]
)
def test_nothing_is_said_where_a_trace_could_say_no_more(
    model: nn.Module, given: Tensor, recwarn: pytest.WarningsRecorder
) -> None:
    rows(model, given)
    assert [str(w.message) for w in recwarn if "moonfx" in str(w.message)] == []


def test_a_wrapped_model_is_traced_as_the_model() -> None:
    wrapped = nn.DataParallel(torch.compile(Broken.Layer()))  # type: ignore[arg-type]
    assert list(rows(wrapped).values()) == list(rows(Broken.Layer()).values())


def test_a_model_that_stumbles_over_zeros_is_run() -> None:
    class Picks(Broken.Layer):
        def forward(self, x: Tensor) -> Tensor:
            y = self.qkv(x)[..., :8]
            return normed(self.out(y[:, y.abs().sum((0, 2)).nonzero()[0]]))

    assert rows(Picks())["out.weight"].rule == "graph"


def test_inputs_by_keyword_are_a_dict() -> None:
    model = Broken.Layer()
    names, parameters = zip(*model.named_parameters(), strict=True)
    assert classify(parameters, names, model, {"x": X}) == list(rows(model).values())


def test_tied_weights_have_one_role_in_either_order() -> None:
    class Tied(nn.Module):
        def __init__(self, first: str) -> None:
            super().__init__()
            parts = {"a": nn.Embedding(20, 8), "b": nn.Linear(8, 20, bias=False)}
            parts["b"].weight = parts["a"].weight
            for name in sorted(parts, reverse=first == "b"):
                setattr(self, name, parts[name])

        def forward(self, ids: Tensor) -> Tensor:
            return self.b(normed(self.a(ids)))

    for first in ("a", "b"):
        (row,) = rows(Tied(first), IDS).values()
        assert (row.name, row.role, row.rule) == (f"{first}.weight", "tied head", "graph")


def test_the_user_goes_before_the_graph() -> None:
    row = rows(Broken.Layer(), overrides={"qkv.weight": "adamw"})["qkv.weight"]
    assert (row.rule, row.optimizer, row.layout) == ("override", "adamw", Layout())
    assert "graph: fused projection" in row.why


def test_the_reason_names_the_node_the_module_and_the_source_line() -> None:
    why = rows(Broken.Layer())["qkv.weight"].why
    assert "linear in qkv, test_by_use.py:" in why
    assert "is 8 + 8 + 8 features that go apart; several matrices in one" in why


def test_an_example_that_the_model_does_not_take_is_an_error_that_says_so() -> None:
    with pytest.raises(ValueError, match="example: Layer cannot be traced with it: "):
        rows(Broken.Layer(), torch.randn(2, 5, 7))


PARAMETRIZED = [
    ("weight norm", nn.utils.parametrizations.weight_norm, "graph"),
    ("weight norm, the old one", nn.utils.weight_norm, "graph"),
    ("spectral norm", nn.utils.parametrizations.spectral_norm, "module"),
]


@pytest.mark.parametrize(
    ("wrap", "rule"), [r[1:] for r in PARAMETRIZED], ids=[r[0] for r in PARAMETRIZED]
)
def test_what_a_weight_is_computed_of_is_no_matrix(
    wrap: Callable[..., nn.Module], rule: str
) -> None:
    class Computed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.line = wrap(nn.Linear(8, 6, bias=False))

        def forward(self, x: Tensor) -> Tensor:
            return normed(self.line(x))

    found = rows(Computed().eval())
    assert {(row.role, row.rule) for row in found.values()} == {("weight norm", rule)}


def test_the_gates_of_an_lstm_are_known_by_its_module() -> None:
    found = rows(Recurrent())
    assert found["lstm.weight_ih_l0"].role == "fused projection"
    assert found["lstm.weight_ih_l0"].layout == Layout(sizes=(6, 6, 6, 6))
