"""What moonfx needs from torch's private side: capture, symbolic sizes, inner compilers.

A new torch release is this one file's work. `capture` brings a Dynamo graph to the one form that
every pass is written against, pre-dispatch ATen: autograd intact, SDPA, softmax and dropout single
nodes, symbolic shapes, and on each node the module and the source line that it came from.
"""

import contextlib
import copy
import functools
import hashlib
import inspect
import itertools
import logging
import operator
import re
import shutil
import threading
import types
import warnings
import weakref
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import sympy
import torch
import torch._dynamo
import torch._dynamo.utils
from torch import fx
from torch._dispatch.python import enable_python_dispatcher
from torch._dynamo import trace_rules
from torch._dynamo.code_context import code_context
from torch._dynamo.exc import FailOnRecompileLimitHit
from torch._dynamo.external_utils import wrap_inline
from torch._dynamo.symbolic_convert import InstructionTranslator
from torch._functorch._aot_autograd.frontend_utils import construct_fake_mode, process_inputs
from torch._guards import CompileContext, detect_fake_mode
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch._logging import trace_structured
from torch._logging._internal import LazyTraceHandler, trace_log
from torch._ops import HigherOrderOperator
from torch._subclasses.fake_tensor import FakeTensor
from torch.export.exported_program import ExportedProgram
from torch.export.graph_signature import InputKind
from torch.fx.experimental.proxy_tensor import (
    disable_proxy_modes_tracing,
    get_proxy_mode,
    make_fx,
    snapshot_fake,
    track_tensor,
    track_tensor_tree,
)
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.optim.optimizer import Optimizer
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from moonfx.capture.repeated_calls import Key, Written, key_of, remember
from moonfx.fallback import warn_slow

Size = int | torch.SymInt
Repeats = dict[Key, Written | None]

# Higher-order operators that call a body with their last arguments: where among the arguments the
# body is, and where its own begin. The passes look into these bodies. Every other one stays exactly
# as it was written.
BODY_OPERATORS = {
    "tag_activation_checkpoint": (0, 1),
    "wrap": (0, 1),
    "invoke_subgraph": (0, 2),
    "wrap_with_set_grad_enabled": (1, 2),
    "wrap_with_autocast": (4, 5),
}

_CAPTURED = "moonfx_captured"
_BUFFER = "moonfx_buffer"
_ORIGIN = ("nn_module_stack", "stack_trace")
_INPUT = "moonfx_input"
_TRAINED = "moonfx_trained"


class CaptureError(Exception):
    """A graph could not be brought to pre-dispatch ATen.

    Its own type because Dynamo turns exceptions of the types it knows into silent graph breaks.
    """


