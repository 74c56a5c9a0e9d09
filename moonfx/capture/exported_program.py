"""A torch.export.ExportedProgram as a captured graph for the passes, and as a program again."""

import contextlib
import copy
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.export.exported_program import ExportedProgram
from torch.export.graph_signature import InputKind

from moonfx.capture.graph_nodes import (
    BUFFER,
    CAPTURED,
    INPUT,
    body_position,
    name_in_model,
    name_invoked_bodies,
    nested_graphs,
    placeholders,
)
from moonfx.capture.sizes import same_size

# One operator that torch.export's decompositions make of scaled_dot_product_attention on CPU.
_FLASH = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_VIEWS = {
    torch.ops.aten.view.default,
    torch.ops.aten._unsafe_view.default,
    torch.ops.aten.reshape.default,
}
_METADATA_CHECK = torch.ops.aten._assert_tensor_metadata.default


@dataclass
class Exported:
    """An ExportedProgram's graph in the form that the passes work on.

    Args:
        gm: a copy of the program's graph module.
        checks: nodes -> the checks of their dtypes and devices, which `exported_again` puts back
            where the node is still there. As nodes they would read, and keep, dense scores.
    """

    program: ExportedProgram
    gm: fx.GraphModule
    checks: list[tuple[fx.Node, dict[str, Any]]]


def capture_exported(program: ExportedProgram) -> Exported:
    """Brings a program to pre-dispatch ATen as the passes expect it; the program stays as it is."""
    checks: list[tuple[fx.Node, dict[str, Any]]] = []
    gm = _copy_for_passes(program.graph_module, checks)
    signature = program.graph_signature
    mutated = set(signature.buffers_to_mutate.values())
    values = {**program.state_dict, **program.constants}
    for node, spec in zip(placeholders(gm.graph), signature.input_specs, strict=True):
        inside = spec.target is not None
        node.meta[INPUT] = (inside, spec.target if inside else node.name)
        value = None if spec.kind is InputKind.PARAMETER else values.get(str(spec.target))
        if isinstance(value, torch.Tensor) and spec.target not in mutated:
            node.meta[BUFFER] = value
    return Exported(program, gm, checks)


def _copy_for_passes(
    gm: fx.GraphModule, checks: list[tuple[fx.Node, dict[str, Any]]]
) -> fx.GraphModule:
    """A copy of a graph and of the bodies it calls, each call with a body of its own."""
    with _copying_specs():
        copied = fx.GraphModule(gm, copy.deepcopy(gm.graph))
    copied.meta.update(gm.meta)
    copied.meta[CAPTURED] = True
    for node in list(copied.graph.nodes):
        if node.target is _METADATA_CHECK:
            checks.append((node.args[0], {**node.kwargs}))
            copied.graph.erase_node(node)
        elif node.target is _FLASH:
            _recompose_attention(node)
        elif node.target is torch.ops.aten.expand.default and _expands_nothing(node):
            node.replace_all_uses_with(node.args[0])  # decompositions put one around each product
            copied.graph.erase_node(node)
        elif (position := body_position(node)) is not None:
            held = node.args[position[0]]
            body = getattr(gm, held.target)
            with copied.graph.inserting_before(node):
                name = f"{held.target}_{node.name}"
                copied.add_submodule(name, _copy_for_passes(body, checks))
                own = copied.graph.get_attr(name)
            own.meta.update(held.meta)
            node.update_arg(position[0], own)
    for node in copied.graph.nodes:
        if node.target is torch.ops.aten.bmm.default:
            _recompose_matmul(node)
    copied.graph.eliminate_dead_code(lambda node: node.op != "get_attr" and node.is_impure())
    copied.delete_all_unused_submodules()
    copied.recompile()
    return copied


def _expands_nothing(node: fx.Node) -> bool:
    before, after = (n.meta["val"].shape for n in (node.args[0], node))  # type: ignore[union-attr]
    return len(before) == len(after) and all(map(same_size, before, after))


