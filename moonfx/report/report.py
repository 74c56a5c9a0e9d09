"""What moonfx did to the attentions and the Newton-Schulz iterations of some graphs."""

import json
from collections.abc import Hashable, Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

from tabulate import tabulate

from moonfx.ops.flops import attended_keys
from moonfx.report import newton_schulz as iterations
from moonfx.report.attention import Row, heads_of, outcome, together
from moonfx.report.newton_schulz import IterationRow

_LAST = "block/topk/sinks, or why not"


@dataclass
class Report:
    """What was compiled so far.

    Args:
        rows: one per attention site, in the order in which the model runs them. A site that was
            compiled several times (prefill, decode) counts once for each different outcome, with
            the longest lengths traced and the kinds of calls.
        graphs: how many graphs were compiled.
        iterations: the Newton-Schulz iterations of optimizers' graphs, those alike in one row, as
            one step runs them: those of code that was compiled anew count once.
        of_steps: whether all graphs are of optimizers' steps.
        failures: what runs as it was because something failed, and why: whole sentences.
        disabled: the passes that did not run, as `disable_passes` asked.
    """

    rows: list[Row] = field(default_factory=list)
    graphs: int = 0
    failures: list[str] = field(default_factory=list)
    iterations: list[IterationRow] = field(default_factory=list)
    of_steps: bool = False
    disabled: tuple[str, ...] = ()
    _of_code: dict[Hashable, list[IterationRow]] = field(default_factory=dict, repr=False)

    @property
    def sites(self) -> list[Row]:
        return list(self.rows)

    @property
    def rewritten(self) -> list[Row]:
        return [r for r in self.rows if r.action == "sparse"]

    @property
    def declined(self) -> list[Row]:
        return [r for r in self.rows if r.action == "declined"]

    def add(
        self, rows: Iterable[Row], alike: Iterable[IterationRow] = (), code: Hashable = None
    ) -> None:
        """Adds the rows of one more graph.

        Args:
            alike: its iterations.
            code: the same for graphs that the same code was compiled to, for the same parameters.
        """
        self.graphs += 1
        known = self._of_code.get(code, [])
        self._of_code[code] = iterations.merge_recompiled(known, alike)
        self.iterations = iterations.sum_pieces(self._of_code.values())
        seen: dict[tuple[Any, ...], int] = {}
        for row in rows:
            found = outcome(row)
            seen[found] = seen.get(found, 0) + 1
            same = [i for i, r in enumerate(self.rows) if outcome(r) == found]
            if len(same) < seen[found]:
                self.rows.append(row)
            else:
                at = same[seen[found] - 1]
                self.rows[at] = together(self.rows[at], row)

    def savings(self) -> dict[str, Any]:
        """Share of key tokens attended and the FLOP-ideal speedup of attention, as traced."""
        dense = sparse = longest = 0
        for row in self.rewritten:
            if row.queries is None or row.keys is None or row.policy is None:
                continue
            weight = (row.heads or 1) * (row.head_dim or 1)
            causal = not row.mask.startswith("all")
            dense += weight * attended_keys(row.queries, row.keys, row.keys, 1, causal)
            block, topk = row.policy.block, row.policy.topk
            sparse += weight * attended_keys(row.queries, row.keys, block, topk, causal)
            longest = max(longest, row.keys)
        if not sparse:
            return {"keys": None, "attended_share": None, "ideal_speedup": None, "dense": False}
        return {
            "keys": longest,
            "attended_share": sparse / dense,
            "ideal_speedup": dense / sparse,
            "dense": sparse == dense,
        }

    def footer(self) -> str:
        """Counts, and what the policy saves at the traced length."""
        kept = len(self.rows) - len(self.rewritten) - len(self.declined)
        lines = [
            f"{len(self.rows)} attention sites in {self.graphs} graph(s): "
            f"{len(self.rewritten)} sparse, {len(self.declined)} declined, {kept} kept dense"
        ]
        if self.iterations or (self.of_steps and self.graphs):
            lines = lines if self.rows else []
            pieces = len(self._of_code) or self.graphs
            lines.append(iterations.footer(self.iterations, self.graphs, pieces))
        saved = self.savings()
        if saved["dense"]:
            lines.append(f"dense: N <= block*topk at the traced length N = {saved['keys']}")
        elif saved["keys"] is not None:
            lines.append(
                f"at N = {saved['keys']}: {saved['attended_share']:.1%} of key tokens attended, "
                f"FLOP-ideal speedup of these attentions {saved['ideal_speedup']:.2f}x"
            )
        if self.disabled:
            lines.append(f"passes disabled: {', '.join(self.disabled)}")
        return "\n".join([*lines, *self.failures])

    def __str__(self) -> str:
        columns: dict[str, list[Any]] = {
            "layer": [r.layer for r in self.rows],
            "line": [r.line for r in self.rows],
            "form": [r.form for r in self.rows],
            "mask": [r.mask for r in self.rows],
            "modifiers": [r.modifiers for r in self.rows],
            "heads": [heads_of(r) for r in self.rows],
            "head_dim": [r.head_dim for r in self.rows],
            "calls": [r.calls for r in self.rows],
            "action": [r.action for r in self.rows],
            _LAST: [str(r.policy) if r.policy else r.reason for r in self.rows],
        }
        if not any(columns["modifiers"]):
            del columns["modifiers"]
        if not any("chunk" in row.calls or "step" in row.calls for row in self.rows):
            del columns["calls"]
        widths = [60 if name == _LAST else None for name in columns]
        text = tabulate(columns, headers="keys", maxcolwidths=widths)
        tables = [text] if self.rows else []
        tables += [iterations.table(self.iterations)] if self.iterations else []
        return "\n".join([*tables, self.footer()])

    def to_dict(self) -> dict[str, Any]:
        return {
            "sites": [asdict(r) for r in self.rows],
            "graphs": self.graphs,
            "rewritten": len(self.rewritten),
            "declined": len(self.declined),
            "failures": list(self.failures),
            "disabled": list(self.disabled),
            "iterations": [asdict(r) for r in self.iterations],
            "savings": self.savings(),
        }

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2)
