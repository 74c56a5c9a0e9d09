"""A message that a model logs once is said, once, and breaks no graph."""

import functools
import logging
from typing import Any

import pytest
import torch
from torch import Tensor

import moonfx
from tests.support.surroundings import SPARSE, X, outcome
from tests.support.tiny import TinyLM

logger = logging.getLogger("tests.said_once")
BOTH = [("layers.0", SPARSE), ("layers.1", SPARSE)]


class Logger(logging.Logger):
    """transformers gives every logger such a method."""

    @functools.lru_cache(None)  # noqa: B019
    def warning_once(self, *args: Any, **kwargs: Any) -> None:
        self.warning(*args, **kwargs)


class Said(TinyLM):
    """Logs something in each layer."""

    def __init__(self, say: Any) -> None:
        super().__init__()
        self.say = say

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for layer in self.layers:
            self.say(len(tokens), x)
            x = x + layer(x)
        return self.head(x)


@pytest.fixture(autouse=True)
def own(monkeypatch: pytest.MonkeyPatch) -> None:
    method = functools.lru_cache(None)(Logger.warning_once.__wrapped__)
    monkeypatch.setattr(logging.Logger, "warning_once", method, raising=False)


def once(batch: int, x: Tensor) -> None:
    logger.warning_once("a batch of %s", batch)  # type: ignore[attr-defined]


def with_a_value(batch: int, x: Tensor) -> None:
    logger.warning_once("a sum of %s", float(x.sum()))  # type: ignore[attr-defined]


def every_time(batch: int, x: Tensor) -> None:
    logger.warning("a batch of %s", batch)


def test_what_is_said_once_breaks_no_graph(caplog: pytest.LogCaptureFixture) -> None:
    model = Said(once)
    moonfx.sparsify(model, 16, 2, compiler="eager", on_miss="raise")
    for _ in range(3):
        model(X)
    report = moonfx.report(model)
    assert (report.graphs, outcome(report)) == (1, BOTH)
    assert [r.getMessage() for r in caplog.records if r.name == logger.name] == ["a batch of 2"]


LEFT = [("of a value", with_a_value, 2), ("said each time", every_time, 6)]


@pytest.mark.parametrize(("say", "count"), [r[1:] for r in LEFT], ids=[r[0] for r in LEFT])
def test_what_else_is_logged_is_said_as_ever(say: Any, count: int, caplog: Any) -> None:
    model = Said(say)
    moonfx.sparsify(model, 16, 2, compiler="eager", on_miss="ignore")
    for _ in range(3):
        model(X)
    said = [r.getMessage() for r in caplog.records if r.name == logger.name]
    assert len(said) == count
    torch.compiler.reset()


def test_a_message_of_transformers_in_each_layer_leaves_the_layers_their_names() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=50,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=48,
    )
    made = transformers.LlamaForCausalLM._from_config(config, attn_implementation="sdpa").eval()
    moonfx.sparsify(made, 16, 2, compiler="eager", on_miss="raise")
    made(X, output_attentions=True, use_cache=False)
    layers = [f"model.layers.{i}.self_attn" for i in range(2)]
    assert outcome(moonfx.report(made)) == [(layer, SPARSE) for layer in layers]
