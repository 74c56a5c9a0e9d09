"""Conditions on sizes that are given to a torch function as a flag, decided when they are traced.

before  scaled_dot_product_attention(q, k, v, is_causal=n > 1), n symbolic: torch takes no SymBool
        for a flag, Dynamo breaks the graph, and the attention runs outside of it
after   is_causal=True, and a guard n > 1

Only in compilations for a backend of moonfx.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch._dynamo.eval_frame import innermost_backend
from torch._dynamo.variables.base import VariableTracker
from torch._dynamo.variables.tensor import SymNodeVariable
from torch._dynamo.variables.torch import TorchInGraphFunctionVariable


def decide_flags() -> None:
    """Makes Dynamo decide such conditions from now on; again, it does nothing."""
    call = TorchInGraphFunctionVariable.call_function
    if not hasattr(call, "__wrapped__"):
        TorchInGraphFunctionVariable.call_function = _deciding(call)  # type: ignore[method-assign]


def _deciding(call: Callable[..., VariableTracker]) -> Callable[..., VariableTracker]:
    @functools.wraps(call)
    def decided(
        function: TorchInGraphFunctionVariable,
        tx: Any,
        args: Any,
        kwargs: dict[str, VariableTracker],
    ) -> VariableTracker:
        given = [*args, *kwargs.values()]
        if any(map(_is_condition, given)) and _takes_flags(function.value) and _is_ours(tx):
            args = [_decided(tx, each) for each in args]
            kwargs = {name: _decided(tx, each) for name, each in kwargs.items()}
        return call(function, tx, args, kwargs)

    return decided


def _is_condition(given: VariableTracker) -> bool:
    return isinstance(given, SymNodeVariable) and isinstance(given.sym_num, torch.SymBool)


def _takes_flags(function: Any) -> bool:
    """Whether it is an operator: torch.sym_not, torch._check and their like take conditions."""
    return hasattr(torch.ops.aten, getattr(function, "__name__", ""))


def _decided(tx: Any, given: VariableTracker) -> VariableTracker:
    if not _is_condition(given):
        return given
    assert isinstance(given, SymNodeVariable)
    return VariableTracker.build(tx, given.evaluate_expr(tx.output))


def _is_ours(tx: Any) -> bool:
    backend = innermost_backend(tx.output.compiler_fn)
    backend = getattr(backend, "compiler_fn", backend)  # one that torch.compile found by name
    module = getattr(backend, "__module__", None) or type(backend).__module__
    return str(module).startswith("moonfx.")
