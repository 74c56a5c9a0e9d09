"""Graphs as readable Python, and the artifacts of torch's structured traces."""

import ast
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import torch

from moonfx.capture.trace_log import readable, tracing
from moonfx.passes.pass_manager import PASSES
from tests.passes.test_dump import PROGRAM
from tests.support.bodies import nested
from tests.support.reading import traced


def test_structured_traces_hold_each_graph_and_each_diff(tmp_path: Path) -> None:
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(PROGRAM)],
        env={**os.environ, "TORCH_TRACE": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    )
    text = "".join(path.read_text() for path in tmp_path.iterdir())
    for number, (name, _) in enumerate(PASSES, 1):
        for what in ("before", "after", "diff"):
            assert text.count(f'"moonfx_{number:02}_{name}_{what}"') == 1, run.stderr


def test_a_graph_is_python_with_shapes_dtypes_and_strides() -> None:
    text = readable(traced(lambda x: x.mT.contiguous() + 1, torch.ones(2, 3)))
    ast.parse(text)
    assert text.lstrip().startswith("class Graph(")
    assert '"f32[2, 3][3, 1]' in text
    assert '"f32[3, 2][2, 1]' in text


def test_the_bodies_of_a_graph_are_in_its_text() -> None:
    text = readable(nested(lambda x: x.exp() * 2, torch.ones(3))[0])
    assert "aten.exp" in text


def test_nobody_has_asked_for_a_trace() -> None:
    """pytest's own handler only listens."""
    assert not tracing()
