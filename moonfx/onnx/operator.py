"""moonfx::moba_attention in standard ONNX operators of opset 18, for onnxruntime on any device.

    key ranks -> blocks [B, n, Nk] -> block means -> gate [B, Hq, Nq, n] -> TopK -> chosen
    scores [B, Hq, Nq, Nk] -> softcap, bias -> Where(chosen[block of key], score, lowest) -> Softmax

Every size is read at run time, so one file serves any batch and length; the number of blocks n is
ceil(Nk / block), and TopK's k is clamped to it. The routing is MoBA's to the tie (ONNX TopK, too,
gives a tie to the lower index), but the scores are dense: [B, Hq, Nq, Nk] in float32, because no
standard operator skips a block. A file computes what the sparse model computes; it does not save
what the sparse kernels save.

Shape letters: B batch, Hq query heads, Hkv key/value heads, G query heads per key head, Nq queries,
Nk keys, D head dim, Dv value dim, n blocks. "1" in a shape stands for an axis that broadcasts.
"""

from dataclasses import dataclass
from typing import Any

from moonfx.kernels.common.arguments import MobaArguments
from moonfx.ops.moba import parse

# A value of the ONNX graph under construction; onnxscript has no public name for it.
Value = Any

FLOAT, INT64 = 1, 7  # onnx.TensorProto.DataType

# Below every float32 score, and finite: a row that sees nothing gives no NaN.
LOWEST = -3.4028234663852886e38


@dataclass
class Keys:
    """Where keys stand and which block each is in.

    Args:
        rank: int64 [B or 1, Nk], the real keys at or before a key (of its segment), less one.
        real: bool [B, Nk], None where every key is real.
        member: float [B or 1, n, Nk], 1 where a real key is in a block.
        index: int64 [B or 1, 1, n], a block's place in its segment.
        block_segment: [B, 1, n], a block's segment, None where there is one.
        exists: bool [B or 1, 1, n], whether the block holds a key.
        by_key: int64 [Nk], the block of each key, where that is the same in every row; else None.
    """

    rank: Value
    real: Value | None
    member: Value
    index: Value
    block_segment: Value | None
    exists: Value
    by_key: Value | None


def moba_attention(query, key, value, *rest, **named):  # type: ignore[no-untyped-def]
    """The translation: arguments and results are those of torch.ops.moonfx.moba_attention.

    But for the routes, which only a backward reads, as it does `recompute`: a file has neither.
    Computes in float32; float16 and bfloat16 inputs are cast, and out is cast back.
    """
    from onnxscript import opset18 as op

    arguments, _ = parse(rest, named)
    key_mask, segments, key_bias = arguments.key_mask, arguments.segments, arguments.key_bias
    ops = _Ops(op)
    queries, length = ops.size(query, 2), ops.size(key, 2)
    dtype_like = query
    query, key, value = (op.Cast(x, to=FLOAT) for x in (query, key, value))
    keys = _keys(ops, length, arguments.block, key_mask, segments)
    if keys.real is not None:
        # Not even a NaN under the padding may count.
        outside = op.Unsqueeze(op.Not(keys.real), ops.vector(1, 3))
        key, value = (op.Where(outside, ops.scalar(0.0), x) for x in (key, value))
    if key_bias is not None:
        key_bias = op.Cast(key_bias, to=FLOAT)
        if keys.real is not None:
            hidden = op.Unsqueeze(op.Not(keys.real), ops.vector(1))
            key_bias = op.Where(hidden, ops.scalar(0.0), key_bias)
    scale = _scale(ops, arguments.scale, query)
    gate = _gate(ops, query, key, key_bias, keys, scale, arguments.block_means)
    seen, chosen = _choose(ops, gate, keys, length, queries, arguments)
    visible = _visible(ops, chosen, keys, length, queries, arguments.causal)

    score = _by_group(ops, op.Mul(query, scale), op.Transpose(key, perm=[0, 1, 3, 2]))
    if arguments.softcap:
        softcap = ops.scalar(float(arguments.softcap))
        score = op.Mul(op.Tanh(op.Div(score, softcap)), softcap)
    if key_bias is not None:
        score = op.Add(score, op.Unsqueeze(key_bias, ops.vector(2)))
    score = op.Where(visible, score, ops.scalar(LOWEST))
    out = _by_group(ops, op.Softmax(score, axis=-1), value)
    lse = op.ReduceLogSumExp(score, ops.vector(-1), keepdims=0)
    if seen is not None:  # [B or 1, 1, Nq]
        out = op.Where(op.Unsqueeze(seen, ops.vector(3)), out, ops.scalar(0.0))
        lse = op.Where(seen, lse, ops.scalar(float("-inf")))
    return op.CastLike(out, dtype_like), lse


