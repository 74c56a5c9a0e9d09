"""`moonfx bench perplexity`: what sparse attention costs a model that was trained with dense.

SmolLM2-135M-Instruct reads the first tokens of each text, densely and after moonfx.sparsify, in
float32, and nothing is trained. Perplexity is that of the last tokens, each of which would densely
attend all tokens before it. The texts are Python's own, so they change with its version: files of
the standard library, and the help topics, one after the other. A text whose passages recur costs
most: what a token repeats may lie in a block that it does not attend.
"""

import argparse
import json
import math
import sysconfig
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
import torch.nn.functional as F
from tabulate import tabulate
from torch import Tensor
from tqdm import tqdm

import moonfx
from moonfx.bench.harness import into_page, machine
from moonfx.bench.models import smollm2
from moonfx.bench.models.options import add_numbers, add_policy, check_policy, policy

LIBRARY = Path(sysconfig.get_path("stdlib"))
TOPICS = "help topics"
TEXTS = ("typing.py", "pickle.py+pickletools.py+imaplib.py", TOPICS)
HEADERS = ("text", "tokens", "dense perplexity", "sparse perplexity", "over dense")


@dataclass(frozen=True)
class Reading:
    """One text: `tokens` read, and the perplexity of the last of them, densely and sparsely."""

    text: str
    tokens: int
    dense: float
    sparse: float

    @property
    def over_dense(self) -> float:
        """How much higher the sparse perplexity is, as a share of the dense one."""
        return self.sparse / self.dense - 1


