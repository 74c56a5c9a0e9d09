"""The verbs on a module: in place, replaceable, and never silent."""

import warnings

import pytest
import torch
from torch import fx

import moonfx
from moonfx.backend.on_miss import NothingRewritten
from tests.support.front_ends import (
    EAGER,
    by_matmul,
    inputs,
    model_of,
)
from tests.support.tiny import Outer, Plain, TinyLM, tokens


def test_a_graph_module_stays_dense_and_its_sparse_copy_shares_the_parameters() -> None:
    gm = fx.symbolic_trace(model_of(by_matmul))
    calls: list[int] = []
    gm.register_forward_pre_hook(lambda *_: calls.append(1))
    dense = gm(*inputs())
    sparse = moonfx.sparsify(gm, 8, 3, **EAGER)
    assert isinstance(sparse, fx.GraphModule)
    assert sparse is not gm
    first = sparse(*inputs())
    assert torch.equal(gm(*inputs()), dense)
    assert not torch.equal(first, dense)
    assert len(calls) == 3, "the copy keeps the hooks"
    assert {id(p) for p in sparse.parameters()} == {id(p) for p in gm.parameters()}
    again = moonfx.sparsify(sparse, 8, 9, **EAGER)
    torch.testing.assert_close(again(*inputs()), dense, atol=2e-6, rtol=1e-5)
    assert torch.equal(sparse(*inputs()), first)
    assert torch.equal(moonfx.restore(sparse)(*inputs()), dense)


def test_the_model_keeps_its_class_parameters_and_state_dict() -> None:
    model = TinyLM()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    parameters = [id(p) for p in model.parameters()]
    assert moonfx.sparsify(model, 16, 2, **EAGER) is model
    model(tokens())
    assert type(model) is TinyLM
    assert [id(p) for p in model.parameters()] == parameters
    assert list(model.state_dict()) == list(before)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_a_second_sparsify_replaces_the_policy() -> None:
    model, x = TinyLM(), tokens()
    dense = model(x)
    moonfx.sparsify(model, 16, 2, **EAGER)
    first = model(x)
    moonfx.sparsify(model, 16, 6, **EAGER)
    torch.testing.assert_close(model(x), dense, atol=2e-6, rtol=1e-5)
    assert {str(r.policy) for r in moonfx.report(model).rewritten} == {"16/6/1"}
    moonfx.sparsify(model, 16, 2, **EAGER)
    torch.testing.assert_close(model(x), first, atol=0, rtol=0)


def test_many_policies_in_a_row_are_all_obeyed() -> None:
    """More than Dynamo's recompile limit of 8, beyond which it would silently stay eager."""
    model, x = TinyLM(layers=1), tokens(64, 1)
    dense = model(x)
    for topk in [2] * 12:
        moonfx.sparsify(model, 8, topk, **EAGER)
        assert not torch.allclose(model(x), dense, atol=1e-4)
        assert len(moonfx.report(model).rewritten) == 1


def test_a_model_that_is_no_module_or_already_compiled_is_refused() -> None:
    with pytest.raises(
        TypeError,
        match="model must be a torch.nn.Module that torch.compile takes, an fx.Gr.*, got int",
    ):
        moonfx.sparsify(3)  # type: ignore[type-var]
    with pytest.raises(TypeError, match="model is already compiled"):
        moonfx.sparsify(torch.compile(TinyLM(), backend="eager"))  # type: ignore[type-var]
    with pytest.raises(ValueError, match="TinyLM is neither"):
        moonfx.report(TinyLM())


def test_a_model_without_attention_warns_raises_or_is_ignored() -> None:
    x = torch.randn(2, 8)
    with pytest.warns(UserWarning, match="no attention of Plain became sparse"):
        moonfx.sparsify(Plain(), **EAGER)(x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = moonfx.sparsify(Plain(), on_miss="ignore", **EAGER)
        model(x)
        model(x)
    model = Plain()
    expected = model(x)
    moonfx.sparsify(model, on_miss="raise", **EAGER)
    with pytest.raises(NothingRewritten, match="no attention of Plain became sparse"):
        model(x)
    assert torch.equal(model(x), expected)
    assert model._compiled_call_impl is None


class Dropping(TinyLM):
    def __init__(self) -> None:
        super().__init__()
        for layer in self.layers:
            layer.dropout = 0.1


def test_a_later_call_that_turns_dense_is_not_silent() -> None:
    model, x = Dropping().eval(), tokens()
    moonfx.sparsify(model, 16, 2, **EAGER)
    model(x)
    with pytest.warns(
        UserWarning, match="layers.0 was sparse in a call of 96 .* is dense in .*p=0.1"
    ):
        model.train()(x)


def test_sparsify_of_a_model_around_a_sparse_one_is_refused() -> None:
    inner = moonfx.sparsify(TinyLM(), 16, 2, **EAGER)
    with pytest.raises(ValueError, match=r"under moonfx.sparsify already \(inner\)"):
        moonfx.sparsify(Outer(inner), 8, 2, **EAGER)


def test_a_compilation_after_sparsify_shows_in_the_report() -> None:
    model = moonfx.sparsify(TinyLM(), 16, 2, **EAGER)
    model.compile(backend="eager")
    assert "compiled anew after sparsify" in str(moonfx.report(model))


def test_explain_copies_a_cache_and_takes_tensors_with_a_history() -> None:
    class Cached(TinyLM):
        def forward(self, x: torch.Tensor, cache: list[torch.Tensor]) -> torch.Tensor:
            cache.append(x.detach())
            return self.layers[0](x)

    cache: list[torch.Tensor] = []
    x = torch.randn(1, 64, 32, requires_grad=True) * 2
    plan = moonfx.explain(Cached(), x, cache, block=16, topk=2)
    assert len(plan.rewritten) == 1
    assert cache == []
