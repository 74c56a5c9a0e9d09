"""Runs a written model in onnxruntime beside PyTorch, at the traced size and at others.

Beside the sparse model as torch.compile runs it, at the traced and the largest size, so that what
torch.export fixed or missed shows; beside the exported program, which needs no further compilation,
at the rest. An ExportedProgram has no model beside it.
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from moonfx.onnx.report import Check, OnnxMismatch, table
from moonfx.onnx.sizes import Inputs

Call = Callable[..., Any]

# Onnxruntime sums in another order; a near-tie between two blocks may then fall the other way.
TOLERANCE = 2e-3


def run_checks(
    staged: Path, inputs: Inputs, program: Call, model: Call | None, tolerance: float
) -> list[Check]:
    """One check per size.

    Args:
        staged: the model's file.
        inputs: what PyTorch was traced with.
        program, model: the exported program and, where there is one, the sparse model, to call.
    Raises:
        OnnxMismatch: if an output is off by more than the tolerance, or onnxruntime fails.
    """
    session = _session(staged)
    sizes = inputs.sizes()
    largest = max(sizes, key=lambda size: (size[0] or 0) * (size[1] or 0))
    checks = []
    # The largest first: torch.compile then compiles once for both sizes of the model.
    for size in sorted(sizes, key=lambda size: size != largest):
        whole = model is not None and size in (sizes[0], largest)
        checks.append(_check(session, inputs, size, program, model if whole else None, tolerance))
    checks.sort(key=lambda check: sizes.index((check.batch, check.length)))
    wrong = [c for c in checks if c.max_error > tolerance]
    if wrong:
        raise OnnxMismatch(_explained(wrong, checks, tolerance))
    return checks


def _check(
    session: Any,
    inputs: Inputs,
    size: tuple[int | None, int | None],
    program: Call,
    model: Call | None,
    tolerance: float,
) -> Check:
    batch, length = size
    leaves = inputs.at(batch, length)
    args, kwargs = inputs.unflatten(leaves)
    against = "program" if model is None else "model"
    try:
        with torch.no_grad():
            expected = tensors((program if model is None else model)(*args, **kwargs))
    except Exception as error:
        if size == (inputs.batch, inputs.length):
            raise
        # Past the end of a position table, say: what PyTorch does not run, no file need.
        reason = str(error).strip().splitlines()[:1]
        note = f"PyTorch does not run at this size: {type(error).__name__}: {''.join(reason)}"
        return Check(batch, length, "", 0.0, note=note[:120])
    known = {i.name for i in session.get_inputs()}
    feed = {
        name: leaf.detach().cpu().numpy()
        for name, leaf in zip(inputs.names, leaves, strict=True)
        if isinstance(leaf, Tensor) and name in known
    }
    try:
        found = [torch.from_numpy(x) for x in session.run(None, feed)]
    except Exception as error:  # noqa: BLE001 (onnxruntime's errors have no common type)
        note = f"onnxruntime failed: {str(error).strip().splitlines()[0]}"
        return Check(batch, length, against, math.inf, note=note)
    return _compared(found, expected, batch, length, against, tolerance)


def _compared(
    found: list[Tensor],
    expected: list[Tensor],
    batch: int | None,
    length: int | None,
    against: str,
    tolerance: float,
) -> Check:
    shapes = [[tuple(x.shape) for x in each] for each in (found, expected)]
    if shapes[0] != shapes[1]:
        note = f"outputs of shapes {shapes[0]}, PyTorch's have {shapes[1]}"
        return Check(batch, length, against, math.inf, note=note)
    worst, off, positions = 0.0, 0, 0
    for ours, theirs in zip(found, expected, strict=True):
        a, b = ours.double(), theirs.detach().cpu().double()
        # Equal infinities and NaN in the same places are equal.
        error = torch.where((a == b) | (a.isnan() & b.isnan()), 0.0, (a - b).abs())
        error = error.nan_to_num(math.inf, math.inf)
        error = error.flatten(0, -2).amax(-1) if error.dim() > 1 and error.numel() else error
        worst = max(worst, error.max().item() if error.numel() else 0.0)
        off += int((error > tolerance).sum())
        positions += error.numel()
    note = f"beyond the tolerance at {off} of {positions} positions" if off else ""
    return Check(batch, length, against, worst, off, positions, note)


def _explained(wrong: list[Check], checks: list[Check], tolerance: float) -> str:
    sizes = ", ".join(f"batch {c.batch} length {c.length}" for c in wrong)
    lines = [
        f"onnxruntime differs from PyTorch by more than {tolerance:g} at {sizes}; nothing was "
        "written",
        table(checks),
    ]
    if all(0 < c.off <= c.positions // 20 for c in wrong):
        lines.append(
            "Few positions are off. That is what a near-tie between two blocks looks like: float32 "
            "sums in another order choose the other block. Give other example inputs, or "
            "tolerance= if such positions may differ."
        )
    return "\n".join(lines)


def tensors(result: Any) -> list[Tensor]:
    return [x for x in pytree.tree_leaves(result) if isinstance(x, Tensor)]


def _session(staged: Path) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    try:
        return onnxruntime.InferenceSession(str(staged), options, ["CPUExecutionProvider"])
    except Exception as error:
        raise OnnxMismatch(f"onnxruntime cannot load the model: {error}") from error
