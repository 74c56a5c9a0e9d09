"""In the place of SmolLM2 a Llama of two narrow layers, with bytes for tokens."""

from collections.abc import Callable
from typing import Any

import pytest
import torch


def load(dtype: torch.dtype) -> tuple[Any, Callable[..., Any]]:
    """The model, in eval mode with random weights, and a tokenizer that takes 4,096 bytes."""
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 64, "intermediate_size": 96, "vocab_size": 256}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2}
    made = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **heads))

    def tokenizer(text: str, return_tensors: str) -> Any:
        tokens = torch.tensor([list(text.encode()[:4096])])
        return transformers.BatchEncoding({"input_ids": tokens})

    return made.to(dtype).eval(), tokenizer
