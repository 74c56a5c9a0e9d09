"""`moonfx bench model` on a small model: what is timed, and the FLOPs that it counts."""

import json

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from moonfx.bench.models import model
from moonfx.cli import command as cli
from tests.support import tiny_smollm2


@pytest.mark.parametrize("work", model.WORKS)
def test_a_model_is_timed_dense_and_sparse_on_the_same_tokens(work, monkeypatch, capsys):
    monkeypatch.setattr(model.smollm2, "load", tiny_smollm2.load)
    words = ["--length", "256", "--train-length", "192", "--block", "16", "--topk", "3"]
    words += ["--repeats", "1", "--json", "--work", work]
    assert cli.main(["bench", "model", *words]) == 0
    (result,) = json.loads(capsys.readouterr().out)["results"]
    assert result["sites"] == 2
    assert result["tokens"] == (256 if work == "reading" else 192)
    seconds = result["seconds"]
    assert [len(turns) for turns in seconds.values()] == [1, 1]
    assert result["speedup"] == pytest.approx(seconds["dense"][0] / seconds["sparse"][0])


def test_the_flops_of_a_model_are_those_that_torch_counts():
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 64, "intermediate_size": 96, "vocab_size": 256}
    config = transformers.LlamaConfig(num_hidden_layers=2, num_attention_heads=4, **sizes)
    # By hand, for torch does not count the fused attention of a CPU.
    llama = transformers.LlamaForCausalLM._from_config(config, attn_implementation="eager").eval()
    tokens = torch.zeros(1, 64, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter:
        model.reading(llama, tokens)
    # By hand every pair of tokens is computed.
    assert counter.get_total_flops() == model.flops(llama, 64, 64 * 64, "reading")
