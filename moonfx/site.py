"""What a pass found in a graph, or why it declined."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from moonfx.policy import LayerPolicy


class Declined(Exception):
    """Why something is left as it is, and the node that stands in the way.

    Raised where a parse cannot go on, and caught once, by the pass that parses.

    Args:
        of_call: whether it lies in how the model was called (in training), not in the layer.
    """

    def __init__(self, reason: str, node: fx.Node, *, of_call: bool = False) -> None:
        super().__init__(reason, node)
        self.reason, self.node, self.of_call = reason, node, of_call

    def __str__(self) -> str:
        return f"{self.reason} (node {self.node.name})"


@dataclass
class Mask:
    """What a mask was proved to be, for every shape.

    Args:
        kind: "causal" or "all" (bidirectional), then " & padding" and " & packed" where they hold.
        padding: the proved predicate over (row, key) that says which keys are real, or None.
        segments: what, over (row, key), tells the packed sequences of a row apart: a query sees the
            keys where it is what it is at the query's own token. None where nothing is packed.
        bias: what is added to the scores, over (row, head, key): a passes.masks.key_bias.Bias,
            the same for every query up to a constant that softmax does not see. None for none.
    """

    kind: str
    padding: Any = None
    segments: Any = None
    bias: Any = None

    @property
    def causal(self) -> bool:
        return self.kind.startswith("causal")


@dataclass
class AttentionSite:
    """One dense attention in a graph.

    Shapes: query [B, Hq, Nq, D], key [B, Hkv, Nk, D], value [B, Hkv, Nk, Dv], output
    [B, Hq, Nq, Dv]. With `folded` the heads lie in the batch and every tensor lacks the head axis.
    As it is found, and until `lay_out_heads`, an attention may also have its heads cut in two, or
    keys and values repeated for each query head.

    Args:
        output: the node that the rewrite replaces.
        query, key, value: before any repeat_kv.
        key_transposed: the key node is [B, Hkv, D, Nk].
        tokens_first: until `lay_out_heads`, operands and output are [B, N, H, D].
        laid_out: the shapes are those above, and checked.
        scale: softmax scale; None is head_dim ** -0.5.
        factors: scalars unknown to the graph that scale the query, as (node, "mul" | "div").
        masks: nodes of the masks, as (node, how) with how one of "additive", "keep", "drop", or
            "times" for 0 and 1 that multiply the scores under another mask.
        mask_scales: additive masks that are multiplied after they were added -> by what.
        fills: "keep" and "drop" masks -> what they put in the place of scores, scaled; not there
            for an operator's own mask, of which a query gets 0 that sees no key.
        clears_hidden: whether all that is hidden (or, if False, a part of it) is set to 0 after the
            softmax; None if nothing is.
        zeroes_keyless: a query that sees no key gets 0 now, and got something else before.
        causal: the operator itself was told to be causal (is_causal=True, top-left aligned).
        softcap: c where the scores are c * tanh(scaled scores / c) before any mask, 0.0 for none.
        sink_logits: a node with one logit per query head, or one for all (every other dim is 1),
            which joins the softmax's denominator and no value; None for none.
        lse: a node [B, Hq, Nq] or [B, Hq, Nq, 1] with the logarithm of the softmax's denominator,
            which something else reads; None for none.
        form: which surface form was found, for the report.
        layer, line: module name and source line.
        ordinal: which attention of its layer this is, from 0.
    """

    output: fx.Node
    query: fx.Node
    key: fx.Node
    value: fx.Node
    form: str
    layer: str
    line: str
    scale: float | None = None
    factors: list[tuple[fx.Node, str]] = field(default_factory=list)
    masks: list[tuple[fx.Node, str]] = field(default_factory=list)
    mask_scales: dict[fx.Node, float] = field(default_factory=dict)
    fills: dict[fx.Node, float] = field(default_factory=dict)
    clears_hidden: bool | None = None
    zeroes_keyless: bool = False
    causal: bool = False
    softcap: float = 0.0
    sink_logits: fx.Node | None = None
    lse: fx.Node | None = None
    key_transposed: bool = False
    folded: bool = False
    tokens_first: bool = False
    laid_out: bool = False
    ordinal: int = 0
    heads: int | None = None
    kv_heads: int | None = None
    head_dim: int | None = None
    query_length: int | None = None
    key_length: int | None = None
    mask: Mask | None = None
    reject: Declined | None = None
    action: str = "declined"
    policy: LayerPolicy | None = None

    @property
    def sees_constants(self) -> bool:
        """Whether a constant added to all scores of a query changes more than the softmax."""
        return self.sink_logits is not None or self.lse is not None

    @property
    def unfolds(self) -> bool:
        """Whether heads that lie in the batch can be told apart."""
        return self.folded and (self.heads or 1) > 1

    @property
    def modifiers(self) -> str:
        """What acts on the scores beside scale and mask, for the report: "softcap 50, ALiBi"."""
        found = [f"softcap {self.softcap:g}"] if self.softcap else []
        if self.sink_logits is not None:
            found.append("sink logits")
        if self.lse is not None:
            found.append("logsumexp")
        if self.mask is not None and self.mask.bias is not None:
            found.append(str(self.mask.bias))
        if self.zeroes_keyless:
            found.append("0 for queries without a key")
        return ", ".join(found)


@dataclass
class NewtonSchulzSite:
    """One Newton-Schulz iteration X_0 -> X_k in a graph.

    Args:
        output: the node that is X_k, or the last one known where it is declined.
        shape, dtype, device: of X.
        coefficients: (a, b, c) of each step.
        layer, line: module name and source line.
        flops: what its products cost as they were written.
        action: "rewritten", "left" if the cost model keeps what was written, or "declined".
        form: the operator's form, "" if it is not used.
        why: the cost model's reason.
        reject: why it was declined.
        call: which call of the operator computes it, counted in the graph; None for none.
    """

    output: fx.Node
    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    coefficients: list[tuple[float, float, float]]
    layer: str
    line: str
    flops: int = 0
    action: str = "declined"
    form: str = ""
    why: str = ""
    reject: Declined | None = None
    call: int | None = None
