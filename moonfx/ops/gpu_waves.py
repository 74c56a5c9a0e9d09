"""How much sooner symmetric products finish on a GPU, by the arithmetic of waves: never measured.

    waves(P) = ceil(P / multiprocessors)        P tiles of SIDE x SIDE, each computed by one program
    time of a product of depth k = waves k      all tiles of a wave take as long as one

A multiprocessor's matrix units are one tile's at a time: where two tiles share it, each takes twice
as long, so that how many are resident says nothing here. The kernel computes the tiles of a
triangle. cuBLAS computes all of them, in tiles of SIDE x SIDE or of SIDE x 2 SIDE, whichever leaves
less of its last wave idle. So one 2048 x 2048 product gains nothing on 132 multiprocessors: 136
tiles of its triangle are two waves, and so are all 256.
"""

SIDE = 128  # of the kernel's tile for 16-bit numbers, on every chip


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def of_cublas(batch: int, m: int, n: int, depth: int, multiprocessors: int) -> int:
    rows = batch * ceil_div(m, SIDE)
    return depth * min(
        width * ceil_div(rows * ceil_div(n, width * SIDE), multiprocessors) for width in (1, 2)
    )


def triangle(batch: int, m: int) -> int:
    """The kernel's programs."""
    tiles = ceil_div(m, SIDE)
    return batch * (tiles * (tiles + 1) // 2)


def of_kernel(batch: int, m: int, depth: int, multiprocessors: int) -> int:
    return depth * ceil_div(triangle(batch, m), multiprocessors)


def gain(batch: int, m: int, n: int, runs: tuple[int, ...], multiprocessors: int) -> float:
    """How many times longer the products as written take than `runs` of steps; [batch, m, n]."""
    short = batch, m
    visit = of_cublas(*short, n, m, multiprocessors)
    square = of_cublas(*short, m, m, multiprocessors)
    written = sum(runs) * (of_cublas(*short, m, n, multiprocessors) + square + visit)
    half = of_kernel(*short, m, multiprocessors)
    ours = sum(of_kernel(*short, n, multiprocessors) + (4 * run - 3) * half + visit for run in runs)
    return written / ours