class _Ops:
    """Constants and sizes in one opset."""

    def __init__(self, op: Any) -> None:
        self.op = op

    def scalar(self, number: float) -> Value:
        """int64 for an int, float32 for a float."""
        if isinstance(number, int):
            return self.op.Constant(value_int=number)
        return self.op.Constant(value_float=number)

    def vector(self, *numbers: int) -> Value:
        return self.op.Constant(value_ints=list(numbers))

    def size(self, tensor: Value, axis: int) -> Value:
        """One size as int64 [1]."""
        return self.op.Shape(tensor, start=axis, end=axis + 1)

    def join(self, *parts: Value | int) -> Value:
        """A shape of known and of run-time sizes."""
        sizes = [self.vector(p) if isinstance(p, int) else p for p in parts]
        return self.op.Concat(*sizes, axis=0)

    def range(self, size: Value) -> Value:
        """int64 [size]: 0, 1, ..."""
        return self.op.Range(self.scalar(0), self.op.Squeeze(size), self.scalar(1))

    def all(self, *conditions: Value | None) -> Value:
        known = [c for c in conditions if c is not None]
        result = known[0]
        for condition in known[1:]:
            result = self.op.And(result, condition)
        return result


def _scale(ops: _Ops, scale: float | None, query: Value) -> Value:
    if scale is not None:
        return ops.scalar(float(scale))
    op = ops.op
    return op.Reciprocal(op.Sqrt(op.Cast(ops.size(query, 3), to=FLOAT)))


def _by_group(ops: _Ops, left: Value, right: Value) -> Value:
    """[B, Hq, Nq, x] @ [B, Hkv, x, y]: no key head is copied for its group."""
    op = ops.op
    rows = op.Reshape(left, ops.join(ops.vector(0), ops.size(right, 1), -1, ops.size(left, 3)))
    product = op.MatMul(rows, right)
    shape = op.Concat(op.Shape(left, start=0, end=3), ops.size(right, 3), axis=0)
    return op.Reshape(product, shape, allowzero=1)


def _keys(
    ops: _Ops, length: Value, block: int, key_mask: Value | None, segments: Value | None
) -> Keys:
    op = ops.op
    if segments is not None:
        return _packed_keys(ops, length, block, key_mask, segments)
    n = op.Div(op.Add(length, ops.vector(block - 1)), ops.vector(block))
    index = ops.range(n)
    by_key = None
    if key_mask is None:
        rank = op.Unsqueeze(ops.range(length), ops.vector(0))
    else:
        rank = op.Sub(op.CumSum(op.Cast(key_mask, to=INT64), ops.scalar(1)), ops.scalar(1))
    place = op.Div(op.Max(rank, ops.scalar(0)), ops.scalar(block))
    if key_mask is None:
        by_key = op.Squeeze(place, ops.vector(0))
    member = _members(ops, index, place, key_mask)
    return Keys(
        rank=rank,
        real=key_mask,
        member=member,
        index=op.Unsqueeze(index, ops.vector(0, 1)),
        block_segment=None,
        exists=_exists(ops, member),
        by_key=by_key,
    )


