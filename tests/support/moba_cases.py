"""Attention problems that tests draw, on a grid where every implementation must route alike.

Inputs are multiples of 1/8 in [-1, 1] and blocks powers of two: block means, and their products
with a query, are then exact in float32 in any order of summation. A tie is a tie everywhere and
no near-tie can flip, so that outputs differ by the rounding of softmax and sums alone. With a bias
that holds where a scale is a power of two, which the gate divides by.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from moonfx.kernels.common.arguments import MobaArguments
from moonfx.kernels.reference import moba as reference

PADDINGS = ("none", "left", "right", "holes", "one row empty")
PACKINGS = ("none", "runs", "interleaved", "one token each", "one row whole")
BIASES = ("none", "all", "by head", "by row", "by key", "alibi")
MEANS = ("none", "exact", "other")
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
    causal: bool = True
    softcap: float = 0.0
    bias: str = "none"
    packing: str = "none"
    means: str = "none"
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

    def segments(self) -> Tensor | None:
        """int64 [batch, length], different in every row; ids are neither ordered nor small."""
        if self.packing == "none":
            return None
        generator = torch.Generator().manual_seed(self.seed + 1)
        shape = self.batch, self.length
        if self.packing == "runs":
            ends = torch.rand(shape, generator=generator) < 3 / max(3, self.length)
            return 7 - 5 * ends.long().cumsum(-1)
        if self.packing == "interleaved":
            return torch.randint(-1, 2, shape, generator=generator) * 10**12
        if self.packing == "one token each":
            return torch.arange(self.length).flip(0).repeat(self.batch, 1)
        ids = torch.arange(self.length).expand(shape) // 11
        return ids * (torch.arange(self.batch)[:, None] > 0)

    def key_bias(self) -> Tensor | None:
        """float32 [batch or 1, heads or 1, length], multiples of 1/8; NaN under the padding."""
        if self.bias == "none":
            return None
        heads = self.kv_heads * self.group
        if self.bias == "alibi":
            slope = 0.5 ** torch.arange(heads).fmod(4)
            return (slope[:, None] * torch.arange(self.length)).unsqueeze(0)
        rows = self.batch if self.bias in ("all", "by row") else 1
        heads = heads if self.bias in ("all", "by head") else 1
        generator = torch.Generator().manual_seed(self.seed + 2)
        drawn = torch.randint(-16, 17, (rows, heads, self.length), generator=generator) / 8
        mask = self.key_mask()
        return drawn if mask is None or rows == 1 else drawn.masked_fill(~mask[:, None], torch.nan)

    def full_bias(self) -> Tensor | None:
        """`key_bias` as a leaf [batch, heads, length], whose gradient a kernel gives."""
        bias = self.key_bias()
        if bias is None:
            return None
        shape = self.batch, self.kv_heads * self.group, self.length
        return bias.expand(shape).clone().requires_grad_()

    def block_means(self) -> Tensor | None:
        """float32 [batch, kv_heads, m, dim]: the keys' or others; NaN where none is read."""
        if self.means == "none":
            return None
        blocks = max(0, self.length - 1) // self.block  # the last one is no candidate
        real = self.key_mask()
        if real is None:
            real = torch.ones(self.batch, self.length, dtype=torch.bool)
        if self.means == "exact":
            key = self.inputs()[1]
            made = reference.block_means(key, self.block, real, real.long().cumsum(-1) - 1)
            made = made[:, :, :blocks].float()
        else:
            generator = torch.Generator().manual_seed(self.seed + 3)
            shape = self.batch, self.kv_heads, blocks + 2, self.dim
            made = torch.randint(-8, 9, shape, generator=generator) / 8
        last = (real.sum(-1)[:, None] - 1).clamp(min=0) // self.block
        beyond = torch.arange(made.shape[2]) >= last
        return made.masked_fill(beyond[:, None, :, None], torch.nan)

    def arguments(self, device: str = "cpu") -> MobaArguments:
        """The arguments after the tensors; a field or method of this class has each one's name."""
        given = {name: getattr(self, name) for name in MobaArguments._fields}
        made = {name: x() if callable(x) else x for name, x in given.items()}
        tensors = {name: x.to(device) for name, x in made.items() if isinstance(x, Tensor)}
        return MobaArguments(**made | tensors)

    def named(self) -> dict[str, Any]:
        """The named arguments of the reference and of the public function."""
        named = self.arguments()._asdict()
        del named["block"], named["topk"]
        if named["block_means"] is None:
            del named["block_means"]
        return named

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


