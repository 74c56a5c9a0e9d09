"""How a matrix lies in memory, as the C++ passes of a Muon step walk it (test_cpu_passes.py)."""

import pytest
import torch

from moonfx.kernels.cpu.muon import rows_of


@pytest.mark.parametrize(
    ("matrix", "expected"),
    [
        (torch.empty(3, 4), (1, 12, 0)),
        (torch.empty(3, 8)[:, :4], (3, 4, 8)),
        (torch.empty(6, 4)[::2], (3, 4, 8)),
        (torch.empty(4, 3).mT, None),
        (torch.empty(2, 3, 4)[:, :, :2], (6, 2, 4)),
        (torch.empty(2, 3, 4)[:, :2, :2], None),
        (torch.empty(5, 1), (1, 5, 0)),
        (torch.empty(5, 2)[:, :1], (5, 1, 2)),
        (torch.empty(1, 1), (1, 1, 0)),
    ],
)
def test_rows_of_a_matrix_are_found_where_one_step_leads_from_each_to_the_next(
    matrix, expected
) -> None:
    assert rows_of(matrix) == expected
    if expected is not None:
        rows, columns, step = expected
        flat = matrix.as_strided((rows, columns), (step, 1))
        assert flat.numel() == matrix.numel()
        assert flat.data_ptr() == matrix.data_ptr()
