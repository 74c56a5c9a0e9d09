"""moonfx works from a wheel, an editable install and a bare checkout, and shadows no one."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import venv
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from moonfx.cli import doctor

pytestmark = pytest.mark.xdist_group("packaging")  # one process makes the environments

CHECKOUT = Path(__file__).resolve().parents[1]
PACKAGES = {"moonfx": "moonfx", "passes": "moonfx/passes", "kernels": "moonfx/kernels"}
MODES = ["wheel", "editable", "bare checkout"]

# What a process sees of moonfx, as JSON.
PROBE = """
import importlib.util, json
import moonfx, moonfx.kernels.reference.moba, moonfx.passes.attention.sparsify_attention

def where(name):
    spec = importlib.util.find_spec(name)
    return None if spec is None else spec.origin or "namespace"

print(json.dumps({
    "moonfx": moonfx.__file__,
    "reference": moonfx.kernels.reference.moba.__file__,
    "pass": moonfx.passes.attention.sparsify_attention.__file__,
    "top level": {name: where(name) for name in ("passes", "kernels")},
}))
"""

# Enough of Hugging Face's `kernels` for transformers to import it and decorate its layers with it.
HUGGING_FACE_KERNELS = '''
"""Stands in for Hugging Face's package."""
import enum

class Record:
    def __init__(self, *args, **kwargs):
        pass

class Mode(enum.IntFlag):
    FALLBACK, TRAINING, INFERENCE, TORCH_COMPILE = 1, 2, 4, 8

def decorator(*args, **kwargs):
    return lambda decorated: decorated

def nothing(*args, **kwargs):
    pass

use_kernel_forward_from_hub = use_kernelized_func = decorator
register_kernel_mapping = replace_kernel_forward_from_hub = use_kernel_mapping = nothing
get_kernel = kernelize = nothing

def __getattr__(name):
    if name.startswith("__"):
        raise AttributeError(name)
    return Record
