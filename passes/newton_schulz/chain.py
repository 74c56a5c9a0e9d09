"""An iteration X_0 -> X_k as it is found: its steps, its nodes, and why it may not be replaced."""

from dataclasses import dataclass, field

import torch
from torch import fx

from moonfx.passes.graph.memory_versions import TensorVersion
from moonfx.passes.newton_schulz.steps import Coefficients
from moonfx.site import Declined


@dataclass
class Chain:
    """X_0 -> X_k.

    Args:
        source: X_0.
        output: X_k.
        transposed: X_k is the transpose of what the steps make of X_0.
        coefficients: of each step.
        body: the nodes that the operator replaces, X_k's among them.
        reject: why it cannot be replaced, None if it can.
        column: X_k lies in memory column by column.
        own: X_k must not be a view of memory that others lie in, too.
    """

    source: TensorVersion
    output: fx.Node
    transposed: bool = False
    coefficients: list[Coefficients] = field(default_factory=list)
    body: set[fx.Node] = field(default_factory=set)
    reject: Declined | None = None
    column: bool = False
    own: bool = False

    @property
    def value(self) -> torch.Tensor:
        value: torch.Tensor = self.output.meta["val"]
        return value


@dataclass
class Partial:
    """A chain as far as it was followed.

    Args:
        words: each of its nodes -> the step's number, and the words of the node's polynomial.
        rejected: why it leads no further, None where it ends.
    """

    chain: Chain
    words: dict[fx.Node, tuple[int, set[str]]] = field(default_factory=dict)
    rejected: Declined | None = None
