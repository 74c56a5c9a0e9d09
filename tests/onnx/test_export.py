"""A sparsified model becomes a file of standard ONNX operators that gives what the model gives."""

import importlib.util
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

import moonfx
from moonfx.onnx import OnnxMismatch, OnnxReport, export, files
from tests.support.tiny import Plain, TinyLM, tokens
from tests.support.zoo import VOCABULARY, build, oracle

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

BLOCK, TOPK, SINKS = 16, 3, 1
POLICY = {"block": BLOCK, "topk": TOPK, "sinks": SINKS, "compiler": "eager"}


def run(path: str | Path, **inputs: Tensor) -> list[Tensor]:
    """The outputs of a file in onnxruntime."""
    session = onnxruntime.InferenceSession(str(path))
    feed = {name: tensor.numpy() for name, tensor in inputs.items()}
    return [torch.from_numpy(x) for x in session.run(None, feed)]


def standard_only(path: str | Path) -> bool:
    """Whether a file is valid and knows no operators but ONNX's own."""
    onnx.checker.check_model(str(path), full_check=True)
    model = onnx.load(str(path))
    used = {node.domain for graph in [model.graph, *model.functions] for node in graph.node}
    return used | {entry.domain for entry in model.opset_import} == {""} and not model.functions


# --- models ---------------------------------------------------------------------------------------

MODELS = [
    ("llama", "sdpa", True),
    ("llama", "eager", False),
    ("gpt2", "eager", True),
    ("qwen3", "sdpa", False),
    ("nano", "eager", False),
    ("nano", "sdpa", False),
]


# Whose forms the others have as well.
LONG = (("llama", "eager", False), ("qwen3", "sdpa", False))


@pytest.mark.parametrize(
    ("name", "form", "padded"),
    [pytest.param(*m, marks=[pytest.mark.sweep] if m in LONG else []) for m in MODELS],
    ids=[f"{n}-{f}{'-padded' * p}" for n, f, p in MODELS],
)
def test_a_model_traced_at_96_runs_at_any_batch_and_length(
    name: str, form: str, padded: bool, tmp_path: Path
) -> None:
    def call(batch: int, length: int) -> tuple[Tensor, Tensor | None]:
        ids = torch.randint(0, VOCABULARY, (batch, length))
        start = (torch.arange(batch)[:, None] * 5 + 3) % length
        return ids, (torch.arange(length) >= start).long() if padded else None

    ids, padding = call(2, 96)
    model = moonfx.sparsify(build(name, form), **POLICY)
    named = {} if padding is None else {"attention_mask": padding}
    path = tmp_path / "model.onnx"
    report = moonfx.export_onnx(model, (ids,), path, kwargs=named)
    sizes = [(c.batch, c.length, c.against) for c in report.checks]
    assert sizes == [(2, 96, "model"), (1, 32, "program"), (3, 200, "model"), (1, 1, "program")]
    assert report.max_error <= 2e-3
    assert report.attention is not None
    assert len(report.attention.rewritten) == 2
    assert report.operators["TopK"] == 2
    token_input = "ids" if name == "nano" else "input_ids"
    assert report.inputs[token_input] == ["batch", "sequence"]
    assert standard_only(path)
    # Beside an oracle that knows no graph and no pass; measured errors are at most 2e-6.
    for batch, length in [(2, 96), (1, 32), (3, 200), (1, 1), (2, 16)]:
        ids, padding = call(batch, length)
        named = {} if padding is None else {"attention_mask": padding}
        (found,) = run(path, **{token_input: ids}, **named)
        with torch.no_grad():
            expected, calls = oracle(name, ids, padding, BLOCK, TOPK, SINKS)
        real = torch.ones_like(ids) if padding is None else padding
        assert calls == 2
        assert (found - expected)[real.bool()].abs().max() <= 1e-5


class WithTwoResults(TinyLM):
    """Takes float inputs and a position per token, and returns a dict."""

    def forward(self, tokens: Tensor, places: Tensor) -> dict[str, Tensor]:  # type: ignore[override]
        x = self.embed(tokens) + places[..., None].float().sin()
        for layer in self.layers:
            x = x + layer(x)
        return {"scores": self.head(x), "best": self.head(x).argmax(-1)}


@pytest.fixture(scope="module")
def program() -> torch.export.ExportedProgram:
    """A sparse program of one layer, exported without moonfx and then sparsified."""
    torch.manual_seed(0)
    shapes = ({0: Dim("rows"), 1: Dim("words", max=120)},)
    exported = torch.export.export(TinyLM(1).eval(), (tokens(96),), dynamic_shapes=shapes)
    sparse: Any = moonfx.sparsify(exported, BLOCK, 2)
    return sparse


