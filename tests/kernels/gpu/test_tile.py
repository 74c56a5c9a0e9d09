"""What attention kernels share on the host: how a score is made, which tensors are read in bulk."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")
from moonfx.kernels.common.arguments import MobaArguments
from moonfx.kernels.gpu import configs as gpu_configs
from moonfx.kernels.gpu import tile as gpu_tile

BULK = [
    ("adjacent rows", lambda x: x, True),
    ("by token", lambda x: x.transpose(1, 2).contiguous().transpose(1, 2), True),
    ("a head seen by all", lambda x: x[:, :1].expand_as(x), False),
    ("rows of 20 bytes", lambda x: x[..., :5].contiguous(), False),
    ("every other element", lambda x: x[..., ::2], False),
    ("from an odd address", lambda x: x.flatten()[1:-7].unflatten(0, (3, 1, 1, 8)), False),
    ("one row, of any stride", lambda x: x[:1, :1, :1, :4], True),
]  # fmt: skip


@pytest.mark.parametrize(
    ("view", "expected"), [row[1:] for row in BULK], ids=[row[0] for row in BULK]
)
@pytest.mark.parametrize("chip", ["sm_80", "sm_90", "sm_100", "gfx942"])
def test_the_copy_engine_reads_aligned_tensors_of_chips_that_have_one(
    view: Callable[[Tensor], Tensor], expected: bool, chip: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_configs, "architecture", lambda device: chip)
    tensor = view(torch.zeros(1, 2, 2, 8))
    assert gpu_tile.bulk(tensor) == (expected and chip in ("sm_90", "sm_100"))


@pytest.mark.parametrize(
    ("setting", "expected"), [("tf32", "tf32"), ("ieee", "tf32x3"), ("none", "tf32x3")]
)
def test_float32_products_follow_either_of_torchs_settings(setting: str, expected: str) -> None:
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    try:
        matmul.fp32_precision = setting
        assert gpu_tile.precision(torch.float32) == expected
    finally:
        matmul.fp32_precision = before
    torch.set_float32_matmul_precision("high")  # conftest.py sets it back
    assert gpu_tile.precision(torch.float32) == "tf32"
    torch.set_float32_matmul_precision("highest")
    assert gpu_tile.precision(torch.float32) == "tf32x3"
    assert gpu_tile.precision(torch.bfloat16) == "ieee"


def call(**given: Any) -> gpu_tile.Scores:
    return gpu_tile.scores(torch.zeros(2, 4, 3, 16), 9, MobaArguments(8, 2, **given))


def test_a_factor_is_folded_where_the_largest_product_is_the_largest_score() -> None:
    plain = call()
    assert (plain.scale, plain.FOLD, plain.SOFTCAP, plain.BIAS) == (0.25, True, False, 0)
    assert not call(scale=-0.5).FOLD
    assert not call(scale=0.0).FOLD
    capped = call(softcap=30.0)
    assert (capped.softcap, capped.SOFTCAP, capped.FOLD) == (30.0, True, False)
    assert not call(key_bias=torch.zeros(1, 1, 9)).FOLD


def test_a_bias_of_all_heads_is_read_once_for_them() -> None:
    shared, by_head = call(key_bias=torch.zeros(2, 1, 9)), call(key_bias=torch.zeros(1, 4, 9))
    assert (shared.BIAS, shared.head, shared.row) == (1, 0, 9)
    assert (by_head.BIAS, by_head.head, by_head.row) == (2, 9, 0)
    half = call(key_bias=torch.zeros(1, 4, 9, dtype=torch.bfloat16))
    assert half.bias.dtype == torch.float32


def test_rows_that_are_not_adjacent_or_too_far_apart_are_copied() -> None:
    x = torch.zeros(2, 3, 4, 8)
    assert gpu_tile.inner_contiguous(x) is x
    assert gpu_tile.inner_contiguous(by_token := x.transpose(1, 2)) is by_token
    assert gpu_tile.inner_contiguous(x[..., ::2]).is_contiguous()
    far = torch.empty_strided((2, 8), (2**23, 1), device="meta")
    assert gpu_tile.inner_contiguous(far).stride() == (8, 1)
    near = torch.empty_strided((2, 8), (2**23 - 1, 1), device="meta")
    assert gpu_tile.inner_contiguous(near) is near


@pytest.mark.parametrize(("dim", "width"), [(1, 16), (16, 16), (17, 32), (96, 128), (512, 512)])
def test_a_head_dim_takes_a_power_of_two_and_sixteen_at_least(dim: int, width: int) -> None:
    assert gpu_tile.padded(dim) == width


def test_a_descriptor_has_tiles_of_rows_and_a_stride_for_each_dim() -> None:
    x = torch.zeros(1, 2, 40, 24)
    found = gpu_tile.descriptor(x, 16)
    assert (list(found.shape), list(found.block_shape)) == ([1, 2, 40, 24], [1, 1, 16, 32])
    assert list(found.strides) == [32, 40 * 24, 24, 1]  # of one row, a stride that is aligned


def test_what_is_absent_is_any_tensor_with_a_stride_of_nothing() -> None:
    x, other = torch.zeros(3, 5), torch.zeros(2)
    assert gpu_tile.by_row(x, other) == (x, 5)
    assert gpu_tile.by_row(None, other) == (other, 0)
