"""`moonfx bench model`: a real model reads a text and trains on one, dense and sparse in turns.

SmolLM2-135M-Instruct and real text, as smollm2.py finds them. Dense is the model as transformers
runs it, without a compiler; sparse is the same model after moonfx.sparsify, by default
with compiler="eager", so that attention alone is what differs. Reading is one forward pass for the
last token's logits. A training step is forward, loss, backward and AdamW; its weights are float32,
under autocast for another dtype. The FLOP-ideal counts every product of the whole model.
"""

import argparse
import json
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor, nn
from tqdm import tqdm

import moonfx
from moonfx.bench.harness import machine
from moonfx.bench.harness.arguments import DTYPES
from moonfx.bench.models import smollm2
from moonfx.bench.models.options import add_numbers, add_policy, check_policy, policy
from moonfx.ops.flops import attended_keys

WORKS = ("reading", "training")
WAYS = ("dense", "sparse")
HEADERS = ("dtype", "work", "tokens", "dense s", "sparse s", "speedup", "FLOP-ideal")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark; returns 0."""
    options = parse(argv)
    where = machine.describe(torch.device("cpu"))
    text, turns = smollm2.source_text(), [(d, w) for d in options.dtype for w in options.work]
    results = []
    for dtype, work in tqdm(turns, unit="work", leave=False, disable=None):
        model, tokenizer = smollm2.load(DTYPES[dtype] if work == "reading" else torch.float32)
        length = options.length if work == "reading" else options.train_length
        tokens = smollm2.tokens_of(text, tokenizer, length)
        results.append(
            {"dtype": dtype, "work": work, **compare(model, tokens, work, dtype, options)}
        )
    if options.json:
        print(json.dumps({"where": where, "policy": policy(options), "results": results}, indent=1))
        return 0
    print(machine.text(where))
    print(
        f"SmolLM2-135M-Instruct, {options.block}/{options.topk}/{options.sinks}, "
        f'compiler="{options.compiler}"; best of {options.repeats} turns\n'
    )
    print(tabulate([row(r) for r in results], HEADERS, disable_numparse=True))
    return 0


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="moonfx bench model",
        description=__doc__.partition("\n\n")[2],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_numbers(
        parser,
        ("length", 8192, "tokens read"),
        ("train-length", 4096, "tokens of a training step"),
        ("repeats", 3, "turns of each"),
    )
    add_policy(parser)
    parser.add_argument(
        "--dtype", nargs="+", choices=DTYPES, default=["bfloat16"], help="(bfloat16)"
    )
    parser.add_argument("--work", nargs="+", choices=WORKS, default=WORKS, help="(both)")
    parser.add_argument(
        "--compiler", choices=("eager", "aot_eager", "inductor"), default="eager", help="(eager)"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args(argv)
    if min(options.length, options.train_length, options.repeats) < 1:
        parser.error("--length, --train-length and --repeats must be at least 1")
    check_policy(parser, options)
    return options


def compare(
    model: Any, tokens: Tensor, work: str, dtype: str, options: argparse.Namespace
) -> dict[str, Any]:
    """Seconds of each turn, after a first call each, which compiles."""
    moonfx.sparsify(model, **policy(options), compiler=options.compiler, on_miss="raise")
    # model.forward goes past what sparsify put on the model.
    calls = {"dense": model.forward, "sparse": model}
    do = reading if work == "reading" else training(model, dtype)
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    for turn in range(options.repeats + 1):
        for way, call in calls.items():
            start = time.perf_counter()
            do(call, tokens)
            if turn:
                seconds[way].append(time.perf_counter() - start)
    length = tokens.shape[1]
    sparse = attended_keys(length, length, options.block, options.topk)
    dense = attended_keys(length, length, length, 1)
    return {
        "tokens": length,
        "seconds": seconds,
        "sites": len(moonfx.report(model).rewritten),
        "speedup": min(seconds["dense"]) / min(seconds["sparse"]),
        "flop_ideal": flops(model, length, dense, work) / flops(model, length, sparse, work),
    }


def reading(call: Callable[..., Any], tokens: Tensor) -> None:
    with torch.no_grad():
        call(tokens, use_cache=False, logits_to_keep=1)


def training(model: nn.Module, dtype: str) -> Callable[[Callable[..., Any], Tensor], None]:
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)

    def step(call: Callable[..., Any], tokens: Tensor) -> None:
        with torch.autocast("cpu", DTYPES[dtype], enabled=dtype != "float32"):
            loss = call(tokens, labels=tokens, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def flops(model: Any, length: int, keys: int, work: str) -> int:
    """Of a forward pass, or a training step, where each head attends `keys` keys in all."""
    config = model.config
    head = model.get_output_embeddings().weight.numel()
    weights = sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear)) - head
    attention = 4 * keys * config.hidden_size * config.num_hidden_layers
    if work == "reading":
        return 2 * length * weights + 2 * head + attention
    return 6 * length * (weights + head) + attention * 7 // 2


def row(result: dict[str, Any]) -> list[str]:
    best = {way: min(turns) for way, turns in result["seconds"].items()}
    return [
        *(result["dtype"], result["work"], f"{result['tokens']:,}"),
        *(f"{best[way]:.2f}" for way in WAYS),
        *(f"{result['speedup']:.2f}x", f"{result['flop_ideal']:.2f}x"),
    ]


if __name__ == "__main__":
    raise SystemExit(main())
