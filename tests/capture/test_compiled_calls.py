"""A model's compiled call: its recompile limit, and compilations around it."""

import copy

import pytest
import torch

import moonfx
from moonfx.capture import compiled_calls
from tests.support.tiny import Outer, TinyLM, tokens

EAGER = {"compiler": "eager"}


def test_the_recompile_limit_is_an_error_and_not_silently_dense(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(compiled_calls, "RECOMPILE_LIMIT", 2)
    static = {"recompile_limit": 2, "automatic_dynamic_shapes": False}
    model = moonfx.sparsify(TinyLM(), 16, 2, **EAGER)
    with torch._dynamo.config.patch(static):
        model(tokens(64))
        model(tokens(65))
        with pytest.raises(compiled_calls.TooManyGraphs, match="would run dense from here"):
            model(tokens(66))
        model(tokens(64))


def test_a_compilation_around_a_sparse_model_leaves_it_sparse_or_is_an_error() -> None:
    model, x = TinyLM(), tokens()
    dense = model(x)
    moonfx.sparsify(model, 16, 2, **EAGER)
    sparse = model(x)
    outer = Outer(model)
    torch.testing.assert_close(outer(x), sparse * 2, atol=0, rtol=0)
    torch.testing.assert_close(torch.compile(outer, backend="eager")(x), sparse * 2)
    torch.testing.assert_close(torch.compile(model, backend="eager")(x), sparse)
    torch.compiler.reset()
    with pytest.raises(Exception, match=r"under moonfx.sparsify[\s\S]*moonfx.restore first"):
        torch.compile(outer, backend="eager", fullgraph=True)(x)
    torch.testing.assert_close(model(x), sparse, atol=0, rtol=0)
    copied = copy.deepcopy(model)
    torch.testing.assert_close(torch.compile(copied, backend="eager")(x), dense)
    moonfx.restore(model)
    torch.testing.assert_close(torch.compile(outer, backend="eager")(x), dense * 2)
    moonfx.sparsify(outer, 16, 2, **EAGER)
    torch.testing.assert_close(outer(x), sparse * 2, atol=0, rtol=0)
