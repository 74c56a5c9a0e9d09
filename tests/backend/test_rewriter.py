"""One graph and its model's policies: what becomes of it, also where something fails."""

import pytest
import torch

import moonfx
from moonfx.backend import rewriter
from moonfx.capture.retrace import CaptureError
from tests.support.tiny import TinyLM, gradients, tokens


def test_a_failed_capture_runs_the_graph_as_it_was_and_says_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Raised as it is, an exception that Dynamo knows would shatter the model into pieces."""
    model, x = TinyLM(), tokens()
    dense = model(x)

    def fail(*args: object) -> None:
        raise CaptureError("DataDependentOutputException: injected")

    monkeypatch.setattr(rewriter, "capture", fail)
    moonfx.sparsify(model, 16, 2, compiler="eager")
    with pytest.warns(UserWarning, match="not captured, runs as it was: .*injected"):
        assert torch.equal(model(x), dense)
    report = moonfx.report(model)
    assert (report.graphs, len(report.failures)) == (1, 1)


def test_a_failed_pass_runs_the_graph_as_it_was_and_says_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, x = TinyLM(), tokens()
    dense = model(x)

    def fail(context: object) -> None:
        raise KeyError("injected")

    monkeypatch.delenv("MOONFX_VERIFY", raising=False)
    monkeypatch.setattr(rewriter, "run_passes", fail)
    moonfx.sparsify(model, 16, 2, compiler="eager")
    with pytest.warns(UserWarning, match="KeyError: 'injected'"):
        assert torch.equal(model(x), dense)


class Islands(TinyLM):
    """A layer under no_grad, and a layer under autocast, inside the graph."""

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens)
        with torch.no_grad():
            x = x + self.layers[0](x)
        with torch.autocast("cpu", torch.bfloat16):
            y = self.layers[1](x)
        return self.head(x + y)


@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
def test_no_grad_and_autocast_regions_inside_the_graph_keep_their_meaning(compiler: str) -> None:
    model, x = Islands(), tokens()
    dense = model(x)
    names = [n for n, _ in model.named_parameters()]
    without = {n for n in names if n.startswith("layers.0")} | {"embed.weight"}
    wanted = [p for n, p in model.named_parameters() if n not in without]
    expected = torch.autograd.grad(dense.square().sum(), wanted)
    moonfx.sparsify(model, 16, 6, compiler=compiler)
    sparse = model(x)
    found = torch.autograd.grad(sparse.square().sum(), wanted)
    assert len(moonfx.report(model).rewritten) == 2
    # bfloat16 in layer 1: 8 bits of mantissa.
    torch.testing.assert_close(sparse, dense, atol=2e-2, rtol=2e-2)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, atol=2e-2 * float(b.abs().max()), rtol=2e-2)
    sparse = model(x)
    sparse.sum().backward()
    assert all(p.grad is None for n, p in model.named_parameters() if n.startswith("layers.0"))


class Checkpointed(TinyLM):
    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens)
        for layer in self.layers:
            x = x + torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False)
        return self.head(x)


@pytest.mark.parametrize("compiler", ["eager", "aot_eager", "inductor"])
def test_attention_inside_activation_checkpointing_is_found_and_still_recomputed(
    compiler: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    graphs: list[torch.fx.GraphModule] = []
    original = rewriter.compile_graph

    def spy(gm, *rest):  # type: ignore[no-untyped-def]
        graphs.append(gm)
        return original(gm, *rest)

    monkeypatch.setattr(rewriter, "compile_graph", spy)
    model, x = Checkpointed(), tokens()
    dense = model(x)
    expected = gradients(model, dense.square().sum())
    moonfx.sparsify(model, 16, 6, compiler=compiler)
    sparse = model(x)
    found = gradients(model, sparse.square().sum())
    torch.testing.assert_close(sparse, dense, atol=2e-6, rtol=1e-5)
    for name, grad in expected.items():
        torch.testing.assert_close(found[name], grad, atol=2e-5, rtol=1e-4, msg=name)
    assert [r.layer for r in moonfx.report(model).rewritten] == ["layers.0", "layers.1"]
    (graph,) = graphs
    regions = [n for n in graph.graph.nodes if "checkpoint" in str(n.target)]
    assert len(regions) == 2, "each layer is still one checkpointed region"