def _recompose_matmul(node: fx.Node) -> None:
    """Writes view(bmm(view(a), view(b))), what decompositions make of a 4-D a @ b, as matmul."""
    sides: list[Any] = [x.args[0] if x.target in _VIEWS else x for x in node.all_input_nodes]
    out = next(iter(node.users), node)
    if len(sides) != 2 or len(node.users) != 1 or out.target not in _VIEWS:
        return
    a, b, result = (n.meta["val"].shape for n in (*sides, out))
    lead = a[:-2]
    if not len(a) == len(b) == len(result) > 3 or not all(map(same_size, lead, b[:-2])):
        return
    if not all(map(same_size, result, (*lead, a[-2], b[-1]))) or not same_size(a[-1], b[-2]):
        return
    with node.graph.inserting_before(out):
        recomposed = node.graph.call_function(torch.ops.aten.matmul.default, tuple(sides))
    recomposed.meta.update(out.meta)
    out.replace_all_uses_with(recomposed)


def _recompose_attention(node: fx.Node) -> None:
    """Writes CPU flash attention whose logsumexp is not read as scaled_dot_product_attention."""
    if [user.args[1] for user in node.users] != [0]:
        return
    (out,) = node.users
    query, key, value, *rest = node.args
    dropout, causal = (*rest, 0.0, False)[:2] if len(rest) < 2 else rest[:2]
    dropout, causal = node.kwargs.get("dropout_p", dropout), node.kwargs.get("is_causal", causal)
    arguments = (query, key, value, node.kwargs.get("attn_mask"), dropout, causal)
    with node.graph.inserting_before(node):
        recomposed = node.graph.call_function(
            torch.ops.aten.scaled_dot_product_attention.default,
            arguments,
            {"scale": node.kwargs.get("scale")},
        )
    recomposed.meta.update(out.meta)
    out.replace_all_uses_with(recomposed)
    node.graph.erase_node(out)
    node.graph.erase_node(node)


def exported_again(exported: Exported) -> ExportedProgram:
    """A new program with the rewritten graph; state, dynamic shapes and signature as before."""
    program, gm = exported.program, exported.gm
    graphs = {gm.graph: gm for gm in nested_graphs(gm)}
    alive = {node for graph in graphs for node in graph.nodes}
    for node, check in exported.checks:
        if node in alive and (node.users or node.op == "placeholder"):
            with node.graph.inserting_after(node):
                node.graph.call_function(_METADATA_CHECK, (node,), check)
    name_invoked_bodies(gm, retraced=False)
    for graph, owner in graphs.items():
        for node in graph.nodes:
            for key in (INPUT, BUFFER):
                node.meta.pop(key, None)
        graph.lint()
        owner.recompile()
    signature = copy.deepcopy(program.graph_signature)
    for spec, node in zip(signature.output_specs, _results(gm), strict=True):
        if isinstance(node, fx.Node) and hasattr(spec.arg, "name"):
            spec.arg.name = node.name
    with _copying_specs():
        return program._update(gm, signature)


@contextlib.contextmanager
def _copying_specs() -> Iterator[None]:
    """torch's own specs of a program's inputs warn when they are copied."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        yield


def _results(gm: fx.GraphModule) -> Sequence[Any]:
    (output,) = (n for n in gm.graph.nodes if n.op == "output")
    return output.args[0]


def is_decomposed(program: ExportedProgram) -> bool:
    """Whether run_decompositions has been called on it."""
    return program.dialect != "TRAINING"


def exported_modules(program: ExportedProgram) -> set[str]:
    """The names of the modules that an exported program's nodes came from, "" for the model."""
    stacks = [
        node.meta.get("nn_module_stack") or {}
        for module in program.graph_module.modules()
        if isinstance(module, fx.GraphModule)
        for node in module.graph.nodes
    ]
    return {name_in_model(path) for stack in stacks for path, _ in stack.values()} | {""}
