"""The user's verbs on a module: in place, replaceable, undone; bad input leaves it untouched."""

import copy
import pickle
import warnings

import pytest
import torch

import moonfx
from moonfx.backend.on_miss import NothingRewritten
from moonfx.capture import compiled_calls
from tests.support.tiny import Plain, TinyLM, gradients, tokens

EAGER = {"compiler": "eager"}


@pytest.mark.parametrize("compiler", ["eager", "aot_eager", "inductor"])
def test_full_topk_equals_dense_in_output_and_every_gradient(compiler: str) -> None:
    model, x = TinyLM(), tokens()
    dense = model(x)
    expected = gradients(model, dense.square().sum())
    moonfx.sparsify(model, 16, 6, compiler=compiler)
    sparse = model(x)
    found = gradients(model, sparse.square().sum())
    # float32 sums of other order: a few units of 1.2e-7 on values of order one.
    torch.testing.assert_close(sparse, dense, atol=2e-6, rtol=1e-5)
    for name, grad in expected.items():
        torch.testing.assert_close(found[name], grad, atol=2e-5, rtol=1e-4, msg=name)
    assert len(moonfx.report(model).rewritten) == 2


@pytest.mark.parametrize("compiler", ["eager", "aot_eager", "inductor"])
def test_every_compiler_computes_the_same_sparse_model(compiler: str) -> None:
    model, x = TinyLM(), tokens()
    dense = model(x)
    moonfx.sparsify(model, 16, 2, **EAGER)
    expected = model(x)
    moonfx.sparsify(model, 16, 2, compiler=compiler)
    torch.testing.assert_close(model(x), expected, atol=2e-6, rtol=1e-5)
    assert (expected - dense).abs().max() > 1e-3


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


def test_restore_gives_bit_identical_outputs_and_undoes_everything() -> None:
    model, x = TinyLM(), tokens()
    before, attributes = model(x), set(vars(model))
    moonfx.sparsify(moonfx.sparsify(model, 16, 2, **EAGER), 8, 3, **EAGER)
    model(x)
    assert moonfx.restore(model) is model
    assert torch.equal(model(x), before)
    assert set(vars(model)) - attributes <= {"_compiled_call_impl"}
    assert model._compiled_call_impl is None
    with pytest.raises(ValueError, match="restore: model must be under moonfx.sparsify"):
        moonfx.restore(model)


def test_restore_gives_back_a_compilation_of_the_users_own() -> None:
    model = TinyLM()
    model.compile(backend="eager")
    own = model._compiled_call_impl
    moonfx.restore(moonfx.sparsify(model, 16, 2, **EAGER))
    assert model._compiled_call_impl is own


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


def test_full_attention_is_dense_inside_and_sparse_again_after() -> None:
    model, x = TinyLM(), tokens()
    dense = model(x)
    moonfx.sparsify(model, 16, 2, **EAGER)
    sparse = model(x)
    with moonfx.full_attention(model):
        assert torch.equal(model(x), dense)
    assert torch.equal(model(x), sparse)
    switch = moonfx.full_attention(model)
    assert torch.equal(model(x), dense)
    with moonfx.full_attention(model):
        assert torch.equal(model(x), dense)
    assert torch.equal(model(x), dense)
    switch.off()
    assert torch.equal(model(x), sparse)
    assert moonfx.report(model).graphs == 1, "nothing is compiled anew"


def test_switches_to_full_attention_can_end_in_any_order() -> None:
    model, x = TinyLM(), tokens()
    moonfx.sparsify(model, 16, 2, **EAGER)
    sparse = model(x)
    first, second = moonfx.full_attention(model), moonfx.full_attention(model)
    first.off()
    first.off()
    assert not torch.equal(model(x), sparse)
    second.off()
    assert torch.equal(model(x), sparse)


def test_full_attention_leaves_optimizer_state_and_training_alone() -> None:
    model, x = TinyLM(), tokens()
    moonfx.sparsify(model, 16, 2, **EAGER)
    optimizer = torch.optim.AdamW(model.parameters())
    for step in range(4):
        switch = moonfx.full_attention(model) if step == 2 else None
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
        if switch:
            switch.off()
    steps = {int(state["step"]) for state in optimizer.state.values()}
    assert steps == {4}


