"""What `export_onnx` wrote, and how far it is from PyTorch at each size."""

from dataclasses import dataclass, field

from tabulate import tabulate

from moonfx.report.report import Report


class OnnxMismatch(RuntimeError):
    """onnxruntime does not give what PyTorch gives; no file was written."""


@dataclass(frozen=True)
class Check:
    """One run of onnxruntime beside PyTorch.

    Args:
        batch, length: of the token inputs; None where an input has no such axis.
        against: "model" for the sparse model as torch.compile runs it, "program" for the exported
            one, "" where PyTorch itself does not run at this size.
        max_error: the largest absolute difference of any output, inf for another shape or type.
        off: positions (all axes but the last) whose error is beyond the tolerance.
        positions: how many there are.
        note: what else there is to say.
    """

    batch: int | None
    length: int | None
    against: str
    max_error: float
    off: int = 0
    positions: int = 0
    note: str = ""


@dataclass(frozen=True)
class OnnxReport:
    """A written file.

    Args:
        path: of the file.
        files: every file written, the model first; the weights beside it if they are many.
        opset: version of the standard operators.
        inputs, outputs: name -> shape, axes by name where they are dynamic.
        checks: one per size.
        tolerance: what max_error was held to.
        operators: how often each operator occurs.
        attention: what became of each attention.
    """

    path: str
    files: list[str]
    opset: int
    inputs: dict[str, list[int | str]]
    outputs: dict[str, list[int | str]]
    checks: list[Check]
    tolerance: float
    operators: dict[str, int]
    attention: Report | None = field(default=None, repr=False)

    @property
    def max_error(self) -> float:
        return max(check.max_error for check in self.checks if check.against)

    def __str__(self) -> str:
        shapes = [
            f"{kind} {name} [{', '.join(map(str, shape))}]"
            for kind, named in (("in ", self.inputs), ("out", self.outputs))
            for name, shape in named.items()
        ]
        most = sorted(self.operators.items(), key=lambda item: (-item[1], item[0]))
        sparse = "" if self.attention is None else f", {len(self.attention.rewritten)} sparse"
        return "\n".join(
            [
                f"{', '.join(self.files)}: opset {self.opset}, {sum(self.operators.values())} "
                f"nodes of standard operators{sparse}",
                *shapes,
                table(self.checks),
                f"tolerance {self.tolerance:g}; operators: "
                + ", ".join(f"{name} {count}" for name, count in most),
            ]
        )


def table(checks: list[Check]) -> str:
    rows = [
        [c.batch, c.length, c.against, f"{c.max_error:.1e}" if c.against else "", c.note]
        for c in checks
    ]
    return tabulate(rows, headers=["batch", "length", "against", "max error", ""])
