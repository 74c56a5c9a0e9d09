"""Follows one attention of a Llama from the nodes that the model's code became to the kernel.

    python examples/llama_attention.py
    python examples/llama_attention.py --into docs/architecture.md

The first prints the text; the second puts it into the page, between the comments that name this
command. The model is one narrow layer with random weights: nothing is downloaded.
"""

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import transformers
from torch import fx

from moonfx.capture.retrace import capture
from moonfx.capture.trace_log import readable
from moonfx.ops import dispatch
from moonfx.passes.context import Context
from moonfx.passes.pass_manager import PASSES
from moonfx.passes.symbolic.indices import BATCH, HEAD, KEY, QUERY
from moonfx.policy import LayerPolicy
from moonfx.site import AttentionSite

POLICY = LayerPolicy(block=16, topk=3, sinks=1)
TOKENS = 256
COMMENTS = "<!-- examples/llama_attention.py -->", "<!-- /examples/llama_attention.py -->"
ROOT = Path(__file__).resolve().parents[1]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--into", type=Path, metavar="PAGE", help="put the text into this page")
    page = parser.parse_args(argv).into
    text = worked_example()
    if page is None:
        print(text)
    else:
        page.write_text(placed(page.read_text(encoding="utf-8"), text), encoding="utf-8")


def placed(page: str, text: str) -> str:
    """The page with the text between its comments."""
    start, end = COMMENTS
    before, _, rest = page.partition(start)
    _, found, after = rest.partition(end)
    if not found:
        raise ValueError(f"the page must have {start} and {end}")
    return f"{before}{start}\n\n{text}\n\n{end}{after}"


class Road:
    """What became of the attention at each stage, kept while torch.compile runs the passes."""

    def __init__(self) -> None:
        self.before = ""  # the captured graph, and the rewritten one, as MOONFX_DUMP prints them
        self.after = ""
        self.site: dict[str, str] = {}  # as lay_out_heads leaves it
        self.mask: list[str] = []  # what is read of the mask, and what classify_mask proves of it
        self.called: list[str] = []

    def backend(self, graph: fx.GraphModule, inputs: Sequence[Any]) -> Any:
        """What moonfx's own backend does: retrace, then each pass in its order."""
        captured = capture(graph, inputs)
        context = Context(captured, policy=lambda site, sites, root: POLICY)
        self.before = readable(captured)
        for name, run in PASSES:
            run(captured.graph, context)
            if name == "lay_out_heads":
                self.site = fields_of(context.sites[0])
            if name == "classify_mask":
                self.mask = mask_of(context.sites[0], context)
        captured.recompile()
        self.after = readable(captured)
        return lambda *args: self.recorded(captured, args)

    def recorded(self, captured: fx.GraphModule, args: Sequence[Any]) -> Any:
        """Runs the graph and keeps which functions of operators and kernels were called."""
        self.called.clear()
        sys.setprofile(self.note)
        try:
            return captured(*args)
        finally:
            sys.setprofile(None)

    def note(self, frame: FrameType, event: str, argument: object) -> None:
        file = Path(frame.f_code.co_filename)
        name = frame.f_code.co_name
        if event != "call" or not file.is_relative_to(ROOT) or name.startswith("<"):
            return
        called = f"{file.relative_to(ROOT)}: {name}"
        if called.startswith(("kernels/", "moonfx/ops/")) and called not in self.called:
            self.called.append(called)


def followed() -> Road:
    """Compiles and runs a Llama of one layer, and keeps what was seen on the way."""
    sizes = {"hidden_size": 64, "intermediate_size": 96, "vocab_size": 100}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 1}
    config = transformers.LlamaConfig(**sizes, **heads, use_cache=False)
    # "eager" is attention written out by hand: the form with the most nodes.
    model: Any = transformers.LlamaForCausalLM._from_config(config, attn_implementation="eager")
    road = Road()
    compiled = torch.compile(model.eval(), backend=road.backend, dynamic=False)
    with torch.no_grad():
        for _ in range(2):  # what a first call prepares, as compiling C++, is no part of the road
            compiled(torch.zeros((1, TOKENS), dtype=torch.int64))
    torch.compiler.reset()
    return road


