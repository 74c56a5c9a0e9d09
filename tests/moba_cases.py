"""Attention problems that tests draw, on a grid where every implementation must route alike.

Inputs are multiples of 1/8 in [-1, 1] and blocks powers of two: block means, and their products
with a query, are then exact in float32 in any order of summation. A tie is a tie everywhere and
no near-tie can flip, so that outputs differ by the rounding of softmax and sums alone.
"""

from dataclasses import dataclass, replace

import torch
from hypothesis import strategies as st
from torch import Tensor

PADDINGS = ("none", "left", "right", "holes", "one row empty")
LAYOUTS = ("contiguous", "by token", "expanded", "strided")


@dataclass(frozen=True)
class Case:
    """Shapes and settings of one problem; `inputs` makes its tensors."""

    batch: int = 2
    kv_heads: int = 2
    group: int = 2
    queries: int = 40
    length: int = 40
    dim: int = 8
    value_dim: int = 8
    block: int = 8
    topk: int = 2
    sinks: int = 0
    scale: float | None = None
    padding: str = "none"
    layout: str = "contiguous"
    dtype: torch.dtype = torch.float32
    seed: int = 0

    def but(self, **changes: object) -> "Case":
        return replace(self, **changes)  # type: ignore[arg-type]

    def inputs(self) -> tuple[Tensor, Tensor, Tensor]:
        """query, key and value; NaN lies under the padding, because nothing there may count."""
        generator = torch.Generator().manual_seed(self.seed)
        heads = self.kv_heads * self.group
        query = self._grid(generator, heads, self.queries, self.dim)
        key = self._grid(generator, self.kv_heads, self.length, self.dim)
        value = self._grid(generator, self.kv_heads, self.length, self.value_dim)
        mask = self.key_mask()
        if mask is not None and self.layout != "expanded":
            key.masked_fill_(~mask[:, None, :, None], torch.nan)
            value.masked_fill_(~mask[:, None, :, None], torch.nan)
        return query, key, value

    def key_mask(self) -> Tensor | None:
        """bool [batch, length], True for real tokens; rows are padded by different amounts."""
        if self.padding == "none":
            return None
        index = torch.arange(self.length)
        shift = (torch.arange(self.batch)[:, None] * 5 + 3) % max(1, self.length)
        if self.padding == "left":
            return index >= shift
        if self.padding == "right":
            return index < self.length - shift
        mask = torch.rand(
            self.batch, self.length, generator=torch.Generator().manual_seed(self.seed)
        ).gt(0.3)
        if self.padding == "one row empty":
            mask[0] = False
        return mask

    def policy(self) -> tuple[int, int, int, float | None, Tensor | None]:
        """The arguments after the tensors, in a kernel's order."""
        return self.block, self.topk, self.sinks, self.scale, self.key_mask()

    def named(self) -> dict[str, object]:
        """The named arguments of the reference and of the public function."""
        return {"sinks": self.sinks, "scale": self.scale, "key_mask": self.key_mask()}

    def _grid(self, generator: torch.Generator, heads: int, length: int, dim: int) -> Tensor:
        shape = (self.batch, heads, length, dim)
        if self.layout == "by token":
            shape = (self.batch, length, heads, dim)
        elif self.layout == "expanded":
            shape = (1, 1, length, dim)
        elif self.layout == "strided":
            shape = (self.batch, heads, length, 2 * dim)
        drawn = torch.randint(-8, 9, shape, generator=generator).to(self.dtype) / 8
        if self.layout == "by token":
            return drawn.transpose(1, 2)
        if self.layout == "expanded":
            return drawn.expand(self.batch, heads, length, dim)
        return drawn[..., ::2] if self.layout == "strided" else drawn


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Sizes around every edge: N below, at and beyond a block, topk beyond the block count."""
    topk = draw(st.integers(1, 5))
    length = draw(st.sampled_from([1, 2, 7, 16, 31, 33, 64, 90]))
    return Case(
        batch=draw(st.sampled_from([1, 2, 3])),
        kv_heads=draw(st.sampled_from([1, 2])),
        group=draw(st.sampled_from([1, 2, 3, 4])),
        queries=min(length, draw(st.sampled_from([1, 2, 9, 100, 100, 100]))),
        length=length,
        dim=draw(st.sampled_from([4, 8, 16])),
        value_dim=draw(st.sampled_from([4, 8, 24])),
        block=draw(st.sampled_from([1, 2, 4, 8, 16, 64])),
        topk=topk,
        sinks=draw(st.integers(0, topk - 1)),
        scale=draw(st.sampled_from([None, 0.25])),
        padding=draw(st.sampled_from(PADDINGS)),
        layout=draw(st.sampled_from(LAYOUTS)),
        dtype=draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16])),
        seed=draw(st.integers(0, 1000)),
    )
