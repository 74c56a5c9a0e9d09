"""Conditions on sizes that are flags of a torch function: decided in our compilations alone."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from moonfx.capture.compiled_calls import compile_call
from moonfx.capture.symbolic_flags import decide_flags

X = torch.randn(2, 4, 6, 8)


class Ours:
    """A backend, of moonfx by its module's name."""

    __module__ = "moonfx.test"

    def __init__(self) -> None:
        self.graphs: list[torch.fx.GraphModule] = []

    def __call__(self, gm: torch.fx.GraphModule, inputs: Any) -> Callable[..., Any]:
        self.graphs.append(gm)
        return gm.forward


def by_keyword(x: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(x, x, x, is_causal=x.shape[2] > 1)


def by_place(x: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(x, x, x, None, 0.0, x.shape[2] == x.shape[-1])


def of_a_sum(x: Tensor) -> Tensor:
    return torch.sum(x, -1, keepdim=x.shape[2] > 3)


@pytest.mark.parametrize("function", [by_keyword, by_place, of_a_sum])
def test_a_flag_of_sizes_breaks_no_graph_and_is_guarded(function) -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    backend = Ours()
    compiled = compile_call(function, backend, dynamic=True)
    for length in (6, 9, 8, 2):
        x = torch.randn(2, 4, length, 8)
        torch.testing.assert_close(compiled(x), function(x))
    assert torch._dynamo.utils.counters["graph_break"] == {}
    assert backend.graphs


def test_a_condition_that_torch_takes_as_one_stays_a_condition() -> None:
    def function(x: Tensor) -> Tensor:
        torch._check(x.shape[2] > 1)
        return x * torch.sym_ite(torch.sym_not(x.shape[2] > 40), 2, 3)

    torch._dynamo.reset()
    backend = Ours()
    compiled = compile_call(function, backend, dynamic=True)
    torch._dynamo.utils.counters.clear()
    for length in (6, 60):
        x = torch.randn(2, 4, length, 8)
        torch.testing.assert_close(compiled(x), function(x))
    assert torch._dynamo.utils.counters["graph_break"] == {}
    assert len(backend.graphs) == 1


def test_compilations_for_another_backend_are_left_as_they_are() -> None:
    decide_flags()
    decide_flags()
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    torch.compile(by_keyword, backend="eager", dynamic=True)(X)
    assert torch._dynamo.utils.counters["graph_break"]
