"""The house: which file may import which, what only capture may touch, and how large a part may be.

The layers between folders are contracts of import-linter (pyproject.toml, run by `make lint`); here
is what they do not see: cycles between files, names from torch, sizes.
"""

import ast
import functools
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ("moonfx", "passes", "kernels")
LINES, FUNCTION_LINES = 400, 60
Function = ast.FunctionDef | ast.AsyncFunctionDef

# Private by name alone: torch's guides to extensions name them, and optimizers are written in them.
PUBLIC = ("torch._check", "torch._foreach_", "torch.utils._pytree", "torch.utils._python_dispatch")

# function -> why it is longer, its docstring left out. Bodies of Triton kernels need no entry.
_LAUNCH = "checks a problem, chooses a configuration and hands each argument to one kernel"
LONG = {
    "moonfx.kernels.gpu.backward_dkdv.gradients_of_keys": _LAUNCH,
    "moonfx.kernels.gpu.decode.attend": _LAUNCH,
    "moonfx.kernels.gpu.route.route": _LAUNCH,
}


def sources(*folders: str) -> list[Path]:
    return [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]


@functools.cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def module_name(path: Path) -> str:
    """A file's name once installed: passes/context.py is moonfx.passes.context."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = parts if parts[0] == "moonfx" else ("moonfx", *parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported(tree: ast.AST) -> Iterator[str]:
    """Every module that a file imports, wherever in it, and each name that it takes from one."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def cycle(arrows: dict[str, set[str]]) -> list[str]:
    """One circle of arrows, [] if there is none."""
    try:
        TopologicalSorter(arrows).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def imports_between_files() -> dict[str, set[str]]:
    modules = {module_name(path): path for path in sources(*PACKAGE)}

    def resolved(name: str) -> str:
        """The file that an import reads; moonfx.passes is none in a bare checkout."""
        while name and name not in modules:
            name = name.rpartition(".")[0]
        return name

    arrows = {}
    for module, path in modules.items():
        names = (n for n in imported(tree_of(path)) if n.split(".")[0] == "moonfx")
        arrows[module] = {resolved(n) for n in names} - {module, ""}
    return arrows


def test_no_files_import_each_other_in_a_circle_be_it_lazily_or_for_types():
    assert " -> ".join(cycle(imports_between_files())) == ""


def test_a_circle_would_be_found():
    assert cycle({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) != []
    assert cycle({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []


def is_private(name: str) -> bool:
    """Whether a dotted name is of torch, and neither public nor said to be stable."""
    first, *rest = name.split(".")
    if first != "torch" or name.startswith(PUBLIC):
        return False
    hidden = any(part.startswith("_") and not part.endswith("__") for part in rest)
    return hidden or name.startswith("torch.fx.experimental")


def private_names(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and name of each of torch's private names that a file reads or imports."""
    inner = {id(n.value) for n in ast.walk(tree) if isinstance(n, ast.Attribute)}
    known = {  # what a file calls what it imported: fx is torch.fx
        alias.asname or alias.name: f"{n.module}.{alias.name}"
        for n in ast.walk(tree)
        if isinstance(n, ast.ImportFrom)
        for alias in n.names
    }
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = list(imported(node))
        elif isinstance(node, ast.Attribute) and id(node) not in inner:
            first, *rest = ast.unparse(node).split(".")
            names = [".".join([known.get(first, first), *rest])]
        for name in names:
            if is_private(name):
                yield node.lineno, name


def test_torchs_private_names_are_read_in_capture_alone():
    found = [
        f"{path.relative_to(ROOT)}:{line}: {name}"
        for path in sources(*PACKAGE)
        if not path.is_relative_to(ROOT / "moonfx" / "capture")
        for line, name in private_names(tree_of(path))
    ]
    assert found == []


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("import torch._dynamo", ["torch._dynamo"]),
        ("from torch import _dynamo", ["torch._dynamo"]),
        ("from torch._ops import OpOverload", ["torch._ops.OpOverload"]),
        ("torch._C._len_torch_dispatch_stack()", ["torch._C._len_torch_dispatch_stack"]),
        ("from torch.fx.experimental import proxy_tensor", ["torch.fx.experimental.proxy_tensor"]),
        ("def f():\n  import torch._guards", ["torch._guards"]),
        ("from torch import fx\nfx.experimental.x", ["torch.fx.experimental.x"]),
        ("torch.compile(f); torch.utils._pytree.tree_map(f, x); torch.__version__", []),
        ("torch._foreach_add_(x, 1); torch.ops.aten.mm.default; a.torch._C", []),
    ],
)
def test_a_private_name_would_be_found(text: str, found: list[str]):
    assert [name for _, name in private_names(ast.parse(text))] == found


def test_kernels_import_torch_triton_and_the_standard_library_only():
    allowed = {"torch", "triton", *sys.stdlib_module_names}
    found = [
        f"{path.relative_to(ROOT)}: {name}"
        for path in sources("kernels")
        for name in imported(tree_of(path))
        if name.split(".")[0] not in allowed and not name.startswith("moonfx.kernels.")
    ]
    assert found == []


def test_no_file_is_longer_than_a_reader_can_hold():
    paths = [
        path
        for pattern in ("*.py", "*.h", "*.cpp")
        for folder in (*PACKAGE, "tests", "examples", "docs")
        for path in (ROOT / folder).rglob(pattern)
    ]
    lengths = {str(p.relative_to(ROOT)): len(p.read_text().splitlines()) for p in paths}
    assert len(lengths) > 300
    assert {name: n for name, n in lengths.items() if n > LINES} == {}


def is_triton(function: Function) -> bool:
    return any("triton.jit" in ast.unparse(each) for each in function.decorator_list)


def lines_of(function: Function) -> int:
    """How many lines a function has beside its docstring, nested functions included."""
    docstring = function.body[0] if ast.get_docstring(function) else None
    spans = [1 + (n.end_lineno or n.lineno) - n.lineno for n in (function, docstring) if n]
    return spans[0] - sum(spans[1:])


def test_no_function_is_longer_than_a_screen_but_for_named_reasons():
    functions = {
        f"{module_name(path)}.{node.name}": lines_of(node)
        for path in sources(*PACKAGE)
        for node in ast.walk(tree_of(path))
        if isinstance(node, Function) and not is_triton(node)
    }
    long = {name: n for name, n in functions.items() if n > FUNCTION_LINES}
    assert {name: n for name, n in long.items() if name not in LONG} == {}
    assert sorted(LONG) == sorted(long), "a function that is no longer long needs no reason"


@pytest.mark.parametrize("folder", ["passes", "kernels"])
def test_few_files_lie_loose(folder: str):
    loose = [path.name for path in (ROOT / folder).iterdir() if path.is_file()]
    assert len(loose) <= 5, loose
