"""Looks at this machine: what each feature needs, whether it is there, and what brings it."""

import importlib
import importlib.metadata
import importlib.util
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from moonfx import environment
from moonfx.kernels.common.arguments import MobaArguments
from moonfx.kernels.cpu import library as cpu_build
from moonfx.kernels.gpu import configs as gpu_configs

PYTHON_FROM = (3, 11)
TORCH_FROM, TORCH_BELOW = (2, 11), (2, 16)
NEEDS_OPENMP = "CPU kernel on more than one core"
NEEDS_TRITON = "fast attention on a GPU (else plain torch)"

OK = "ok"
MISSING = "missing"  # can be installed: `fix` says how
UNSUPPORTED = "unsupported"  # there, in a version that is not supported
BROKEN = "broken"  # there, and does not work
ABSENT = "absent"  # hardware: nothing to install


@dataclass(frozen=True)
class Check:
    """One thing that was looked for.

    Args:
        component: what was looked for.
        found: version or name; "-" if nothing was found, else the reason why it does not work.
        needed_by: the features that need it.
        status: "ok", "missing", "unsupported", "broken" or "absent" (hardware).
        fix: the command that mends it, "" where nothing is to be mended.
        core: True if nothing works without it.
    """

    component: str
    found: str
    needed_by: str
    status: str
    fix: str = ""
    core: bool = False

    def to_dict(self) -> dict[str, str | bool]:
        return asdict(self)


def diagnose() -> Iterator[Check]:
    """Looks for everything that a feature needs. The first call here compiles the CPU kernel."""
    yield check_python()
    yield check_torch(torch.__version__)
    yield from check_compiler()
    yield check_operator()
    yield check_backend_name()
    yield from check_vector_units(cpu_flags())
    yield check_gpu()
    yield check_package("triton", f"{NEEDS_TRITON}, torch.compile there")
    yield check_triton_kernels()
    yield check_package("transformers", "Hugging Face models, `moonfx explain <model type>`")
    yield check_package("gguf", "reading the demo's weights")
    yield check_package("onnx", "moonfx.export_onnx")
    yield check_package("onnxscript", "moonfx.export_onnx")
    yield check_package("onnxruntime", "moonfx.export_onnx")
    yield check_package("torchao", "quantised models, 8-bit momentum")
    yield check_package("matplotlib", "moonfx bench attention --plot")


def core_works(checks: Iterable[Check]) -> bool:
    """True if every core component is ok."""
    return all(check.status == OK for check in checks if check.core)


def check_python() -> Check:
    status = OK if sys.version_info >= PYTHON_FROM else UNSUPPORTED
    fix = "" if status == OK else "make PYTHON=python3.11 setup"
    return Check("Python", platform.python_version(), "everything", status, fix, core=True)


def check_torch(version: str) -> Check:
    release = tuple(int(part) for part in version.split("+")[0].split(".")[:2])
    status = OK if TORCH_FROM <= release < TORCH_BELOW else UNSUPPORTED
    wanted = f"torch>={dotted(TORCH_FROM)},<{dotted(TORCH_BELOW)}"
    fix = "" if status == OK else f"pip install '{wanted}'"
    return Check("torch", version, "everything", status, fix, core=True)


def check_operator() -> Check:
    """Runs the operator once, sparse, against the reference."""
    component, needed_by = "moonfx::moba_attention", "everything"
    show = "python -c 'import moonfx; moonfx.moba_attention'"
    try:
        error = error_on("cpu")
    except Exception as failure:  # noqa: BLE001 - whatever is wrong is the finding
        return Check(component, one_line(failure), needed_by, BROKEN, show, core=True)
    status = OK if error < 1e-4 else BROKEN
    found = f"differs from the reference by {error:.0e}"
    return Check(component, found, needed_by, status, "" if status == OK else show, core=True)


def error_on(device: str) -> float:
    """The operator's largest difference from the reference, in a sparse call."""
    moonfx = importlib.import_module("moonfx")
    reference = importlib.import_module("moonfx.kernels.reference.moba")
    query, key, value = torch.randn(
        3, 1, 2, 24, 16, generator=torch.Generator().manual_seed(0)
    ).unbind()
    inputs = (x.to(device) for x in (query, key, value))
    out = moonfx.moba_attention(*inputs, 4, 3, sinks=1)
    expected, _ = reference.moba_attention(query, key, value, MobaArguments(4, 3, sinks=1))
    return float((out.cpu() - expected).abs().max())


def check_backend_name() -> Check:
    component, needed_by = 'backend "moonfx"', 'torch.compile(model, backend="moonfx")'
    entries = importlib.metadata.entry_points(group="torch_dynamo_backends", name="moonfx")
    if entries:
        return Check(component, next(iter(entries)).value, needed_by, OK)
    # Names come from installed metadata, which a bare checkout does not have.
    root = Path(__file__).resolve().parents[2]
    return Check(component, "-", needed_by, MISSING, f"pip install -e {root}")


