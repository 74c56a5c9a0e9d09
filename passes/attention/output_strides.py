"""Keeps what follows a rewritten attention from seeing another order in memory.

    before  attention [B, H, N, D], stored as [B, H, N, D] -> view(B * H, N, D)
    after   attention [B, H, N, D], stored as [B, N, H, D] -> reshape(B * H, N, D)

The operator stores its output token by token, so that the model's own transpose(1, 2).reshape needs
no copy. Strides are followed from it through the graph until they are again what they were. Where
something on the way means another thing under other strides, the output is copied to the old ones.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from moonfx.capture.graph_nodes import is_higher_order
from moonfx.capture.sizes import hint, same_size
from moonfx.passes.context import Context
from moonfx.passes.graph.aliases import writes
from moonfx.passes.graph.nodes import call

aten = torch.ops.aten

_VIEW = {aten.view.default, aten._unsafe_view.default}
_READS_STRIDES = {
    aten.as_strided.default,
    aten.as_strided_copy.default,
    aten.as_strided_scatter.default,
    aten.is_contiguous.default,
    aten.is_contiguous.memory_format,
    aten.stride.default,
    aten.stride.int,
    aten.sym_stride.default,
    aten.sym_stride.int,
    aten.view.dtype,
    aten.view_as.default,
    aten.view_as_complex.default,
    aten.view_as_real.default,
    aten._reshape_alias.default,
}


class CannotKeep(Exception):
    """Strides that something needs and that cannot be made again."""


def keep(old: fx.Node, new: fx.Node, context: Context) -> fx.Node:
    """What to use in the place of `old`: `new`, or a copy of it with the strides of `old`.

    Works under the graph's fake mode. Turns each view of another order into a reshape, and brings
    the fake values of all that follows up to date; `old` still has its users.

    Raises:
        CannotKeep: if a copy is needed and the old strides are not those of a permuted tensor.
    """
    before = old.meta["val"]
    if same_layout(before, new.meta["val"]):
        return new
    values = _follow(old, new, context)
    if values is None:
        return copied(before, new)
    for node, value in values.items():
        node.meta["val"] = value
        if node.target in _VIEW:
            node.target = aten.reshape.default
    return new


def same_layout(a: Any, b: Any) -> bool:
    """Whether two values, tensors among them, are proved to lie in memory alike."""
    left, right = (pytree.tree_leaves(x) for x in (a, b))
    return len(left) == len(right) and all(map(_same, left, right))


def _same(a: Any, b: Any) -> bool:
    if not isinstance(a, torch.Tensor) or not isinstance(b, torch.Tensor):
        return isinstance(a, torch.Tensor) == isinstance(b, torch.Tensor)
    sizes = zip(a.shape, a.stride(), b.shape, b.stride(), strict=True)
    return (
        a.dtype == b.dtype
        and a.dim() == b.dim()
        and all(same_size(n, m) and (same_size(n, 1) or same_size(s, t)) for n, s, m, t in sizes)
    )


def _follow(old: fx.Node, new: fx.Node, context: Context) -> dict[fx.Node, Any] | None:
    """The new fake value of each node that is made from one that lies in memory otherwise.

    None if one of them is no longer what it was.
    """
    moved: dict[fx.Node, Any] = {old: new.meta["val"]}
    found: dict[fx.Node, Any] = {}
    written = context.writes(old.graph)
    if old in written:
        return None
    node, awaited = old, set(old.users)
    while awaited:  # in the order of the graph, and no further than it reaches
        node = node.next
        if node not in awaited:
            continue
        awaited.remove(node)
        if node.op != "call_function" or node in written or writes(node) or _needs_strides(node):
            return None
        try:
            found[node] = value = rerun(node, moved, context)
        except (RuntimeError, ValueError, TypeError):  # it refuses the new strides, in its own way
            return None
        if not same_layout(value, node.meta.get("val")):
            moved[node] = value
            awaited.update(node.users)
    return found


def _needs_strides(node: fx.Node) -> bool:
    """Whether a node may mean another thing under other strides."""
    if is_higher_order(node) or node.target in _READS_STRIDES:
        return True
    return getattr(node.target, "namespace", "aten") not in ("aten", "moonfx")


def rerun(node: fx.Node, moved: dict[fx.Node, Any], context: Context) -> Any:
    """A node's fake value, given its operands'; a view of another order as a reshape."""
    target: Any = aten.reshape.default if node.target in _VIEW else node.target
    args, kwargs = fx.node.map_arg(
        (node.args, node.kwargs), lambda n: moved[n] if n in moved else n.meta["val"]
    )
    with autocasts(node, context):
        return target(*args, **kwargs)


@contextlib.contextmanager
def autocasts(node: fx.Node, context: Context) -> Iterator[None]:
    """The autocasts of the graph that a node is in."""
    with contextlib.ExitStack() as stack:
        for enter in context.mode(node).autocast:
            if enter.target.__name__ in ("_enter_autocast", "wrap_with_autocast"):  # type: ignore[union-attr]
                device, dtype, enabled, cache = enter.args[:4]
                stack.enter_context(torch.autocast(device, dtype, enabled, cache))  # type: ignore[arg-type]
        yield


def copied(before: torch.Tensor, new: fx.Node) -> fx.Node:
    """A copy of `new` with the strides of `before`, by way of the order that it is dense in."""
    order = sorted(range(before.dim()), key=lambda d: -hint(before.stride()[d]))
    back = [order.index(d) for d in range(before.dim())]
    steps: list[tuple[Any, tuple[Any, ...]]] = [(aten.contiguous.default, ())]
    if order != back or order != sorted(order):
        steps = [(aten.permute.default, (order,)), *steps, (aten.permute.default, (back,))]
    node = new
    for target, args in steps:
        node = call(target, node, *args)
    if not same_layout(before, node.meta["val"]):
        raise CannotKeep(
            "what follows the attention reads its strides, and these cannot be restored: "
            f"{tuple(before.stride())}"
        )
    return node
