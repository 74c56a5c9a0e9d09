"""Attentions that run outside of every compiled graph: what no pass was ever shown.

Dynamo leaves code to Python under torch.compiler.disable, where it gives up a function, and at the
very operation that breaks a graph. A dispatch mode sees the operators that run there. It costs a
call of Python for each operator, so that it is on for calls in which something may be new:

with Watch(model) as watch:         from the start
    model(x)
with Watch(model, late=True):       from the first compilation on, if there is one
    model(x)
"""

import contextlib
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch._dynamo.callback import callback_handler
from torch._dynamo.utils import get_compilation_metrics
from torch.utils._python_dispatch import (
    TorchDispatchMode,
    _get_current_dispatch_mode,
    _len_torch_dispatch_stack,
)

aten = torch.ops.aten

TORCH = str(Path(torch.__file__).parent)
Code = tuple[str | None, str | None, int | None]  # name, file and first line of a function
DISABLED = "torch.compiler.disable keeps it from compilation"
UNKNOWN = f"{DISABLED}, or Dynamo gave its function up"
# The operators that dense attention ends in, by the beginnings of their names.
_FUSED = (
    "_scaled_dot_product",
    "scaled_dot_product",
    "_flash_attention",
    "_efficient_attention",
    "_cudnn_attention",
)
_SOFTMAX = {aten._softmax.default, aten._safe_softmax.default}
_PRODUCTS = {aten.bmm.default, aten.baddbmm.default, aten.mm.default}
# What gives probabilities a memory of their own on their way to the product with the values.
_COPIES = {
    *(aten._to_copy.default, aten.clone.default, aten.mul.Tensor, aten.div.Tensor),
    *(aten.masked_fill.Scalar, aten.native_dropout.default, aten._unsafe_view.default),
}


@dataclass(frozen=True)
class PlainAttention:
    """One attention that ran outside of every graph.

    Args:
        layer, line: module name and source line.
        form: the operator that it ended in.
        queries, keys: how many there were, None where the operator does not say.
        reason: why it is in no graph.
    """

    layer: str
    line: str
    form: str
    queries: int | None
    keys: int | None
    reason: str


class _Thread(threading.local):
    watch: "Watch | None" = None  # the innermost, on or to be


_thread = _Thread()


@contextlib.contextmanager
def unwatched() -> Iterator[None]:
    """Around each run of a compiled graph of ours, whose attentions the passes have seen."""
    watch = _thread.watch
    mode = watch.mode if watch is not None else None
    if mode is None or _get_current_dispatch_mode() is not mode:
        yield
        return
    mode.__exit__(None, None, None)
    try:
        yield
    finally:
        mode.__enter__()


class Watch:
    """Notes the attentions that run outside of every graph while it is on.

    Args:
        model: names their layers.
        late: on only once something was compiled.
    """

    def __init__(self, model: torch.nn.Module, *, late: bool = False) -> None:
        self.model, self.late = model, late
        self.seen: dict[tuple[str, str], PlainAttention] = {}
        self.mode: _Mode | None = None

    def __enter__(self) -> "Watch":
        self._outer, self._depth = _thread.watch, _len_torch_dispatch_stack()
        _thread.watch = self
        if self.late:
            if _turn_on not in callback_handler.end_callbacks:  # torch._dynamo.reset drops it
                callback_handler.register_end_callback(_turn_on)
        else:
            self.turn_on()
        return self

    @property
    def on(self) -> bool:
        """Whether it was on at any time."""
        return self.mode is not None

    def turn_on(self) -> None:
        """On from here, unless a mode of someone else's is on meanwhile, and would be shut out."""
        if not self.on and _len_torch_dispatch_stack() == self._depth:
            self.mode = _Mode(self.model, self.seen)
            self.mode.__enter__()

    def __exit__(self, *error: Any) -> None:
        _thread.watch = self._outer
        if self.mode is not None:
            self.mode.__exit__(*error)


def _turn_on(compilation: object) -> None:
    watch = _thread.watch
    if watch is not None:
        watch.turn_on()


class _Mode(TorchDispatchMode):
    """Sees every operator; keeps the attentions outside of graphs."""

    def __init__(self, model: torch.nn.Module, seen: dict[tuple[str, str], PlainAttention]) -> None:
        super().__init__()
        self.model, self.seen = model, seen
        self.names: dict[int, str] | None = None
        self.probabilities: dict[int, torch.Tensor] = {}

    supports_higher_order_operators = True

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Dynamo compiles under this mode as if it were not there."""
        return True

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(func, torch._ops.OpOverload) and not torch.compiler.is_compiling():
            self._look(func, args, result)
        return result

    def _look(self, func: Any, args: tuple[Any, ...], result: Any) -> None:
        name = func.overloadpacket.__name__
        if name.startswith(_FUSED):
            if not name.endswith("backward"):
                self._note(name, args[0].shape[-2], args[1].shape[-2])
        elif func in _SOFTMAX:
            if args[0].dim() > 2 and args[1] in (-1, args[0].dim() - 1):
                self._follow(result)
        elif not self.probabilities:
            return
        elif func in _COPIES and self._are_probabilities(args[0]):
            self._follow(result[0] if isinstance(result, tuple) else result)
        elif func in _PRODUCTS:
            left = args[func is aten.baddbmm.default]
            if self._are_probabilities(left):
                self._note("softmax", left.shape[-2], left.shape[-1])

    def _follow(self, value: torch.Tensor) -> None:
        """Probabilities, kept for a few operators more: memory that is freed may be used again."""
        self.probabilities[value.untyped_storage()._cdata] = value
        while len(self.probabilities) > 2:
            del self.probabilities[next(iter(self.probabilities))]

    def _are_probabilities(self, value: Any) -> bool:
        plain = isinstance(value, torch.Tensor) and value.layout is torch.strided
        return plain and value.untyped_storage()._cdata in self.probabilities

    def _note(self, form: str, queries: int, keys: int) -> None:
        layer, line, functions = self._place()
        if (layer, line) not in self.seen:
            found = PlainAttention(layer, line, form, queries, keys, _why(functions))
            self.seen[layer, line] = found

    def _place(self) -> tuple[str, str, list[Code]]:
        """The layer and line that run, and the functions around them, innermost first."""
        if self.names is None:
            self.names = {id(m): name for name, m in self.model.named_modules()}
        line, functions = "", list[Code]()
        frame: FrameType | None = sys._getframe(3)
        while frame is not None:
            code = frame.f_code
            if not code.co_filename.startswith(TORCH) and code.co_filename != __file__:
                line = line or f"{Path(code.co_filename).name}:{frame.f_lineno}"
                functions.append((code.co_name, code.co_filename, code.co_firstlineno))
            layer = self.names.get(id(frame.f_locals.get("self")))
            if layer is not None and (line or not layer):
                return layer, line, functions
            frame = frame.f_back
        return "", line, functions


def _why(functions: list[Code]) -> str:
    """Why code in these functions is in no graph: the latest that Dynamo said of one of them."""
    for metrics in reversed(get_compilation_metrics()):
        code = metrics.co_name, metrics.co_filename, metrics.co_firstlineno
        if metrics.fail_type is not None and code in functions:
            said = (metrics.fail_reason or metrics.fail_type).strip().splitlines()[0]
            if "torch.compiler.disable" in said:
                return DISABLED
            return f"Dynamo gave up {metrics.co_name}(): {said}"
    return UNKNOWN
