"""Writes what was proved of the keys, an expression over (batch, head, key), as a small tensor.

    real[b, j] != 0            ->  ne(real, 0)                              key_mask [B, Nk]
    segment[b, j]              ->  segment                                  segments [B, Nk]
    slope[h] * (j - (Nk - 1))  ->  slope[None, :, None] * (arange - ..)     key_bias [1, H, Nk]

Where the graph already holds such a tensor, it is used as it is. An expression is written once in
the graph that its leaves are in, for all attentions that need it; nested bodies get it passed in.
"""

import operator
from typing import Any

import sympy
import torch
from torch import fx

from moonfx.capture.graph_nodes import placeholders
from moonfx.capture.sizes import Size, expression, same_size
from moonfx.passes.context import Context
from moonfx.passes.graph.nodes import body_of, call
from moonfx.passes.masks.padding import heads_of
from moonfx.passes.symbolic.expressions import Expr, is_load, loads, rest_of
from moonfx.passes.symbolic.indices import BATCH, HEAD, KEY
from moonfx.site import AttentionSite

aten = torch.ops.aten

_RELATIONS = {
    sympy.Eq: aten.eq.Scalar,
    sympy.Ne: aten.ne.Scalar,
    sympy.Lt: aten.lt.Scalar,
    sympy.Le: aten.le.Scalar,
    sympy.Gt: aten.gt.Scalar,
    sympy.Ge: aten.ge.Scalar,
}
_FLIPPED = {sympy.Lt: sympy.Gt, sympy.Le: sympy.Ge, sympy.Gt: sympy.Lt, sympy.Ge: sympy.Le}

# The dims of what is written; a leaf is brought to them.
ROW_KEY = (BATCH, KEY)
ROW_HEAD_KEY = (BATCH, HEAD, KEY)

# A bias is clamped here, so that a key hidden by -inf weighs exp(-1e30) = 0 and not NaN in a mean.
LOWEST_BIAS = -1e30

Written = dict[tuple[Any, ...], fx.Node]


class CannotWrite(Exception):
    """An expression that has no operator form."""


