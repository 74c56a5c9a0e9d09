"""Symbolic sizes: what is proved of them, what they were at the trace, and fake values."""

import contextlib
from collections.abc import Iterator
from typing import Any

import sympy
import torch
from torch import fx
from torch._dispatch.python import enable_python_dispatcher
from torch._guards import detect_fake_mode
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.experimental.symbolic_shapes import statically_known_true

Size = int | torch.SymInt


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


def hint_or_none(size: Size) -> int | None:
    """A size at the traced shape, None if only the run will know it. Adds no guard.

    The ragged dim of a jagged nested tensor has no number either.
    """
    known = size if isinstance(size, int) else size.node.hint
    return int(known) if isinstance(known, int) else None


def is_plain(value: torch.Tensor) -> bool:
    """Whether a node's value is a strided tensor of no subclass."""
    plain = type(value) in (FakeTensor, torch.Tensor, torch.nn.Parameter)
    return plain and value.layout is torch.strided


def storage_of(value: torch.Tensor) -> object:
    """What two tensors share if and only if they lie in one storage; None if that is not known."""
    return value.untyped_storage()._cdata if is_plain(value) else None


def fake_mode_of(gm: fx.GraphModule) -> Any:
    """The fake mode that the graph's values live in, or None if it has no tensor."""
    values = [n.meta.get("val") for n in gm.graph.nodes]
    return detect_fake_mode([v for v in values if isinstance(v, torch.Tensor)])


@contextlib.contextmanager
def fake_values(gm: fx.GraphModule) -> Iterator[None]:
    """Runs operators on the graph's fake values."""
    mode = fake_mode_of(gm)
    with mode if mode is not None else contextlib.nullcontext(), enable_python_dispatcher():
        yield
