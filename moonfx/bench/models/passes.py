"""`moonfx bench passes`: what the capture and the passes take, beside each other.

A narrow Llama of 2, 8 and 32 layers, each compiled afresh in one process after a warm-up, the
sizes in turns. Dynamo's part is the time from the call to the backend; the retrace brings its graph
to pre-dispatch ATen; both together are the capture. The passes find, prove and rewrite. Nothing is
compiled after that. All of it is one thread of Python, so seconds are the process's own: what else
runs does not count.
"""

import argparse
import gc
import json
import statistics
import time
from collections.abc import Sequence
from typing import Any

import torch
from tabulate import tabulate
from torch import fx
from tqdm import tqdm

import moonfx
from moonfx.backend import rewriter
from moonfx.bench.harness import machine

LAYERS = (2, 8, 32)
FORMS = ("eager", "sdpa")
PARTS = ("dynamo", "retrace", "passes")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark; returns 0."""
    parser = argparse.ArgumentParser(
        prog="moonfx bench passes",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--layers", type=int, nargs="+", default=LAYERS, help="(2 8 32)")
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=FORMS, help="(eager sdpa)")
    parser.add_argument("--length", type=int, default=256, help="tokens (%(default)s)")
    parser.add_argument("--repeats", type=int, default=3, help="turns of each (%(default)s)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args(argv)
    if min(*options.layers, options.length, options.repeats) < 1:
        parser.error("--layers, --length and --repeats must be at least 1")

    where = machine.describe(torch.device("cpu"))
    cases = [(form, layers) for form in options.forms for layers in options.layers]
    once(options.forms[0], min(options.layers), options.length)
    spent: dict[tuple[str, int], list[dict[str, float]]] = {case: [] for case in cases}
    turns = [case for _ in range(options.repeats) for case in cases]
    for form, layers in tqdm(turns, unit="capture", leave=False, disable=None):
        spent[form, layers].append(once(form, layers, options.length))
    rows = [summary(form, layers, spent[form, layers]) for form, layers in cases]
    if options.json:
        print(json.dumps({**where, "length": options.length, "cases": rows}, indent=2))
        return 0
    print(machine.text(where))
    print(f"Llama of width 64, {options.length} tokens; medians of {options.repeats}\n")
    print(tabulate([list(row.values()) for row in rows], list(rows[0]), floatfmt=".3g"))
    return 0


def summary(form: str, layers: int, turns: list[dict[str, float]]) -> dict[str, Any]:
    """Median seconds of each part and of the capture, and the medians of shares of Dynamo's."""
    row: dict[str, Any] = {"form": form, "layers": layers, "nodes": turns[0]["nodes"]}
    row |= {f"{part} s": statistics.median(t[part] for t in turns) for part in PARTS}
    row["capture s"] = statistics.median(t["dynamo"] + t["retrace"] for t in turns)
    for part in PARTS[1:]:
        row[f"{part} / dynamo"] = statistics.median(t[part] / t["dynamo"] for t in turns)
    return row


def once(form: str, layers: int, length: int) -> dict[str, float]:
    """Seconds of each part in one compilation, and the nodes of the captured graph."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        num_hidden_layers=layers,
        hidden_size=64,
        intermediate_size=96,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=100,
        use_cache=False,
    )
    model: Any = LlamaForCausalLM._from_config(config, attn_implementation=form).eval()
    tokens = torch.zeros((1, length), dtype=torch.int64)
    spent: dict[str, float] = dict.fromkeys((*PARTS, "nodes"), 0.0)
    capture, run_passes = rewriter.capture, rewriter.run_passes
    reached = 0.0

    def timed_capture(gm: fx.GraphModule, inputs: Sequence[Any]) -> fx.GraphModule:
        nonlocal reached
        reached = reached or time.process_time()
        start = time.process_time()
        captured = capture(gm, inputs)
        spent["retrace"] += time.process_time() - start
        spent["nodes"] += len(captured.graph.nodes)
        return captured

    def timed_passes(context: Any) -> int:
        start = time.process_time()
        rewritten = run_passes(context)
        spent["passes"] += time.process_time() - start
        return rewritten

    torch.compiler.reset()
    gc.collect()
    rewriter.capture, rewriter.run_passes = timed_capture, timed_passes  # type: ignore[assignment]
    start = time.process_time()
    try:
        with torch.no_grad():
            report = moonfx.explain(model, tokens, block=16, topk=4)
    finally:
        rewriter.capture, rewriter.run_passes = capture, run_passes
    if len(report.rewritten) != layers or report.graphs != 1:
        raise RuntimeError(f"expected {layers} sparse attentions in one graph:\n{report}")
    spent["dynamo"] = reached - start
    return spent


if __name__ == "__main__":
    raise SystemExit(main())
