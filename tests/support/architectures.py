"""Every causal language model of transformers, built small, dense against moonfx at full topk.

`survey(name, form)` builds one architecture of the library's own list in one form of attention
("eager" or "sdpa"), counts its attentions without moonfx (tests/support/attention_count.py), and
compares. What a query can see, read off the probabilities or the mask, says of which kind an
attention is.

    python -m tests.support.architectures --write docs/architectures.md     # every row run anew
"""

import argparse
import logging
import multiprocessing
import re
import sys
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from tqdm import tqdm
from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

import moonfx
from moonfx.cli.tiny_config import tiny
from moonfx.report.attention import Row as ReportRow
from moonfx.report.report import Report
from tests.support.attention_count import Count

NAMES: list[str] = sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
FORMS = ("eager", "sdpa")
BATCH, LENGTH, FIRST, LAST = 2, 24, 10, 60  # tokens apart from every special one
BLOCK, TOPK = 8, 3  # all of LENGTH

# Not built, and why.
UNBUILT = {
    "gemma3n": "its vision tower is a timm model; its language model is gemma3n_text",
    "gemma4_assistant": "drafts for another model, whose keys and values it reads",
    "gemma4_unified_assistant": "drafts for another model, whose keys and values it reads",
}
TRAINED = {"reformer"}  # run their backward in training mode only
FIELDS = {"reformer": {"axial_pos_shape": (4, 6)}}  # in training their product is the length


class NotOffered(Exception):
    """The architecture has no such form of attention."""


@dataclass
class Case:
    """A model and what to call it with."""

    model: nn.Module
    inputs: dict[str, Any]

    def logits(self) -> Tensor:
        result: Tensor = self.model(**self.inputs, use_cache=False).logits
        return result


def build(name: str, form: str) -> Case:
    """The same weights for each form, of a size at which attention is far from uniform."""
    config = tiny(CONFIG_MAPPING[name]())
    config.update(FIELDS.get(name, {}))
    model_class = MODEL_FOR_CAUSAL_LM_MAPPING[type(CONFIG_MAPPING[name]())]
    parts = [n for n, kind in config.sub_configs.items() if kind is model_class.config_class]
    if parts:  # the language model of several
        config = getattr(config, parts[0])
    if hasattr(config, "is_decoder"):
        config.is_decoder = True
    try:
        model = model_class._from_config(config, attn_implementation=form)
    except ValueError as error:
        if "does not support an attention implementation" in str(error):
            raise NotOffered from error
        raise
    model.train(name in TRAINED)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim < 2:
                parameter += 0.1 * noise
            else:
                parameter.copy_(noise * parameter.shape[-1] ** -0.5)
    rows = BATCH * getattr(config, "num_codebooks", 1)
    tokens = torch.randint(FIRST, LAST, (rows, LENGTH), generator=generator)
    return Case(model, {"input_ids": tokens})


# --- one row of the table -----------------------------------------------------------------------


@dataclass
class Row:
    """What came of one architecture in one form.

    Args:
        attentions: (module, kind) of each that runs, counted without moonfx.
        report: moonfx's own account; None if the architecture was not built.
        wrong: how outputs or gradients differ from dense, "" if they do not.
        reason: why it was not built.
    """

    name: str
    form: str
    attentions: list[tuple[str, str]] = field(default_factory=list)
    report: Report | None = None
    wrong: str = ""
    reason: str = ""

    def unaccounted(self) -> list[str]:
        """Attentions that no row of the report is about."""
        return [f"{layer} ({kind})" for layer, kind, row in self.pairs() if row is None]

    def pairs(self) -> list[tuple[str, str, ReportRow | None]]:
        """Each attention with its row. Layers that share one compiled graph share its rows."""
        assert self.report is not None
        free, pairs = list(self.report.rows), []
        for layer, kind in self.attentions:
            inner = f"{layer}."  # modules that the first call put in are not counted by name
            row = next((r for r in free if r.layer == layer or r.layer.startswith(inner)), None)
            if row is not None:
                free.remove(row)
            elif self.report.graphs > 1:
                alike = [r for r in self.report.rows if numberless(r.layer) == numberless(layer)]
                row = alike[-1] if alike else None
            pairs.append((layer, kind, row))
        return pairs


def numberless(layer: str) -> str:
    return re.sub(r"\d+", "#", layer)


def survey(name: str, form: str) -> Row:
    """Builds, counts, and compares moonfx at full topk with dense."""
    if name in UNBUILT:
        return Row(name, form, reason=UNBUILT[name])
    try:
        case = build(name, form)
    except NotOffered:
        return Row(name, form, reason=f"transformers offers no {form} form of it")
    with torch.no_grad(), Count(case.model) as count:
        case.logits()
    dense = outcome(case)
    moonfx.sparsify(case.model, BLOCK, TOPK, compiler="eager", on_miss="ignore")
    sparse = outcome(case)
    return Row(name, form, count.found, moonfx.report(case.model), differences(sparse, dense))


def outcome(case: Case) -> dict[str, Tensor]:
    """Logits and the gradient of every parameter."""
    torch.manual_seed(0)
    case.model.zero_grad(set_to_none=True)
    logits = case.logits()
    logits.float().square().mean().backward()
    grads = {n: p.grad for n, p in case.model.named_parameters() if p.grad is not None}
    return {"logits": logits.detach(), **grads}


