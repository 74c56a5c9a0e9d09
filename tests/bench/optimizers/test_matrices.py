"""The matrices that optimizers are measured on."""

from moonfx.bench.optimizers.matrices import MODELS, fewer, sweep


def test_the_matrices_are_those_of_the_models() -> None:
    entries = {
        name: sum(m * n * k for (m, n), k in shapes.items()) for name, shapes in MODELS.items()
    }
    assert entries["smollm2"] == 134_515_008 - 49152 * 576 - 61 * 576  # less embedding and norms
    assert entries["llama-8b"] == 8_030_261_248 - 2 * 128256 * 4096 - 65 * 4096
    assert sum(MODELS["smollm2"].values()) == 210
    assert fewer(MODELS["smollm2"], 2) == dict.fromkeys(MODELS["smollm2"], 2)


def test_the_sweep_holds_every_reading_of_its_range() -> None:
    """Short sides and long sides of 64 to 2048, ratios to 16, and tall matrices."""
    found = sweep()
    sides = [64, 128, 256, 512, 1024, 2048]
    wide = {(m, r * m) for m in sides for r in (1, 2, 4, 8, 16)}
    assert set(found) == wide | {(4 * m, m) for m in sides}
    assert {k for m in sides for n in sides if n >= m for k in [(m, n)] if n <= 16 * m} <= wide
    assert found[64, 64] == found[2048, 2048] == 4
    assert found[2048, 32768] == 1
    assert max(m * n * k for (m, n), k in found.items()) * 4 <= 256 << 20