'''

LLAMA_BESIDE_KERNELS = """
import json, kernels, moonfx, moonfx.kernels.reference.moba
import transformers
from transformers.utils.import_utils import is_kernels_available

model = transformers.LlamaForCausalLM(transformers.LlamaConfig(
    hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=32,
))
print(json.dumps({
    "kernels": getattr(kernels, "__file__", None),
    "available": is_kernels_available(),
    "reference": moonfx.kernels.reference.moba.__file__,
    "layers": len(model.model.layers),
}))
"""


@dataclass(frozen=True)
class Installation:
    """A Python that has moonfx one way or another, and the folder that it must come from."""

    python: Path
    path: str
    home: Path

    def run(self, *words: str, cwd: Path) -> str:
        return run([str(self.python), *words], cwd=cwd, PYTHONPATH=self.path)


def run(command: list[str], *, cwd: Path, **environment: str) -> str:
    """Runs a command to its end and returns its output; what it said is the failure's message."""
    done = subprocess.run(
        command, cwd=cwd, env=os.environ | environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def copied(target: Path) -> Path:
    """The files that a build reads, elsewhere: a build writes beside its sources."""
    for name in PACKAGES:
        shutil.copytree(
            CHECKOUT / name, target / name, ignore=shutil.ignore_patterns("__pycache__", "*.so")
        )
    for name in ("pyproject.toml", "LICENSE", "README.md"):
        if (CHECKOUT / name).is_file():
            shutil.copy(CHECKOUT / name, target / name)
    return target


def fresh_python(folder: Path) -> Path:
    """A new environment that sees this one's packages, torch above all, but not its .pth files.

    An editable moonfx of the environment that runs the tests is therefore out of sight.
    """
    venv.create(folder, symlinks=True)
    (site_packages,) = folder.glob("lib/python*/site-packages")
    shared = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    (site_packages / "shared.pth").write_text("\n".join(sorted(shared)) + "\n")
    return folder / "bin" / "python"


def pip(python: Path | str, *words: str, cwd: Path) -> None:
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", str(python)]
    run([*pip, *words, "--quiet", "--no-deps", "--no-build-isolation", "--no-index"], cwd=cwd)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    pip(sys.executable, "wheel", str(copied(folder / "source")), "-w", str(folder), cwd=folder)
    (built,) = folder.glob("moonfx-*.whl")
    return built


@pytest.fixture(scope="module")
def installations(wheel, tmp_path_factory) -> dict[str, Installation]:
    folder = tmp_path_factory.mktemp("installed")
    source = copied(folder / "source")
    bare = copied(folder / "bare")
    pythons = {mode: fresh_python(folder / mode.split()[0] / "venv") for mode in MODES}
    pip(pythons["wheel"], "install", "--ignore-installed", str(wheel), cwd=folder)
    pip(pythons["editable"], "install", "--ignore-installed", "-e", str(source), cwd=folder)
    (site_packages,) = (folder / "wheel").glob("venv/lib/python*/site-packages")
    return {
        "wheel": Installation(pythons["wheel"], "", site_packages),
        "editable": Installation(pythons["editable"], "", source),
        "bare checkout": Installation(pythons["bare checkout"], str(bare), bare),
    }


@pytest.fixture(scope="module")
def hugging_face_kernels(tmp_path_factory) -> Path:
    """A folder with a stub of Hugging Face's `kernels`, in a version that transformers takes."""
    pytest.importorskip("transformers", reason="needs transformers")
    from transformers.utils.import_utils import KERNELS_MIN_VERSION

    folder = tmp_path_factory.mktemp("stub")
    (folder / "kernels").mkdir()
    (folder / "kernels" / "__init__.py").write_text(HUGGING_FACE_KERNELS)
    metadata = folder / f"kernels-{KERNELS_MIN_VERSION}.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: kernels\nVersion: {KERNELS_MIN_VERSION}\n"
    )
    return folder


@pytest.mark.parametrize("mode", MODES)
def test_moonfx_with_its_passes_and_kernels_imports_from(mode, installations, tmp_path):
    installed = installations[mode]
    seen = json.loads(installed.run("-c", PROBE, cwd=tmp_path))
    for name in ("moonfx", "reference", "pass"):
        assert Path(seen[name]).is_relative_to(installed.home), name
    # A bare checkout is on the path itself; what it shows is no package: a real one wins.
    shown = "namespace" if mode == "bare checkout" else None
    assert seen["top level"] == {"passes": shown, "kernels": shown}


@pytest.mark.parametrize("mode", ["wheel", "editable"])
def test_the_dynamo_backend_is_found_by_name_from(mode, installations, tmp_path):
    # No import of moonfx: Dynamo finds it through the entry point alone.
    words = "from torch._dynamo import lookup_backend as f; print(f('moonfx').__module__)"
    assert installations[mode].run("-c", words, cwd=tmp_path).split() == ["moonfx.backend.entry"]


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_the_doctor_finds_the_core_working_from(mode, installations, tmp_path):
    said = json.loads(installations[mode].run("-m", "moonfx", "doctor", "--json", cwd=tmp_path))
    assert said["ok"] is True
    # The C++ sources travel with the package: where there is a compiler, the kernel is usable.
    status = {check["component"]: check["status"] for check in said["checks"]}
    there = any(map(shutil.which, ("g++", "c++", "clang++")))
    assert status["C++ compiler"] == (doctor.OK if there else doctor.MISSING)


def test_the_command_is_installed_with_the_wheel(installations, tmp_path):
    command = installations["wheel"].python.with_name("moonfx")
    assert "explain" in run([str(command), "--help"], cwd=tmp_path)


def test_the_wheel_holds_every_source_file_and_nothing_at_top_level(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    sources = {
        f"{inside}/{file.relative_to(CHECKOUT / folder)}"
        for folder, inside in PACKAGES.items()
        for pattern in ("*.py", "*.cpp", "*.h", "py.typed")
        for file in (CHECKOUT / folder).rglob(pattern)
    }
    held = {name for name in names if ".dist-info/" not in name}
    assert held == sources
    assert {"LICENSE"} <= {Path(name).name for name in names}


def test_the_wheels_only_top_level_name_is_moonfx(wheel):
    archive = zipfile.ZipFile(wheel)
    (listing,) = (name for name in archive.namelist() if name.endswith("top_level.txt"))
    assert archive.read(listing).decode().split() == ["moonfx"]


@pytest.mark.parametrize("mode", MODES)
def test_hugging_faces_kernels_is_what_import_kernels_gives_beside(
    mode, installations, hugging_face_kernels
):
    installed = installations[mode]
    # From the checkout's root, whose own kernels/ folder is first on the path.
    root = CHECKOUT if mode == "wheel" else installed.home
    path = os.pathsep.join(filter(None, [installed.path, str(hugging_face_kernels)]))
    beside = Installation(installed.python, path, installed.home)
    seen = json.loads(beside.run("-c", LLAMA_BESIDE_KERNELS, cwd=root))
    assert seen["kernels"] == str(hugging_face_kernels / "kernels" / "__init__.py")
    assert seen["available"] is True
    assert seen["layers"] == 1
    assert Path(seen["reference"]).parts[-2:] == ("reference", "moba.py")


def test_transformers_takes_the_checkouts_kernels_folder_for_no_package(installations):
    pytest.importorskip("transformers", reason="needs transformers")
    bare = installations["bare checkout"]
    seen = json.loads(bare.run("-c", LLAMA_BESIDE_KERNELS, cwd=bare.home))
    assert (seen["kernels"], seen["available"], seen["layers"]) == (None, False, 1)


@pytest.mark.parametrize("folder", ["passes", "kernels"])
def test_no_top_level_folder_is_a_package(folder):
    assert not (CHECKOUT / folder / "__init__.py").exists()


def project() -> dict[str, Any]:
    return tomllib.loads((CHECKOUT / "pyproject.toml").read_text())


def installed_name(path: Path) -> str:
    """passes/graph once installed: moonfx.passes.graph."""
    folder, *rest = path.relative_to(CHECKOUT).with_suffix("").parts
    return ".".join([*PACKAGES[folder].split("/"), *rest])


def test_every_folder_with_sources_is_listed_as_a_package():
    files = [path for folder in PACKAGES for path in (CHECKOUT / folder).rglob("*.py")]
    folders = {path.parent for path in files} | {CHECKOUT / folder for folder in PACKAGES}
    assert sorted(project()["tool"]["setuptools"]["packages"]) == sorted(
        map(installed_name, folders)
    )


def test_every_module_that_mypy_is_told_of_is_there():
    files = [path for folder in PACKAGES for path in (CHECKOUT / folder).rglob("*.py")]
    overrides = project()["tool"]["mypy"]["overrides"]
    named = {name for each in overrides for name in each["module"] if name.startswith("moonfx.")}
    assert named - set(map(installed_name, files)) == set()


def test_the_doctor_asks_for_what_the_package_asks_for():
    asked = f"torch>={doctor.dotted(doctor.TORCH_FROM)},<{doctor.dotted(doctor.TORCH_BELOW)}"
    assert asked in project()["project"]["dependencies"]
    assert project()["project"]["requires-python"] == f">={doctor.dotted(doctor.PYTHON_FROM)}"


def test_every_requirement_of_the_makefile_is_pinned():
    for name in ("requirements.txt", "requirements-no-deps.txt"):
        lines = (CHECKOUT / name).read_text().splitlines()
        loose = [line for line in lines if line and not line.startswith("#") and "==" not in line]
        assert loose == []
