"""The hidden matrices of the models that optimizers are measured on: [m, n] -> how many."""

Shapes = dict[tuple[int, int], int]


def llama(layers: int, hidden: int, key_value: int, inner: int) -> Shapes:
    """Of a Llama: query and output, key and value, gate and up, down."""
    found: Shapes = {}
    for shape, count in (
        ((hidden, hidden), 2),
        ((key_value, hidden), 2),
        ((inner, hidden), 2),
        ((hidden, inner), 1),
    ):
        found[shape] = found.get(shape, 0) + count * layers
    return found


def gpt(layers: int, hidden: int) -> Shapes:
    """Of a GPT with one matrix for query, key and value, and a fourfold inner width."""
    shapes = (3 * hidden, hidden), (hidden, hidden), (4 * hidden, hidden), (hidden, 4 * hidden)
    return dict.fromkeys(shapes, layers)


RATIOS = (1, 2, 4, 8, 16)
TALL = 4
ENTRIES = 1 << 24  # of all matrices of a shape in the sweep: 64 MiB in float32


def sweep(least: int = 64, most: int = 2048) -> Shapes:
    """Short sides from `least` to `most` by factors of two, each at RATIOS, and tall at one.

    So the sides go up to 16 * `most`; that shapes whose long side is at most `most` are among them
    is all that a narrower reading of such a range asks. Four of each, fewer of the largest.
    """
    sides = [least]
    while 2 * sides[-1] <= most:
        sides.append(2 * sides[-1])
    shapes = [(m, r * m) for m in sides for r in RATIOS] + [(TALL * m, m) for m in sides]
    return {(m, n): max(1, min(4, ENTRIES // (m * n))) for m, n in shapes}


MODELS: dict[str, Shapes] = {
    "smollm2": llama(30, 576, 192, 1536),
    "gpt-160m": gpt(12, 768),
    "llama-8b": llama(32, 4096, 1024, 14336),
    "sweep": sweep(),
    "tiny": gpt(2, 32),
}


def fewer(shapes: Shapes, count: int | None) -> Shapes:
    """At most `count` matrices of each shape."""
    return {s: n if count is None else min(n, count) for s, n in shapes.items()}
