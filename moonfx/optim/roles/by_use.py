"""How a model uses its parameters in one call: a dry run that changes nothing.

Dynamo traces the forward and every graph is captured, not run: what it gives are zeros of the
right shapes (where a model stumbles over them, the graphs are run after all). After a graph break
a graph may serve many layers, so that it is the calls of the graphs that are joined into one data
flow, each with the parameters it was called with.
"""

import contextlib
import copy
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from moonfx.capture.compiled_calls import compile_call, plain_call
from moonfx.capture.dynamo_frames import break_reasons, empty_results
from moonfx.capture.retrace import CaptureError, capture
from moonfx.capture.unsharded import unsharded
from moonfx.environment import verifying
from moonfx.model_state import records_of_model
from moonfx.passes.parameters.dataflow import DataFlow, GraphCall
from moonfx.passes.parameters.roles import Found, uses_in

log = logging.getLogger("moonfx.optim")


class Uses:
    """What a model uses its parameters for.

    Args:
        found: by the id of each parameter that a graph reads.
        complete: whether all of the call was seen, so that what no graph reads is not used.
        failures: graphs that could not be captured, and why.
        reason: why not all of the call was seen, "" if that is not known.
    """

    def __init__(
        self,
        found: dict[int, Found],
        complete: bool,
        failures: Sequence[str] = (),
        reason: str = "",
    ) -> None:
        self.found, self.complete = found, complete
        self.failures, self.reason = list(failures), reason


_SHARDED = (
    "; it is sharded, and traced as the model that it was: where sizes were divided by hand, as "
    "heads by processes, no example fits: convert without one"
)


class _Recorder:
    """A Dynamo backend that keeps the calls of its graphs.

    Args:
        runs: whether the graphs are run; else they give zeros.
    """

    def __init__(self, runs: bool) -> None:
        self.runs = runs
        self.calls: list[GraphCall] = []
        self.failures: list[str] = []
        self.graphs: dict[int, fx.GraphModule] = {}

    def __call__(self, gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        number = len(self.graphs) + len(self.failures)
        try:
            self.graphs[number] = capture(gm, example_inputs)
        except CaptureError as error:
            self.failures.append(str(error))
        run = gm.forward if self.runs else empty_results(gm) or gm.forward

        def call(*inputs: Any) -> Any:
            results = run(*inputs)
            if number in self.graphs:
                self.calls.append(GraphCall(self.graphs[number], inputs, results))
            return results

        return call

    def forget(self) -> None:
        """Lets the graphs go: Dynamo keeps what it compiled as long as the model's code lives."""
        self.calls, self.graphs = [], {}


def uses_of_call(model: nn.Module, example: tuple[Any, ...] | dict[str, Any]) -> Uses:
    """What one call of a model uses its parameters for.

    The random state, buffers and mutable inputs (a KV cache) stay as they were. A model that is
    sharded over processes is traced as the one that it was before.

    Args:
        model: inside its wrappers.
        example: positional or keyword inputs.
    Raises:
        ValueError: if the model cannot be called with them.
    """
    with unsharded(model) as meant:
        try:
            uses = _uses_of_call(model, example)
        except ValueError as error:
            raise ValueError(f"{error}{_SHARDED}") if meant else error from error.__cause__
    # What was found of a stand-in holds for the shards that it stood for.
    uses.found = {id(meant[key]) if key in meant else key: x for key, x in uses.found.items()}
    return uses


def _uses_of_call(model: nn.Module, example: tuple[Any, ...] | dict[str, Any]) -> Uses:
    """As `uses_of_call`, of a model without shards."""
    earlier = break_reasons()
    args, kwargs = (example, {}) if isinstance(example, tuple) else ((), example)
    try:
        try:
            flow, complete, failures = _traced(model, args, kwargs, _Recorder(runs=False))
        except Exception:  # noqa: BLE001 (code between two graphs may ask for more than zeros)
            flow, complete, failures = _traced(model, args, kwargs, _Recorder(runs=True))
    except Exception as error:
        raise ValueError(
            f"example: {type(model).__name__} cannot be traced with it: "
            f"{type(error).__name__}: {error}"
        ) from error
    names = {id(module): name for name, module in model.named_modules()}
    reason = "" if complete else _title(break_reasons() - earlier)
    try:
        return Uses(uses_in(flow, names), complete, failures, reason)
    except Exception as error:
        if verifying():
            raise
        log.exception("the uses of a model's parameters could not be read; please report this")
        return Uses({}, False, [*failures, f"{type(error).__name__}: {error}"])


def _traced(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], recorder: _Recorder
) -> tuple[DataFlow, bool, list[str]]:
    """The data flow of one call, whether it is all of it, and what could not be captured."""
    args, kwargs = pytree.tree_map(_copied, (args, kwargs))
    devices = [p.device for p in model.parameters() if p.device.type == "cuda"][:1]
    with torch.random.fork_rng(devices=devices), _kept_buffers(model):
        returned = compile_call(plain_call(model), recorder)(*args, **kwargs)
    given = [*pytree.tree_leaves((args, kwargs)), *model.parameters(), *model.buffers()]
    complete = not recorder.failures and _is_complete(recorder.calls, given, returned)
    # Of a complete call everything goes back to its caller, also in a cache that is no pytree.
    flow = DataFlow(recorder.calls, None if complete else pytree.tree_leaves(returned))
    recorder.forget()
    return flow, complete, recorder.failures


