"""Brings a Dynamo graph to the one form that every pass is written against, pre-dispatch ATen.

Autograd is intact, SDPA, softmax and dropout are single nodes, sizes stay symbolic, and each node
carries the module and the source line that it came from.
"""

import contextlib
import functools
import itertools
import types
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import fx
from torch._dispatch.python import enable_python_dispatcher
from torch._dynamo.utils import _disable_saved_tensors_hooks_during_tracing
from torch._functorch._aot_autograd.frontend_utils import construct_fake_mode, process_inputs
from torch._ops import HigherOrderOperator
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.experimental.proxy_tensor import (
    disable_proxy_modes_tracing,
    get_proxy_mode,
    make_fx,
    snapshot_fake,
    track_tensor,
    track_tensor_tree,
)
from torch.optim.optimizer import Optimizer
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from moonfx.capture.dynamo_frames import owner, returns_gradients
from moonfx.capture.functorch_regions import isolate_transforms, under_transform
from moonfx.capture.graph_nodes import (
    BODY_OPERATORS,
    BUFFER,
    CAPTURED,
    DATA,
    TRAINED,
    placeholders,
)
from moonfx.capture.repeated_calls import Key, Written, key_of, remember

Repeats = dict[Key, Written | None]


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
        # A caller's hooks on what autograd saves (checkpoint, save_on_cpu) are for the run alone.
        no_hooks = _disable_saved_tensors_hooks_during_tracing()
        with fx.traceback.preserve_node_meta(), fake_mode, dispatcher, no_hooks:
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
    if not names:
        return
    inputs = placeholders(captured.graph)
    if not (captured._parameters or captured._buffers):
        captured._parameters, captured._buffers = gm._parameters, gm._buffers
    for name, node in zip(names, inputs[-len(names) :], strict=True):
        if name not in captured._parameters and name not in captured._buffers:
            table = "_parameters" if name in gm._parameters else "_buffers"
            getattr(captured, table)[name] = getattr(gm, table)[name]
        with captured.graph.inserting_after(inputs[-1]):
            read = captured.graph.get_attr(name)
        read.meta.update(node.meta)
        read.meta[TRAINED] = getattr(gm, name).requires_grad
        node.replace_all_uses_with(read)
        captured.graph.erase_node(node)
        if not read.users:
            captured.graph.erase_node(read)


def _keep_placeholders(
    gm: fx.GraphModule, captured: fx.GraphModule, example_inputs: Sequence[Any]
) -> None:
    """Gives placeholders their first names, and module buffers their values.

    A mask kept in a buffer can be proved from its value; `backend.guards` watches that it stays.
    """
    pairs = placeholders(gm.graph), placeholders(captured.graph)
    for old, new, value in zip(*pairs, example_inputs, strict=True):
        new.name = new.target = old.name
        new.meta.update({k: v for k, v in old.meta.items() if k in ("grapharg", "tensor_dict")})
        new.meta[TRAINED] = isinstance(value, torch.Tensor) and value.requires_grad
        source = repr(getattr(old, "_dynamo_source", ""))
        if "_buffers" in source and isinstance(value, torch.Tensor):
            new.meta[BUFFER] = value
    captured.recompile()


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
    gm = isolate_transforms(gm)
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
    captured.meta[CAPTURED] = True
    for node in captured.graph.nodes:
        if node.op == "get_attr" and isinstance(getattr(captured, node.target, None), FakeTensor):
            raise CaptureError(f"the retrace lost where '{node.name}' comes from")
    return captured


# Their results are read by nobody, and still they must not be removed.
_enter_inference = fx.node.has_side_effect(torch.autograd.grad_mode._enter_inference_mode)
_exit_inference = fx.node.has_side_effect(torch.autograd.grad_mode._exit_inference_mode)


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
            node = known.replay(n, operands, tracer.graph)
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
        if target is DATA:
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
