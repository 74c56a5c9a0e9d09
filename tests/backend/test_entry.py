"""The Dynamo backend "moonfx": by name, its options, what it says of a graph without attention."""

import subprocess
import sys
import textwrap
import warnings

import pytest
import torch

import moonfx
from moonfx.backend import rewriter
from moonfx.backend.on_miss import NothingRewritten
from tests.support.tiny import Plain, TinyLM, tokens


def compiled(model: torch.nn.Module, **options: object) -> torch.nn.Module:
    given = {"block": 16, "topk": 2, "compiler": "eager", **options}
    return torch.compile(model, backend="moonfx", options=given)  # type: ignore[arg-type]


def test_the_backend_is_found_by_name_in_a_process_that_never_imported_moonfx() -> None:
    program = """
        import sys, torch
        from torch import nn
        class M(nn.Module):
            def forward(self, q, k, v):
                return nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        assert "moonfx" in torch._dynamo.list_backends()
        assert "moonfx" not in sys.modules
        compiled = torch.compile(
            M(), backend="moonfx", options={"block": 16, "topk": 2, "compiler": "eager"}
        )
        q, k, v = torch.randn(3, 1, 2, 100, 16)
        out = compiled(q, k, v)
        import moonfx
        expected = moonfx.moba_attention(q, k, v, 16, 2, sinks=1)
        torch.testing.assert_close(out, expected)
        print("same")
    """
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.stdout.strip() == "same", result.stderr


def test_the_backend_and_sparsify_give_the_same_model_and_report() -> None:
    model, x = TinyLM(), tokens()
    by_backend = compiled(model)
    out = by_backend(x)
    report = moonfx.report(by_backend)
    assert report.to_dict() == moonfx.report(model).to_dict()
    moonfx.sparsify(model, 16, 2, compiler="eager")
    torch.testing.assert_close(model(x), out, atol=0, rtol=0)
    assert moonfx.report(model).to_dict() == report.to_dict()


OPTIONS = [
    (dict(blok=3), "unknown option 'blok' .*did you mean 'block'.*known: block, topk, sinks"),
    (dict(max_autotune=True), "unknown option 'max_autotune' of backend 'moonfx'; known: block"),
    (dict(layers={}), "unknown option 'layers'.*moonfx.sparsify takes them"),
    (dict(block=0), "block must be at least 1"),
    (dict(topk=2, sinks=5), "sinks must be"),
    (dict(compiler="tvm"), "compiler must be one of inductor, aot_eager, eager, got 'tvm'"),
    (dict(on_miss="x"), "on_miss must be one of warn, raise, ignore"),
    (dict(causal_only="yes"), "causal_only must be True or False, got 'yes'"),
    (dict(recompute_routing=1), "recompute_routing must be True or False, got 1"),
    (dict(inductor="max-autotune"), "inductor must be a dict of Inductor options"),
    (
        dict(disable_passes=["clasify_mask"]),
        r"disable_passes: no pass is named 'clasify_mask' \(did you mean 'classify_mask'\?\); "
        "known: .*find_attention, lay_out_heads, classify_mask, sparsify_attention, newton_schulz",
    ),
    (dict(disable_passes="tvm"), r"disable_passes must be a list of names, got 'tvm' \(str\)"),
]


@pytest.mark.parametrize(("options", "message"), OPTIONS)
def test_options_are_checked(options: dict[str, object], message: str) -> None:
    with pytest.raises(Exception, match=message):
        compiled(TinyLM(), **options)(tokens())


def test_inductor_options_and_modes_are_passed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[dict[str, object]] = []
    original = rewriter.compile_graph

    def spy(gm, inputs, compiler, stamp, config):  # type: ignore[no-untyped-def]
        seen.append(dict(config))
        return original(gm, inputs, "eager", stamp, config)

    monkeypatch.setattr(rewriter, "compile_graph", spy)
    compiled(TinyLM(), compiler="inductor", inductor={"epilogue_fusion": False})(tokens())
    torch.compile(TinyLM(), backend="moonfx", mode="max-autotune-no-cudagraphs")(tokens())
    assert seen[0] == {"epilogue_fusion": False}
    assert seen[1]["max_autotune"] is True


def test_a_graph_without_attention_warns_raises_or_is_ignored() -> None:
    x = torch.randn(2, 8)
    with pytest.warns(UserWarning, match="no attention of a graph compiled by backend 'moonfx'"):
        compiled(Plain())(x)
    compiled(Plain(), on_miss="ignore")(x)
    with pytest.raises(Exception, match="became sparse") as caught:
        compiled(Plain(), on_miss="raise")(x)
    assert isinstance(caught.value, NothingRewritten) or "NothingRewritten" in str(caught.value)


@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
def test_dynamic_true_keeps_the_attention_and_needs_one_graph(compiler: str) -> None:
    model = TinyLM()
    options = {"block": 16, "topk": 20, "compiler": compiler}
    dynamic = torch.compile(model, backend="moonfx", dynamic=True, options=options)  # type: ignore[arg-type]
    for length in (96, 70, 131, 33, 200):
        x = tokens(length)
        torch.testing.assert_close(dynamic(x), model(x), atol=2e-6, rtol=1e-5)
    report = moonfx.report(model)
    assert (report.graphs, len(report.rewritten)) == (1, 2)


class BreaksFirst(TinyLM):
    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        scale = self.embed.weight.mean().exp()
        torch._dynamo.graph_break()
        return super().forward(tokens) * scale


def test_a_piece_without_attention_before_a_graph_break_is_no_miss() -> None:
    model, x = BreaksFirst(), tokens()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="moonfx")
        compiled(model, on_miss="raise")(x)
    assert len(moonfx.report(model).rewritten) == 2
