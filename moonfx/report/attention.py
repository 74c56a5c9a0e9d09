"""One row of the report per attention."""

from dataclasses import dataclass, replace
from typing import Any

from moonfx.policy import LayerPolicy
from moonfx.site import AttentionSite


@dataclass(frozen=True)
class Row:
    """One attention site.

    Args:
        layer, line: module name and source line.
        form: how the attention was written.
        mask: what its mask was proved to be, "" if it was not.
        modifiers: what else acts on the scores and is kept: softcap, sink logits, ALiBi.
        heads, kv_heads, head_dim: None where they are not known.
        action: "sparse", "declined", or "kept dense" when the policy says so.
        block, topk, sinks: the policy of a sparse site.
        reason: why a site is not sparse.
        queries, keys: the lengths that were traced.
        calls: in which kinds of calls, joined by ", ": "whole" (as many queries as keys), "chunk"
            (fewer), "step" (one query of several keys).
    """

    layer: str
    line: str
    form: str
    mask: str
    modifiers: str
    heads: int | None
    kv_heads: int | None
    head_dim: int | None
    action: str
    block: int | None
    topk: int | None
    sinks: int | None
    reason: str
    queries: int | None
    keys: int | None
    calls: str = ""

    @property
    def policy(self) -> LayerPolicy | None:
        if self.block is None or self.topk is None or self.sinks is None:
            return None
        return LayerPolicy(self.block, self.topk, self.sinks)


def row_of(site: AttentionSite) -> Row:
    """A site as it stands after the passes."""
    sparse = site.action == "sparse"
    policy = site.policy if sparse else None
    if site.reject is not None:
        action, reason = "declined", str(site.reject)
    else:
        action, reason = ("sparse", "") if sparse else ("kept dense", site.action)
    return Row(
        layer=site.layer or "(root)",
        line=site.line,
        form=site.form,
        mask=site.mask.kind if site.mask else "",
        modifiers=site.modifiers,
        heads=site.heads,
        kv_heads=site.kv_heads,
        head_dim=site.head_dim,
        action=action,
        block=policy.block if policy else None,
        topk=policy.topk if policy else None,
        sinks=policy.sinks if policy else None,
        reason=reason,
        queries=site.query_length,
        keys=site.key_length,
        calls=kind_of_call(site.query_length, site.key_length),
    )


def kind_of_call(queries: int | None, keys: int | None) -> str:
    """The kind of call that has so many queries and keys, "" where that is not known."""
    if queries is None or keys is None:
        return ""
    if queries >= keys:
        return "whole"
    return "step" if queries == 1 else "chunk"


def together(known: Row, row: Row) -> Row:
    """Two compilations of one site with the same outcome: the longer, and all kinds of calls."""
    longer = row if (row.keys or 0) > (known.keys or 0) else known
    kinds = dict.fromkeys(f"{known.calls}, {row.calls}".split(", "))
    return replace(longer, calls=", ".join(filter(None, kinds)))


def heads_of(row: Row) -> str:
    if row.heads is None:
        return ""
    return str(row.heads) if row.heads == row.kv_heads else f"{row.heads}/{row.kv_heads}"


def outcome(row: Row) -> tuple[Any, ...]:
    """What makes two compilations of one site the same row."""
    reason = row.reason.split(" (node")[0]
    return (row.layer, row.line, row.form, row.mask, row.modifiers, row.action, row.policy, reason)
