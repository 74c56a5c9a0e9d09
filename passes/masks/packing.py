"""Packed sequences: several in one row, each attending to itself alone.

    segments[b, i] == segments[b, j]        ids given by the user, or made from position_ids:
    segments = cumsum(diff(position_ids) != 1)

In a sequence that Hugging Face finds in this way positions go up one by one, so that a comparison
of position_ids is one of places: position_ids[b, j] <= position_ids[b, i] is j <= i.
"""

import sympy
import torch
from torch import fx

from moonfx.passes.graph.nodes import argument, axis, dtype, shape
from moonfx.passes.symbolic.expressions import Expr, loads
from moonfx.passes.symbolic.indices import HEAD, KEY, QUERY, Lengths
from moonfx.passes.symbolic.reader import Reader

aten = torch.ops.aten


def segments_of(atom: Expr, lengths: Lengths) -> Expr | None:
    """s(b, j) of a condition s(b, j) == s(b, i), in any spelling; None for another condition."""
    if not isinstance(atom, sympy.Eq) or atom.has(HEAD):
        return None
    terms = sympy.Add.make_args(sympy.expand(atom.lhs - atom.rhs))
    of_key = sympy.Add(*(t for t in terms if t.has(KEY)))
    of_query = sympy.Add(*(t for t in terms if not t.has(KEY)))
    if of_key.has(QUERY) or not any(x.has(KEY) for x in loads(of_key)):
        return None
    outside = of_key.subs({x: sympy.Dummy(integer=True) for x in loads(of_key)})
    if outside.has(KEY) or not all(x.is_integer for x in loads(of_key)):
        return None
    if not any(_same(of_query, of_key, offset) for offset in lengths.offsets):
        return None
    return -of_key if of_key.could_extract_minus_sign() else of_key


def _same(of_query: Expr, of_key: Expr, offset: Expr) -> bool:
    """Whether the query's part is that of the query's own key, the other way round."""
    return bool(sympy.expand(of_query.subs(QUERY, KEY - offset) + of_key) == 0)


def within(atom: Expr, segments: Expr, lengths: Lengths, reader: Reader) -> Expr:
    """A condition, given that query and key are of one sequence."""
    for offset in lengths.offsets:
        here = segments.subs(KEY, QUERY + offset)
        atom = atom.subs(here, segments)
        position = _positions(segments, reader)
        if position is not None:
            at_query = position.subs(KEY, QUERY + offset)
            atom = _expanded(atom.subs(at_query, position + QUERY + offset - KEY))
    return atom


def _expanded(atom: Expr) -> Expr:
    """Relations with everything on one side, so that what is on both sides goes."""
    relations = atom.atoms(sympy.core.relational.Relational)
    return atom.subs({r: r.func(sympy.expand(r.lhs - r.rhs), 0) for r in relations})


def _positions(segments: Expr, reader: Reader) -> Expr | None:
    """p(b, j) if the segments are cumsum(diff(p) != 1), else None."""
    (load, *others) = loads(segments)
    if others or load != segments:
        return None
    node = reader.leaf(load)
    source = _detected(node)
    if source is None:
        return None
    position = reader.broadcast(source, load.args)
    return position if loads(position) == [position] else None


def _detected(node: fx.Node) -> fx.Node | None:
    """p of cumsum(diff(p, prepend=...) != 1) over the last dim."""
    if node.target is not aten.cumsum.default or not _over_last(node, 1):
        return None
    unequal = node.args[0]
    if not isinstance(unequal, fx.Node) or unequal.target is not aten.ne.Scalar:
        return None
    difference, one = unequal.args
    if not isinstance(difference, fx.Node) or one != 1:
        return None
    if difference.target is not aten.diff.default or not _over_last(difference, 2):
        return None
    source = difference.args[0]
    wide = (torch.int64, torch.int32)  # a narrow one starts again at 0
    if dtype(node) not in wide or dtype(difference) not in wide:
        return None
    prepend, append = argument(difference, 3, "prepend"), argument(difference, 4, "append")
    once = argument(difference, 1, "n", 1) == 1 and append is None
    if not (once and isinstance(prepend, fx.Node) and isinstance(source, fx.Node)):
        return None
    return source if shape(prepend)[-1] == 1 else None


def _over_last(node: fx.Node, position: int) -> bool:
    return axis(node, argument(node, position, "dim", -1)) == len(shape(node)) - 1
