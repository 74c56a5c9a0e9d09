"""The order of scores as integers, and products that no setting makes less precise."""

import torch

from moonfx.kernels.common.exact import exact_float32, sortable


def test_scores_sort_as_integers_do() -> None:
    score = torch.tensor([-torch.inf, -3.5, -1e-40, -0.0, 0.0, 1e-40, 2.0, torch.inf])
    order = sortable(score)
    assert order[3] == order[4]
    distinct = order[[0, 1, 2, 3, 5, 6, 7]]
    assert distinct.diff().gt(0).all()
    assert torch.equal(order & 0xFFFFFFFF, torch.zeros_like(order))


def test_a_lower_matmul_precision_does_not_reach_the_gate() -> None:
    before = torch.backends.mkldnn.matmul.fp32_precision
    torch.set_float32_matmul_precision("medium")
    try:
        assert torch.backends.mkldnn.matmul.fp32_precision == "bf16"
        with exact_float32():
            assert torch.backends.mkldnn.matmul.fp32_precision == "ieee"
            assert torch.backends.cuda.matmul.fp32_precision == "ieee"
        assert torch.backends.mkldnn.matmul.fp32_precision == "bf16"
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")
        torch.backends.mkldnn.matmul.fp32_precision = before