def test_explain_says_what_sparsify_will_do_and_changes_nothing() -> None:
    model, x = TinyLM(), tokens()
    before, random = model(x), torch.get_rng_state()
    plan = moonfx.explain(model, x, block=16, topk=2, layers={"layers.0": None})
    assert torch.equal(torch.get_rng_state(), random)
    assert model._compiled_call_impl is None
    assert [r.action for r in plan.rows] == ["kept dense", "sparse"]
    assert torch.equal(model(x), before)
    moonfx.sparsify(model, 16, 2, layers={"layers.0": None}, **EAGER)
    model(x)
    assert moonfx.report(model).to_dict() == plan.to_dict()


BAD = [
    (dict(block=0), ValueError, "block must be at least 1 token, got 0"),
    (dict(topk=0), ValueError, "topk must be at least 1 block"),
    (dict(block=1.5), TypeError, "block must be an int, got 1.5"),
    (dict(topk=True), TypeError, "topk must be an int, got True"),
    (dict(topk=2, sinks=2), ValueError, "sinks must be .* less than topk.*takes 0 to 1"),
    (dict(topk=1), ValueError, "topk=1 needs sinks=0"),
    (dict(sinks=-1), ValueError, "sinks must be at least 0"),
    (dict(layers={"layer.0": None}), ValueError, "no module of that name; nearest: .*layers.0"),
    (dict(layers={"re:nothing": None}), ValueError, "matches no module"),
    (dict(layers={"re:(": None}), ValueError, "not a regular expression"),
    (dict(layers={-1: None}), ValueError, "an attention index must be at least 0"),
    (dict(layers={0.5: None}), TypeError, "a key of layers must be"),
    (dict(layers={0: 16}), TypeError, "must be a moonfx.LayerPolicy or None"),
    (dict(layers=[0]), TypeError, r"layers must be a mapping \{module name.*got list"),
    (dict(dense_last=-1), ValueError, "dense_last must be at least 0"),
    (dict(dense_last="1"), TypeError, "dense_last must be an int, at least 0, got '1'"),
    (dict(on_miss="no"), ValueError, "on_miss must be one of warn, raise, ignore, got 'no'"),
    (dict(compiler="gcc"), ValueError, "compiler must be one of inductor, aot_eager, eager"),
]


@pytest.mark.parametrize(("bad", "error", "message"), BAD)
def test_bad_input_is_one_clear_error_and_leaves_the_model_untouched(bad, error, message) -> None:
    model = TinyLM()
    before = dict(vars(model))
    with pytest.raises(error, match=message):
        moonfx.sparsify(model, **bad)
    assert vars(model) == before


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


class Outer(torch.nn.Module):
    def __init__(self, inner: torch.nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x) * 2


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


def test_copies_and_pickles_of_a_sparse_model_are_the_plain_model() -> None:
    model, x = TinyLM(), tokens()
    dense = model(x)
    moonfx.sparsify(model, 16, 2, **EAGER)
    model(x)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(copied(x), dense)
        moonfx.sparsify(copied, 16, 2, **EAGER)
        torch.testing.assert_close(copied(x), model(x), atol=0, rtol=0)


def test_training_and_eval_and_no_grad_agree() -> None:
    model, x = moonfx.sparsify(TinyLM(), 16, 2, **EAGER), tokens()
    with_grad = model(x)
    with torch.no_grad():
        without = model(x)
    with torch.inference_mode():
        inference = model(x)
    assert with_grad.requires_grad
    assert not without.requires_grad
    torch.testing.assert_close(with_grad.detach(), without, atol=0, rtol=0)
    torch.testing.assert_close(inference.clone(), without, atol=0, rtol=0)


def test_five_lengths_need_at_most_one_recompile() -> None:
    model = moonfx.sparsify(TinyLM(), 16, 2, **EAGER)
    plain = copy.deepcopy(model)
    for length in (96, 70, 131, 33, 200):
        x = tokens(length)
        reference = moonfx.sparsify(copy.deepcopy(plain), 16, 2, **EAGER)
        torch.testing.assert_close(model(x), reference(x), atol=2e-6, rtol=1e-5)
    assert moonfx.report(model).graphs <= 2
    assert len(moonfx.report(model).rewritten) == 2


def test_an_unrelated_product_with_a_symbol_does_not_undo_the_attention() -> None:
    class Attends(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = torch.nn.functional.scaled_dot_product_attention(x, x, x, is_causal=True)
            return y + ((x @ x.mT) * (1.0 / x.shape[-2])).sum()

    torch._dynamo.reset()
    model = Attends()
    moonfx.sparsify(model, block=16, topk=2, compiler="eager")
    for length in (128, 192, 160):
        model(torch.randn(1, 2, length, 8))
    report = moonfx.report(model)
    assert (report.failures, {row.action for row in report.rows}) == ([], {"sparse"})
    assert report.graphs == 2
