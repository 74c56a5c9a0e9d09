"""Functions marked for Dynamo: one is never traced, one is called while tracing."""

import subprocess
import sys

import torch
from torch import Tensor

from moonfx.capture.marks import constant_when_traced, never_traced


def test_a_function_that_is_never_traced_runs_as_it_is_inside_a_compiled_one() -> None:
    calls: list[bool] = []

    @never_traced
    def apart(x: Tensor) -> Tensor:
        calls.append(torch.compiler.is_compiling())
        return x * 2

    compiled = torch.compile(lambda x: apart(x + 1) + 1, backend="eager")
    for _ in range(2):
        assert compiled(torch.ones(1)).item() == 5
    assert calls == [False, False]


def test_a_constant_is_what_the_trace_was_told_once() -> None:
    calls: list[int] = []

    @constant_when_traced
    def count() -> int:
        calls.append(1)
        return len(calls)

    compiled = torch.compile(lambda x: x * count(), backend="eager", fullgraph=True)
    found = [compiled(torch.ones(1)).item() for _ in range(3)]
    assert len(calls) < 3
    assert found == [found[0]] * 3


def test_marks_do_not_import_dynamo() -> None:
    program = (
        "import sys, torch; from moonfx.capture import marks; before = 'torch._dynamo' in "
        "sys.modules; marks.never_traced(lambda x: x); marks.constant_when_traced(lambda: 1); "
        "print('torch._dynamo' in sys.modules)"
    )
    found = subprocess.check_output([sys.executable, "-c", program], text=True)
    assert found.strip() == "False"
