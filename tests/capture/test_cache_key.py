"""Editing a pass, an operator or a policy is never answered by a stale compiled artifact."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from moonfx.capture import cache_key
from moonfx.capture.cache_key import Stamp

pytestmark = pytest.mark.xdist_group("cache")  # one process compiles the first artifact

ROOT = Path(__file__).resolve().parents[2]

# Prints the result, a gradient, and whether the artifact came from the cache.
PROGRAM = """
import sys, torch, moonfx
from torch._dynamo.utils import counters
torch.manual_seed(0)
class M(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.line = torch.nn.Linear(16, 48)
    def forward(self, x):
        q, k, v = (t.unsqueeze(1) for t in self.line(x).chunk(3, -1))
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
model, x = M(), torch.randn(1, 64, 16)
moonfx.sparsify(model, 8, int(sys.argv[1]))
out = model(x)
out.square().sum().backward()
hits = counters["aot_autograd"]["autograd_cache_hit"]
print(f"{out.square().sum().item():.5f} {model.line.weight.grad.square().sum().item():.5f} {hits}")
"""

# file, text, replacement: what of (output, gradient) must change
EDITS = [
    (
        "moonfx/ops/moba.py",
        "found = dict(zip(TENSORS, grads, strict=True))",
        "found = {name: 2 * grad for name, grad in zip(TENSORS, grads, strict=True)}",
        (False, True),
    ),
    (
        "passes/attention/sparsify_attention.py",
        '"topk": policy.topk,',
        '"topk": policy.topk + 1,',
        (True, True),
    ),
    # A folder deeper than the package's own files; what it computes stays the same.
    ("passes/masks/prove.py", "\ndef prove(", "\n\ndef prove(", (False, False)),
]

# Prints how many sources there are, and those that may be edited without a change of the key.
KEYS = """
import pathlib
from moonfx.capture.cache_key import source_hash
key, missed, seen = source_hash.__wrapped__(), [], 0
for folder in ("moonfx", "passes", "kernels"):
    for path in pathlib.Path(folder).rglob("*.*"):
        if path.suffix in (".py", ".h", ".cpp"):
            text = path.read_bytes()
            path.write_bytes(text + b"\\n")
            missed += [str(path)] if source_hash.__wrapped__() == key else []
            path.write_bytes(text)
            seen += 1
assert source_hash.__wrapped__() == key
print(seen, *missed)
"""


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("checkout")
    for name in ("moonfx", "passes", "kernels"):
        ignore = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, target / name, ignore=ignore)
    (target / "program.py").write_text(PROGRAM)
    return target


def run(checkout: Path, topk: int) -> tuple[str, str, int]:
    environment = dict(os.environ, TORCHINDUCTOR_CACHE_DIR=str(checkout / "cache"))
    environment |= {"PYTHONPATH": str(checkout), "TORCHINDUCTOR_FX_GRAPH_CACHE": "1"}
    environment |= {"TORCHINDUCTOR_AUTOGRAD_CACHE": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    result = subprocess.run(
        [sys.executable, str(checkout / "program.py"), str(topk)],
        env=environment,
        cwd=checkout,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    output, gradient, hits = result.stdout.split()
    return output, gradient, int(hits)


def test_an_edit_of_any_source_changes_the_key(checkout: Path) -> None:
    seen, *missed = subprocess.check_output(
        [sys.executable, "-c", KEYS],
        env=os.environ | {"PYTHONPATH": str(checkout), "PYTHONDONTWRITEBYTECODE": "1"},
        cwd=checkout,
        text=True,
    ).split()
    suffixes = {".py", ".h", ".cpp"}
    folders = [checkout / name for name in ("moonfx", "passes", "kernels")]
    sources = [p for folder in folders for p in folder.rglob("*") if p.suffix in suffixes]
    assert (int(seen), missed) == (len(sources), [])
    for name in ("passes/masks/prove.py", "kernels/cpu/forward.h", "moonfx/ops/moba.py"):
        assert checkout / name in sources


def test_an_edit_or_a_new_policy_in_a_second_process_is_obeyed_and_else_the_cache_answers(
    checkout: Path,
) -> None:
    first = run(checkout, 2)
    assert run(checkout, 2) == (*first[:2], 1), "unchanged: the cached artifact is right"
    other = run(checkout, 3)
    assert other[0] != first[0]
    assert other[2] == 0
    for name, old, new, changes in EDITS:
        path = checkout / name
        text = path.read_text()
        assert text.count(old) == 1, f"{name} no longer holds {old!r}"
        path.write_text(text.replace(old, new))
        edited = run(checkout, 2)
        path.write_text(text)
        assert edited[2] == 0, f"{name}: answered by a stale artifact"
        assert tuple(a != b for a, b in zip(edited[:2], first[:2], strict=True)) == changes, name


def test_the_stamp_follows_the_sources_and_the_policy(monkeypatch: pytest.MonkeyPatch) -> None:
    first = Stamp("16/2/1").uuid()
    assert Stamp("16/2/1").uuid() == first
    assert Stamp("16/3/1").uuid() != first
    monkeypatch.setattr(cache_key, "source_hash", lambda: "edited")
    assert Stamp("16/2/1").uuid() != first
