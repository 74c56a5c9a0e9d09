"""What is said of a written file."""

import pytest

from moonfx.onnx.report import Check, OnnxReport, table
from moonfx.report.report import Report

CHECKS = [
    Check(1, 64, "model", 2e-5),
    Check(2, 32, "program", 3e-4, note="other batch"),
    Check(None, None, "", 9.0, note="PyTorch does not run it"),
]


def report(**fields: object) -> OnnxReport:
    given = {
        "path": "m.onnx",
        "files": ["m.onnx", "m.data"],
        "opset": 18,
        "inputs": {"ids": ["batch", "length"]},
        "outputs": {"logits": ["batch", "length", 50]},
        "checks": CHECKS,
        "tolerance": 1e-3,
        "operators": {"Add": 2, "MatMul": 7, "Abs": 2},
        **fields,
    }
    return OnnxReport(**given)


def test_the_error_is_the_largest_of_what_was_compared() -> None:
    assert report().max_error == pytest.approx(3e-4)


def test_the_text_names_files_shapes_checks_and_operators() -> None:
    text = str(report(attention=Report()))
    assert text.startswith("m.onnx, m.data: opset 18, 11 nodes of standard operators, 0 sparse\n")
    assert "in  ids [batch, length]\nout logits [batch, length, 50]\n" in text
    assert text.endswith("tolerance 0.001; operators: MatMul 7, Abs 2, Add 2")


def test_a_size_that_was_compared_with_nothing_has_no_error() -> None:
    *_, last = table(CHECKS).splitlines()
    assert last.split() == ["PyTorch", "does", "not", "run", "it"]
