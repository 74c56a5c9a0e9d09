"""Results that lie by token, so that a model's transpose and reshape copy nothing."""

import pytest
import torch

from moonfx.kernels.common.token_layout import empty_by_token, zeros_by_token


@pytest.mark.parametrize("shape", [(2, 4, 7, 8), (1, 1, 1, 1), (2, 3, 0, 4)], ids=str)
def test_a_result_is_by_head_over_memory_by_token(shape: tuple[int, ...]) -> None:
    like = torch.zeros(shape, dtype=torch.bfloat16)
    for found in (empty_by_token(like, shape[3]), zeros_by_token(shape, torch.bfloat16)):
        assert (found.shape, found.dtype) == (shape, torch.bfloat16)
        by_token = found.transpose(1, 2)
        assert by_token.is_contiguous()
        joined = by_token.flatten(2)
        assert joined.numel() == 0 or joined.data_ptr() == found.data_ptr()


def test_the_width_may_be_another_and_the_device_is_kept() -> None:
    like = torch.zeros(2, 4, 7, 8, device="meta")
    found = empty_by_token(like, 5)
    assert (found.shape, found.device.type) == ((2, 4, 7, 5), "meta")


def test_zeros_are_zero() -> None:
    assert not zeros_by_token((2, 3, 5, 4), torch.float32).any()
