"""What is kept on a model: undone by `restore`, switched by `full_attention`, never copied."""

import copy
import pickle

import pytest
import torch

import moonfx
from tests.support.tiny import TinyLM, tokens

EAGER = {"compiler": "eager"}


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


def test_copies_and_pickles_of_a_sparse_model_are_the_plain_model() -> None:
    model, x = TinyLM(), tokens()
    dense = model(x)
    moonfx.sparsify(model, 16, 2, **EAGER)
    model(x)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(copied(x), dense)
        moonfx.sparsify(copied, 16, 2, **EAGER)
        torch.testing.assert_close(copied(x), model(x), atol=0, rtol=0)
