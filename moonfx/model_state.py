"""What moonfx keeps on a model that is under `sparsify`, and the switches that read it."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from torch.utils.hooks import RemovableHandle

from moonfx.backend.records import Record, records_of
from moonfx.backend.rewriter import Backend
from moonfx.capture.compiled_calls import compile_call, compiled_call, plain_call, set_compiled_call
from moonfx.policy import Policies

Module = TypeVar("Module", bound=torch.nn.Module)
STATE = "_moonfx"


class State:
    """What moonfx keeps on a model; copies and pickles of the model do not take it along.

    Attributes:
        before: the compiled call that the model had before.
        sparse, dense: the compiled calls of its own; the second only once it was asked for.
        called: whether it has been called.
        judged: of how many of the backend's graphs it was said what there is to say.
        paths: sets of graphs that ran in one call -> what is to be said of attentions that run
            outside of every graph in such a call.
        in_pieces: whether a call ran anything but one graph.
        watch_next: whether the next call is looked at for such attentions.
        switches: how many `full_attention` are on.
        hook: keeps compilations around the model out of it.
    """

    def __init__(self, before: Callable[..., Any] | None, backend: Backend, on_miss: str) -> None:
        self.before, self.backend, self.on_miss = before, backend, on_miss
        self.sparse: Callable[..., Any] | None = None
        self.dense: Callable[..., Any] | None = None
        self.called = False
        self.judged = 0
        self.paths: dict[frozenset[int], list[str]] = {}
        self.in_pieces = False
        self.watch_next = True
        self.switches = 0
        self.hook: RemovableHandle | None = None

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return (type(None), ())


def restore(model: Module) -> Module:
    """Undoes `sparsify`: the model runs as it did before, bit for bit.

    Raises:
        ValueError: if the model is not sparsified.
    """
    state = required_state(model, "restore")
    set_compiled_call(model, state.before)
    if state.hook is not None:
        state.hook.remove()
    del model.__dict__[STATE]
    return model


def policies_of(model: torch.nn.Module, verb: str) -> Policies:
    """The policies that a model is under.

    Raises:
        TypeError, ValueError: naming `verb`, if it is not under `sparsify`.
    """
    policies = required_state(model, verb).backend.policies
    assert policies is not None
    return policies


@contextlib.contextmanager
def traced_plain(model: torch.nn.Module) -> Iterator[None]:
    """The model as if it were not under `sparsify`, for a trace that runs passes of its own."""
    state, call = model.__dict__.pop(STATE), compiled_call(model)
    set_compiled_call(model, None)
    try:
        yield
    finally:
        set_compiled_call(model, call)
        model.__dict__[STATE] = state


class full_attention:  # noqa: N801 (a verb to its callers)
    """Dense attention now, sparse again after: a context manager, and a switch.

        with moonfx.full_attention(model): ...       # dense inside
        switch = moonfx.full_attention(model)        # dense from here
        switch.off()                                 # sparse again; nothing is compiled anew

    Dense attention runs through the same compiler. No state of the model or optimizer is lost.

    Raises:
        ValueError: if the model is not sparsified.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self.model, self.state, self.on = model, required_state(model, "full_attention"), True
        state = self.state
        if state.dense is None:
            dense = Backend(None, state.backend.compiler)
            state.dense = compile_call(plain_call(model), dense)
        state.switches += 1
        set_compiled_call(model, state.dense)

    def off(self) -> None:
        """Sparse again, once every switch that is on has been turned off."""
        self.state.switches -= self.on
        self.on = False
        if not self.state.switches and state_of(self.model) is self.state:
            set_compiled_call(self.model, self.state.sparse)

    def __enter__(self) -> None:
        return None

    def __exit__(self, *error: object) -> None:
        self.off()


def records_of_model(model: torch.nn.Module) -> list[Record]:
    """The graphs compiled so far for a model, or for one inside it, with what they hold."""
    states = [state for module in model.modules() if (state := state_of(module)) is not None]
    own = [record for state in states for record in state.backend.records]
    return own + records_of(model.parameters())


def sparse_inside(model: torch.nn.Module) -> list[str]:
    """The names of the modules in a model that are under `sparsify` themselves."""
    return [name for name, m in model.named_modules() if name and state_of(m) is not None]


def state_of(model: object) -> State | None:
    found = getattr(model, "__dict__", {}).get(STATE)
    return found if isinstance(found, State) else None


def required_state(model: torch.nn.Module, verb: str) -> State:
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"{verb}: model must be a torch.nn.Module, got {type(model).__name__}")
    state = state_of(model)
    if state is None:
        raise ValueError(
            f"{verb}: model must be under moonfx.sparsify, and this {type(model).__name__} is not"
        )
    return state