@st.composite
def feature_cases(draw: st.DrawFn) -> Case:
    """`cases` with everything beyond plain causal attention drawn as well."""
    case = draw(cases())
    bias = draw(st.sampled_from(BIASES))
    causal = draw(st.booleans())
    packing = draw(st.sampled_from(PACKINGS))
    means = draw(st.sampled_from(MEANS)) if causal and packing == "none" else "none"
    return case.but(
        queries=case.queries if causal else case.length,
        causal=causal,
        softcap=draw(st.sampled_from([0.0, 0.0, 0.5, 2.0])),
        bias=bias,
        scale=case.scale if bias == "none" else draw(st.sampled_from([0.25, 1.0])),
        packing=packing,
        means=means,
    )


FEATURES = [
    ("bidirectional", Case(causal=False, topk=3)),
    ("bidirectional, sinks", Case(causal=False, topk=3, sinks=2, length=45, queries=45)),
    ("bidirectional, only the own block", Case(causal=False, topk=1)),
    ("bidirectional, dense", Case(causal=False, topk=9)),
    *((f"bidirectional, padding: {p}", Case(causal=False, topk=3, sinks=1, padding=p))
      for p in ("left", "right", "holes", "one row empty")),
    ("softcap", Case(softcap=0.5)),
    ("softcap, own scale, sinks", Case(softcap=2.0, scale=1.5, topk=3, sinks=1)),
    *((f"bias: {b}", Case(bias=b, scale=0.25, topk=3)) for b in BIASES[1:]),
    *((f"bias, padding: {p}", Case(bias="all", scale=0.25, topk=3, padding=p))
      for p in ("left", "right", "holes", "one row empty")),
    ("bias, fewer queries", Case(bias="all", scale=0.5, topk=3, queries=9)),
    ("bias, one query", Case(bias="by head", scale=0.5, topk=3, queries=1)),
    *((f"packing: {p}", Case(packing=p, topk=3, sinks=1, length=90, queries=90))
      for p in PACKINGS[1:]),
    *((f"packing and padding: {p}", Case(packing="runs", padding=p, length=90, queries=90))
      for p in ("left", "right", "holes", "one row empty")),
    ("packing, fewer queries", Case(packing="runs", length=90, queries=20)),
    ("packing, one query", Case(packing="interleaved", length=90, queries=1)),
    ("packing, blocks of one key", Case(packing="interleaved", length=50, queries=50, block=1)),
    ("packing, dense", Case(packing="interleaved", topk=6)),
    *((f"packing, bidirectional: {p}",
       Case(packing=p, causal=False, topk=3, length=90, queries=90, padding="holes"))
      for p in PACKINGS[1:]),
    ("everything", Case(causal=False, softcap=2.0, bias="all", scale=0.25, packing="runs",
                        padding="holes", topk=3, sinks=1, length=130, queries=130)),
    ("everything, causal, value wider, by token",
     Case(softcap=2.0, bias="by head", scale=0.25, packing="interleaved", padding="left", topk=3,
          length=130, queries=100, value_dim=24, layout="by token", group=3)),
]  # fmt: skip

GIVEN_MEANS = [
    ("means given, exact", Case(means="exact", topk=3)),
    *((f"means given, {p}", Case(means="other", topk=3, sinks=1, padding=p, length=60, queries=60))
      for p in PADDINGS),
    ("means given, bias", Case(means="other", topk=3, bias="all", scale=0.25)),
    ("means given, tail block full", Case(means="other", length=48, queries=9)),
    ("means given, one query", Case(means="exact", length=41, queries=1, padding="left")),
    ("means given, dense", Case(means="other", topk=5)),
    ("means given, one block", Case(means="other", length=8, queries=8, topk=1)),
]  # fmt: skip
