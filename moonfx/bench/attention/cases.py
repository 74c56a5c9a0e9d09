"""What `moonfx bench attention` measures: causal attentions, one by one or as named suites."""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from moonfx.ops.flops import attended_keys

PASSES = ("forward", "forward+backward")


@dataclass(frozen=True)
class Case:
    """One causal attention: the last `queries` of `length` tokens attend those before them.

    Shapes: q [batch, heads, queries, dim], k and v [batch, kv_heads, length, dim].

    Args:
        work: one of PASSES.
        means: whether the block means are given, as a cache gives them when it decodes.
    """

    batch: int
    heads: int
    kv_heads: int
    queries: int
    length: int
    dim: int
    dtype: str
    block: int
    topk: int
    sinks: int
    work: str
    means: bool = False

    @property
    def backward(self) -> bool:
        return self.work == PASSES[1]

    @property
    def dense_keys(self) -> int:
        """Keys that the queries of one head attend together, densely."""
        return attended_keys(self.queries, self.length, self.length, 1)

    @property
    def sparse_keys(self) -> int:
        return attended_keys(self.queries, self.length, self.block, self.topk)

    @property
    def flop_ideal(self) -> float:
        """The speedup that the skipped products alone would give."""
        return self.dense_keys / self.sparse_keys

    @property
    def flops(self) -> int:
        """Of the selected products: two forward and five backward, none for the gate."""
        products = 7 if self.backward else 2
        return products * 2 * self.dim * self.sparse_keys * self.batch * self.heads

    def __str__(self) -> str:
        return (
            f"batch {self.batch}, heads {self.heads}/{self.kv_heads}, queries {self.queries}, "
            f"N {self.length}, D {self.dim}, {self.dtype}, "
            f"{self.block}/{self.topk}/{self.sinks}, {self.work}"
        )


def cpu() -> Iterator[Case]:
    """Large and small blocks, head dims and dtypes of small models."""
    policies = ((512, 3, (16384, 32768)), (128, 8, (8192, 16384)))
    for (block, topk, lengths), dim, dtype in itertools.product(
        policies, (64, 128), ("float32", "bfloat16")
    ):
        for length, work in itertools.product(lengths, PASSES):
            yield Case(1, 8, 2, length, length, dim, dtype, block, topk, 1, work)


def flashmoba() -> Iterator[Case]:
    """The setting of FlashMoBA (arXiv 2511.11571, Figures 3 and 4)."""
    for power, work in itertools.product(range(13, 20), PASSES):
        yield Case(2, 16, 16, 1 << power, 1 << power, 128, "bfloat16", 128, 8, 0, work)


def paper() -> Iterator[Case]:
    """MoBA's own setting, of an 8-billion Llama (arXiv 2502.13189, Figure 2a)."""
    for power, work in itertools.product(range(15, 21), PASSES):
        yield Case(1, 32, 8, 1 << power, 1 << power, 128, "bfloat16", 4096, 12, 0, work)


def decode() -> Iterator[Case]:
    """One new token, or a few that are verified together, after 32,768; the means are cached."""
    for batch, queries in itertools.product((1, 8, 64, 256), (1, 2, 4, 8)):
        yield Case(batch, 32, 8, queries, 32768, 128, "bfloat16", 128, 16, 1, PASSES[0], means=True)


SUITES: dict[str, Callable[[], Iterator[Case]]] = {
    suite.__name__: suite for suite in (cpu, flashmoba, paper, decode)
}