class Writer:
    """Writes expressions of one site; `written` is shared by the sites of a graph."""

    def __init__(self, site: AttentionSite, context: Context, written: Written) -> None:
        self.site, self.context, self.written = site, context, written
        key = site.key.meta["val"].shape
        self.rows: Size = site.query.meta["val"].shape[0]
        self.length: Size = key[-1 if site.key_transposed else -2]
        self.heads = site.heads or 1

    def key_mask(self, predicate: Expr) -> fx.Node:
        """bool [B, Nk]"""
        return self._once("key_mask", predicate, self._whole_rows)

    def segments(self, ids: Expr) -> fx.Node:
        """integers [B, Nk]"""
        return self._once("segments", ids, self._whole_rows)

    def key_bias(self, value: Expr) -> fx.Node:
        """float32 [B or 1, H or 1, Nk]"""
        return self._once("key_bias", value, self._bias)

    def _once(self, name: str, expr: Expr, write: Any) -> fx.Node:
        sizes = expression(self.rows), expression(self.length), self.heads
        mode = self.context.mode(self.site.output)  # what is made in one may not do in another
        once = (name, expr, *sizes, self.site.unfolds, mode)
        if once not in self.written:
            leaves = [self.context.reader.leaf(x) for x in loads(expr)] or [self.site.key]
            home = leaves[0].graph
            if any(leaf.graph is not home for leaf in leaves):
                raise CannotWrite(f"{name}: its parts lie in different graphs")
            path = self._path(home, name)
            before = path[-1] if path else self.site.output
            if mode.gradients and not self.context.mode(before).gradients:
                raise CannotWrite(f"{name}: it would be written under torch.no_grad()")
            with home.inserting_before(before):
                self.sizes = _Sizes(home, before, [self.site.key, *leaves])
                node = write(expr)
            for outside in reversed(path):
                node = _pass_in(outside, node, name)
                self.context.changed(node.graph)
            self.written[once] = node
        return self.written[once]

    def _path(self, home: fx.Graph, name: str) -> list[fx.Node]:
        """The calls from the site's graph out to `home`."""
        path: list[fx.Node] = []
        graph = self.site.output.graph
        while graph is not home:
            outside = self.context.nesting.call_of(graph)
            if outside is None:
                raise CannotWrite(f"{name}: its parts lie in a nested body")
            path.append(outside)
            graph = outside.graph
        return path

    def _whole_rows(self, expr: Expr) -> fx.Node:
        node = self._write(expr, ROW_KEY)
        rows = self._rows()
        if not same_size(node.meta["val"].shape[0], rows):
            node = call(
                aten.expand.default, node, [self.sizes.of(rows), self.sizes.of(self.length)]
            )
        return node

    def _rows(self) -> Size:
        if not self.site.unfolds:
            return self.rows
        return self.rows // self.heads

    def _bias(self, expr: Expr) -> fx.Node:
        node = self._write(expr, ROW_HEAD_KEY)
        if not isinstance(node, fx.Node):  # a constant, which sink logits see
            device = self.site.key.meta["val"].device
            made = {"dtype": torch.float32, "device": device}
            node = call(aten.full.default, [1, 1, 1], node, graph=self.sizes.graph, **made)
        if node.meta["val"].dtype != torch.float32:
            node = call(aten.to.dtype, node, torch.float32)
        if any(x.has(KEY) and not x.is_integer for x in loads(expr)):
            node = call(aten.clamp.default, node, LOWEST_BIAS)
        batch, heads, keys = node.meta["val"].shape
        if not same_size(keys, self.length):
            node = call(aten.expand.default, node, [batch, heads, self.sizes.of(self.length)])
        return node

    def _write(self, expr: Expr, dims: tuple[Expr, ...]) -> Any:
        """An expression as operators on its leaves; a number where it is one."""
        if isinstance(expr, sympy.And | sympy.Or | sympy.Not):
            return self._logic(expr, dims)
        if isinstance(expr, sympy.core.relational.Relational):
            return self._relation(expr, dims)
        if is_load(expr):
            return self._load(expr, dims)
        if expr.is_number:
            return int(expr) if expr.is_Integer else float(expr)
        if expr == KEY:
            return self._arange(dims)
        if isinstance(expr, sympy.Add | sympy.Mul):
            target = aten.add.Tensor if isinstance(expr, sympy.Add) else aten.mul.Tensor
            distance = expr.coeff(KEY) == 1 and expr - KEY
            known = distance and not (distance.has(KEY, BATCH, HEAD) or loads(distance))
            if isinstance(expr, sympy.Add) and known:
                return self._shifted(distance, dims)
            tensors = [a for a in expr.args if not a.is_number]
            parts = [self._write(a, dims) for a in tensors]
            parts += [self._write(a, dims) for a in expr.args if a.is_number]
            result = parts[0]
            for part in parts[1:]:
                result = call(target, result, part)
            return result
        if isinstance(expr, sympy.Piecewise):
            return self._choice(expr, dims)
        if isinstance(expr, sympy.Pow) and expr.exp.is_Integer:
            return call(aten.pow.Tensor_Scalar, self._write(expr.base, dims), int(expr.exp))
        raise CannotWrite(f"the mask or bias is {expr}, which has no operator form here")

    def _choice(self, expr: sympy.Piecewise, dims: tuple[Expr, ...]) -> Any:
        """where(condition, first, others)"""
        value, condition = expr.args[0]
        if condition == True:  # noqa: E712
            return self._write(value, dims)
        keep = self._write(condition, dims)
        yes, no = self._write(value, dims), self._write(rest_of(expr), dims)
        target = {
            (True, True): aten.where.self,
            (True, False): aten.where.ScalarOther,
            (False, True): aten.where.ScalarSelf,
            (False, False): aten.where.Scalar,
        }[isinstance(yes, fx.Node), isinstance(no, fx.Node)]
        return call(target, keep, yes, no)

    def _logic(self, expr: Expr, dims: tuple[Expr, ...]) -> fx.Node:
        parts = [self._write(a, dims) for a in expr.args]
        if isinstance(expr, sympy.Not):
            return call(aten.logical_not.default, parts[0])
        target = aten.logical_and if isinstance(expr, sympy.And) else aten.logical_or
        result = parts[0]
        for part in parts[1:]:
            result = call(target.default, result, part)
        return result

    def _relation(self, expr: Expr, dims: tuple[Expr, ...]) -> fx.Node:
        relation, (left, right) = expr.func, expr.args
        if expr.has(KEY) and all(x.is_integer for x in loads(expr)) and _counts_keys(expr):
            return self._compared(relation, sympy.expand(left - right), dims)
        if left.is_number:
            left, right, relation = right, left, _FLIPPED.get(relation, relation)
        if not right.is_number:
            left, right = sympy.expand(left - right), sympy.S.Zero
        if relation not in _RELATIONS:
            raise CannotWrite(f"the padding predicate {expr}")
        tensor = self._write(left, dims)
        if tensor.meta["val"].dtype == torch.bool:
            if right != 0 or relation not in (sympy.Ne, sympy.Eq):
                raise CannotWrite(f"the padding predicate {expr}")
            return tensor if relation is sympy.Ne else call(aten.logical_not.default, tensor)
        number = int(right) if right.is_Integer else float(right)
        return call(_RELATIONS[relation], tensor, number)

    def _compared(self, relation: Any, difference: Expr, dims: tuple[Expr, ...]) -> fx.Node:
        """A relation of integers and places, j < length[b], each in 64 bits."""
        result: Any = self._arange(dims, torch.int64)
        result = call(aten.mul.Tensor, result, int(difference.coeff(KEY)))
        for term in sympy.Add.make_args(sympy.expand(difference - difference.coeff(KEY) * KEY)):
            if not loads(term) and not term.is_Integer:
                raise CannotWrite(f"the padding predicate {difference}")
            factor, load = term.as_coeff_Mul()
            if load == 1:
                result = call(aten.add.Tensor, result, int(factor))
                continue
            if not is_load(load):
                raise CannotWrite(f"the padding predicate {difference}")
            tensor = call(aten.to.dtype, self._load(load, dims), torch.int64)
            result = call(aten.add.Tensor, result, call(aten.mul.Tensor, tensor, int(factor)))
        return call(_RELATIONS[relation], result, 0)

    def _arange(self, dims: tuple[Expr, ...], dtype: torch.dtype = torch.float32) -> fx.Node:
        """0, 1, .. Nk - 1, by default in float32, exact up to 2**24 tokens."""
        device = self.site.key.meta["val"].device
        length = self.sizes.of(self.length)
        made = {"dtype": dtype, "device": device}
        node = call(aten.arange.default, length, graph=self.sizes.graph, **made)
        for _ in dims[:-1]:
            node = call(aten.unsqueeze.default, node, 0)
        return node

    def _shifted(self, distance: Expr, dims: tuple[Expr, ...]) -> fx.Node:
        """j + c; c may be made of sizes."""
        keys = self._arange(dims)
        from_last = sympy.expand(distance + expression(self.length) - 1)
        if distance.is_Integer:
            return call(aten.add.Tensor, keys, int(distance))
        if not from_last.is_Integer:
            raise CannotWrite(f"a bias of positions from {distance}")
        node = call(aten.sub.Tensor, keys, self.sizes.of(self.length))
        return call(aten.add.Tensor, node, 1 + int(from_last))

    def _load(self, load: Expr, dims: tuple[Expr, ...]) -> fx.Node:
        """A leaf, its dims brought to `dims` by selecting, slicing, permuting and inserting."""
        leaf, index = self.context.reader.leaf(load), list(load.args)
        for dim in reversed(range(len(index))):
            if index[dim].is_Integer:
                leaf = call(aten.select.int, leaf, dim, int(index[dim]))
                del index[dim]
        for dim, at in reversed(list(enumerate(index))):
            if (heads := heads_of(at)) is not None:
                leaf, index[dim] = call(aten.repeat_interleave.self_int, leaf, heads, dim), BATCH
            elif at == BATCH * self.heads + HEAD and self.heads > 1:
                leaf = call(aten.unflatten.int, leaf, dim, [-1, self.heads])
                index[dim : dim + 1] = [BATCH, HEAD]
            elif at == BATCH and not same_size(leaf.meta["val"].shape[dim], self._rows()):
                leaf = call(aten.slice.Tensor, leaf, dim, 0, self.sizes.of(self._rows()))
            elif at.has(KEY):
                leaf, index[dim] = self._keys(leaf, dim, sympy.expand(at - KEY)), KEY
        if len(set(index)) < len(index) or not set(index) <= set(dims):
            raise CannotWrite(f"a mask or bias read at {load.args}")
        order = [index.index(d) for d in dims if d in index]
        if order != sorted(order):
            leaf = call(aten.permute.default, leaf, order)
        for dim, wanted in enumerate(dims):
            if wanted not in index:
                leaf = call(aten.unsqueeze.default, leaf, dim)
        return leaf

    def _keys(self, leaf: fx.Node, dim: int, start: Expr) -> fx.Node:
        """leaf[j + start] for every key j, along a dim."""
        if start == 0 and same_size(leaf.meta["val"].shape[dim], self.length):
            return leaf
        if not start.is_Integer:
            raise CannotWrite(f"a mask or bias read from position {start}")
        length = self.sizes.of(self.length)
        end = length + int(start) if isinstance(length, int) else length
        if not isinstance(length, int) and start != 0:
            end = call(operator.add, length, int(start))
        return call(aten.slice.Tensor, leaf, dim, int(start), end)


