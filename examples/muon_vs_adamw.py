"""Trains a small GPT from scratch with AdamW, then with the same AdamW converted to Muon.

The text is Python's standard library, byte by byte, split into training and validation by file.
AdamW's learning rate is tuned on a grid that is widened until its best is inside; Muon takes that
rate, the weight decay and the schedule as they are. Counted is the step at which Muon first has
AdamW's final validation loss.

    python examples/muon_vs_adamw.py [--plot FILE] [--json FILE]      about ten minutes on two cores
"""

import argparse
import functools
import json
import math
import multiprocessing
import os
import sysconfig
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tabulate import tabulate
from torch import Tensor, nn
from tqdm import tqdm

import moonfx

SKIPPED = {
    "test",
    "tests",
    "idlelib",
    "lib2to3",
    "pydoc_data",
    "encodings",
    "site-packages",
    "dist-packages",
}
BETAS, WEIGHT_DECAY, CLIP = (0.9, 0.95), 0.1, 1.0


@dataclass(frozen=True)
class Sizes:
    """Model, data and schedule: linear warmup, then a cosine down to a tenth of the rate."""

    width: int = 128
    layers: int = 4
    heads: int = 4
    length: int = 128
    batch: int = 16
    steps: int = 400
    warmup: int = 20
    every: int = 10
    scored: int = 128
    rates: tuple[float, ...] = (1e-3, 3e-3, 1e-2)
    seeds: tuple[int, ...] = (0, 1, 2)


QUICK = Sizes(32, 2, 2, 32, 4, 12, warmup=2, every=2, scored=4, rates=(1e-2,), seeds=(0,))


@dataclass(frozen=True)
class Run:
    """One training run; losses holds (step, validation loss)."""

    optimizer: str
    rate: float
    seed: int
    losses: list[tuple[int, float]]

    @property
    def final(self) -> float:
        return self.losses[-1][1]

    def reaches(self, loss: float) -> int | None:
        """The first evaluated step with at most this loss; None if it never gets there."""
        return next((step for step, found in self.losses if found <= loss), None)


