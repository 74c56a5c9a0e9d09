"""What the tests of Newton-Schulz rewrites share: a graph of a function, before and after."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

import moonfx.ops.newton_schulz as operator
from moonfx.passes.context import Context
from moonfx.passes.pass_manager import run_passes
from moonfx.policy import LayerPolicy
from moonfx.report.newton_schulz import IterationRow, rows_of

OPERATOR = torch.ops.moonfx.newton_schulz.default


def always(monkeypatch: pytest.MonkeyPatch, form: str = "symmetric") -> None:
    """Has the cost model choose this form for every size."""
    monkeypatch.setattr(operator, "newton_schulz_form", lambda *size: (form, "asked for"))


def as_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """Has each iteration become an operator that multiplies what was written.

    It equals what torch computes bit for bit on any processor, as no other form does.
    """
    always(monkeypatch, "plain")
    monkeypatch.setattr("moonfx.passes.newton_schulz.batching.is_as_written", lambda *call: False)


def matrix(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


class Rewritten:
    """The pre-dispatch graph of a function, after the passes.

    Traced without Dynamo, which takes most of a second for each function.

    Args:
        run: the function.
        inputs: what it is traced with; not changed.
        symbolic: whether sizes are symbols.
        gradients: whether it is called with gradients on, which no optimizer's step is.
    """

    def __init__(
        self,
        run: Callable[..., Any],
        *inputs: Tensor,
        symbolic: bool = False,
        gradients: bool = False,
    ) -> None:
        mode = "symbolic" if symbolic else "fake"
        copies = [x.clone() for x in inputs]
        with torch.set_grad_enabled(gradients):
            trace = make_fx(lambda *given: run(*given), tracing_mode=mode, pre_dispatch=True)
            self.gm = trace(*copies)
            self.before = [n.target for n in self.gm.graph.nodes]
            context = Context(self.gm, lambda *site: LayerPolicy())
            self.count = run_passes(context, check=True)
        self.failures = context.failures
        self.rows: list[IterationRow] = rows_of(context.iterations)

    def __call__(self, *inputs: Tensor) -> Any:
        return self.gm(*inputs)

    @property
    def targets(self) -> list[Any]:
        return [n.target for n in self.gm.graph.nodes]

    @property
    def calls(self) -> list[torch.fx.Node]:
        return [n for n in self.gm.graph.nodes if n.target is OPERATOR]

    @property
    def reasons(self) -> list[str]:
        return [row.reason for row in self.rows]
