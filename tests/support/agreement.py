"""Runs one model dense, sparse with every block, and sparse with few, and says how they agree.

The tables of tests/models (surroundings, Hugging Face, libraries) state what each model's report
must be; what every model must obey is asserted here: the same outputs and gradients as dense where
topk reaches every block, others where it does not, dense to the bit where nothing was rewritten.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import moonfx
from moonfx import LayerPolicy
from moonfx.backend.rewriter import Backend
from moonfx.capture.compiled_calls import compile_call, plain_call
from moonfx.policy import Policies
from moonfx.report.report import Report

BLOCK, FULL, FEW = 16, 6, 2  # 16 * 6 tokens cover the 80 of the tables
LENGTH = 80

Call = Callable[[Any], Any]


def outputs(result: Any) -> list[Tensor]:
    """Every floating point tensor that a model returns; the logits of a Hugging Face output."""
    result = getattr(result, "logits", result)
    return [t for t in tree_leaves(result) if isinstance(t, Tensor) and t.is_floating_point()]


def run(model: nn.Module, call: Call) -> tuple[list[Tensor], dict[str, Tensor | None]]:
    """Outputs, and the gradients of all parameters if the outputs have a history."""
    model.zero_grad()
    found = outputs(call(model))
    if any(t.requires_grad for t in found):
        loss = torch.stack([t.float().square().mean() for t in found if t.requires_grad]).sum()
        loss.backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    return [t.detach() for t in found], gradients


@dataclass(frozen=True)
class Tolerance:
    """How far sparse with every block may be from dense.

    float32 sums in another order through two layers, on values of order one: a few units of 1.2e-7.
    """

    output: float = 5e-6
    gradient: float = 5e-6
    relative: float = 1e-4


ROUNDING = Tolerance()


def assert_agree(
    dense: tuple[list[Tensor], dict[str, Tensor | None]],
    full: tuple[list[Tensor], dict[str, Tensor | None]],
    tolerance: Tolerance,
) -> None:
    bounds = dict(atol=tolerance.output, rtol=tolerance.relative)
    for mine, theirs in zip(full[0], dense[0], strict=True):
        torch.testing.assert_close(mine, theirs, **bounds)
    for name, theirs in dense[1].items():
        mine = full[1][name]
        assert (mine is None) == (theirs is None), f"gradient of {name}"
        if mine is not None and theirs is not None:
            bounds = dict(atol=tolerance.gradient, rtol=10 * tolerance.relative)
            torch.testing.assert_close(mine, theirs, msg=name, **bounds)


def assert_sparse(few: list[Tensor], dense: list[Tensor], report: Report) -> None:
    """Sparse where something was rewritten, and otherwise dense to the bit."""
    if report.rewritten:
        assert (
            max(float((a - b).detach().abs().max()) for a, b in zip(few, dense, strict=True)) > 1e-4
        )
    else:
        assert all(map(torch.equal, few, dense))


def sparsified(
    model: nn.Module, call: Call, tolerance: Tolerance = ROUNDING, **options: Any
) -> Report:
    """The report of a model under `moonfx.sparsify`, once it was seen to agree."""
    options = {"compiler": "eager", "on_miss": "ignore", **options}
    dense = run(model, call)
    moonfx.sparsify(model, BLOCK, FULL, **options)
    full = run(model, call)
    report = moonfx.report(model)
    assert_agree(dense, full, tolerance)
    moonfx.sparsify(model, BLOCK, FEW, **options)
    assert_sparse(outputs(call(model)), dense[0], report)
    return report


class TwoPolicies:
    """A backend that makes each graph sparse twice, so that Dynamo reads a model once."""

    def __init__(self, model: nn.Module, causal_only: bool) -> None:
        made = [Policies(LayerPolicy(BLOCK, n), causal_only=causal_only) for n in (FULL, FEW)]
        self.full, self.few = (Backend(p, "eager", model) for p in made)
        self.use_few = False

    def __call__(self, gm: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        full, few = self.full(gm, inputs), self.few(gm, inputs)
        return lambda *args: (few if self.use_few else full)(*args)


def compiled(
    model: nn.Module, call: Call, tolerance: Tolerance = ROUNDING, causal_only: bool = True
) -> Report:
    """As `sparsified`, at half its time, for a model whose call is nothing special."""
    dense = run(model, call)
    backend = TwoPolicies(model, causal_only)
    model._compiled_call_impl = compile_call(plain_call(model), backend)
    full = run(model, call)
    assert_agree(dense, full, tolerance)
    backend.use_few = True
    with torch.no_grad() if not full[1] else torch.enable_grad():
        assert_sparse(outputs(call(model)), dense[0], backend.full.report)
    model._compiled_call_impl = None
    return backend.full.report
