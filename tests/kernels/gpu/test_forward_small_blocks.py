"""Attention of blocks that are one step of keys, against that of larger ones."""

import pytest
import torch

gpu = pytest.importorskip("moonfx.kernels.gpu.moba", reason="needs Triton")
from moonfx.kernels.gpu import configs, forward_small_blocks  # noqa: E402
from tests.support.moba_cases import Case  # noqa: E402


def test_a_block_of_one_step_of_sixteen_bit_keys_is_small_and_no_other() -> None:
    def chosen(dtype: torch.dtype, block: int) -> configs.Config | None:
        return forward_small_blocks.configuration(16, dtype, block, torch.device("cpu"), False)

    for dtype in (torch.bfloat16, torch.float16):
        small = chosen(dtype, 8)
        assert small is not None
        assert chosen(dtype, small.block_n) is not None
        assert chosen(dtype, 4096) is None
    assert chosen(torch.float32, 8) is None


# Few tokens: the interpreter takes a millisecond per operation of a program.
TINY = Case(batch=1, kv_heads=1, group=4, length=20, queries=17, dtype=torch.bfloat16)
CASES = [
    ("more keys than a block", TINY),
    ("bias, softcap, holes", TINY.but(bias="by head", softcap=0.5, scale=0.25, padding="holes")),
    ("packed", TINY.but(packing="interleaved", dtype=torch.float16)),
    ("bidirectional", TINY.but(queries=20, causal=False, dtype=torch.float16)),
]


@pytest.mark.parametrize("case", [case for _, case in CASES], ids=[name for name, _ in CASES])
def test_small_blocks_give_what_the_general_kernel_gives(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs, arguments = case.inputs(), case.arguments()
    launched: list[object] = []
    launch = configs.launch
    monkeypatch.setattr(
        configs,
        "launch",
        lambda kernel, *rest, **named: (launched.append(kernel), launch(kernel, *rest, **named)),
    )
    out, lse, _ = gpu.forward(*inputs, arguments)
    assert forward_small_blocks.small_blocks in launched
    launched.clear()
    monkeypatch.setattr(forward_small_blocks, "configuration", lambda *given: None)
    general, general_lse, _ = gpu.forward(*inputs, arguments)
    assert launched
    assert forward_small_blocks.small_blocks not in launched
    tolerance = 2**-6 if case.dtype == torch.bfloat16 else 2**-9  # merged from rounded results
    torch.testing.assert_close(out, general, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(lse, general_lse, atol=1e-5, rtol=1e-5)
