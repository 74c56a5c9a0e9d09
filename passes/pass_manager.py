"""The passes in their order, and the loop that runs them."""

import logging
import time
from collections.abc import Callable, Iterable

from torch import fx

from moonfx.environment import verifying
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
from moonfx.policy import did_you_mean
from moonfx.report.attention import row_of
from moonfx.site import Declined

log = logging.getLogger("moonfx.passes")
sites_log = logging.getLogger("moonfx.sites")

Pass = Callable[[fx.Graph, Context], int]
Passes = tuple[tuple[str, Pass], ...]


def isolated(name: str, run: Pass) -> Pass:
    """A pass that has nothing to do with the others: where it fails, what they did stays.

    Its graph must compute the same wherever it may fail.
    """

    def guarded(graph: fx.Graph, context: Context) -> int:
        known = len(context.iterations)
        try:
            return run(graph, context)
        except Exception as error:
            if verifying():
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
    ("newton_schulz", isolated("newton_schulz", newton_schulz.run)),
    ("symbolic_alpha", isolated("symbolic_alpha", symbolic_alpha.run)),
    ("remove_dead", remove_dead.run),
)
# Without one of these an attention that was found stays as it was.
NEEDED_BY_ATTENTIONS = ("lay_out_heads", "classify_mask", "sparsify_attention")
# What is left to do where a pass for attentions fails.
WITHOUT_ATTENTION = tuple(
    p for p in PASSES if p[0] in ("newton_schulz", "symbolic_alpha", "remove_dead")
)


def check_passes(names: Iterable[str]) -> None:
    """Checks names that `disable_passes` was given.

    Raises:
        ValueError: for a name that no pass has, listing those of PASSES.
    """
    known = [name for name, _ in PASSES]
    for name in names:
        if name not in known:
            raise ValueError(
                f"disable_passes: no pass is named {name!r}{did_you_mean(name, known)}; known: "
                f"{', '.join(known)}"
            )


def run_passes(context: Context, passes: Passes = PASSES, *, check: bool | None = None) -> int:
    """Runs passes on the captured graph and the bodies inside it.

    Args:
        passes: in their order; those that context.disabled names are passed over.
        check: run `verify` after each pass; None is "if MOONFX_VERIFY is set".
    Returns:
        How many sites became sparse, and how many Newton-Schulz iterations an operator.
    """
    check = verifying() if check is None else check
    dump = Dump(context.gm)
    for number, (name, run) in enumerate(passes, 1):
        if name in context.disabled:
            _leave_sites(name, context)
            continue
        dump.before(f"{number:02}_{name}", context.sites)
        start = time.perf_counter()
        count = sum(run(gm.graph, context) for gm in list(context.graphs()))
        log.debug("%s: %d in %.1f ms", name, count, 1e3 * (time.perf_counter() - start))
        if name == "find_attention":
            _in_order_of_execution(context)
        if check:
            for gm in context.graphs():
                verify.run(gm.graph, context)
        dump.after(f"{number:02}_{name}", context.sites)
    for gm in reversed(list(context.graphs())):
        gm.recompile()
    for row in (row_of(site) for site in context.sites if site.reject is None):
        outcome = row.policy or row.reason
        sites_log.info("%s (%s): %s, %s: %s", row.layer, row.line, row.form, row.action, outcome)
    sparse = sum(site.action == "sparse" for site in context.sites)
    return sparse + sum(site.action == "rewritten" for site in context.iterations)


def _leave_sites(name: str, context: Context) -> None:
    """What a disabled pass would have looked at stays as it was, and says why."""
    if name in NEEDED_BY_ATTENTIONS:
        for site in context.sites:
            if site.reject is None:
                context.decline(site, Declined(f"the pass {name} is disabled", site.output))


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