def differences(sparse: dict[str, Tensor], dense: dict[str, Tensor]) -> str:
    """What differs by more than float32 rounding of sums in another order through all layers."""
    if sparse.keys() != dense.keys():
        return f"gradients of {sorted(sparse.keys() ^ dense.keys())[:3]}"
    largest = max(float(g.abs().max()) for n, g in dense.items() if n != "logits")
    for name, expected in dense.items():
        if not bool(torch.isfinite(expected).all()):
            return f"dense {name} is not finite"
        got, scale = sparse[name], float(expected.abs().max())
        bound = 1e-4 * scale + (0.0 if name == "logits" else 1e-5 * largest)
        error = float((got - expected).abs().max())
        if not error <= bound:
            return f"{name} differs by {error:.1e} of {scale:.1e}"
    return ""


# --- the table ----------------------------------------------------------------------------------

DOCS = Path(__file__).parents[2] / "docs" / "architectures.md"
HEADERS = ("architecture", "form", "attention", "rewritten", "modifiers", "not rewritten, and why")
HEAD = """# Causal language models of transformers

Every architecture that transformers {version} lists for causal language modelling, built small with
random weights and called as `model(input_ids)`: what `moonfx.sparsify` makes of each attention.
Made, and each row compared with dense attention, outputs and gradients, by

    python -m tests.support.architectures --write

`attention` counts, without moonfx, what runs in one forward: "causal" sees every earlier token,
"narrower" only some of them (a window, a chunk, an indexer's choice), "cross" another sequence's.

"""


def line(row: Row) -> str:
    """A row of the table, in Markdown. Node names are left out: they change with the graph."""
    if row.report is None:
        return cells(row.name, row.form, "", "", "", f"not built: {row.reason}")
    kinds = Counter(kind for _, kind in row.attentions)
    rewritten: Counter[str] = Counter()
    modifiers: set[str] = set()
    declined: Counter[str] = Counter()
    for _, kind, found in row.pairs():
        if found is None:
            declined["NOT REPORTED"] += 1
        elif found.action == "sparse":
            rewritten[kind] += 1
            modifiers |= {found.modifiers} - {""}
        else:
            declined[f"{kind}: {bare(found.reason)}"] += 1
    return cells(
        row.name,
        row.form,
        counted(kinds) or "none",
        counted(rewritten),
        "; ".join(sorted(modifiers)),
        "; ".join(f"{n} {reason}" for reason, n in sorted(declined.items())) + row.wrong,
    )


def counted(kinds: Counter[str]) -> str:
    return ", ".join(f"{n} {kind}" for kind, n in sorted(kinds.items()))


def bare(reason: str) -> str:
    """A reason without what changes from trace to trace: names of nodes."""
    reason = re.sub(r" ?\(node [^)]*\)", "", reason)
    return re.sub(r"\b([a-z]\w*?)_\d+\b", r"\1", reason)


def cells(*texts: str) -> str:
    return "| " + " | ".join(" ".join(t.split()).replace("|", "\\|") for t in texts) + " |"


def totals(lines: Sequence[str]) -> dict[str, Counter[str]]:
    """What the lines of the table add up to, for attention and for what was rewritten of it."""
    sums: dict[str, Counter[str]] = {k: Counter() for k in ("attention", "rewritten", "rows")}
    for _, form, attention, rewritten, _, why in map(split, lines):
        sums["rows"]["not built" if why.startswith("not built") else form] += 1
        for what, text in (("attention", attention), ("rewritten", rewritten)):
            for n, kind in re.findall(r"(\d+) (\w+)", text):
                sums[what][kind] += int(n)
    return sums


def split(text: str) -> list[str]:
    return [cell.strip() for cell in re.split(r"(?<!\\)\|", text)[1:-1]]


def written() -> tuple[str, dict[tuple[str, str], str]]:
    """The version of transformers and the lines by (architecture, form), as the docs have them."""
    text = DOCS.read_text()
    found = re.search(r"that transformers (\S+) lists", text)
    rows = [x for x in text.splitlines() if x.startswith("| ") and split(x)[1] in FORMS]
    return found.group(1) if found else "", {(split(x)[0], split(x)[1]): x for x in rows}


def document(lines: Sequence[str]) -> str:
    sums = totals(lines)
    built = ", ".join(f"{n} {what}" for what, n in sorted(sums["rows"].items()))
    facts = [f"- rows: {built}"]
    for kind, n in sorted(sums["attention"].items()):
        facts.append(f"- {kind} attention: {n}, rewritten: {sums['rewritten'][kind]}")
    table = [cells(*HEADERS), cells(*["---"] * len(HEADERS)), *lines]
    head = HEAD.format(version=transformers.__version__)
    return head + "\n".join([*facts, "", *table]) + "\n"


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.support.architectures")
    parser.add_argument("names", nargs="*", metavar="ARCHITECTURE", help="only these (all)")
    parser.add_argument("--write", action="store_true", help=f"write {DOCS.name}; else print")
    parser.add_argument("--jobs", type=int, default=2, help="processes (%(default)s)")
    options = parser.parse_args(words)
    lines = written()[1] if options.names and DOCS.exists() else {}
    todo = [(name, form) for name in options.names or NAMES for form in FORMS]
    context = multiprocessing.get_context("spawn")
    with context.Pool(options.jobs, initializer=quiet) as pool:
        for key, text in tqdm(pool.imap_unordered(run, todo), total=len(todo), disable=None):
            lines[key] = text
            if options.write:  # at once, so that what is done stays done
                DOCS.parent.mkdir(exist_ok=True)
                DOCS.write_text(document([lines[key] for key in sorted(lines)]))
            else:
                sys.stdout.write(text + "\n")
    return 0


def run(what: tuple[str, str]) -> tuple[tuple[str, str], str]:
    text = line(survey(*what))
    torch.compiler.reset()
    return what, text


def quiet() -> None:
    """One thread each, so that sums round alike, and nothing of what the libraries log."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    logging.getLogger("torch._dynamo").setLevel(logging.CRITICAL)


if __name__ == "__main__":
    sys.exit(main())