def _counts_keys(relation: Expr) -> bool:
    """Whether a relation has the place of a key itself, and not just values read there."""
    return bool(relation.subs({x: sympy.Dummy(integer=True) for x in loads(relation)}).has(KEY))


class _Sizes:
    """Sizes as node arguments of one graph: a number, or a sym_size node of a tensor there."""

    def __init__(self, graph: fx.Graph, before: fx.Node, tensors: list[fx.Node]) -> None:
        self.graph = graph
        self.tensors = [n for n in (*tensors, *before.all_input_nodes) if n.graph is graph]

    def of(self, size: Size) -> Any:
        if isinstance(size, int):
            return size
        for node in self.tensors:
            value = node.meta.get("val")
            for dim, there in enumerate(getattr(value, "shape", ())):
                if not isinstance(there, int) and expression(there) == expression(size):
                    return call(aten.sym_size.int, node, dim)
        raise CannotWrite(f"no tensor at hand has the size {size}")


def _pass_in(outside: fx.Node, value: fx.Node, name: str) -> fx.Node:
    """Adds an operand to a nested body and returns its placeholder."""
    body = body_of(outside)
    assert body is not None
    outside.args = (*outside.args, value)
    last = placeholders(body.graph)[-1]
    with body.graph.inserting_after(last):
        placeholder = body.graph.placeholder(name)
    placeholder.meta["val"] = value.meta["val"]
    return placeholder
