"""What a call asks of a kernel beside its tensors: one type for MoBA, one for Newton-Schulz.

Below the operator no signature spells these arguments: a function takes `MobaArguments` and reads
what it computes with. A new one is a field here, and is read where it is computed.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor

Coefficients = Sequence[tuple[float, float, float]]


class MobaArguments(NamedTuple):
    """The arguments after query, key and value, in the operator's order and with its defaults.

    Shape letters: B batch, Hq query heads, Hkv key/value heads, Nk keys, D head dim. What each
    means is defined in kernels/reference/moba.py; moonfx/ops/checks.py says what it may be.

    Args:
        block: tokens in a block, >= 1.
        topk: blocks per query, the own block and the sinks counted, >= 1.
        sinks: first blocks that are always chosen, < topk.
        scale: factor on q.k in the softmax, D**-0.5 by default; the gate has none.
        key_mask: bool [B, Nk], True for a real token; None when all are.
        causal: whether a query sees only the keys at or before its own position. If not, Nq = Nk.
        softcap: bound on the scaled scores; 0 for none.
        key_bias: float32 [B or 1, Hq or 1, Nk], added to the scaled and capped scores; None for 0.
        segments: integers [B, Nk], the sequence that each token is of; None for one per row.
        block_means: float32 [B, Hkv, m, D], m >= (Nk - 1) // block, causal and without segments:
            the mean of the real keys of each row's block, which the gate reads in place of the
            keys; only those of a query's candidates are read. None for those of the keys.
    """

    block: int
    topk: int
    sinks: int = 0
    scale: float | None = None
    key_mask: Tensor | None = None
    causal: bool = True
    softcap: float = 0.0
    key_bias: Tensor | None = None
    segments: Tensor | None = None
    block_means: Tensor | None = None

    def scale_for(self, head_dim: int) -> float:
        """The factor on q.k: the scale, or the default of D**-0.5."""
        return head_dim**-0.5 if self.scale is None else self.scale

    def split(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """What is no tensor, and the tensors, by name: an autograd node keeps them apart."""
        named = self._asdict()
        tensors = {name: x for name, x in named.items() if isinstance(x, Tensor)}
        return {name: x for name, x in named.items() if name not in tensors}, tensors
