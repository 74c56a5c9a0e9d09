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


def sweep(least: int = 64, most: int = 2048) -> Shapes:
    """Short sides from `least` to `most` by factors of two, each at ratios 1 to 16 up to `most`."""
    sides = [least]
    while 2 * sides[-1] <= most:
        sides.append(2 * sides[-1])
    ratios = (1, 2, 4, 8, 16)
    return {(m, r * m): 4 for m in sides for r in ratios if r * m <= most}


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
