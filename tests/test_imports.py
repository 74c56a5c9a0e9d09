"""`import moonfx` takes little more than `import torch`, and still registers what must be there."""

import ast
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import moonfx

ROOT = Path(__file__).resolve().parents[1]

# What takes long to import, each longer than the rest of moonfx together.
HEAVY = (
    "onnx",
    "onnxscript",
    "sympy",
    "torch._dynamo",
    "torch._inductor.compile_fx",
    "torchao",
    "transformers",
    "triton",
)

IMPORTED = f"""
import json, sys, torch
torch_alone = [name for name in {HEAVY} if name in sys.modules]
import moonfx
print(json.dumps([name for name in {HEAVY} if name in sys.modules and name not in torch_alone]))
"""

FLOPS = """
import torch, moonfx
from torch.utils.flop_counter import FlopCounterMode
q = torch.empty(1, 2, 64, 16, device="meta")
with FlopCounterMode(display=False) as counter:
    torch.ops.moonfx.moba_attention(q, q, q, 16, 2)
print(counter.get_total_flops())
"""

NAMES = """
import moonfx, moonfx.report.newton_schulz, moonfx.sparsify, moonfx.optim.roles, moonfx.onnx
print([name for name in moonfx.__all__ if type(getattr(moonfx, name)).__name__ == "module"])
"""


def run(program: str, **environment: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done


def test_import_moonfx_imports_nothing_heavy_that_torch_does_not():
    assert json.loads(run(IMPORTED).stdout) == []


def test_the_operators_are_there_and_count_their_flops_once_moonfx_is_imported():
    # Two products of 2 heads over the keys attended: the first 32 queries all earlier ones, the
    # others the first block and what is before them in their own.
    keys = 32 * 33 // 2 + 2 * (16 * 17 // 2) + 32 * 16
    assert run(FLOPS).stdout.split() == [str(2 * keys * 2 * (16 + 16))]


def test_a_public_name_stays_a_function_when_the_module_of_that_name_is_imported():
    assert run(NAMES).stdout.split() == ["[]"]


def test_what_describes_a_weights_layout_needs_no_import_of_its_own():
    program = "import moonfx; print(moonfx.optim.matrices.Layout.__module__)"
    assert run(program).stdout.split() == ["moonfx.optim.matrices"]


@pytest.mark.parametrize("name", moonfx.__all__)
def test_each_public_name_can_be_read_and_is_listed(name):
    assert getattr(moonfx, name).__name__ == name
    assert name in dir(moonfx)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'moonfx' has no attribute 'sparsfy'"):
        moonfx.sparsfy  # noqa: B018


def test_names_imported_later_are_told_to_type_checkers_from_the_same_modules():
    tree = ast.parse(Path(moonfx.__file__).read_text())
    (typed,) = (n for n in tree.body if isinstance(n, ast.If) and "TYPE_CHECKING" in ast.dump(n))
    imports = [n for n in typed.body if isinstance(n, ast.ImportFrom)]
    assert {alias.name: n.module for n in imports for alias in n.names} == moonfx._LATER


def test_a_pickled_muon_needs_no_import_of_moonfx():
    linear = torch.nn.Linear(4, 4)
    adamw = torch.optim.AdamW(linear.parameters())
    pickled = pickle.dumps(moonfx.convert_optimizer(adamw, linear)).hex()
    program = f"import pickle; print(type(pickle.loads(bytes.fromhex('{pickled}'))))"
    assert run(program).stdout.strip() == "<class 'moonfx.optim.muon.Muon'>"
