"""`moonfx bench compile`: what sparsify adds to torch.compile's time, with the same compiler.

Each compilation is a process of its own with an empty Inductor cache, and the two take turns. The
time of a compilation is the first call's less the second's. The model has SmolLM2-135M's
architecture and random weights, which no compiler looks at. moonfx's C++ kernel is not part of it:
it is built once per machine, before the clock starts.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import Any

import torch
from tabulate import tabulate
from tqdm import tqdm

import moonfx
from moonfx.bench.harness import machine
from moonfx.ops.dispatch import kernel_for

# SmolLM2-135M's configuration.
SMOLLM2 = {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
}
BLOCK, TOPK = 128, 8
WAYS = ("torch.compile", "moonfx.sparsify")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark; returns 0."""
    parser = argparse.ArgumentParser(
        prog="moonfx bench compile",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--layers", type=int, default=30, help="layers of the model (%(default)s)")
    parser.add_argument("--length", type=int, default=2048, help="tokens (%(default)s)")
    parser.add_argument("--repeats", type=int, default=2, help="turns of each (%(default)s)")
    parser.add_argument("--training", action="store_true", help="compile the backward pass too")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--child", choices=WAYS, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.length <= BLOCK * TOPK or options.layers < 1 or options.repeats < 1:
        parser.error(f"--length must be more than {BLOCK * TOPK}, the others at least 1")
    if options.child:
        print(json.dumps(compile_once(options.child, options)))
        return 0

    where = machine.describe(torch.device("cpu"))
    turns = [way for _ in range(options.repeats) for way in WAYS]
    spent: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
    for way in tqdm(turns, unit="compilation", leave=False, disable=None):
        spent[way].append(in_new_process(way, options))
    times = {way: min(turn["compile"] for turn in spent[way]) for way in WAYS}
    ratio = times["moonfx.sparsify"] / times["torch.compile"]
    if options.json:
        print(json.dumps({**where, "seconds": spent, "ratio": ratio}, indent=2))
        return 0
    print(machine.text(where))
    work = "forward and backward" if options.training else "forward"
    print(
        f"SmolLM2-135M's architecture, {options.layers} layers, {options.length} tokens, float32, "
        f"{work}; empty caches, best of {options.repeats}\n"
    )
    rows = [
        (way, f"{times[way]:.1f}", f"{min(turn['run'] for turn in spent[way]):.2f}") for way in WAYS
    ]
    print(tabulate(rows, ["by Inductor", "compile s", "then one call s"], disable_numparse=True))
    print(f"sparsify takes {ratio:.2f} times as long to compile")
    return 0


def in_new_process(way: str, options: argparse.Namespace) -> dict[str, float]:
    command = [sys.executable, "-m", "moonfx.bench.models.compile_time", "--child", way]
    command += ["--layers", str(options.layers), "--length", str(options.length)]
    command += ["--training"] * options.training
    with tempfile.TemporaryDirectory() as cache:
        environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": cache}
        printed = subprocess.run(
            command, env=environment, stdout=subprocess.PIPE, text=True, check=True
        ).stdout
    result: dict[str, float] = json.loads(printed.splitlines()[-1])
    return result


def compile_once(way: str, options: argparse.Namespace) -> dict[str, float]:
    """Seconds of the compilation, and of a call once compiled."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(num_hidden_layers=options.layers, use_cache=False, **SMOLLM2)
    model: Any = LlamaForCausalLM(config)
    tokens = torch.randint(config.vocab_size, (1, options.length))
    kernel_for(torch.device("cpu"))
    call = model
    if way == "torch.compile":
        call = torch.compile(model, backend="inductor")
    else:
        moonfx.sparsify(model, block=BLOCK, topk=TOPK, on_miss="raise", compiler="inductor")

    def step() -> None:
        with torch.set_grad_enabled(options.training):
            logits = call(tokens, logits_to_keep=1).logits
        if options.training:
            logits.sum().backward()
            model.zero_grad()

    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - start)
    run = min(seconds[1:])
    return {"compile": seconds[0] - run, "run": run}


if __name__ == "__main__":
    raise SystemExit(main())