def check_compiler() -> list[Check]:
    """The compiler, by compiling and loading the CPU kernel, and its OpenMP."""
    component, needed_by = "C++ compiler", "CPU kernel (else plain torch), Inductor on the CPU"
    try:
        compiler = cpu_build.find_compiler()
    except cpu_build.BuildError:
        # A CXX that is no program hides every compiler that there may be.
        fix = "unset CXX" if environment.compiler() else "apt-get install -y g++"
        missing = Check(component, "-", needed_by, MISSING, fix)
        return [missing, Check("OpenMP", "-", NEEDS_OPENMP, MISSING, fix)]
    if (reason := cpu_build.available()) is not None:
        show = "python -c 'from moonfx.kernels.cpu import library; print(library.available())'"
        row = Check(component, reason.partition("\n")[0], needed_by, BROKEN, show)
    else:
        version = cpu_build.run([*compiler, "--version"]).stdout.partition("\n")[0]
        row = Check(component, version, needed_by, OK)
    return [row, check_openmp(compiler)]


def check_openmp(compiler: list[str]) -> Check:
    source = "#include <omp.h>\nint main() { return omp_get_max_threads() < 1; }\n"
    command = [*compiler, "-fopenmp", "-x", "c++", "-", "-o", "/dev/null"]
    run = subprocess.run(command, input=source, capture_output=True, text=True, check=False)
    if run.returncode == 0:
        found = f"links; torch uses {torch.get_num_threads()} threads"
        return Check("OpenMP", found, NEEDS_OPENMP, OK)
    # g++ brings its own; clang++ needs the package.
    return Check("OpenMP", "-", NEEDS_OPENMP, MISSING, "apt-get install -y libomp-dev")


def check_vector_units(flags: set[str]) -> list[Check]:
    units = [("AVX-512", "avx512f", "float32"), ("AVX512-BF16", "avx512_bf16", "bfloat16")]
    return [
        Check(
            component,
            flag if flag in flags else "-",
            f"fastest {dtype} CPU kernel",
            OK if flag in flags else ABSENT,
        )
        for component, flag, dtype in units
    ]


def check_gpu() -> Check:
    component, needed_by = "GPU", "running on a GPU"
    if torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability()
        found = f"{torch.cuda.get_device_name()}, capability {major}.{minor}"
        return Check(component, found, needed_by, OK)
    if shutil.which("nvidia-smi"):
        found = f"a driver, but torch {torch.__version__} cannot use it"
        return Check(component, found, needed_by, BROKEN, "pip install --force-reinstall torch")
    return Check(component, "-", needed_by, ABSENT)


def check_triton_kernels() -> Check:
    """Runs the operator on the GPU, which compiles its kernels, against the reference."""
    component = "Triton kernels"
    if not torch.cuda.is_available():
        return Check(component, "-", NEEDS_TRITON, ABSENT)
    show = "python -c 'from moonfx.kernels.gpu import moba; print(moba.available())'"
    kernels, reason = importlib.import_module("moonfx.ops.dispatch").find_triton_kernels()
    if kernels is None:
        if importlib.util.find_spec("triton") is None:
            return Check(component, "-", NEEDS_TRITON, MISSING, "pip install triton")
        return Check(component, str(reason), NEEDS_TRITON, BROKEN, show)
    try:
        error = error_on("cuda")
    except Exception as failure:  # noqa: BLE001 - whatever is wrong is the finding
        return Check(component, one_line(failure), NEEDS_TRITON, BROKEN, show)
    found = f"tiles of {gpu_configs.architecture()}, differ from the reference by {error:.0e}"
    status = OK if error < 1e-4 else BROKEN
    return Check(component, found, NEEDS_TRITON, status, "" if status == OK else show)


def check_package(name: str, needed_by: str) -> Check:
    """Finds an installed package by its metadata: importing them all would take many seconds."""
    if importlib.util.find_spec(name) is None:
        return Check(name, "-", needed_by, MISSING, f"pip install {name}")
    try:
        version = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        # Some builds of torch bring a package under another distribution's name.
        version = str(getattr(importlib.import_module(name), "__version__", "version unknown"))
    return Check(name, version, needed_by, OK)


def cpu_flags() -> set[str]:
    """The processor's feature flags as Linux lists them; empty elsewhere."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return set()
    return {
        flag for line in lines if line.startswith("flags") for flag in line.split(":")[1].split()
    }


def one_line(failure: BaseException) -> str:
    return f"{type(failure).__name__}: {str(failure).strip().partition(chr(10))[0]}"


def dotted(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))
