"""Whether an attention's keys lie in a static cache: in memory that is longer, and written to.

    cache.index_copy_(2, positions, new) -> views -> repeat_kv -> key [B, H, length of the cache, D]

What of such keys is written yet, only the mask says, so that attention over them stays dense.
"""

from torch import fx

from moonfx.passes.context import Context
from moonfx.passes.graph.aliases import writes
from moonfx.passes.graph.operators import CASTS, COPIES
from moonfx.passes.symbolic.rules import VIEWS
from moonfx.site import AttentionSite

_REPEATS = ("repeat_interleave", "expand", "repeat", "reshape")


def reason_of(site: AttentionSite, context: Context) -> str:
    """What a reason says of a static cache that a site's keys lie in, "" if they do not."""
    node = site.key
    while True:
        if node.op == "placeholder" and (outside := context.nesting.outer(node)) is not None:
            node = outside
        elif not _looks_through(node):
            break
        else:
            node = node.all_input_nodes[0]
    if not context.mutated(node):
        return ""
    given = node.op in ("placeholder", "get_attr")
    name = f" ('{context.nesting.name_of(node)}')" if given else ""  # a first call makes its own
    cache = f"the keys lie in a static cache{name}, and which of them are written is not known"
    return f"{cache}; a DynamicCache can be proved"


def _looks_through(node: fx.Node) -> bool:
    if node.op != "call_function" or not node.all_input_nodes:
        return False
    named = str(getattr(node.target, "__name__", "")).split(".")[0] in _REPEATS
    written = writes(node)
    return named or node.target in VIEWS | CASTS | COPIES or written == node.all_input_nodes[:1]
