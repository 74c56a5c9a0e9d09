"""Which axes of a call's inputs are batch and tokens, and the same call at another size.

The first tensor of two or more axes says how long the call is: [batch, tokens, ...]. In every other
tensor the first axis is the batch if it is as long, the second the tokens if it is as long; so are
the last two of a mask [batch or 1, heads, tokens, tokens], and the one axis of a tensor [tokens].
"""

import inspect
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import Tensor
from torch.export import Dim, ExportedProgram
from torch.utils import _pytree as pytree

from moonfx.capture.sizes import Size, expression


def by_name(
    model: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[str, Any]:
    """A call's arguments as torch.export names them.

    Raises:
        TypeError: if the model cannot be called so.
    """
    try:
        bound = inspect.signature(model.forward).bind(*args, **kwargs)
    except TypeError as error:
        raise TypeError(
            f"args and kwargs do not fit {type(model).__name__}.forward: {error}"
        ) from None
    return dict(bound.arguments)


def token_input(arguments: Any) -> Tensor:
    """The tensor that says the call's batch size and length.

    Raises:
        ValueError: if there is none.
    """
    for leaf in pytree.tree_leaves(arguments):
        if isinstance(leaf, Tensor) and leaf.dim() >= 2:
            return leaf
    raise ValueError("args must hold a tensor [batch, tokens, ...]; got none of two or more axes")


def axes_of(tensor: Tensor, batch: int, length: int) -> dict[int, str]:
    """Which axes of a tensor are the batch and the tokens."""
    if tensor.dim() == 1:
        return {0: "sequence"} if tensor.shape[0] == length else {}
    axes = {0: "batch"} if tensor.dim() and tensor.shape[0] == batch else {}
    is_mask = tensor.dim() == 4 and tensor.shape[2] == tensor.shape[3] == length
    if tensor.dim() >= 2 and tensor.shape[1] == length and not is_mask:
        axes[1] = "sequence"
    elif tensor.dim() == 4:
        axes.update({axis: "sequence" for axis in (2, 3) if tensor.shape[axis] == length})
    return axes


def dynamic_shapes(arguments: Mapping[str, Any], dims: Mapping[str, Any]) -> dict[str, Any]:
    """torch.export's dynamic_shapes: batch and tokens of every input at any size."""
    batch, length = token_input(arguments).shape[:2]

    def spec(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return None
        return {axis: dims[name] for axis, name in axes_of(leaf, batch, length).items()}

    return {name: pytree.tree_map(spec, value) for name, value in arguments.items()}


def large_enough(call: Any) -> Any:
    """The call with two rows and two tokens at least: torch.export takes an axis of 1 for fixed."""
    batch, length = token_input(call).shape[:2]
    sizes = {"batch": max(2, batch), "sequence": max(2, length)}

    def resize(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        for axis, name in axes_of(leaf, batch, length).items():
            leaf = repeated(leaf, axis, sizes[name])
        return leaf

    return pytree.tree_map(resize, call)


def repeated(tensor: Tensor, axis: int, size: int) -> Tensor:
    """The tensor with another size of one axis: its own entries, from the first, over again."""
    if tensor.shape[axis] == size:
        return tensor
    index = torch.arange(size, device=tensor.device) % tensor.shape[axis]
    return tensor.index_select(axis, index)


@dataclass
class Inputs:
    """The inputs of an exported program, and the symbols in their shapes.

    Args:
        program: the exported program.
        call: the (args, kwargs) that it was exported with, as tensors.
        from_one: an axis that starts at 2 starts so because torch.export takes an axis of 1 for
            fixed, not because someone said so; it is checked from 1.
    """

    program: ExportedProgram
    call: tuple[tuple[Any, ...], dict[str, Any]]
    from_one: bool = False

    def __post_init__(self) -> None:
        leaves, self.spec = pytree.tree_flatten(self.call)
        values = {n.name: n.meta.get("val") for n in self.program.graph.nodes}
        names = self.program.graph_signature.user_inputs
        self.leaves: list[Any] = leaves
        self.names = [str(name) for name in names]
        self.shapes: list[tuple[Size, ...] | None] = [
            tuple(values[str(name)].shape) if isinstance(leaf, Tensor) else None
            for name, leaf in zip(names, leaves, strict=True)
        ]
        self.batch, self.length = _first(leaves)
        self.axes: dict[sympy.Symbol, str] = {}
        self.traced: dict[sympy.Symbol, int] = {}
        for leaf, shape in zip(leaves, self.shapes):
            names_of: dict[int, str] = {}
            if shape and self.batch is not None and self.length is not None:
                names_of = axes_of(leaf, self.batch, self.length)
            for axis, size in enumerate(shape or ()):
                symbol = expression(size)
                if isinstance(symbol, sympy.Symbol):
                    self.traced[symbol] = leaf.shape[axis]
                    if axis in names_of:
                        self.axes.setdefault(symbol, names_of[axis])

    def limit(self, axis: str) -> tuple[int, int]:
        """The smallest and the largest size of an axis that the program allows, 1 at least."""
        known = self.program.range_constraints
        ranges = [known[s] for s, name in self.axes.items() if name == axis and s in known]
        upper = (int(r.upper) for r in ranges if isinstance(r.upper, sympy.Integer))
        lower = max(1, *(int(r.lower) for r in ranges))
        return 1 if self.from_one and lower == 2 else lower, min([2**31, *upper])

    def sizes(self) -> list[tuple[int | None, int | None]]:
        """Batch sizes and lengths to check: as traced, a third, about twice, and one token."""
        asked: list[tuple[int | None, int | None]] = [(self.batch, self.length)]
        if not self.axes:
            return asked
        assert self.batch is not None
        assert self.length is not None
        for batch, length in (
            (1, self.length // 3),
            (3, 2 * self.length + 8),
            (1, 1),
        ):
            size = (self._within("batch", batch), self._within("sequence", length))
            if size not in asked:
                asked.append(size)
        return asked

    def _within(self, axis: str, size: int) -> int:
        if axis not in self.axes.values():
            traced = self.batch if axis == "batch" else self.length
            assert traced is not None
            return traced
        lower, upper = self.limit(axis)
        return min(max(size, lower), upper)

    def at(self, batch: int | None, length: int | None) -> list[Any]:
        """The inputs, flat, at another batch size and length."""
        asked = {"batch": batch, "sequence": length}
        sizes = {**self.traced, **{symbol: asked[name] for symbol, name in self.axes.items()}}
        resized: list[Any] = []
        first = True
        for leaf, shape in zip(self.leaves, self.shapes):
            for axis, size in enumerate(shape or ()):
                leaf = repeated(leaf, axis, int(expression(size).subs(sizes)))
            if shape is not None and len(shape) >= 2 and first:
                first, leaf = False, _rows_unlike(leaf)
            resized.append(leaf)
        return resized

    def unflatten(self, leaves: list[Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        args, kwargs = pytree.tree_unflatten(leaves, self.spec)
        return args, kwargs


def _first(leaves: list[Any]) -> tuple[int | None, int | None]:
    shape = next((x.shape for x in leaves if isinstance(x, Tensor) and x.dim() >= 2), None)
    return (None, None) if shape is None else (shape[0], shape[1])


def _rows_unlike(tokens: Tensor) -> Tensor:
    """Rows shifted against each other, so that repeated ones differ."""
    rows = [row.roll(7 * i, 0) for i, row in enumerate(tokens)]
    return torch.stack(rows)


def parameters(model: torch.nn.Module) -> list[str]:
    """Names of the arguments of the model's forward, in order."""
    return list(inspect.signature(model.forward).parameters)


def exported(
    model: torch.nn.Module,
    call: tuple[tuple[Any, ...], dict[str, Any]],
    dynamic: bool | Mapping[str, Any],
) -> ExportedProgram:
    """torch.export of a call; with dynamic=True, over the sizes that the model can have.

    Raises:
        ValueError: if the model fixes an axis that should be dynamic.
    """
    args, kwargs = call
    dims: dict[str, Any] = {"batch": Dim("batch"), "sequence": Dim("sequence")}
    for _ in range(4):
        shapes: Any = dynamic or None
        if dynamic is True:
            shapes = dynamic_shapes(by_name(model, args, kwargs), dims)
        try:
            return torch.export.export(model, args, kwargs, dynamic_shapes=shapes, strict=False)
        except Exception as error:
            if dynamic is not True or Dim.DYNAMIC in dims.values():
                raise
            last, narrowed = error, _narrowed(str(error), dims)
            # Where nothing is suggested (a length that the model wants apart: a slice that is the
            # whole of a buffer) torch.export finds the range, but not that two inputs' are equal.
            dims = dict.fromkeys(dims, Dim.DYNAMIC) if narrowed == dims else narrowed
        if fixed := [f"{name} {size}" for name, size in dims.items() if isinstance(size, int)]:
            raise ValueError(
                f"{type(model).__name__} can be exported for {' and '.join(fixed)} only: pass "
                f"dynamic=False, or torch.export's dynamic_shapes as dynamic.\n{last}"
            ) from last
    raise last


def _narrowed(message: str, dims: dict[str, Any]) -> dict[str, Any]:
    """Axes with the ranges, or the fixed sizes, that torch.export suggests."""
    narrowed = dict(dims)
    for name, fix in re.findall(r"^ *(batch|sequence) = (.+?)\s*$", message, re.MULTILINE):
        ends = {end: int(size) for end, size in re.findall(r"(min|max)=(\d+)", fix)}
        if ends:
            old = narrowed[name]
            narrowed[name] = Dim(name, **{"min": old.min, "max": old.max, **ends})
        elif fix.isdigit():
            narrowed[name] = int(fix)
    return narrowed
