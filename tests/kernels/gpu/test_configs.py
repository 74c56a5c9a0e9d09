"""The table of tiles: complete, small, and the same for every length of a sequence."""

import math

import pytest
import torch

from moonfx.kernels.gpu import configs as gpu_configs

KERNELS = ("means", "route", "forward", "merge", "dkdv", "dq", "delta", "decode")
CHIPS = (*gpu_configs.ARCHITECTURES, gpu_configs.INTERPRETER)

# torch.cuda.get_device_capability, and the row's name: by shared memory and matrix instruction.
CAPABILITIES = [
    ((8, 0), "sm_80"),  # A100
    ((8, 6), "sm_86"),  # RTX 30, A10
    ((8, 7), "sm_80"),  # Orin: 163 KB
    ((8, 9), "sm_86"),  # RTX 40, L4, L40
    ((9, 0), "sm_90"),  # H100, H200
    ((10, 0), "sm_100"),  # B200
    ((10, 3), "sm_100"),  # B300
    ((12, 0), "sm_86"),  # RTX 50: 99 KB, no tensor memory
]


@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize("kernel", KERNELS)
def test_every_kernel_has_a_tile_of_powers_of_two_for_every_shape_class(kernel, chip):
    shapes = list(gpu_configs.every(kernel, chip))
    assert len(shapes) == 4 * 2 * 5 * 2  # head dims, widths, blocks, extras or none
    for shape, config in shapes:
        assert all(math.log2(size).is_integer() for size in config[:3]), (shape, config)
        assert config.stages >= 1


@pytest.mark.parametrize("kernel", ["forward", "dkdv", "dq", "decode"])
def test_a_tile_spans_no_more_keys_than_a_block_and_no_fewer_than_a_product_takes(kernel):
    for chip in CHIPS:
        for shape, config in gpu_configs.every(kernel, chip):
            assert 16 <= config.block_n <= max(16, shape.block), (chip, shape, config)


@pytest.mark.parametrize(("capability", "chip"), CAPABILITIES)
def test_a_capability_has_the_tiles_of_the_chip_with_its_memory(capability, chip, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert gpu_configs.architecture.__wrapped__(torch.device("cuda")) == chip


def test_tensors_that_are_not_on_a_gpu_have_the_interpreters_tiles():
    cpu = gpu_configs.choose("forward", 128, torch.bfloat16, 128, torch.device("cpu"))
    (interpreted,) = {
        config
        for shape, config in gpu_configs.every("forward", gpu_configs.INTERPRETER)
        if shape == (128, torch.bfloat16, 256, False)
    }
    assert cpu == interpreted


def test_sizes_between_two_rows_of_the_table_share_a_variant():
    wide, narrow = (
        gpu_configs.choose("forward", dim, torch.float16, block)
        for dim, block in ((128, 256), (65, 65))
    )
    assert wide == narrow


def test_an_unknown_kernel_is_named():
    with pytest.raises(KeyError, match="no row for nothing, 2 bytes, small block, sm_90"):
        list(gpu_configs.every("nothing", "sm_90"))


@pytest.mark.parametrize("autotune", ["", "1"])
def test_launch_hands_the_kernel_its_arguments_warps_and_stages(autotune, monkeypatch):
    """MOONFX_AUTOTUNE changes nothing where there is no chip to measure."""
    monkeypatch.setenv("MOONFX_AUTOTUNE", autotune)
    calls = []

    class Kernel:
        def __getitem__(self, grid):
            return lambda *a, **k: calls.append((grid, a, k))

    config = gpu_configs.Config(64, 32, 8, 3)
    gpu_configs.launch(Kernel(), (7,), config, "q", 5, tune=("BLOCK_N",), BLOCK_N=32)
    assert calls == [((7,), ("q", 5), dict(BLOCK_N=32, num_warps=8, num_stages=3))]


def test_autotune_tries_warps_stages_and_halves_and_doubles_of_the_tile():
    triton = pytest.importorskip("triton")

    @triton.jit
    def kernel(x, BLOCK_N):
        pass

    config = gpu_configs.Config(64, 16, 4, 2)
    tuner = gpu_configs._tuner(kernel, config, (), (("BLOCK_N", 16),))
    tries = {(c.num_warps, c.num_stages, c.kwargs["BLOCK_N"]) for c in tuner.configs}
    assert tries == {(w, s, n) for w in (4, 8) for s in (1, 2, 3) for n in (16, 32)}
    assert tuner.keys == []  # the tensors' dtypes alone, which Triton adds