def _title(reasons: Counter[str]) -> str:
    """Dynamo's last reason without its hints: what came last, and where it left off."""
    last = next(reversed(reasons), "").split(" ***\n")[-1].strip()
    title, *rest = last.split("\n")
    where = next((x for x in rest if "Developer debug context: " in x), "").partition(": ")[2]
    return f"{title} ({where})" if where else title


def _is_complete(calls: Sequence[GraphCall], given: Sequence[Any], returned: Any) -> bool:
    """Whether one graph makes all that a call returns of all that it was given."""
    if len(calls) != 1:
        return False
    (call,) = calls
    known = {id(x) for x in given}
    results = {id(x) for x in call.results}
    tensors = [x for x in call.inputs if isinstance(x, torch.Tensor)]
    out = [x for x in pytree.tree_leaves(returned) if isinstance(x, torch.Tensor)]
    return all(id(x) in known for x in tensors) and all(id(x) in results | known for x in out)


def uses_recorded(model: nn.Module) -> Uses | None:
    """What the graphs that moonfx compiled for a model use its parameters for.

    None if it compiled none. A graph that a break cut off serves many layers, and was recorded for
    the first. What is not in a graph may be used in one that is still to come.
    """
    names = {id(module): name for name, module in model.named_modules()}
    found: dict[int, Found] = {}
    records = records_of_model(model)
    for record in records:
        for key, use in record.uses(names).items():
            found[key] = use if key not in found else _agreed(found[key], use)
    return Uses(found, False) if records else None


def _agreed(one: Found, other: Found) -> Found:
    """What two graphs say together."""
    if one.role is None or other.role is None:
        return one if other.role is None else other
    if one[:1] + one[2:] == other[:1] + other[2:]:
        return one
    return Found(None, f"its use is not clear: {one.role}, {one.why}; {other.role}, {other.why}")


def _copied(argument: Any) -> Any:
    """An input that the call may change; a tensor is only read."""
    return argument if isinstance(argument, torch.Tensor) else copy.deepcopy(argument)


@contextlib.contextmanager
def _kept_buffers(model: nn.Module) -> Iterator[None]:
    """Puts back the buffers, and their numbers, that code between two graphs may have changed.

    The version of a tensor does not say it: batch norm's kernel of the CPU leaves it as it was.
    """
    places = [(module, dict(module._buffers)) for module in model.modules()]
    before = [(b, b._version, b.clone()) for b in model.buffers() if b.numel()]
    try:
        yield
    finally:
        for module, buffers in places:
            module._buffers.update(buffers)
        with torch.no_grad():
            for buffer, version, value in before:
                if buffer._version != version or not _equal(buffer, value):
                    buffer.copy_(value)


def _equal(buffer: torch.Tensor, value: torch.Tensor) -> bool:
    """Whether a buffer has its numbers still; one that is expanded could not be written to."""
    try:
        if buffer.is_meta or torch.equal(buffer, value):
            return True
    except NotImplementedError:  # of 4-bit types and some subclasses: the version is all there is
        return True
    return bool(((buffer == value) | ((buffer != buffer) & (value != value))).all())
