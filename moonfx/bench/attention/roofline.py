"""Predicts the time of each stage of a case: routing, forward, merge, backward.

    time = sum over stages of max(FLOPs / product rate + exponentials / rate, bytes / copy rate)

The products and the exponentials of a stage wait for each other; its bytes move beside them. FLOPs
and bytes are those of this library's kernels as they are built: whole tiles with their empty rows
(moonfx/bench/attention/counts.py), the partial results of each route written and read once, routing
repeated by the CPU's backward. Not counted: launches, comparisons of scores, the latency of
gathers, and what a kernel's inner loop falls short of a matrix product.
"""

from typing import NamedTuple

from moonfx.bench.attention import counts
from moonfx.bench.attention.cases import Case
from moonfx.bench.attention.ceilings import Ceilings
from moonfx.bench.harness.arguments import DTYPES
from moonfx.kernels.gpu import configs as gpu_configs

# Rows that a tile of the CPU kernel holds, and keys of one of its vectors.
CPU_TILE = (6, 16)


class Stage(NamedTuple):
    """Work of one stage; `dtype` names the rate of its products."""

    name: str
    dtype: str
    flops: float = 0
    exps: float = 0
    bytes: float = 0


def predict(case: Case, ceilings: Ceilings) -> dict[str, float]:
    """Seconds of each stage of moonfx's kernels, by name."""
    if case.queries * counts.group(case) <= 64:
        stages = decode(case)
    elif ceilings.device == "cpu":
        stages = on_cpu(case)
    else:
        stages = on_gpu(case)
    return {stage.name: seconds(stage, ceilings) for stage in stages}


def predict_dense(case: Case, ceilings: Ceilings) -> float:
    """Seconds of dense flash attention: its backward has five products, and no tile is wasted."""
    size, pairs = counts.sizes(case), case.dense_keys * case.batch * case.heads
    moved = 2 * (size.query + size.key) + size.lse
    forward = Stage("forward", case.dtype, 4 * case.dim * pairs, pairs, moved)
    if not case.backward:
        return seconds(forward, ceilings)
    backward = Stage("backward", case.dtype, 10 * case.dim * pairs, pairs, 2 * moved)
    return seconds(forward, ceilings) + seconds(backward, ceilings)


def seconds(stage: Stage, ceilings: Ceilings) -> float:
    computing = stage.flops / ceilings.flops[stage.dtype]
    if ceilings.exps:
        computing += stage.exps / ceilings.exps
    return max(computing, stage.bytes / ceilings.copy)


def gate(case: Case, products: int, dtype: str) -> Stage:
    """Means of the keys, and a product of every row with the blocks before it."""
    size = counts.sizes(case)
    flops = products * 2 * case.dim * counts.scored(case)
    moved = size.query + size.means + size.key * (not case.means) if flops else 0
    return Stage("routing", dtype, flops, 0, moved)


def decode(case: Case) -> list[Stage]:
    """Few rows: each block that any row of a kv head chose is read once, for all of them."""
    size, attended = counts.sizes(case), counts.compulsory_bytes(case)
    routing = gate(case, 1, "float32")
    pairs = case.sparse_keys * case.batch * case.heads
    flops = 4 * case.dim * pairs
    read = attended - size.means * case.means * (routing.flops > 0)
    return [routing, Stage("forward", case.dtype, flops, pairs, read)]


def on_cpu(case: Case) -> list[Stage]:
    """K and V are packed first; scores and sums stay in a core's caches."""
    size = counts.sizes(case)
    rows, keys = CPU_TILE
    pairs = counts.computed_pairs(case, rows, keys)
    routing = gate(case, 1, "float32")
    forward = Stage(
        "forward",
        case.dtype,
        4 * case.dim * pairs,
        pairs,
        2 * size.query + size.lse + 6 * size.key,
    )
    if not case.backward:
        return [routing, forward]
    float32 = 4 // DTYPES[case.dtype].itemsize
    backward = Stage(
        "backward",
        case.dtype,
        10 * case.dim * pairs,
        pairs,
        4 * size.query + size.lse + (9 + 2 * float32) * size.key,
    )
    return [
        routing._replace(flops=2 * routing.flops, bytes=2 * routing.bytes),
        forward,
        backward,
    ]


def on_gpu(case: Case) -> list[Stage]:
    """Tiles of a block's gathered rows; each route's partial result is written, then merged."""
    size, dtype = counts.sizes(case), DTYPES[case.dtype]
    width, routes = dtype.itemsize, counts.routes(case)
    vector = case.dim * width  # bytes of one row
    merged = case.length > case.block * case.topk and case.topk > 1
    # float32's three products are in its rate; the gate of the others is three of their own.
    routing = gate(case, 1 if width == 4 else 3, case.dtype)
    table = 4 * routes if merged else 0
    stages = [
        routing._replace(bytes=routing.bytes + table),
        Stage("index", case.dtype, bytes=3 * table),
        Stage(
            "forward",
            case.dtype,
            4 * case.dim * pairs_of("forward", case),
            pairs_of("forward", case),
            routes * (2 * vector + 4) + 2 * size.key,
        ),
    ]
    merge = Stage("merge", case.dtype, bytes=routes * (vector + 4) + size.query + size.lse)
    if merged:
        stages.append(merge)
    if not case.backward:
        return stages
    # The key tiles of a block run side by side and read its rows through the second-level cache.
    stages += [
        Stage("delta", case.dtype, bytes=2 * size.query + 2 * size.lse),
        Stage(
            "dK dV",
            case.dtype,
            8 * case.dim * pairs_of("dkdv", case),
            pairs_of("dkdv", case),
            routes * (2 * vector + 8) + 4 * size.key,
        ),
        Stage(
            "dQ",
            case.dtype,
            6 * case.dim * pairs_of("dq", case),
            pairs_of("dq", case),
            routes * (3 * vector + 8) + 2 * size.key,
        ),
    ]
    if merged:
        stages.append(merge._replace(name="merge dQ"))
    return stages


def pairs_of(kernel: str, case: Case) -> float:
    """Pairs that a GPU kernel's tiles compute, with the tiles of an H100."""
    dim, block = min(case.dim, gpu_configs.DIMS[-1]), min(case.block, 2 * gpu_configs.BLOCKS[-1])
    width = DTYPES[case.dtype].itemsize
    tile = next(
        tile
        for shape, tile in gpu_configs.every(kernel, "sm_90")  # ascending
        if shape.dim >= dim and shape.block >= block and shape.dtype.itemsize == width
    )
    return counts.computed_pairs(case, tile.block_m, tile.block_n)
