"""export_onnx: torch.export, the passes, torch.onnx, a check in onnxruntime, and only then a file.

model  --torch.export-->  program  --passes-->  program with moonfx::moba_attention
       --torch.onnx, onnx_table()-->  standard operators  --onnxruntime = PyTorch-->  path
"""

import contextlib
import importlib.util
import logging
import math
import os
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

import moonfx.ops  # noqa: F401  (registers the operator)
from moonfx.backend.rewriter import Backend
from moonfx.capture.compiled_calls import compile_call, plain_call
from moonfx.model_state import policies_of, traced_plain
from moonfx.onnx import check, files, operator, sizes
from moonfx.onnx.report import OnnxReport
from moonfx.policy import Policies
from moonfx.report.report import Report

PACKAGES = ("onnx", "onnxscript", "onnxruntime")
OPSET = 20
STANDARD = ("", "ai.onnx")


def onnx_table() -> dict[Callable[..., Any], Callable[..., Any]]:
    """What moonfx's operators are in ONNX, for those who call torch.onnx.export themselves.

        sparse = moonfx.sparsify(torch.export.export(model, args), block=64, topk=4)
        torch.onnx.export(sparse, dynamo=True, custom_translation_table=moonfx.onnx_table())

    The scores are dense in the file, [B, H, N, N] per layer: no standard operator skips a block.
    Inputs in float16 and bfloat16 are computed in float32, as the operator does.
    """
    return {torch.ops.moonfx.moba_attention.default: operator.moba_attention}


def export_onnx(
    model: torch.nn.Module | ExportedProgram,
    args: tuple[Any, ...] | None,
    path: str | os.PathLike[str],
    dynamic: bool | Mapping[str, Any] = True,
    *,
    kwargs: Mapping[str, Any] | None = None,
    opset: int = OPSET,
    tolerance: float = check.TOLERANCE,
) -> OnnxReport:
    """Writes a sparsified model as standard ONNX operators, checked against PyTorch first.

    The file holds the routing of the sparse model to the tie, but dense scores [B, H, N, N] per
    layer, because no standard operator skips a block: it is a way out, not a faster model. Before
    it is written, onnxruntime runs it on CPU beside PyTorch: as traced and, where sizes are
    dynamic, with batch 1 at a third of the length and at one token and batch 3 at twice the length
    and 8 more. A model that is used later keeps no trace of this.

    Args:
        model: a module under moonfx.sparsify, in eval mode and float32, or an ExportedProgram that
            moonfx.sparsify made.
        args: an example call, a tuple; an ExportedProgram may use its own (None).
        path: the file, "*.onnx". Weights over 1.8 GB lie beside it, in "*.onnx.<id>.data".
        dynamic: True lets batch and tokens of the inputs have any size, False fixes both. The
            first tensor [batch, tokens, ...] says how long each is. A dict is torch.export's
            dynamic_shapes. Nothing but True for an ExportedProgram, which has its own.
        kwargs: more of the example call, by name. use_cache=False where the model has a cache.
        opset: version of the standard operators, 18 at least.
        tolerance: largest absolute error. Float32 sums in another order give 1e-5 or less; more
            than 2e-3 is a wrong model, or a near-tie between blocks that fell the other way.
    Returns:
        What was written, and the error at each size; prints as a table.
    Raises:
        ImportError: if onnx, onnxscript or onnxruntime is missing.
        TypeError, ValueError: for a bad argument, a model that is not sparsified, one without an
            attention that can be sparse, or one that calls an operator that ONNX has not.
        OnnxMismatch: if the check fails. Nothing is written then, and an old file stays.
    """
    _require_packages()
    target = _checked_path(path)
    _check_numbers(opset, tolerance)
    sparse, call, attention, runs = _program(model, args, kwargs, dynamic)
    inputs = sizes.Inputs(sparse, call, from_one=runs is not None and dynamic is True)
    onnx_program = _translated(sparse, inputs, opset)
    with files.staging(target) as folder:
        staged = folder / target.name
        files.write(onnx_program.model, staged)
        _check_file(staged)
        checks = check.run_checks(
            staged, inputs, sparse.module(check_guards=False), runs, tolerance
        )
        written = files.publish(staged, target)
    graph = onnx_program.model.graph
    return OnnxReport(
        path=str(target),
        files=written,
        opset=onnx_program.model.opset_imports[""],
        inputs=_shapes(graph.inputs),
        outputs=_shapes(graph.outputs),
        checks=checks,
        tolerance=tolerance,
        operators=_operators(onnx_program.model),
        attention=attention,
    )


