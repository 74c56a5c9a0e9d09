"""The passes in their order, and the loop that runs them."""

import logging
import os
import time
from collections.abc import Callable

from torch import fx

from moonfx.passes.attention import (
    canonicalize,
    find_attention,
    lay_out_heads,
    sparsify_attention,
)
from moonfx.passes.cleanup import remove_dead, symbolic_alpha, verify
from moonfx.passes.context import Context
from moonfx.passes.dump import Dump
from moonfx.passes.masks import classify_mask
from moonfx.passes.newton_schulz import rewrite as newton_schulz
from moonfx.report.attention import row_of

log = logging.getLogger("moonfx.passes")
sites_log = logging.getLogger("moonfx.sites")

Pass = Callable[[fx.Graph, Context], int]
Passes = tuple[tuple[str, Pass], ...]


def _apart(name: str, run: Pass) -> Pass:
    """A pass that has nothing to do with the others: where it fails, what they did stays.

    Its graph must compute the same wherever it may fail.
    """

    def guarded(graph: fx.Graph, context: Context) -> int:
        known = len(context.iterations)
        try:
            return run(graph, context)
        except Exception as error:
            if os.environ.get("MOONFX_VERIFY"):
                raise
            context.failures.append(f"{name}: {type(error).__name__}: {error}")
            log.exception("the pass %s failed, others went on; please report this", name)
            del context.iterations[known:]
            return 0

    return guarded


PASSES: Passes = (
    ("canonicalize", canonicalize.run),
    ("find_attention", find_attention.run),
    ("lay_out_heads", lay_out_heads.run),
    ("classify_mask", classify_mask.run),
    ("sparsify_attention", sparsify_attention.run),
    ("newton_schulz", _apart("newton_schulz", newton_schulz.run)),
    ("symbolic_alpha", _apart("symbolic_alpha", symbolic_alpha.run)),
    ("remove_dead", remove_dead.run),
)
# What is left to do where a pass for attentions fails.
WITHOUT_ATTENTION = tuple(
    p for p in PASSES if p[0] in ("newton_schulz", "symbolic_alpha", "remove_dead")
)


def run_passes(context: Context, passes: Passes = PASSES, *, check: bool | None = None) -> int:
    """Runs passes on the captured graph and the bodies inside it.

    Args:
        passes: in their order.
        check: run `verify` after each pass; None is "if MOONFX_VERIFY is set".
    Returns:
        How many sites became sparse, and how many Newton-Schulz iterations an operator.
    """
    check = bool(os.environ.get("MOONFX_VERIFY")) if check is None else check
    dump = Dump(context.gm)
    for number, (name, run) in enumerate(passes, 1):
        dump.write(f"{number:02}_{name}_before", context.sites)
        start = time.perf_counter()
        count = sum(run(gm.graph, context) for gm in list(context.graphs()))
        log.debug("%s: %d in %.1f ms", name, count, 1e3 * (time.perf_counter() - start))
        if name == "find_attention":
            _in_order_of_execution(context)
        if check:
            for gm in context.graphs():
                verify.run(gm.graph, context)
        dump.write(f"{number:02}_{name}_after", context.sites)
    for gm in reversed(list(context.graphs())):
        gm.recompile()
    for row in (row_of(site) for site in context.sites if site.reject is None):
        outcome = row.policy or row.reason
        sites_log.info("%s (%s): %s, %s: %s", row.layer, row.line, row.form, row.action, outcome)
    sparse = sum(site.action == "sparse" for site in context.sites)
    return sparse + sum(site.action == "rewritten" for site in context.iterations)


def _in_order_of_execution(context: Context) -> None:
    """Sorts the sites as the model runs them and numbers those that share a layer."""
    position: dict[fx.Node, tuple[int, ...]] = {}

    def place(node: fx.Node) -> tuple[int, ...]:
        if node not in position:
            call = context.nesting.call_of(node.graph)
            prefix = place(call) if call is not None else ()
            for index, each in enumerate(node.graph.nodes):
                position[each] = (*prefix, index)
        return position[node]

    context.sites.sort(key=lambda site: place(site.output))
    seen: dict[str, int] = {}
    for site in context.sites:
        site.ordinal = seen.get(site.layer, 0)
        seen[site.layer] = site.ordinal + 1