def _packed_keys(
    ops: _Ops, length: Value, block: int, key_mask: Value | None, segments: Value
) -> Keys:
    """Blocks of every segment of a row, numbered by the index of their first key."""
    op = ops.op
    column, row = ops.vector(2), ops.vector(1)
    index = ops.range(length)
    real = None if key_mask is None else op.Unsqueeze(key_mask, row)
    same = op.Equal(op.Unsqueeze(segments, column), op.Unsqueeze(segments, row))  # [B, Nk, Nk]
    before = op.LessOrEqual(index, op.Unsqueeze(index, row))
    counted = op.Cast(ops.all(op.And(same, before), real), to=INT64)
    rank = op.Sub(op.ReduceSum(counted, ops.vector(-1), keepdims=0), ops.scalar(1))
    place = op.Div(op.Max(rank, ops.scalar(0)), ops.scalar(block))

    starts = op.Equal(op.Mod(rank, ops.scalar(block)), ops.scalar(0))
    first = ops.all(starts, key_mask)  # [B, Nk], the first key of a block
    number = op.CumSum(op.Cast(first, to=INT64), ops.scalar(1))
    most = op.ReduceMax(op.Reshape(number, ops.vector(-1)), ops.vector(0), keepdims=1)
    number = op.Sub(number, ops.scalar(1))
    siblings = op.And(same, op.Equal(op.Unsqueeze(place, column), op.Unsqueeze(place, row)))
    siblings = op.And(siblings, op.Unsqueeze(first, row))
    of_key = op.Where(siblings, op.Unsqueeze(number, row), ops.scalar(0))
    of_key = op.ReduceSum(of_key, ops.vector(-1), keepdims=0)  # one term each: its block's number

    blocks = ops.range(op.Max(most, ops.vector(1)))
    starts = _members(ops, blocks, number, first)
    at = op.ArgMax(starts, axis=2, keepdims=0)  # [B, n], the index of a block's first key
    member = _members(ops, blocks, of_key, key_mask)
    return Keys(
        rank=rank,
        real=key_mask,
        member=member,
        index=op.Unsqueeze(op.GatherElements(place, at, axis=1), row),
        block_segment=op.Unsqueeze(op.GatherElements(segments, at, axis=1), row),
        exists=_exists(ops, member),
        by_key=None,
    )


def _members(ops: _Ops, index: Value, block_of: Value, real: Value | None) -> Value:
    """float [B or 1, n, Nk]: 1 where a real key is in a block."""
    op = ops.op
    equal = op.Equal(op.Unsqueeze(index, ops.vector(1)), op.Unsqueeze(block_of, ops.vector(1)))
    real = None if real is None else op.Unsqueeze(real, ops.vector(1))
    return op.Cast(ops.all(equal, real), to=FLOAT)


def _exists(ops: _Ops, member: Value) -> Value:
    op = ops.op
    most = op.ReduceMax(member, ops.vector(-1), keepdims=0)
    return op.Unsqueeze(op.Greater(most, ops.scalar(0.5)), ops.vector(1))


def _gate(
    ops: _Ops,
    query: Value,
    key: Value,
    key_bias: Value | None,
    keys: Keys,
    scale: Value,
    block_means: Value | None,
) -> Value:
    """Score of each block for each query, [B, Hq, Nq, n]: eq. 6, plus what the bias adds."""
    op = ops.op
    count = op.ReduceSum(keys.member, ops.vector(-1), keepdims=1)  # [B or 1, n, 1]
    share = op.Div(keys.member, op.Max(count, ops.scalar(1.0)))
    if block_means is None:
        means = op.MatMul(op.Unsqueeze(share, ops.vector(1)), key)
    else:  # those of all blocks but the last, or more: the last is never a candidate
        means = op.Slice(
            op.Pad(block_means, ops.vector(0, 0, 0, 0, 0, 0, 1, 0)),
            ops.vector(0),
            ops.size(count, 1),
            ops.vector(2),
        )
    gate = _by_group(ops, query, op.Transpose(means, perm=[0, 1, 3, 2]))
    if key_bias is None:
        return gate
    bias = op.MatMul(key_bias, op.Transpose(share, perm=[0, 2, 1]))
    return op.Add(gate, op.Unsqueeze(op.Div(bias, scale), ops.vector(2)))