class Block(nn.Module):
    """Pre-norm causal attention and a GELU of four times the width; no biases."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.RMSNorm(width), nn.RMSNorm(width)
        self.query, self.key, self.value, self.output = (
            nn.Linear(width, width, bias=False) for _ in range(4)
        )
        self.up = nn.Linear(width, 4 * width, bias=False)
        self.down = nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x)
        q, k, v = (
            layer(y).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.output(attended.transpose(1, 2).flatten(-2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class GPT(nn.Module):
    """Bytes in, logits of the next byte out; initialized as GPT-2 is."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.tokens = nn.Embedding(256, sizes.width)
        self.positions = nn.Embedding(sizes.length, sizes.width)
        self.blocks = nn.Sequential(*(Block(sizes.width, sizes.heads) for _ in range(sizes.layers)))
        self.norm = nn.RMSNorm(sizes.width)
        self.head = nn.Linear(sizes.width, 256, bias=False)
        for name, p in self.named_parameters():
            if p.ndim == 2:
                into_residual = name.endswith(("output.weight", "down.weight"))
                nn.init.normal_(p, std=0.02 / (math.sqrt(2 * sizes.layers) if into_residual else 1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.tokens(x) + self.positions.weight[: x.shape[1]]
        logits: Tensor = self.head(self.norm(self.blocks(x)))
        return logits


@functools.cache
def corpus() -> tuple[Tensor, Tensor]:
    """The bytes of the standard library: 19 files in 20 to train on, the others to validate."""
    root = Path(sysconfig.get_paths()["stdlib"])
    parts: tuple[list[bytes], list[bytes]] = ([], [])
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root)
        if not SKIPPED & set(name.parts):
            held_out = zlib.crc32(name.as_posix().encode()) % 20 == 0
            parts[held_out].append(path.read_bytes())
    texts = (bytearray(b"\n".join(files)) for files in parts)
    training, validation = (torch.frombuffer(text, dtype=torch.uint8) for text in texts)
    return training, validation


def windows(data: Tensor, starts: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """Inputs and the bytes that follow them, int64 [batch, length]."""
    tokens = torch.stack([data[i : i + length + 1] for i in starts.tolist()]).long()
    return tokens[:, :-1], tokens[:, 1:]


def train(sizes: Sizes, optimizer: str, rate: float, seed: int) -> Run:
    """One run. A seed gives the same initial weights and the same batches to both optimizers."""
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    data, validation = corpus()
    model = GPT(sizes)
    adamw = torch.optim.AdamW(model.parameters(), lr=rate, betas=BETAS, weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.LambdaLR(adamw, lambda step: factor(step, sizes))
    scored = windows(validation, spread(len(validation), sizes), sizes.length)
    opt: torch.optim.Optimizer = adamw
    if optimizer == "muon":
        # The schedule goes on driving it. Compiling would take longer than these few steps.
        opt = moonfx.convert_optimizer(adamw, model, example=(scored[0][:1],), compile=False)
    losses, batches = [], torch.Generator().manual_seed(seed)
    for step in range(sizes.steps + 1):
        if step % sizes.every == 0 or step == sizes.steps:
            losses.append((step, evaluate(model, *scored)))
        if step < sizes.steps:
            last = len(data) - sizes.length - 1
            starts = torch.randint(last, (sizes.batch,), generator=batches)
            x, y = windows(data, starts, sizes.length)
            F.cross_entropy(model(x).flatten(0, 1), y.flatten()).backward()
            nn.utils.clip_grad_norm_(model.parameters(), CLIP)
            opt.step()
            schedule.step()
            opt.zero_grad()
    return Run(optimizer, rate, seed, losses)


def factor(step: int, sizes: Sizes) -> float:
    """The learning rate over its peak."""
    if step < sizes.warmup:
        return (step + 1) / sizes.warmup
    done = (step - sizes.warmup) / (sizes.steps - sizes.warmup)
    return 0.1 + 0.45 * (1 + math.cos(math.pi * done))


def spread(total: int, sizes: Sizes) -> Tensor:
    """Where the windows that are scored begin: the same in every run, evenly spread."""
    return torch.arange(sizes.scored) * (total - sizes.length - 1) // sizes.scored


@torch.no_grad()
def evaluate(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """Mean cross-entropy per byte, in nats."""
    total = 0.0
    for a, b in zip(x.split(32), y.split(32), strict=True):
        total += F.cross_entropy(model(a).flatten(0, 1), b.flatten(), reduction="sum").item()
    return total / y.numel()


def all_of(sizes: Sizes, wanted: Sequence[tuple[str, float, int]], jobs: int) -> Iterator[Run]:
    """The runs, in no particular order; one process with one thread each."""
    bar = tqdm(total=len(wanted), desc="training runs", leave=False)
    if jobs < 2:
        for one in wanted:
            yield train(sizes, *one)
            bar.update()
    else:
        with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool:
            for done in as_completed(pool.submit(train, sizes, *one) for one in wanted):
                yield done.result()
                bar.update()
    bar.close()


def tuned(sizes: Sizes, jobs: int) -> list[Run]:
    """AdamW at each rate with the first seed; halves and doubles join until the best is inside."""
    runs = list(all_of(sizes, [("adamw", rate, sizes.seeds[0]) for rate in sizes.rates], jobs))
    while len(runs) > 1:
        runs.sort(key=lambda run: run.rate)
        best = min(runs, key=lambda run: run.final)
        if best is runs[0]:
            further = best.rate / 2
        elif best is runs[-1]:
            further = best.rate * 2
        else:
            break
        runs += all_of(sizes, [("adamw", further, sizes.seeds[0])], 1)
    return runs


def compare(sizes: Sizes, jobs: int) -> tuple[list[Run], list[Run]]:
    """The runs of the grid, and those of every seed with both optimizers at the best rate."""
    grid = tuned(sizes, jobs)
    best = min(grid, key=lambda run: run.final)
    wanted = [("muon", best.rate, seed) for seed in sizes.seeds]
    wanted += [("adamw", best.rate, seed) for seed in sizes.seeds[1:]]
    return grid, [best, *all_of(sizes, wanted, jobs)]


def of(runs: list[Run], optimizer: str) -> list[Run]:
    """One optimizer's runs, by seed."""
    return sorted((r for r in runs if r.optimizer == optimizer), key=lambda r: r.seed)


def table(sizes: Sizes, runs: list[Run]) -> list[dict[str, Any]]:
    """One row per seed."""
    rows = []
    for adamw, muon in zip(of(runs, "adamw"), of(runs, "muon"), strict=True):
        reached = muon.reaches(adamw.final)
        rows.append(
            {
                "seed": adamw.seed,
                "AdamW's final loss": adamw.final,
                "Muon's final loss": muon.final,
                "Muon is there at step": reached,
                "of AdamW's steps": None if reached is None else reached / sizes.steps,
            }
        )
    return rows


def draw(runs: list[Run], path: str) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for optimizer, color in (("adamw", "tab:orange"), ("muon", "tab:blue")):
        for run in of(runs, optimizer):
            label = {"adamw": "AdamW", "muon": "Muon, converted"}[optimizer]
            axes.plot(*zip(*run.losses[1:]), color=color, alpha=0.7, label=label)
    handles, labels = axes.get_legend_handles_labels()
    axes.legend(*zip(*{label: (handle, label) for handle, label in zip(handles, labels)}.values()))
    axes.set_xlabel("steps")
    axes.set_ylabel("validation loss, nats per byte")
    seeds = len(of(runs, "muon"))
    axes.set_title(f"GPT from scratch, learning rate {runs[0].rate:g}, seeds: {seeds}")
    axes.grid(alpha=0.3)
    figure.savefig(path)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="a few steps of a tiny model")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="runs at a time")
    parser.add_argument("--plot", metavar="FILE", help="draw loss against steps (needs matplotlib)")
    parser.add_argument("--json", metavar="FILE", help="write the runs and the table")
    options = parser.parse_args(arguments)
    sizes = QUICK if options.quick else Sizes()
    grid, runs = compare(sizes, 1 if options.quick else options.jobs)

    parameters = sum(p.numel() for p in GPT(sizes).parameters())
    train_bytes, validation_bytes = map(len, corpus())
    print(
        f"{parameters:,} parameters; {sizes.steps} steps of {sizes.batch} x {sizes.length} bytes "
        f"out of {train_bytes:,}; validated on {sizes.scored * sizes.length:,} out of "
        f"{validation_bytes:,} bytes of other files"
    )
    print("\nAdamW's learning rate, seed 0")
    best = min(grid, key=lambda run: run.final)
    lines = [(run.rate, run.final, "<- taken" if run is best else "") for run in grid]
    print(tabulate(lines, ["rate", "final loss", ""], floatfmt=("g", ".4f")))
    rows = table(sizes, runs)
    print(f"\nMuon with AdamW's own rate {best.rate:g}, weight decay and schedule")
    print(tabulate(rows, "keys", floatfmt=("d", ".4f", ".4f", "d", ".1%"), missingval="never"))
    shares = [row["of AdamW's steps"] for row in rows]
    if None not in shares:
        print(f"mean: {sum(shares) / len(shares):.1%} of AdamW's steps")
    if options.json:
        found = {"sizes": asdict(sizes), "grid": grid, "runs": runs, "table": rows}
        Path(options.json).write_text(json.dumps(found, default=asdict, indent=1))
    if options.plot:
        draw(runs, options.plot)


if __name__ == "__main__":
    main()