def capture(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> fx.GraphModule:
    """Retraces a Dynamo graph to pre-dispatch ATen.

    Args:
        gm: the graph that Dynamo hands to a backend.
        example_inputs: its inputs as Dynamo gives them: tensors, parameters, SymInts.
    Returns:
        A GraphModule of the same signature; nodes carry "val", "stack_trace", "nn_module_stack".
    Raises:
        CaptureError: if the retrace fails, whatever the cause.
    """
    held = held_tensors(gm)
    given = [*example_inputs, *held.values()]
    try:
        aot = types.SimpleNamespace(
            dynamic_shapes=True, static_input_indices=[], num_params_buffers=0
        )
        fake_mode, shape_env = construct_fake_mode(given, aot)  # type: ignore[arg-type]
        fakes = process_inputs(given, aot, fake_mode, shape_env)[0]  # type: ignore[arg-type]
        # Python's own dispatch keeps sizes symbolic; where there are none it only takes time.
        symbolic = shape_env is not None and bool(shape_env.var_to_range)
        dispatcher = enable_python_dispatcher() if symbolic else contextlib.nullcontext()
        with fx.traceback.preserve_node_meta(), fake_mode, dispatcher:
            captured = _retrace(gm, fakes, {}, list(held), isinstance(owner(), Optimizer))
    except Exception as error:
        raise CaptureError(f"{type(error).__name__}: {error}") from error
    _hold(gm, captured, list(held))
    _keep_placeholders(gm, captured, example_inputs)
    return captured


def held_tensors(gm: fx.GraphModule) -> dict[str, torch.Tensor]:
    """The parameters and buffers that the graph's own nodes read from its module.

    Dynamo puts an optimizer's parameters and states there, and not among the inputs.
    """
    targets = dict.fromkeys(str(n.target) for n in gm.graph.nodes if n.op == "get_attr")
    tensors = {**gm._parameters, **gm._buffers}
    found = {name: tensors.get(name) for name in targets}
    return {name: tensor for name, tensor in found.items() if tensor is not None}


def _hold(gm: fx.GraphModule, captured: fx.GraphModule, names: Sequence[str]) -> None:
    """Makes of the last placeholders the tensors that the module holds under these names.

    The two modules share their tables of tensors where they can: Dynamo empties that of its own
    when the optimizer goes, so that a compiled step does not keep the parameters alive.
    """
    placeholders = [n for n in captured.graph.nodes if n.op == "placeholder"]
    if not names:
        return
    if not (captured._parameters or captured._buffers):
        captured._parameters, captured._buffers = gm._parameters, gm._buffers
    for name, node in zip(names, placeholders[-len(names) :], strict=True):
        if name not in captured._parameters and name not in captured._buffers:
            table = "_parameters" if name in gm._parameters else "_buffers"
            getattr(captured, table)[name] = getattr(gm, table)[name]
        with captured.graph.inserting_after(placeholders[-1]):
            read = captured.graph.get_attr(name)
        read.meta.update(node.meta)
        read.meta[_TRAINED] = getattr(gm, name).requires_grad
        node.replace_all_uses_with(read)
        captured.graph.erase_node(node)
        if not read.users:
            captured.graph.erase_node(read)


def _retrace(
    gm: fx.GraphModule,
    fakes: Sequence[Any],
    written: Repeats,
    held: Sequence[str] = (),
    steps: bool = False,
) -> fx.GraphModule:
    """Traces the graph again.

    Args:
        fakes: its inputs, then the tensors that its module holds.
        written: what calls became so far, in this graph and in those around it.
        held: the names of the tensors that its module holds.
        steps: whether it is of an optimizer's step.
    """
    gm = _with_transforms_apart(gm)
    interpreter = _Retrace(gm, written, steps)

    def run(*given: Any) -> Any:
        inputs = given[: len(given) - len(held)]
        interpreter.held = dict(zip(held, given[len(inputs) :], strict=True))
        return interpreter.run(*inputs)

    trace = make_fx(
        run,
        pre_dispatch=True,
        tracing_mode="real",
        _allow_non_fake_inputs=True,
    )
    captured = trace(*fakes)
    captured.meta.update(gm.meta)
    captured.meta[_CAPTURED] = True
    for node in captured.graph.nodes:
        if node.op == "get_attr" and isinstance(getattr(captured, node.target, None), FakeTensor):
            raise CaptureError(f"the retrace lost where '{node.name}' comes from")
    return captured


class Region(torch.nn.Module):
    """A region of a graph as Dynamo wrote it; no child, for dead code is removed in children."""

    def __init__(self, gm: fx.GraphModule) -> None:
        super().__init__()
        self.held = (gm,)


@fx.node.has_side_effect  # unknown, for it is not looked into
def under_transform(region: Region, *operands: Any) -> Any:
    """Runs a region."""
    return region.held[0](*operands)


def _with_transforms_apart(gm: fx.GraphModule) -> fx.GraphModule:
    """The graph with each region under torch.vmap or torch.func as one call of a module.

    Such a region means something only as Dynamo wrote it: _vmap_increment_nesting(...), what runs
    on batched tensors, _vmap_decrement_nesting(). Make_fx would see through the batched tensors.
    """
    regions: list[list[fx.Node]] = []
    depth = 0
    for node in gm.graph.nodes:
        name = str(getattr(node.target, "__name__", ""))
        opens, closes = (name.endswith(f"_{x}_nesting") for x in ("increment", "decrement"))
        if opens and not depth:
            regions.append([])
        depth += opens
        if depth:
            regions[-1].append(node)
        depth -= closes
    if not regions:
        return gm
    gm = fx.GraphModule(gm, gm.graph)
    graph = fx.Graph()
    inside = {node: i for i, region in enumerate(regions) for node in region}
    made: dict[fx.Node, fx.Node] = {}
    for node in gm.graph.nodes:
        if node not in inside:
            made[node] = graph.node_copy(node, made.__getitem__)
        elif (region := regions[inside[node]])[-1] is node:
            _call_region(gm, graph, region, f"transformed_{inside[node]}", made)
    return fx.GraphModule(gm, graph)


def _call_region(
    gm: fx.GraphModule,
    graph: fx.Graph,
    region: list[fx.Node],
    name: str,
    made: dict[fx.Node, fx.Node],
) -> None:
    """Writes a call of a module that holds the region's nodes; its results go into `made`."""
    body, own = fx.Graph(), dict[fx.Node, fx.Node]()
    within = set(region)
    outside = dict.fromkeys(x for n in region for x in n.all_input_nodes if x not in within)
    for operand in outside:
        own[operand] = body.placeholder(operand.name)
    for node in region:
        own[node] = body.node_copy(node, own.__getitem__)
    results = [n for n in region if any(user not in within for user in n.users)]
    body.output(tuple(own[n] for n in results))
    gm.add_submodule(name, Region(fx.GraphModule(gm, body)))
    operands = (graph.get_attr(name), *(made[x] for x in outside))
    call = graph.call_function(under_transform, operands)
    call.meta.update({k: v for k, v in region[0].meta.items() if k in _ORIGIN})
    for i, node in enumerate(results):
        made[node] = graph.call_function(operator.getitem, (call, i))
        made[node].meta.update({k: v for k, v in node.meta.items() if k in _ORIGIN})


# Their results are read by nobody, and still they must not be removed.
_enter_inference = fx.node.has_side_effect(torch.autograd.grad_mode._enter_inference_mode)
_exit_inference = fx.node.has_side_effect(torch.autograd.grad_mode._exit_inference_mode)


def _tracer() -> Any:
    """What make_fx writes the graph with."""
    proxy_mode = get_proxy_mode()
    assert proxy_mode is not None
    return proxy_mode.tracer


def _plain(tracer: Any, x: torch.Tensor) -> bool:
    """Whether a tensor is a fake one that the graph knows, and no constant."""
    slot = tracer.tensor_tracker.get(x)
    known = slot is not None and slot.constant is None
    return known and type(x) is FakeTensor and x.constant is None


# What Dynamo makes of tensor.data, where this torch has it.
_DATA = getattr(torch._C._autograd, "_get_data_attr", None)


class _Retrace(fx.Interpreter):
    """Runs a graph under make_fx, keeping higher-order operators as single nodes.

    Args:
        written: what calls became so far, in this graph and in those around it.
        steps: whether the graph is of an optimizer's step.
    """

    def __init__(self, gm: fx.GraphModule, written: Repeats, steps: bool = False) -> None:
        super().__init__(gm)
        self.inference: list[fx.Proxy] = []
        self.written = written
        self.steps = steps
        self.detaches = not returns_gradients(gm)
        self.held: dict[str, Any] = {}

    def get_attr(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return self.held[target] if target in self.held else super().get_attr(target, args, kwargs)

    def run_node(self, n: fx.Node) -> Any:
        if n.op not in ("call_function", "call_method"):
            return super().run_node(n)
        tracer = _tracer()
        with torch._C.DisableTorchFunction():  # make_fx looks at each size that is read
            args, kwargs = self.fetch_args_kwargs_from_env(n)
            call = key_of(n.target, args, kwargs, functools.partial(_plain, tracer))
            operands = [tracer.tensor_tracker[x].proxy.node for x in call[1]] if call else []
        known = self.written.get(call[0]) if call else None
        if known is not None:
            value = self._like(known, n)
            node = known.again(n, operands, tracer.graph)
            track_tensor(value, fx.Proxy(node, tracer), constant=None, tracer=tracer)
            return value
        last = next(iter(reversed(tracer.graph.nodes)), None)
        out = super().run_node(n)
        results = out if isinstance(out, tuple | list) else (out,)
        if not all(isinstance(x, torch.Tensor) for x in results):
            self.written.clear()  # it may have changed the mode that the next ones run under
        elif call is not None and call[0] not in self.written:
            new = itertools.takewhile(lambda x: x is not last, reversed(tracer.graph.nodes))
            with torch._C.DisableTorchFunction():
                # An operand that comes back, as from x.to(x.dtype), goes by its new name from here.
                own = out is not results and all(out is not x for x in call[1])
                own = own and _plain(tracer, out)
                result = tracer.tensor_tracker[out].proxy.node if own else None
                self.written[call[0]] = remember(list(new)[::-1], operands, out, result)
        return out

    def _like(self, known: Written, n: fx.Node) -> torch.Tensor:
        """A value for a call that is written as another was."""
        if not known.needs_grad:
            value = snapshot_fake(known.value)
            assert value is not None
            return value
        with disable_proxy_modes_tracing():
            args, kwargs = self.fetch_args_kwargs_from_env(n)
            out: torch.Tensor = getattr(fx.Interpreter, n.op)(self, n.target, args, kwargs)
            return out

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        # Of p.data make_fx does not see where it comes from. Unlike it, p.detach() tells autograd
        # of what is written, as optimizers do that write to p itself; a model might mind, and a
        # backward from what the step returns would refuse to run.
        if target is _DATA:
            if self.detaches and (self.steps or any(args[0] is x for x in self.held.values())):
                return args[0].detach()
            return self._as_is("call_function", target, args, kwargs)
        # make_fx records these two as they are called; only the context manager also obeys them.
        if target is torch.amp.autocast_mode._enter_autocast:
            region = torch.autocast(*args)
            region.__enter__()
            return region
        if target is torch.amp.autocast_mode._exit_autocast:
            args[0].__exit__(None, None, None)
            return None
        tracer = _tracer()
        # make_fx obeys these two and records nothing, so that gradients would come back.
        if target is _enter_inference:
            self.inference.append(tracer.create_proxy("call_function", target, args, kwargs))
        elif target is _exit_inference:
            tracer.create_proxy("call_function", target, (self.inference.pop(),), {})
        if not isinstance(target, HigherOrderOperator) and target is not under_transform:
            if _subclasses(args, kwargs):
                return self._as_is("call_function", target, args, kwargs)
            return super().call_function(target, args, kwargs)
        proxies = pytree.tree_map(tracer.unwrap_proxy, (args, kwargs))
        with disable_proxy_modes_tracing():
            name = getattr(target, "__name__", "")
            if name in BODY_OPERATORS:
                at, first = BODY_OPERATORS[name]
                operands = list(args[first:])
                with _modes_of_body(name, args):
                    # A body whose arguments come after a mode's runs under that mode.
                    body = _retrace(args[at], operands, {} if at else self.written)
                    out = fx.Interpreter(args[at]).run(*operands)
                modules = {id(args[at]): body}
            else:
                out = target(*args, **kwargs)
                modules = {}

        def as_argument(value: Any, proxy: Any) -> Any:
            if not isinstance(value, torch.nn.Module):
                return proxy
            name = tracer.get_fresh_qualname("body")
            tracer.root.register_module(name, modules.get(id(value), value))
            return tracer.create_proxy("get_attr", name, (), {})

        def is_leaf(x: Any) -> bool:
            return isinstance(x, torch.nn.Module)

        flat, spec = pytree.tree_flatten((args, kwargs), is_leaf=is_leaf)
        flat_proxies = pytree.tree_flatten(proxies, is_leaf=is_leaf)[0]
        args, kwargs = pytree.tree_unflatten(
            [as_argument(v, p) for v, p in zip(flat, flat_proxies, strict=True)], spec
        )
        proxy = tracer.create_proxy("call_function", target, args, kwargs)
        return track_tensor_tree(out, proxy, constant=None, tracer=tracer)

    def call_method(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if _subclasses(args, kwargs):
            return self._as_is("call_method", target, args, kwargs)
        return super().call_method(target, args, kwargs)

    def _as_is(self, kind: str, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Keeps a call as Dynamo wrote it: on tensor subclasses (a quantized linear), of .data.

        The subclass would put operators on its inner tensors in its place, which are no inputs of
        the graph.
        """
        tracer = _tracer()
        proxies = pytree.tree_map(tracer.unwrap_proxy, (args, kwargs))
        with disable_proxy_modes_tracing():
            out = getattr(super(), kind)(target, args, kwargs)
        proxy = tracer.create_proxy(kind, target, *proxies)
        return track_tensor_tree(out, proxy, constant=None, tracer=tracer)


def _subclasses(*given: Any) -> bool:
    return any(map(is_traceable_wrapper_subclass, pytree.tree_leaves(given)))


@contextlib.contextmanager
def _modes_of_body(name: str, args: Sequence[Any]) -> Iterator[None]:
    """The mode that a higher-order operator runs its body under."""
    if name == "wrap_with_set_grad_enabled":
        with torch.set_grad_enabled(args[0]):
            yield
    elif name == "wrap_with_autocast":
        with torch.autocast(*args[:4]):
            yield
    else:
        yield


def _keep_placeholders(
    gm: fx.GraphModule, captured: fx.GraphModule, example_inputs: Sequence[Any]
) -> None:
    """Gives placeholders their first names, and module buffers their values.

    A mask kept in a buffer can be proved from its value; `backend.guards` watches that it stays.
    """
    before = [n for n in gm.graph.nodes if n.op == "placeholder"]
    after = [n for n in captured.graph.nodes if n.op == "placeholder"]
    for old, new, value in zip(before, after, example_inputs, strict=True):
        new.name = new.target = old.name
        new.meta.update({k: v for k, v in old.meta.items() if k in ("grapharg", "tensor_dict")})
        new.meta[_TRAINED] = isinstance(value, torch.Tensor) and value.requires_grad
        source = repr(getattr(old, "_dynamo_source", ""))
        if "_buffers" in source and isinstance(value, torch.Tensor):
            new.meta[_BUFFER] = value
    captured.recompile()


# --- torch.export ---------------------------------------------------------------------------------

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
    placeholders = [n for n in gm.graph.nodes if n.op == "placeholder"]
    for node, spec in zip(placeholders, signature.input_specs, strict=True):
        inside = spec.target is not None
        node.meta[_INPUT] = (inside, spec.target if inside else node.name)
        value = None if spec.kind is InputKind.PARAMETER else values.get(str(spec.target))
        if isinstance(value, torch.Tensor) and spec.target not in mutated:
            node.meta[_BUFFER] = value
    return Exported(program, gm, checks)


def _copy_for_passes(
    gm: fx.GraphModule, checks: list[tuple[fx.Node, dict[str, Any]]]
) -> fx.GraphModule:
    """A copy of a graph and of the bodies it calls, each call with a body of its own."""
    with _copying_specs():
        copied = fx.GraphModule(gm, copy.deepcopy(gm.graph))
    copied.meta.update(gm.meta)
    copied.meta[_CAPTURED] = True
    for node in list(copied.graph.nodes):
        if node.target is _METADATA_CHECK:
            checks.append((node.args[0], {**node.kwargs}))
            copied.graph.erase_node(node)
        elif node.target is _FLASH:
            _whole_attention(node)
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
            _whole_product(node)
    copied.graph.eliminate_dead_code(lambda node: node.op != "get_attr" and node.is_impure())
    copied.delete_all_unused_submodules()
    copied.recompile()
    return copied


def _expands_nothing(node: fx.Node) -> bool:
    before, after = (n.meta["val"].shape for n in (node.args[0], node))  # type: ignore[union-attr]
    return len(before) == len(after) and all(map(same_size, before, after))


def _whole_product(node: fx.Node) -> None:
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
        whole = node.graph.call_function(torch.ops.aten.matmul.default, tuple(sides))
    whole.meta.update(out.meta)
    out.replace_all_uses_with(whole)


def _whole_attention(node: fx.Node) -> None:
    """Writes CPU flash attention whose logsumexp is not read as scaled_dot_product_attention."""
    if [user.args[1] for user in node.users] != [0]:
        return
    (out,) = node.users
    query, key, value, *rest = node.args
    dropout, causal = (*rest, 0.0, False)[:2] if len(rest) < 2 else rest[:2]
    dropout, causal = node.kwargs.get("dropout_p", dropout), node.kwargs.get("is_causal", causal)
    arguments = (query, key, value, node.kwargs.get("attn_mask"), dropout, causal)
    with node.graph.inserting_before(node):
        whole = node.graph.call_function(
            torch.ops.aten.scaled_dot_product_attention.default,
            arguments,
            {"scale": node.kwargs.get("scale")},
        )
    whole.meta.update(out.meta)
    out.replace_all_uses_with(whole)
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
            for key in (_INPUT, _BUFFER):
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


def name_invoked_bodies(gm: fx.GraphModule, retraced: bool) -> None:
    """Gives the bodies of nested compile regions names by what they now hold.

    Regions of one name are compiled once: those that were alike and are now different must not
    share it, and those that are still alike should. AOTAutograd asks the results' fake values which
    of them need gradients, and make_fx's do not know: without them it finds out by itself.
    """
    known: dict[tuple[Any, ...], str] = {}
    for graph in nested_graphs(gm):
        for node in graph.graph.nodes:
            if node.op != "call_function" or str(node.target) != "invoke_subgraph":
                continue
            body = getattr(graph, str(node.args[0].target))
            key = (node.args[1], _content(body))
            same = sum(old == node.args[1] for old, _ in known)
            node.update_arg(1, known.setdefault(key, f"{node.args[1]}_moonfx_{same}"))
            for result in body.graph.output_node().all_input_nodes if retraced else ():
                result.meta.pop("val", None)


def _content(gm: fx.GraphModule) -> tuple[Any, ...]:
    """What a graph computes: equal for two graphs only if they are interchangeable."""
    held = [getattr(gm, str(n.target)) for n in gm.graph.nodes if n.op == "get_attr"]
    parts = [_content(x) if isinstance(x, fx.GraphModule) else id(x) for x in held]
    return (str(gm.graph), *parts)


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
    return {_path(path) for stack in stacks for path, _ in stack.values()} | {""}


def _path(path: str) -> str:
    return re.sub(r"^L\['\w+'\]\.?", "", str(path))


# --- GraphModules ---------------------------------------------------------------------------------


def copy_of_graph_module(gm: fx.GraphModule) -> fx.GraphModule:
    """A GraphModule of its own, of the same parameters and buffers.

    Dynamo is told where the code came from, so that its graph keeps each node's module.
    """
    shared = {id(t): t for t in (*gm.parameters(), *gm.buffers())}
    copied: fx.GraphModule = copy.deepcopy(gm, shared)
    ours = [k for k, h in gm._forward_pre_hooks.items() if h is stay_out_of_outer_graphs]
    for name, value in vars(gm).items():  # hooks and other attributes, which a deep copy loses
        if re.fullmatch(r"_(forward|backward)(_pre)?_hooks\w*", name):
            setattr(copied, name, type(value)((k, h) for k, h in value.items() if k not in ours))
        elif name not in ("_moonfx", "_compiled_call_impl"):
            vars(copied).setdefault(name, value)
    context: Any = code_context.get_context(copied.forward.__code__)
    context["orig_graphmodule"] = weakref.ref(copied)
    return copied


def is_captured(gm: torch.nn.Module) -> bool:
    """Whether the graph is in pre-dispatch ATen, so that passes may look at it."""
    return bool(getattr(gm, "meta", {}).get(_CAPTURED))


def buffer_value(node: fx.Node) -> torch.Tensor | None:
    """The value of a placeholder that is a module's buffer, of a constant tensor, else None."""
    if node.op == "get_attr":
        value = getattr(node.graph.owning_module, str(node.target), None)
    else:
        value = node.meta.get(_BUFFER)
    return value if isinstance(value, torch.Tensor) else None


def input_name(node: fx.Node) -> tuple[bool, str] | None:
    """Whether an input of the graph is part of the module that it starts in, and its name there.

    None if the node is no input, or Dynamo does not say where it came from.
    """
    if node.op != "placeholder":
        return None
    if _INPUT in node.meta:
        inside, name = node.meta[_INPUT]
        return bool(inside), str(name)
    source = getattr(getattr(node.meta.get("grapharg"), "source", None), "name", "")
    text = str(source() if callable(source) else source)
    words = re.findall(r"\['([^']+)'\]", text) or [""]
    first, *rest = (w for w in words if w not in ("_buffers", "_parameters", "_modules"))
    if first == "self" and rest:
        return True, ".".join(rest)
    name = [first, *rest][-1]
    return (False, name) if name else None


def may_be_trained(node: fx.Node) -> bool:
    """Whether an input or a tensor that the graph holds may need a gradient."""
    if node.op not in ("placeholder", "get_attr"):
        return False
    return bool(node.meta.get(_TRAINED, buffer_value(node) is None))


def nested_graphs(gm: fx.GraphModule) -> Iterator[fx.GraphModule]:
    """The graph itself, then each captured body inside it, depth first."""
    yield gm
    for node in gm.graph.nodes:
        if node.op == "get_attr":
            child = getattr(gm, str(node.target), None)
            if isinstance(child, fx.GraphModule) and is_captured(child):
                yield from nested_graphs(child)


def opaque_body(node: fx.Node) -> fx.GraphModule | None:
    """The graph behind a get_attr node, if it is one that the passes do not rewrite."""
    held = (
        getattr(node.graph.owning_module, str(node.target), None) if node.op == "get_attr" else None
    )
    body = held.held[0] if isinstance(held, Region) else held
    return body if isinstance(body, fx.GraphModule) and not is_captured(body) else None


@functools.cache
def is_composite(target: Any) -> bool:
    """Whether torch makes an operator of others, and so may hand back what it was given."""
    if not isinstance(target, torch._ops.OpOverload):
        return False
    key = torch._C.DispatchKey.CompositeImplicitAutograd
    try:
        return bool(torch._C._dispatch_has_kernel_for_dispatch_key(target.name(), key))
    except RuntimeError:  # known to Python and not to the dispatcher
        return True


def is_data(node: fx.Node) -> bool:
    """Whether a node is tensor.data."""
    return _DATA is not None and node.target is _DATA


def is_higher_order(node: fx.Node) -> bool:
    return isinstance(node.target, HigherOrderOperator) or node.target is under_transform


def body_position(node: fx.Node) -> tuple[int, int] | None:
    """Where a higher-order node's body is among its arguments, and where the body's own begin.

    None if it calls no body, or one that the passes do not look into.
    """
    if node.op != "call_function" or not isinstance(node.target, HigherOrderOperator):
        return None
    return BODY_OPERATORS.get(node.target.name())


class Traced(Protocol):
    """What a node of a graph says of where it came from."""

    @property
    def meta(self) -> dict[str, Any]: ...

    @property
    def stack_trace(self) -> str | None: ...


def module_path(node: Traced, names: dict[int, str], root: str | None) -> str:
    """The name of the innermost module that the node came from, "" for the model itself.

    Args:
        names: id of each module of the user's model -> its qualified name.
        root: the name of the module that the graph starts in, see `graph_root`.
    """
    stack = node.meta.get("nn_module_stack") or {}
    if not stack:
        return root or ""
    key, (path, _) = list(stack.items())[-1]
    ident = str(key).split("@")[0]
    if ident.isdigit() and int(ident) in names:
        return names[int(ident)]
    return f"{root or ''}.{_path(path)}".strip(".")


def graph_root(
    gm: fx.GraphModule, example_inputs: Sequence[Any], parameter_names: dict[int, str]
) -> str | None:
    """The name of the module that a Dynamo graph starts in: "" for the model itself.

    After a graph break, a graph starts in a layer, and Dynamo runs it for every layer of that
    class. None if the graph has no parameter to tell by.

    Args:
        parameter_names: id of each parameter of the user's model -> its qualified name.
    """
    placeholders = [n for n in gm.graph.nodes if n.op == "placeholder"]
    for node, value in zip(placeholders, example_inputs, strict=True):
        name = parameter_names.get(id(value))
        if name is None:
            continue
        source = getattr(getattr(node, "_dynamo_source", None), "name", "")
        text = source() if callable(source) else source
        # L['self']._modules['layers']._modules['0']._parameters['weight']
        relative = ".".join(re.findall(r"\['([^']+)'\]", str(text))[1:])
        if relative and f".{name}".endswith(f".{relative}"):
            return name[: len(name) - len(relative)].rstrip(".")
    return None


def source_line(node: Traced) -> str:
    """file.py:line in the user's code, innermost frame; "unknown" if the trace has none."""
    frames = re.findall(r'File "([^"]+)", line (\d+)', node.stack_trace or "")
    if not frames:
        return "unknown"
    name, number = frames[-1]
    generated = re.fullmatch(r"<eval_with_key>\.\d+(?: from (\S+) in .*)?", name)
    if generated is None:
        return f"{Path(name).name}:{number}"
    # A GraphModule's own code: where its model was written, if that is known, and the graph's line.
    where = f"{Path(generated[1]).name}, " if generated[1] else ""
    return f"{where}graph line {number}"


def expression(size: Size | torch.SymFloat | float) -> sympy.Expr:
    """A size as a sympy expression over the graph's symbols."""
    if isinstance(size, torch.SymInt | torch.SymFloat):
        return size.node.expr
    return sympy.sympify(size)


def proved(condition: bool | torch.SymBool) -> bool:
    """Whether a condition on sizes holds for every shape the graph will run with. Adds no guard."""
    return statically_known_true(condition)


def same_size(a: Size, b: Size) -> bool:
    return proved(a == b)


def hint(size: Size) -> int:
    """A size at the traced shape, for reports. Adds no guard."""
    return size if isinstance(size, int) else int(size.node.hint)


def is_plain(value: torch.Tensor) -> bool:
    """Whether a node's value is a strided tensor of no subclass."""
    plain = type(value) in (FakeTensor, torch.Tensor, torch.nn.Parameter)
    return plain and value.layout is torch.strided


def storage_of(value: torch.Tensor) -> object:
    """What two tensors share if and only if they lie in one storage; None if that is not known."""
    return value.untyped_storage()._cdata if is_plain(value) else None


def hint_or_none(size: Size) -> int | None:
    """A size at the traced shape, None if only the run will know it. Adds no guard."""
    known = size if isinstance(size, int) else size.node.hint
    return None if known is None else int(known)


def fake_mode_of(gm: fx.GraphModule) -> Any:
    """The fake mode that the graph's values live in, or None if it has no tensor."""
    values = [n.meta.get("val") for n in gm.graph.nodes]
    return detect_fake_mode([v for v in values if isinstance(v, torch.Tensor)])


def readable(gm: fx.GraphModule) -> str:
    """A graph and its bodies as Python, with the shape, dtype and strides of each value."""
    text = gm.print_readable(print_output=False, include_stride=True)
    return re.sub(r"class <\w+>\(", "class Graph(", text)


def tracing() -> bool:
    """Whether someone asked for structured traces (TORCH_TRACE)."""
    # Torch's handler removes itself if no one did; others (pytest's) only listen.
    handlers = (h for h in trace_log.handlers if isinstance(h, LazyTraceHandler))
    return trace_log.isEnabledFor(logging.DEBUG) and any(handlers)


def trace_artifact(name: str, text: str) -> None:
    """Leaves a text for tlparse, where structured traces are on."""
    metadata = {"name": name, "encoding": "string"}
    trace_structured("artifact", metadata_fn=lambda: metadata, payload_fn=lambda: text)


# --- sources and cache stamps ---------------------------------------------------------------------


@functools.cache
def source_hash() -> str:
    """Hash of every source of moonfx, its passes and its kernels."""
    import moonfx.kernels
    import moonfx.passes

    package = Path(__file__).resolve().parents[1]
    parts = (*moonfx.passes.__path__, *moonfx.kernels.__path__)
    roots = {package, *map(Path, parts)}
    digest = hashlib.sha256()
    for root in sorted(roots):
        for path in sorted(p for p in root.rglob("*") if p.suffix in (".py", ".cpp", ".h", ".cu")):
            digest.update(str(path.relative_to(root.parent)).encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()


class Stamp(CustomGraphPass):
    """A pass that does nothing and puts moonfx's sources and policy into Inductor's cache keys.

    Inductor and AOTAutograd hash the graph, not the formula behind a custom operator, so without
    it an edited gradient would be answered by the old artifact (pytorch#144344).
    """

    def __init__(self, policy: str) -> None:
        self.key = f"moonfx-{source_hash()}-{policy}"

    def __call__(self, graph: fx.Graph) -> None:
        return None

    def uuid(self) -> str:
        return self.key


# --- inner compilers ------------------------------------------------------------------------------

COMPILERS = ("inductor", "aot_eager", "eager")


def compile_graph(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    compiler: str,
    stamp: str,
    config: dict[str, Any] | None = None,
) -> Callable[..., Any]:
    """Hands a graph on to one of COMPILERS.

    Args:
        stamp: what the artifact depends on beside the graph and moonfx's sources.
        config: Inductor options of the user, as torch.compile(options=...) takes them.
    """
    if compiler == "inductor" and _inductor_lacks_compiler(example_inputs):
        compiler = "eager"
    if compiler == "eager":
        return gm.forward
    if compiler == "aot_eager":
        return torch._dynamo.lookup_backend("aot_eager")(gm, list(example_inputs))
    from torch._inductor import config as inductor_config
    from torch._inductor.compile_fx import compile_fx

    patches = dict(config or {})
    hook = "post_grad_custom_post_pass"
    theirs = patches.get(hook, getattr(inductor_config, hook))
    if theirs is None:
        patches[hook] = Stamp(stamp)
    else:
        hooks = list(theirs) if isinstance(theirs, list | tuple) else [theirs]
        patches[hook] = [*hooks, Stamp(stamp)]
    compiled: Any = compile_fx(gm, list(example_inputs), config_patches=patches)
    return compiled


def cpp_compiler() -> str | None:
    """The C++ compiler that Inductor will use, or None if there is none."""
    from torch._inductor import config as inductor_config

    named = inductor_config.cpp.cxx
    candidates = named if isinstance(named, list | tuple) else [named]
    for candidate in (*candidates, "g++", "clang++"):
        if candidate and shutil.which(candidate):
            return str(candidate)
    return None


def _inductor_lacks_compiler(example_inputs: Sequence[Any]) -> bool:
    tensors = [x for x in example_inputs if isinstance(x, torch.Tensor)]
    on_cpu = any(t.device.type == "cpu" for t in tensors)
    if not on_cpu or cpp_compiler() is not None:
        return False
    warn_slow(
        "no C++ compiler found, so the rewritten graph runs in eager mode, right but slower",
        "install one (apt-get install g++) or name it in CXX to get Inductor's speed",
    )
    return True


def _compile_options(backend: Callable[..., Any] | str) -> dict[str, Any]:
    """torch.compile arguments; own cache entries, so that policies never evict each other."""
    isolated = "isolate_recompiles" in inspect.signature(torch.compile).parameters
    return {"backend": backend, **({"isolate_recompiles": True} if isolated else {})}


# Whether a call that moonfx compiled is running. A plain bool, because Dynamo guards on its value.
ours_is_running = False
_running = 0
_running_lock = threading.Lock()


def _count_running(change: int) -> None:
    global ours_is_running, _running
    with _running_lock:
        _running += change
        ours_is_running = _running > 0


class TooManyGraphs(RuntimeError):
    """Dynamo would not compile one more variant of a model."""


# Prefill, chunks and decoding, each with and without padding, with and without gradients, are more
# than Dynamo's own limit of 8.
RECOMPILE_LIMIT = 64


def _as_ours(compiled: Callable[..., Any]) -> Callable[..., Any]:
    """Runs a compiled call as every moonfx call must run.

    Python floats (softmax scale, norm eps) stay constants of the graph under dynamic shapes, a
    model that meets Dynamo's recompile limit is an error and not dense from then on, and
    `stay_out_of_outer_graphs` knows that the compilation is ours.
    """

    @functools.wraps(compiled)
    def run(*args: Any, **kwargs: Any) -> Any:
        config = torch._dynamo.config
        limit = max(RECOMPILE_LIMIT, config.recompile_limit)
        settings = {
            "specialize_float": True,
            "recompile_limit": limit,
            "fail_on_recompile_limit_hit": True,
            # A deprecation warning inside torch.nn would break the graph where nothing resumes it.
            "reorderable_logging_functions": {*config.reorderable_logging_functions, warnings.warn},
        }
        # nn.TransformerEncoder's inference path is one operator that no pass can look into.
        fastpath = torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(False)
        _count_running(1)
        try:
            with torch._dynamo.config.patch(settings):
                return compiled(*args, **kwargs)
        except FailOnRecompileLimitHit as error:
            raise TooManyGraphs(
                f"the model was compiled in {limit} variants (torch._dynamo.config.recompile_limit)"
                " and would run dense from here; call it with fewer kinds of inputs, raise the "
                "limit, or moonfx.restore it. TORCH_LOGS=recompiles shows what differs"
            ) from error
        finally:
            _count_running(-1)
            torch.backends.mha.set_fastpath_enabled(fastpath)

    return run


def stay_out_of_outer_graphs(model: torch.nn.Module, args: Any) -> None:
    """A forward pre-hook: a compilation around the model breaks its graph here and calls it.

    Without it Dynamo would trace through nn.Module.compile as if it were not there, and the model
    would be dense, silently. Where a graph must not break (fullgraph=True, torch.export), Dynamo's
    error carries the message.
    """
    if torch.compiler.is_compiling() and not ours_is_running and model.__dict__.get("_moonfx"):
        torch._dynamo.graph_break(
            msg="the model is under moonfx.sparsify: call moonfx.sparsify on the outer model, or "
            "moonfx.restore first"
        )


def compile_call(
    call: Callable[..., Any], backend: Callable[..., Any], dynamic: bool | None = None
) -> Callable[..., Any]:
    """torch.compile of a call, by a backend; `dynamic` as torch.compile takes it."""
    return _as_ours(torch.compile(call, dynamic=dynamic, **_compile_options(backend)))


def compile_in_place(model: torch.nn.Module, backend: Callable[..., Any]) -> Callable[..., Any]:
    """nn.Module.compile; returns the compiled call that it put on the model."""
    model.compile(**_compile_options(backend))
    compiled: Any = model._compiled_call_impl
    return _as_ours(compiled)


def empty_results(gm: fx.GraphModule) -> Callable[..., Any] | None:
    """A function that returns zeros of the shapes that a Dynamo graph returns, without running it.

    None if a shape depends on an input, or a result is not a tensor.
    """
    (output,) = (n for n in gm.graph.nodes if n.op == "output")
    values = [getattr(n, "meta", {}).get("example_value") for n in output.args[0]]
    tensors = [v for v in values if isinstance(v, torch.Tensor) and type(v.numel()) is int]
    if len(tensors) != len(values):
        return None

    def run(*args: Any) -> tuple[torch.Tensor, ...]:
        return tuple(
            torch.zeros((), dtype=v.dtype, device=v.device).expand(v.shape) for v in tensors
        )

    return run


@contextlib.contextmanager
def empty_inductor_caches() -> Iterator[None]:
    """Inductor compiles what it compiled before, whether a file or this process remembers it."""
    from torch._inductor.utils import fresh_cache

    with fresh_cache():
        yield


def mode_options(mode: str | None) -> dict[str, Any]:
    """Inductor's options for a mode of torch.compile."""
    if mode is None or mode == "default":
        return {}
    return dict(torch._inductor.list_mode_options(mode))


def break_reasons() -> Counter[str]:
    """Why Dynamo broke graphs or left functions to Python so far, and how often."""
    return Counter(torch._dynamo.utils.counters.get("unimplemented", {}))


def is_piece(gm: fx.GraphModule) -> bool:
    """Whether a graph break cut this Dynamo graph off from the rest of its function."""
    reason = getattr(gm, "compile_subgraph_reason", None)
    frames = [frame.name for frame in getattr(reason, "user_stack", None) or []]
    resumed = any(name.startswith("torch_dynamo_resume_in") for name in frames)
    return resumed or bool(getattr(reason, "graph_break", False))


def returns_gradients(gm: fx.GraphModule) -> bool:
    """Whether gradients flow through something that a Dynamo graph returns."""
    (output,) = (n for n in gm.graph.nodes if n.op == "output")
    values = (n.meta.get("example_value") for n in output.all_input_nodes)
    return any(isinstance(value, torch.Tensor) and value.requires_grad for value in values)


def is_last_piece_of_step(gm: fx.GraphModule) -> bool:
    """Whether this Dynamo graph is what remains of an optimizer's `step` after a graph break."""
    reason = getattr(gm, "compile_subgraph_reason", None)
    frames = [frame.name for frame in getattr(reason, "user_stack", None) or []]
    resumed = frames[:1] and frames[0].startswith("torch_dynamo_resume_in_step")
    return bool(resumed) and not getattr(reason, "graph_break", False)


def break_after(gm: fx.GraphModule) -> str | None:
    """Where and why Dynamo cut this graph off from what follows it, None if it did not."""
    reason = getattr(gm, "compile_subgraph_reason", None)
    if not getattr(reason, "graph_break", False):
        return None
    frames = list(getattr(reason, "user_stack", None) or [])
    where = f"{Path(frames[-1].filename).name}:{frames[-1].lineno}: " if frames else ""
    return where + str(getattr(reason, "reason", "")).split("\n")[0]


def graph_breaks() -> list[str]:
    """Why Dynamo broke graphs since it was last reset: the first line of each cause."""
    causes = torch._dynamo.utils.counters["graph_break"]
    return list(dict.fromkeys(str(cause).split("\n")[0] for cause in causes))


def compiled_frame() -> int | None:
    """A number for the code that Dynamo compiles now, the same when it compiles it anew."""
    compiling = CompileContext.current_compile_id()
    return None if compiling is None else compiling.frame_id


def owner() -> Optimizer | torch.nn.Module | None:
    """The optimizer or module whose method Dynamo compiles, or else the nearest that called it."""
    found = (_owner_in(scope) for scope in _scopes())
    return next((each for each in found if each is not None), None)


def is_called_by_broken_step() -> bool:
    """Whether Dynamo compiles a function by itself that an optimizer's step calls.

    That is how it goes on with what a step calls whose graph is broken.
    """
    own = _owner_in(next(_scopes()))
    return own is None and isinstance(owner(), Optimizer) and bool(graph_breaks())


def _owner_in(scope: dict[str, Any]) -> Optimizer | torch.nn.Module | None:
    arguments = scope.get("args")  # of a decorator around the method
    first = arguments[:1] if isinstance(arguments, tuple) else ()
    for each in (scope.get("self"), *first):
        if isinstance(each, Optimizer):
            return each
        if isinstance(each, torch.nn.Module) and not isinstance(each, fx.GraphModule):
            return each
    return None


def _scopes() -> Iterator[dict[str, Any]]:
    """The variables of the function that Dynamo compiles, and of its callers from the inside out.

    The function itself does not run yet; between it and its callers stand Dynamo's own frames.
    """
    with contextlib.suppress(AttributeError):  # nothing is compiled
        yield InstructionTranslator.current_tx().output.local_scope
    frame = inspect.currentframe()
    while frame is not None:
        yield frame.f_locals
        frame = frame.f_back


Call = Callable[..., Any]


def plain_call(model: torch.nn.Module) -> Call:
    """What nn.Module.compile compiles: hooks and forward.

    Dynamo passes over functions of torch itself, as the forward of nn.TransformerEncoder is, unless
    they are called by another.
    """
    call: Call = model._call_impl
    return wrap_inline(call) if trace_rules.check(model.forward) else call


def compiled_call(model: torch.nn.Module) -> Call | None:
    """What calling the model runs instead of `plain_call`, if nn.Module.compile was used."""
    return model._compiled_call_impl


def set_compiled_call(model: torch.nn.Module, call: Call | None) -> None:
    model._compiled_call_impl = call


def is_left_out(module: torch.nn.Module) -> bool:
    """Whether torch.compiler.disable keeps a module, and all that it calls, from compilation."""
    context = getattr(module, "dynamo_ctx", None)
    if isinstance(context, torch._dynamo.eval_frame.DisableContext):
        return True
    return getattr(module.forward, "_torchdynamo_disable_recursive", None) is True


def is_compiled_module(model: object) -> bool:
    return isinstance(model, torch._dynamo.OptimizedModule)


@contextlib.contextmanager
def fake_values(gm: fx.GraphModule) -> Iterator[None]:
    """Runs operators on the graph's fake values."""
    mode = fake_mode_of(gm)
    with mode if mode is not None else contextlib.nullcontext(), enable_python_dispatcher():
        yield


# --- optimizers -----------------------------------------------------------------------------------

_HOOKS = (
    *("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks"),
    *("_optimizer_state_dict_pre_hooks", "_optimizer_state_dict_post_hooks"),
    *("_optimizer_load_state_dict_pre_hooks", "_optimizer_load_state_dict_post_hooks"),
)


def bare_step(kind: type) -> Callable[..., Any]:
    """The `step` of a class of optimizers without the hooks that torch runs around it."""
    step: Callable[..., Any] = kind.step  # type: ignore[attr-defined]
    return getattr(step, "__wrapped__", step) if getattr(step, "hooked", False) else step


def share_hooks(source: torch.optim.Optimizer, target: torch.optim.Optimizer) -> None:
    """Gives `target` the very hooks of `source`: a handle still removes what it registered."""
    for name in _HOOKS:
        if name in vars(source):
            setattr(target, name, getattr(source, name))


def without_hooks(attributes: dict[str, Any]) -> dict[str, Any]:
    """What an optimizer's pickle may carry: hooks stay, as torch's own optimizers have it."""
    return {k: v for k, v in attributes.items() if k not in _HOOKS and k != "step"}


def no_hooks() -> dict[str, Any]:
    """The hooks of an optimizer that has none."""
    return {name: OrderedDict() for name in _HOOKS}


def load_hooks(optimizer: torch.optim.Optimizer) -> tuple[list[Any], list[Any]]:
    """What the user registered to run before and after load_state_dict."""
    before = optimizer._optimizer_load_state_dict_pre_hooks
    after = optimizer._optimizer_load_state_dict_post_hooks
    return list(before.values()), list(after.values())


def count_as_stepped(optimizer: torch.optim.Optimizer) -> None:
    """Tells the schedulers of an optimizer that it has stepped."""
    optimizer._opt_called = True  # type: ignore[attr-defined]


def replace_step(optimizer: torch.optim.Optimizer, step: Callable[..., Any]) -> None:
    """Puts another `step` on one optimizer, without a warning from its schedulers."""
    optimizer.step = stands_for_step(step)  # type: ignore[method-assign]


def stands_for_step(function: Callable[..., Any]) -> Callable[..., Any]:
    """Marks what may be put on an optimizer as its `step` without a warning from its schedulers."""
    function._wrapped_by_lr_sched = True  # type: ignore[attr-defined]
    return function


def watched() -> bool:
    """Whether some mode sees each operator that runs, so that what is none would be missed."""
    return torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0


def compile_step(call: Callable[..., Any]) -> Callable[..., Any]:
    """torch.compile of an optimizer's pure step by Inductor, as a graph that cannot break."""
    return torch.compile(call, fullgraph=True, dynamic=False, **_compile_options("inductor"))
