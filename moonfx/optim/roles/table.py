"""What a parameter is to its model, and which optimizer that makes its own.

A row says by which rule the role was found: "graph" (how the traced model uses the parameter),
"module" (the type of the module that holds it), "name", "shape", or "override" (the user's word).
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple

from tabulate import tabulate
from torch.optim import Optimizer

from moonfx.optim.matrices import Layout
from moonfx.optim.settings import ADAMW, MUON

OPTIMIZERS = (MUON, ADAMW)
ONE_MATRIX = Layout()
RULES = ("graph", "module", "name", "shape", "override")


class Role(NamedTuple):
    """Which optimizer a role takes, and why."""

    optimizer: str
    why: str


# The data of the division. Muon's update has one size in every direction of a matrix: it suits maps
# from one space of activations to another, and nothing else.
ROLES: dict[str, Role] = {
    "hidden matrix": Role(MUON, "a matrix between activations"),
    "fused projection": Role(MUON, "several matrices in one: each block is orthogonalized alone"),
    "convolution": Role(MUON, "its filters, flattened, are a matrix between activations"),
    "experts": Role(MUON, "a matrix per expert, each orthogonalized alone"),
    "router": Role(MUON, "a matrix between activations; Moonlight has its routers on Muon"),
    "first convolution": Role(ADAMW, "reads pixels or samples, not activations"),
    "patch embedding": Role(ADAMW, "reads pixels or samples, not activations"),
    "depthwise convolution": Role(ADAMW, "a filter per channel: no channel meets another"),
    "embedding": Role(ADAMW, "a table of rows: a step changes the gathered ones"),
    "position embedding": Role(ADAMW, "a table of positions, not a map between activations"),
    "head": Role(ADAMW, "produces the logits: its rows are a table of outputs"),
    "tied head": Role(ADAMW, "the embedding and the head in one: a table of rows"),
    "norm gain": Role(ADAMW, "multiplies each channel alone"),
    "bias": Role(ADAMW, "is added: no matrix"),
    "vector": Role(ADAMW, "no matrix"),
    "LoRA": Role(ADAMW, "a factor of a product, which no one agrees how to orthogonalize"),
    "scan parameter": Role(ADAMW, "decays and steps of a recurrence, elementwise"),
    "weight norm": Role(ADAMW, "a norm or a direction of which the weight is computed"),
    "thin matrix": Role(ADAMW, "one row or column: Muon would only normalise its gradient"),
    "unused": Role(ADAMW, "gets no gradient"),
    "unclear": Role(ADAMW, "nothing shows that it is a matrix between activations"),
}  # fmt: skip


class Finding(NamedTuple):
    """What one rule says of one parameter."""

    role: str
    why: str
    layout: Layout = ONE_MATRIX


@dataclass(frozen=True)
class RoleRow:
    """One parameter.

    Args:
        name: its first name in the model, without the prefixes of wrappers.
        shape: its sizes.
        role: one of ROLES.
        rule: one of RULES: what the role was found by.
        optimizer: "muon" or "adamw".
        why: what was seen, in words; by the graph, the node, its module and its source line.
        layout: where the matrices lie in it; means nothing where the optimizer is "adamw".
    """

    name: str
    shape: tuple[int, ...]
    role: str
    rule: str
    optimizer: str
    why: str
    layout: Layout = ONE_MATRIX

    def with_layout(self, layout: Layout) -> "RoleRow":
        return replace(self, layout=layout)


def row_of(name: str, shape: Sequence[int], found: Finding, rule: str) -> RoleRow:
    """The row of a finding: its role says which optimizer, and that is part of why."""
    optimizer, reason = ROLES[found.role]
    why = f"{found.why}; {reason}" if found.why else reason
    layout = found.layout if optimizer == MUON else ONE_MATRIX
    return RoleRow(name, tuple(shape), found.role, rule, optimizer, why, layout)


class Roles:
    """A table of roles: one row per parameter, in the order of the optimizer's groups."""

    def __init__(self, rows: Sequence[RoleRow]) -> None:
        self.rows = list(rows)

    def __iter__(self) -> Iterator[RoleRow]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def to_dict(self) -> dict[str, Any]:
        return {"rows": [asdict(row) | {"layout": row.layout._asdict()} for row in self.rows]}

    def __str__(self) -> str:
        table = [
            [row.name, "x".join(map(str, row.shape)), _with_blocks(row), row.rule, row.optimizer,
             row.why]
            for row in self.rows
        ]  # fmt: skip
        head = ["parameter", "shape", "role", "rule", "optimizer", "why"]
        on_muon = sum(row.optimizer == MUON for row in self.rows)
        total = f"{on_muon} of {len(self.rows)} parameters on Muon"
        return f"{tabulate(table, head, disable_numparse=True)}\n{total}"


def roles(optimizer: Optimizer) -> Roles:
    """What went to Muon and what stayed on AdamW, and why: one row per parameter.

    Args:
        optimizer: of moonfx.convert_optimizer.

    Raises:
        TypeError: if it is not a moonfx.Muon.
    """
    table = getattr(optimizer, "table", None)
    if table is None:
        raise TypeError(f"optimizer must be a moonfx.Muon, got {type(optimizer).__name__}")
    return Roles(table)


def _with_blocks(row: RoleRow) -> str:
    """The role, and of a fused parameter its blocks: "fused projection 4 x (16 + 16 + 16)"."""
    if not row.layout.sizes:
        return row.role
    blocks = " + ".join(map(str, row.layout.sizes))
    return f"{row.role} {row.layout.outer} x ({blocks})"