@dataclass(frozen=True)
class Perplexities:
    """Readings of one machine. where: hardware and versions, by name. last: tokens scored."""

    where: dict[str, str]
    policy: dict[str, int]
    last: int
    results: list[Reading]

    def to_json(self) -> str:
        results = [asdict(r) | {"over_dense": r.over_dense} for r in self.results]
        return json.dumps(asdict(self) | {"results": results}, indent=1)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark; returns 0, or 2 for a wrong argument."""
    options = parse(argv)
    found = options.kept or measured(options)
    if options.into:
        into_page.place(Path(options.into), options.read[0], markdown(found))
    elif options.json:
        print(found.to_json())
    elif options.markdown:
        print(markdown(found))
    else:
        print(f"{machine.text(found.where)}\n{heading(found)}\n\n{grid(found, 'simple')}")
    return 0


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="moonfx bench perplexity",
        description=__doc__.partition("\n\n")[2],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--texts",
        nargs="+",
        default=TEXTS,
        metavar="TEXT",
        help=f"'{TOPICS}', files of the standard library, or your own; + joins several to one text "
        f"({', '.join(TEXTS)})",
    )
    add_numbers(
        parser,
        ("length", 8192, "tokens read of each text"),
        ("last", 1024, "tokens whose perplexity counts"),
    )
    add_policy(parser)
    parser.add_argument("--json", action="store_true", help="print JSON")
    into_page.add(parser)
    options = parser.parse_args(argv)
    check_policy(parser, options)
    if not 1 <= options.last < options.length:
        parser.error(f"--last must be 1 to less than --length, got {options.last}")
    if options.length <= options.block * options.topk:
        parser.error("--length must be more than --block times --topk: up to there it is dense")
    try:
        options.kept = read(options.read) if options.read else None
        for name in options.texts:
            source_of(name)
    except ValueError as error:
        parser.error(str(error))
    if options.into and not options.read:
        parser.error("--into needs --from")
    return options


def source_of(name: str) -> str:
    """Python's help topics, or the text of a file of the standard library, or of any other.

    Of several files, joined by "+", the texts one after the other.

    Raises:
        ValueError: if there is no such file.
    """
    if name == TOPICS:
        return "\n".join(topics.values())
    for path in (LIBRARY / name, Path(name)):
        if path.is_file():
            return path.read_text(encoding="utf-8")
    if "+" in name:
        return "\n".join(map(source_of, name.split("+")))
    raise ValueError(f"--texts: {name} is no file, here or in the standard library")


def measured(options: argparse.Namespace) -> Perplexities:
    where = machine.describe(torch.device("cpu"))
    model, tokenizer = smollm2.load(torch.float32)
    texts = {
        name: smollm2.tokens_of(source_of(name), tokenizer, options.length)
        for name in options.texts
    }
    check_lengths(texts, options)
    moonfx.sparsify(model, **policy(options), compiler="eager", on_miss="raise")
    results = []
    for name, tokens in tqdm(texts.items(), unit="text", leave=False, disable=None):
        # model.forward goes past what sparsify put on the model.
        dense, sparse = (perplexity(call, tokens, options.last) for call in (model.forward, model))
        results.append(Reading(name, tokens.shape[1], dense, sparse))
    return Perplexities(where, policy(options), options.last, results)


def check_lengths(texts: Mapping[str, Tensor], options: argparse.Namespace) -> None:
    """Raises ValueError for a text that is dense as a whole, or has too few tokens to score."""
    least = max(options.last, options.block * options.topk) + 1
    for name, tokens in texts.items():
        if tokens.shape[1] < least:
            raise ValueError(
                f"--texts: {name} has {tokens.shape[1]:,} tokens, and must have {least:,}: "
                "more than --last, and than --block times --topk"
            )


def perplexity(call: Callable[..., Any], tokens: Tensor, last: int) -> float:
    """Of the last tokens of a text, int64 [1, N], N more than `last`."""
    with torch.no_grad():
        logits = call(tokens, use_cache=False, logits_to_keep=last + 1).logits
    return math.exp(F.cross_entropy(logits[0, :-1].float(), tokens[0, -last:]).item())


def read(paths: Sequence[str]) -> Perplexities:
    """Files that `--json` wrote, of one machine and policy, as one.

    Raises:
        ValueError: if a file is none, or if they are of different machines, versions or policies.
    """
    first, *others = (from_json(path) for path in paths)
    for path, other in zip(paths[1:], others, strict=True):
        if decisive(other) != decisive(first):
            raise ValueError(f"--from: {path} is of another machine, version or policy")
    return replace(first, results=[r for one in (first, *others) for r in one.results])


def decisive(found: Perplexities) -> tuple[Any, ...]:
    """What readings must share to stand in one table."""
    return found.where["hardware"], found.where["versions"], found.policy, found.last


def from_json(path: str) -> Perplexities:
    try:
        kept = json.loads(Path(path).read_text(encoding="utf-8"))
        names = Reading.__dataclass_fields__
        results = [Reading(**{k: v for k, v in r.items() if k in names}) for r in kept["results"]]
        return Perplexities(kept["where"], kept["policy"], kept["last"], results)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"--from must name what `moonfx bench perplexity --json` wrote, got {path}"
        ) from error


def markdown(found: Perplexities) -> str:
    """The table of docs/benchmarks.md."""
    where = "; ".join(f"{name}: {found.where[name]}" for name in ("hardware", "versions"))
    return f"{where}.\n\n{heading(found)}\n\n{grid(found, 'github')}"


def heading(found: Perplexities) -> str:
    sizes = "/".join(str(found.policy[name]) for name in ("block", "topk", "sinks"))
    return (
        f"SmolLM2-135M-Instruct, float32, block/topk/sinks {sizes}; "
        f"perplexity of the last {found.last:,} tokens"
    )


def grid(found: Perplexities, style: str) -> str:
    rows = [
        (r.text, f"{r.tokens:,}", f"{r.dense:.2f}", f"{r.sparse:.2f}", f"{r.over_dense:+.1%}")
        for r in found.results
    ]
    align = ("left", *["right"] * 4)
    return tabulate(rows, HEADERS, tablefmt=style, colalign=align, disable_numparse=True)


if __name__ == "__main__":
    raise SystemExit(main())