def worked_example() -> str:
    """The text for the page."""
    road = followed()
    site, before, after = road.site, lines_of(road.before), lines_of(road.after)
    gone, new = before.keys() - after.keys(), after.keys() - before.keys()
    kernel = dispatch.kernel_for(torch.device("cpu")).__name__.removeprefix("moonfx.")
    return "\n".join(
        [
            "Written by `python examples/llama_attention.py --into docs/architecture.md` with "
            f"{versions()}. Shapes: 4 query heads, 2 key heads, {TOKENS} tokens, head_dim 16.",
            "",
            "**The nodes** (`moonfx/capture/retrace.py` makes them, `passes/dump.py` prints them). "
            f"Of the {len(before)} nodes of the model, {len(gone)} are one attention and its mask. "
            f"`{site['query']}`, `{site['key']}` and `{site['value']}` are query, key and value.",
            "",
            *code(shown(road.before, gone), "python"),
            "",
            "**A site** (`passes/attention/find_attention.py` fills the `AttentionSite` of "
            "`moonfx/site.py`). Key and value are those from before `repeat_kv` "
            "(`passes/attention/lay_out_heads.py`); the scale is read from the node that carries "
            "it (`passes/attention/scores.py`).",
            "",
            *code([f"{name:<9} {value}" for name, value in site.items()]),
            "",
            "**A proved mask** (`passes/masks/classify_mask.py`). `passes/symbolic/reader.py` "
            "reads the mask at the symbolic indices batch b, head h, query i and key j. "
            "`passes/masks/additive.py` takes from the value where a key is kept, and "
            "`passes/masks/conditions.py` knows that condition by a name.",
            "",
            *code(road.mask),
            "",
            "**One operator node** (`passes/attention/sparsify_attention.py`), for the policy "
            f"block/topk/sinks {POLICY}. Then `passes/cleanup/remove_dead.py` removes what has no "
            "reader any more.",
            "",
            *code(shown(road.after, new), "python"),
            "",
            f"**A kernel's launch** (`moonfx/ops/dispatch.py` chooses "
            f"`{kernel.replace('.', '/')}.py` here). When the graph runs, these functions of the "
            "operator and the kernel are called, in the order of their first call:",
            "",
            *code(road.called),
        ]
    )


def code(lines: Sequence[str], language: str = "text") -> list[str]:
    return [f"```{language}", *lines, "```"]


def versions() -> str:
    """What the names of nodes depend on."""
    torch_release = torch.__version__.partition("+")[0]
    return f"torch {torch_release} and transformers {transformers.__version__}"


def fields_of(site: AttentionSite) -> dict[str, str]:
    names = "query key value output scale masks causal form layer line heads kv_heads head_dim"
    return {name: unnumbered(str(getattr(site, name))) for name in names.split()}


def mask_of(site: AttentionSite, context: Context) -> list[str]:
    mask, _ = site.masks[0]
    read = context.reader.read(mask, (BATCH, HEAD, QUERY, KEY))
    return [f"{mask}[b, h, i, j] = {read}", f"site.mask = {site.mask}"]


def lines_of(graph: str) -> dict[str, str]:
    """Name of a node -> its line in the printed graph."""
    return {m[1]: line for line in graph.splitlines() if (m := re.match(r" {8}(\w+)(:| =)", line))}


def shown(graph: str, names: set[str]) -> list[str]:
    """The lines of these nodes, each group under the model's line that it comes from.

    As printed, less strides, `x = None`, and the folder and line of the model's file.
    """
    wanted, lines, source = lines_of(graph), [], ""
    for line in graph.splitlines():
        if line.lstrip().startswith("# File: "):
            source = re.sub(r".*/(\w+\.py):\d+ in (\w+), code: ", r"# \1, \2: ", line)
        elif any(line == wanted.get(name) for name in names):
            lines += [source] if source else []
            lines.append(re.sub(r"\[[\d, ]*\]\"", '"', line.partition(";")[0].strip()))
            source = ""
    return lines


def unnumbered(text: str) -> str:
    """Without the line number, which changes from release to release of the model's library."""
    return re.sub(r"(\.py):\d+", r"\1", text)


if __name__ == "__main__":
    main()
