"""FLOP formulas reach torch's counter, whether it is imported before or after."""

import subprocess
import sys

import torch
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from moonfx.ops.flop_formulas import COUNTER, register_flop_formula

AFTER = f"""
import sys
import moonfx.ops
assert "{COUNTER}" not in sys.modules, "the counter is imported, and Triton with it"
import torch
from torch.utils.flop_counter import FlopCounterMode, flop_registry
assert torch.ops.moonfx.moba_attention in flop_registry
assert torch.ops.moonfx.newton_schulz in flop_registry
x = torch.zeros(1, 1, 8, 4)
with FlopCounterMode(display=False) as counted:
    moonfx.moba_attention(x, x, x, 8, 1)
assert counted.get_total_flops() == 36 * 2 * (4 + 4)
"""


def test_formulas_are_handed_over_when_the_counter_is_imported_and_not_before() -> None:
    run = subprocess.run([sys.executable, "-c", AFTER], capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr


@torch.library.custom_op("moonfx_test_flops::twice", mutates_args=())
def twice(x: torch.Tensor) -> torch.Tensor:
    return x + x


def test_a_formula_that_comes_later_is_known_at_once() -> None:
    operator = torch.ops.moonfx_test_flops.twice
    try:

        @register_flop_formula(operator)
        def formula(
            shape: torch.Size, *rest: object, out_val: object = None, **named: object
        ) -> int:
            return shape.numel()

        with FlopCounterMode(display=False) as counted:
            twice(torch.zeros(3, 5))
        assert counted.get_total_flops() == 15
        assert formula(torch.Size((2, 2))) == 4
    finally:
        flop_registry.pop(operator, None)


def test_a_formula_may_ask_for_the_tensors_themselves() -> None:
    operator = torch.ops.moonfx_test_flops.twice
    try:

        @register_flop_formula(operator, get_raw=True)
        def formula(x: torch.Tensor, *rest: object, out_val: object = None, **named: object) -> int:
            return x.stride(0)

        with FlopCounterMode(display=False) as counted:
            twice(torch.zeros(3, 5).t())
        assert counted.get_total_flops() == 1
    finally:
        flop_registry.pop(operator, None)