# --- before any work ------------------------------------------------------------------------------


def _require_packages() -> None:
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(
            f"export_onnx needs {' and '.join(missing)}: pip install 'moonfx[onnx]', "
            f"or pip install {' '.join(PACKAGES)}"
        )


def _checked_path(path: str | os.PathLike[str]) -> Path:
    target = Path(path)
    if target.suffix != ".onnx":
        raise ValueError(f"path must end in .onnx, got {str(path)!r}")
    if not target.parent.is_dir():
        raise ValueError(f"path must lie in a folder that exists, got {str(path)!r}")
    if target.is_dir():
        raise ValueError(f"path must be a file, and {str(path)!r} is a folder")
    return target


def _check_numbers(opset: int, tolerance: float) -> None:
    if not isinstance(opset, int) or isinstance(opset, bool):
        raise TypeError(f"opset must be an int, got {opset!r}")
    if opset < 18:
        raise ValueError(f"opset must be 18 or more, got {opset}")
    if not isinstance(tolerance, int | float) or isinstance(tolerance, bool):
        raise TypeError(f"tolerance must be a number, got {tolerance!r}")
    if not (math.isfinite(tolerance) and tolerance > 0):
        raise ValueError(f"tolerance must be finite and more than 0, got {tolerance}")


def _checked_call(
    model: torch.nn.Module, args: tuple[Any, ...] | None, kwargs: Mapping[str, Any] | None
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The example call, in the order of the model's own arguments."""
    if args is None and not kwargs:
        raise ValueError("args must be an example call, a tuple of the model's arguments")
    if args is not None and not isinstance(args, tuple):
        raise TypeError(f"args must be a tuple, got {type(args).__name__}: write (input,)")
    args, kwargs = args or (), dict(kwargs or {})
    if model.training:
        raise ValueError("model must be in eval mode: call model.eval()")
    known = sizes.parameters(model)
    if "use_cache" in known and "use_cache" not in sizes.by_name(model, args, kwargs):
        kwargs["use_cache"] = False
    sizes.by_name(model, args, kwargs)
    kwargs = {name: kwargs[name] for name in sorted(kwargs, key=_order(known))}
    _check_dtypes([*model.parameters(), *pytree.tree_leaves((args, kwargs))])
    sizes.token_input((args, kwargs))
    return args, kwargs


def _order(known: list[str]) -> Callable[[str], int]:
    return lambda name: known.index(name) if name in known else len(known)


def _check_dtypes(leaves: list[Any]) -> None:
    for leaf in leaves:
        if isinstance(leaf, Tensor) and leaf.is_floating_point() and leaf.dtype != torch.float32:
            name = str(leaf.dtype).removeprefix("torch.")
            raise ValueError(f"model and args must be float32, got {name}: call model.float()")


# --- PyTorch's side -------------------------------------------------------------------------------

Call = tuple[tuple[Any, ...], dict[str, Any]]


def _program(
    model: torch.nn.Module | ExportedProgram,
    args: tuple[Any, ...] | None,
    kwargs: Mapping[str, Any] | None,
    dynamic: bool | Mapping[str, Any],
) -> tuple[ExportedProgram, Call, Report | None, Callable[..., Any] | None]:
    """The sparse program, the call that it was exported with, what became of each attention, and
    the sparse model itself to compare with, where there is one."""
    if not isinstance(dynamic, bool | Mapping):
        raise TypeError(f"dynamic must be a bool or a dict of dynamic shapes, got {dynamic!r}")
    if isinstance(model, ExportedProgram):
        if dynamic is not True:
            raise ValueError(
                "dynamic must be True for an ExportedProgram, whose sizes were fixed when it was "
                f"exported; got {dynamic!r}"
            )
        return *_given_program(model, args, kwargs), None
    policies = policies_of(model, "export_onnx")
    call = _checked_call(model, args, kwargs)
    sparse, call, attention = _exported(model, policies, call, dynamic)
    runs = compile_call(plain_call(model), Backend(policies, "eager", model), dynamic=True)
    return sparse, call, attention, runs


def _given_program(
    program: ExportedProgram, args: tuple[Any, ...] | None, kwargs: Mapping[str, Any] | None
) -> tuple[ExportedProgram, Call, Report | None]:
    if not _is_sparse(program):
        raise ValueError(
            "model must be an ExportedProgram with an attention that moonfx.sparsify made sparse, "
            "and this one has none: call moonfx.sparsify(program, ...) first"
        )
    _check_dtypes(list(program.state_dict.values()))
    if args is not None:
        return program, (tuple(args), dict(kwargs or {})), None
    if program.example_inputs is None:
        raise ValueError("args must be an example call: this ExportedProgram holds none")
    return program, program.example_inputs, None


def _is_sparse(program: ExportedProgram) -> bool:
    ours = torch.ops.moonfx.moba_attention.default
    graphs = [
        m.graph for m in program.graph_module.modules() if isinstance(m, torch.fx.GraphModule)
    ]
    return any(node.target is ours for graph in graphs for node in graph.nodes)


def _exported(
    model: torch.nn.Module, policies: Policies, call: Call, dynamic: bool | Mapping[str, Any]
) -> tuple[ExportedProgram, Call, Report]:
    """The model as a program with sparse attention, and the call that it was exported with."""
    if dynamic is True:
        call = sizes.large_enough(call)
    with traced_plain(model), torch.no_grad():
        program = sizes.exported(model, call, dynamic)
    backend = Backend(policies, "eager", model)
    sparse = backend.rewrite_exported(program)
    if not backend.report.rewritten:
        raise ValueError(
            f"no attention of {type(model).__name__} is sparse in a torch.export of it, so there "
            f"is nothing to write that torch.onnx.export would not:\n{backend.report}"
        )
    return sparse, call, backend.report


# --- ONNX's side ----------------------------------------------------------------------------------


def _translated(program: ExportedProgram, inputs: sizes.Inputs, opset: int) -> Any:
    """An onnx program of standard operators alone, its dynamic axes named."""
    with _quiet():
        try:
            translated: Any = torch.onnx.export(
                program,
                dynamo=True,
                custom_translation_table=onnx_table(),
                opset_version=opset,
                output_names=_output_names(program),
                verbose=False,
            )
        except torch.onnx.OnnxExporterError as error:
            unknown = re.search(r"No ONNX function found for <OpOverload\(op='([^']+)'", str(error))
            if unknown is None:
                raise
            raise ValueError(
                f"the model calls {unknown[1]}, which torch.onnx cannot write as standard operators"
            ) from error
        if inputs.axes:
            translated.rename_axes({str(symbol): name for symbol, name in inputs.axes.items()})
    model = translated.model
    foreign = sorted(
        {f"{node.domain}::{node.op_type}" for node in _nodes(model) if node.domain not in STANDARD}
    )
    if foreign:
        raise ValueError(f"the model needs operators that are not standard: {', '.join(foreign)}")
    for domain in [d for d in model.opset_imports if d not in STANDARD]:
        del model.opset_imports[domain]
    return translated


def _output_names(program: ExportedProgram) -> list[str] | None:
    """The keys of a model's result, ["logits"] say, if it has one for each tensor."""
    count = len(program.graph_signature.user_outputs)
    result = pytree.tree_unflatten(list(range(count)), program.call_spec.out_spec)
    paths = [path for path, _ in pytree.tree_leaves_with_path(result)]
    keys = [getattr(path[0], "key", None) for path in paths if len(path) == 1]
    named = [key for key in keys if isinstance(key, str)]
    return named if named and len(named) == count else None


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporter's remarks on packages and on its own internals."""
    log = logging.getLogger("torch.onnx")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(level)


def _nodes(model: Any) -> list[Any]:
    return [
        *model.graph.all_nodes(),
        *(node for function in model.functions.values() for node in function.all_nodes()),
    ]


def _operators(model: Any) -> dict[str, int]:
    counts: dict[str, int] = {}
    for node in _nodes(model):
        counts[node.op_type] = counts.get(node.op_type, 0) + 1
    return counts


def _shapes(values: Any) -> dict[str, list[int | str]]:
    return {
        str(v.name): [d if isinstance(d, int) else str(d) for d in (v.shape or ())] for v in values
    }


def _check_file(staged: Path) -> None:
    import onnx

    onnx.checker.check_model(str(staged), full_check=True)
