"""A model's compiled call: its recompile limit, and compilations around it."""

import copy

import pytest
import torch
from torch import fx

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


def test_what_is_disabled_is_known_however_it_was_said() -> None:
    assert not compiled_calls.is_left_out(TinyLM())
    assert compiled_calls.is_left_out(torch.compiler.disable(TinyLM()))

    class Disabled(TinyLM):
        @torch.compiler.disable
        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            return super().forward(tokens)

    assert compiled_calls.is_left_out(Disabled())


def test_a_call_runs_under_settings_that_are_as_before_after_it() -> None:
    config = torch._dynamo.config
    names = ("specialize_float", "recompile_limit", "fail_on_recompile_limit_hit")
    before = [getattr(config, name) for name in names]
    fast = torch.backends.mha.get_fastpath_enabled()
    seen: list[object] = []

    def backend(gm: fx.GraphModule, inputs: list[object]) -> object:
        seen.append(compiled_calls.ours_is_running)
        seen.append(config.recompile_limit >= compiled_calls.RECOMPILE_LIMIT)
        seen.append(torch.backends.mha.get_fastpath_enabled())
        raise KeyError("injected")

    call = compiled_calls.compile_call(lambda x: x * 2, backend)
    with pytest.raises(Exception, match="injected"):
        call(torch.ones(2))
    assert seen == [True, True, False]
    assert [getattr(config, name) for name in names] == before
    assert torch.backends.mha.get_fastpath_enabled() is fast
    assert not compiled_calls.ours_is_running


def test_a_copy_of_a_graph_module_has_its_hooks_but_none_of_ours() -> None:
    gm = fx.symbolic_trace(torch.nn.Linear(2, 2))
    calls: list[int] = []
    gm.register_forward_pre_hook(lambda *given: calls.append(1))
    gm.register_forward_pre_hook(compiled_calls.stay_out_of_outer_graphs)
    gm.note, gm.__dict__["_moonfx"] = "kept", "state"
    copied = compiled_calls.copy_of_graph_module(gm)
    copied(torch.ones(2))
    assert (calls, copied.note) == ([1], "kept")
    assert "_moonfx" not in vars(copied)
    assert len(copied._forward_pre_hooks) == 1
    assert [id(p) for p in copied.parameters()] == [id(p) for p in gm.parameters()]
