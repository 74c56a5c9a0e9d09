"""The dry run of a model by its example: graph breaks, code left to Python, what stays as it is."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moonfx.optim.matrices import Layout
from moonfx.optim.roles.classify import classify
from tests.support.optim.uses import HIDDEN, IDS, X, normed, rows


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


class Quantized(nn.Module):
    """A layer whose weight goes through code that no graph shows, before or after it is cast."""

    def __init__(self, how: Callable[["Quantized", Tensor], Tensor]) -> None:
        super().__init__()
        self.line, self.out, self.how = nn.Linear(8, 6, bias=False), nn.Linear(6, 8), how

    @torch.compiler.disable
    def rounded(self, w: Tensor) -> Tensor:
        return w + ((w * 4).round() / 4 - w).detach()

    def forward(self, x: Tensor) -> Tensor:
        return normed(self.out(F.linear(x, self.how(self, self.line.weight)).relu()))


OUTSIDE = [
    ("as it is", lambda m, w: m.rounded(w), "no graph that was traced reads it"),
    ("cast before", lambda m, w: m.rounded(w.double()).float(), "goes to code that was not traced"),
    ("a part of it", lambda m, w: m.rounded(w[:, :4]).repeat(1, 2), "was not traced"),
    ("scaled by its own size", lambda m, w: m.rounded(w / w.abs().max()), "was not traced"),
]


@pytest.mark.parametrize(("how", "said"), [r[1:] for r in OUTSIDE], ids=[r[0] for r in OUTSIDE])
def test_a_weight_that_untraced_code_changes_is_what_its_module_says(how, said) -> None:
    with pytest.warns(UserWarning, match="1 of 2 matrices were in no graph"):
        row = rows(Quantized(how))["line.weight"]
    assert (row.role, row.rule, row.optimizer) == (HIDDEN, "module", "muon")
    assert row.why.startswith("a Linear (")
    assert said in row.why


def test_a_weight_that_is_read_for_its_shape_alone_is_unused() -> None:
    row = rows(Quantized(lambda m, w: torch.ones_like(w)))["line.weight"]
    assert (row.role, row.rule) == ("unused", "graph")


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


def test_the_gates_of_an_lstm_are_known_by_its_module() -> None:
    found = rows(Recurrent())
    assert found["lstm.weight_ih_l0"].role == "fused projection"
    assert found["lstm.weight_ih_l0"].layout == Layout(sizes=(6, 6, 6, 6))
