"""The user's verbs on a module: what they compute, and bad input leaves it untouched."""

import copy

import pytest
import torch

import moonfx
from tests.support.tiny import TinyLM, gradients, tokens

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
