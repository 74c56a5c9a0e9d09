"""What symmetric products save on a GPU, by the arithmetic of waves."""

import pytest

from moonfx.ops.gpu_waves import SIDE, gain, of_cublas, of_kernel, triangle

H100 = 132  # multiprocessors


@pytest.mark.parametrize(
    ("batch", "m", "tiles"),
    [(1, 1, 1), (1, SIDE, 1), (1, SIDE + 1, 3), (3, 513, 45), (1, 2048, 136)],
)
def test_a_triangle_has_its_diagonal_and_what_is_below(batch: int, m: int, tiles: int) -> None:
    assert triangle(batch, m) == tiles


def test_a_wave_is_as_many_tiles_as_there_are_multiprocessors() -> None:
    assert of_kernel(1, 1024, 7, 36) == 7  # 36 tiles
    assert of_kernel(1, 1024, 7, 35) == 14
    assert of_cublas(1, 1024, 1024, 7, 64) == 7  # 64 tiles
    assert of_cublas(1, 1024, 1024, 7, 32) == 14  # 64 of one width, 32 of twice that


def test_cublas_takes_the_width_that_leaves_less_of_its_last_wave_idle() -> None:
    """Nine tiles are two waves of 8; five of twice the width are one, twice as long."""
    assert of_cublas(1, SIDE, 9 * SIDE, 1, 8) == 2
    assert of_cublas(1, SIDE, 9 * SIDE, 1, 4) == 3
    assert of_cublas(1, SIDE, 3 * SIDE, 1, 2) == 2


def test_one_matrix_of_2048_gains_nothing_in_its_square_and_many_do() -> None:
    assert of_kernel(1, 2048, 1, H100) == of_cublas(1, 2048, 2048, 1, H100) == 2
    assert gain(1, 2048, 2048, (1,) * 5, H100) == 1.0
    assert gain(16, 2048, 2048, (1,) * 5, H100) == pytest.approx(1.5, abs=0.1)  # at most 6 / 4


def test_runs_of_steps_gain_where_the_sides_differ() -> None:
    assert gain(1, 512, 8192, (5,), H100) > gain(1, 512, 8192, (1,) * 5, H100) >= 1.0
    assert gain(64, 1024, 1024, (5,), H100) < gain(64, 1024, 1024, (1,) * 5, H100)