def _at_queries(ops: _Ops, by_key: Value, length: Value, queries: Value) -> Value:
    """[B or 1, Nk] at the queries' own keys, the last Nq: [B or 1, 1, Nq, 1]."""
    op = ops.op
    own = op.Slice(by_key, op.Sub(length, queries), length, ops.vector(1))
    return op.Unsqueeze(own, ops.vector(1, 3))


def _choose(
    ops: _Ops,
    gate: Value,
    keys: Keys,
    length: Value,
    queries: Value,
    arguments: MobaArguments,
) -> tuple[Value | None, Value]:
    """Which queries see a key, [B or 1, 1, Nq] or None for all; which blocks, [B, Hq, Nq, n] or
    what broadcasts to it."""
    op = ops.op
    block, topk, sinks = arguments.block, arguments.topk, arguments.sinks
    segments, causal = arguments.segments, arguments.causal
    rank = _at_queries(ops, keys.rank, length, queries)
    own = op.Div(op.Max(rank, ops.scalar(0)), ops.scalar(block))
    index = op.Unsqueeze(keys.index, ops.vector(1))  # [B or 1, 1, 1, n]
    within = op.Unsqueeze(keys.exists, ops.vector(1))
    if segments is not None:
        mine = _at_queries(ops, segments, length, queries)
        within = op.And(within, op.Equal(mine, op.Unsqueeze(keys.block_segment, ops.vector(1))))
    if keys.real is None:
        seen = None
    elif causal:
        seen = op.Squeeze(op.GreaterOrEqual(rank, ops.scalar(0)), ops.vector(3))
    else:
        most = op.ReduceMax(op.Cast(within, to=FLOAT), ops.vector(-1), keepdims=0)
        seen = op.Greater(most, ops.scalar(0.5))
    if causal:
        within = op.And(within, op.LessOrEqual(index, own))

    always = op.Equal(index, own)
    if sinks:
        always = op.Or(always, op.Less(index, ops.scalar(sinks)))
    candidate = op.And(within, op.Not(always))
    chosen = op.And(within, always)
    # A query in a sink block has one place more, which only later blocks could take.
    wider = sinks > 0 and not causal
    places = topk - sinks - (not wider)
    if places:
        score = op.Where(candidate, gate, ops.scalar(float("-inf")))
        k = op.Min(ops.vector(places), ops.size(gate, 3))
        _, best = op.TopK(score, k, axis=-1, largest=1, sorted=1)
        taken = op.Expand(ops.scalar(1.0), op.Shape(best))
        if wider:
            limit = op.Where(
                op.Less(own, ops.scalar(sinks)), ops.scalar(places), ops.scalar(places - 1)
            )
            taken = op.Mul(taken, op.Cast(op.Less(ops.range(k), limit), to=FLOAT))
        none = op.Expand(ops.scalar(0.0), op.Shape(gate))
        taken = op.ScatterElements(none, best, taken, axis=-1)
        chosen = op.Or(chosen, op.And(candidate, op.Greater(taken, ops.scalar(0.5))))
    return seen, chosen


def _visible(
    ops: _Ops, chosen: Value, keys: Keys, length: Value, queries: Value, causal: bool
) -> Value:
    """Which keys each query attends, [B, Hq, Nq, Nk]."""
    op = ops.op
    if keys.by_key is not None:
        visible = op.Gather(chosen, keys.by_key, axis=3)
    else:
        member = op.Unsqueeze(keys.member, ops.vector(1))
        visible = op.Greater(op.MatMul(op.Cast(chosen, to=FLOAT), member), ops.scalar(0.5))
    if not causal:
        return visible
    rank = op.Unsqueeze(keys.rank, ops.vector(1, 2))
    return op.And(visible, op.LessOrEqual(rank, _at_queries(ops, keys.rank, length, queries)))