@pytest.fixture
def translated_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Translates a program once for all the tests of what becomes of the translation."""

    def remembered(program: torch.export.ExportedProgram, inputs: Any, opset: int) -> Any:
        if program not in TRANSLATED:
            TRANSLATED[program] = translate(program, inputs, opset)
        return TRANSLATED[program]

    translate = export._translated
    monkeypatch.setattr(export, "_translated", remembered)


TRANSLATED: dict[torch.export.ExportedProgram, Any] = {}


@pytest.mark.usefixtures("translated_once")
def test_an_exported_program_is_written_within_its_own_range(
    program: torch.export.ExportedProgram, tmp_path: Path
) -> None:
    report = moonfx.export_onnx(program, None, tmp_path / "p.onnx")
    sizes = [(c.batch, c.length) for c in report.checks]
    assert sizes == [(2, 96), (1, 32), (3, 120), (1, 1)]
    assert report.max_error < 1e-5
    assert standard_only(report.path)


def test_keyword_order_dict_results_and_the_model_itself_are_kept(tmp_path: Path) -> None:
    model = moonfx.sparsify(WithTwoResults(1).eval(), BLOCK, 2, compiler="eager")
    words, places = tokens(40, batch=1), torch.arange(40)[None]
    report = moonfx.export_onnx(
        model, (), tmp_path / "m.onnx", kwargs={"places": places, "tokens": words}
    )
    assert list(report.inputs) == ["tokens", "places"]
    assert report.outputs == {"scores": ["batch", "sequence", 50], "best": ["batch", "sequence"]}
    with torch.no_grad():
        sparse = model(words, places)
        assert len(moonfx.report(model).rewritten) == 1  # as before
        moonfx.restore(model)
        dense = model(words, places)
    found, best = run(report.path, tokens=words, places=places)
    torch.testing.assert_close(found, sparse["scores"], atol=1e-5, rtol=0)
    assert torch.equal(best, sparse["best"])
    assert (sparse["scores"] - dense["scores"]).abs().max() > 1e-3


def test_static_sizes_stay_as_traced(tmp_path: Path) -> None:
    model = moonfx.sparsify(TinyLM(1).eval(), BLOCK, 2, compiler="eager")
    report = moonfx.export_onnx(model, (tokens(48, 1),), tmp_path / "s.onnx", dynamic=False)
    assert list(report.inputs.values()) == [[1, 48]]
    assert [(c.batch, c.length, c.against) for c in report.checks] == [(1, 48, "model")]


def test_dynamic_shapes_of_the_users_own_are_obeyed(tmp_path: Path) -> None:
    model = moonfx.sparsify(TinyLM(1).eval(), BLOCK, 2, compiler="eager")
    shapes = {"tokens": {1: Dim("words", min=40, max=60)}}
    report = moonfx.export_onnx(model, (tokens(48),), tmp_path / "d.onnx", dynamic=shapes)
    assert list(report.inputs.values()) == [[2, "sequence"]]
    assert [(c.batch, c.length) for c in report.checks] == [(2, 48), (2, 40), (2, 60)]


# --- never a half-written file --------------------------------------------------------------------


@pytest.mark.usefixtures("translated_once")
def test_a_failed_check_leaves_no_file_and_keeps_the_old_one(
    program: torch.export.ExportedProgram, tmp_path: Path
) -> None:
    path = tmp_path / "m.onnx"
    with pytest.raises(OnnxMismatch, match=r"by more than 1e-12 at batch 2 length 96") as failure:
        moonfx.export_onnx(program, None, path, tolerance=1e-12)
    assert "nothing was written" in str(failure.value)
    assert list(tmp_path.iterdir()) == []
    path.write_text("the old file")
    with pytest.raises(OnnxMismatch):
        moonfx.export_onnx(program, None, path, tolerance=1e-12)
    assert path.read_text() == "the old file"
    assert list(tmp_path.iterdir()) == [path]


def test_a_wrong_translation_is_found(
    program: torch.export.ExportedProgram, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from moonfx.onnx import operator

    right = operator.moba_attention

    def one_block_less(query: Any, key: Any, value: Any, block: int, topk: int, *rest: Any) -> Any:
        return right(query, key, value, block, topk - 1, 0)

    monkeypatch.setattr(operator, "moba_attention", one_block_less)
    with pytest.raises(OnnxMismatch, match="differs from PyTorch") as failure:
        moonfx.export_onnx(program, None, tmp_path / "m.onnx")
    assert "near-tie" not in str(failure.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("translated_once")
def test_large_weights_lie_beside_the_model_and_are_replaced_with_it(
    program: torch.export.ExportedProgram, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "EMBED_LIMIT", 0)
    path, words = tmp_path / "m[1].onnx", tokens(50)
    first = moonfx.export_onnx(program, None, path)
    (before,) = run(path, tokens=words)
    assert sorted(map(str, tmp_path.iterdir())) == sorted(first.files)
    assert len(first.files) == 2
    bystander = tmp_path / "m[1].onnx.note.data"
    bystander.write_text("not ours")

    real = os.replace

    def no_space(source: Path, target: Path) -> None:
        if target == path:
            raise OSError(28, "No space left on device")
        real(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", no_space)
        with pytest.raises(OSError, match="No space"):
            moonfx.export_onnx(program, None, path)
    assert torch.equal(run(path, tokens=words)[0], before)
    assert sorted(map(str, tmp_path.iterdir())) == sorted([*first.files, str(bystander)])

    second = moonfx.export_onnx(program, None, path)
    assert sorted(map(str, tmp_path.iterdir())) == sorted([*second.files, str(bystander)])
    assert first.files[1] != second.files[1]
    assert torch.equal(run(path, tokens=words)[0], before)


# --- what it says ---------------------------------------------------------------------------------


@pytest.mark.usefixtures("translated_once")
def test_the_report_is_a_table_of_sizes_and_errors(
    program: torch.export.ExportedProgram, tmp_path: Path
) -> None:
    report = moonfx.export_onnx(program, None, tmp_path / "m.onnx")
    assert isinstance(report, OnnxReport)
    lines = str(report).splitlines()
    assert lines[0].startswith(f"{tmp_path / 'm.onnx'}: opset 20, ")
    assert lines[1] == "in  tokens [batch, sequence]"
    assert [line.split()[:3] for line in lines[5:9]] == [
        ["2", "96", "program"],
        ["1", "32", "program"],
        ["3", "120", "program"],
        ["1", "1", "program"],
    ]
    assert lines[-1].startswith("tolerance 0.002; operators: ")
    assert "Softmax 1" in lines[-1]


def test_a_missing_package_is_one_clear_error_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *rest: None if name in ("onnx", "onnxscript") else find(name, *rest),
    )
    with pytest.raises(
        ImportError, match=r"needs onnx and onnxscript: pip install 'moonfx\[onnx\]'"
    ):
        moonfx.export_onnx(nn.Identity(), (), tmp_path / "m.onnx")


def sparse(model: nn.Module) -> nn.Module:
    return moonfx.sparsify(model, BLOCK, 2, compiler="eager", on_miss="ignore")


def small() -> nn.Module:
    return sparse(TinyLM(1).eval())


BAD = [
    ("not sparsified", lambda: TinyLM(1).eval(), {}, ValueError, "must be under moonfx.sparsify"),
    ("training", lambda: sparse(TinyLM(1)), {}, ValueError, "call model.eval()"),
    (
        "half",
        lambda: sparse(TinyLM(1).eval().half()),
        {},
        ValueError,
        "must be float32, got float16",
    ),
    ("no model", lambda: "model", {}, TypeError, "must be a torch.nn.Module, got str"),
    ("args", small, {"args": tokens()}, TypeError, "must be a tuple"),
    ("none", small, {"args": None}, ValueError, "an example call"),
    ("call", small, {"args": ()}, TypeError, "do not fit TinyLM"),
    ("opset", small, {"opset": 13}, ValueError, "18 or more, got 13"),
    ("tolerance", small, {"tolerance": 0}, ValueError, "more than 0"),
    ("suffix", small, {"path": "m.pt"}, ValueError, "end in .onnx"),
    ("folder", small, {"path": "no/m.onnx"}, ValueError, "that exists"),
    (
        "dynamic",
        small,
        {"dynamic": "yes"},
        TypeError,
        "a bool or a dict",
    ),
]


@pytest.mark.parametrize(
    ("model", "given", "error", "message"), [b[1:] for b in BAD], ids=[b[0] for b in BAD]
)
def test_a_bad_argument_is_named_before_any_work(
    model: Any, given: dict[str, Any], error: type[Exception], message: str, tmp_path: Path
) -> None:
    known = {"args": (tokens(),), "path": "m.onnx"} | given
    known["path"] = tmp_path / known["path"]
    with pytest.raises(error, match=re.escape(message)):
        moonfx.export_onnx(model(), **known)
    assert list(tmp_path.iterdir()) == []


def test_a_model_without_sparse_attention_is_not_written(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    with pytest.raises(ValueError, match="no attention of Plain is sparse"):
        moonfx.export_onnx(sparse(Plain().eval()), (torch.randn(4, 6, 8),), path)
    dense = torch.export.export(TinyLM(1).eval(), (tokens(),))
    with pytest.raises(ValueError, match="this one has none: call moonfx.sparsify"):
        moonfx.export_onnx(dense, None, path)
    assert list(tmp_path.iterdir()) == []


@torch.library.custom_op("moonfx_test_onnx::twice", mutates_args=())
def twice(x: Tensor) -> Tensor:
    return x + x


@twice.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


def test_an_operator_that_onnx_has_not_is_named(tmp_path: Path) -> None:
    class Doubled(TinyLM):
        def forward(self, tokens: Tensor) -> Tensor:
            return twice(super().forward(tokens))

    with pytest.raises(ValueError, match="model calls moonfx_test_onnx.twice, which"):
        moonfx.export_onnx(sparse(Doubled(1).eval()), (tokens(),), tmp_path / "m.onnx")
    assert list(tmp_path.iterdir()) == []


def test_a_program_with_sizes_of_its_own_takes_no_others(
    program: torch.export.ExportedProgram, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="dynamic must be True for an ExportedProgram"):
        moonfx.export_onnx(program, None, tmp_path / "m.onnx", dynamic=False)
