"""Operators by what they mean; the spellings of one thing together.

s * 0.125    s.mul(0.125)    s.mul_(0.125)    0.125 * s      all of them are in MULTIPLY
"""

from typing import Any

import torch

aten = torch.ops.aten

SOFTMAX = {
    aten.softmax.int,
    aten._softmax.default,
    aten._safe_softmax.default,
    aten.special_softmax.default,
}
EXP = {aten.exp.default, aten.exp_.default}
# exp() to another base: reported, not read
POWERS = {aten.exp2.default, aten.exp2_.default, aten.pow.Scalar, aten.expm1.default}
LOG_SOFTMAX = {aten.log_softmax.int, aten._log_softmax.default, aten.special_log_softmax.default}

MATMUL = {aten.matmul.default, aten.bmm.default}
PRODUCTS = MATMUL | {aten.baddbmm.default, aten.einsum.default}
# Scores that are no products: attention that is never rewritten, and not to be passed over.
DISTANCES = {aten.cdist.default, aten._cdist_forward.default, aten._euclidean_dist.default}

CASTS = {
    aten.to.dtype,
    aten.to.dtype_layout,
    aten.to.device,
    aten.to.other,
    aten._to_copy.default,
    aten.type_as.default,
}
COPIES = {aten.contiguous.default, aten.clone.default, aten.alias.default}
SWAPS = {aten.transpose.int, aten.swapaxes.default, aten.swapdims.default}
TRANSPOSES = {aten.t.default, aten.mT.default, aten.numpy_T.default}  # of the last two dims
VIEWS = {aten.reshape.default, aten.view.default, aten._unsafe_view.default}
FOLDS = VIEWS | {aten.flatten.using_ints, aten.unflatten.int}

# In place on the scores is the same as out of place, as long as nobody else reads them.
IN_PLACE: dict[Any, Any] = {
    aten.add_.Tensor: aten.add.Tensor,
    aten.sub_.Tensor: aten.sub.Tensor,
    aten.mul_.Tensor: aten.mul.Tensor,
    aten.mul_.Scalar: aten.mul.Scalar,
    aten.div_.Tensor: aten.div.Tensor,
    aten.div_.Scalar: aten.div.Scalar,
    aten.masked_fill_.Scalar: aten.masked_fill.Scalar,
    aten.masked_fill_.Tensor: aten.masked_fill.Tensor,
    aten.tanh_.default: aten.tanh.default,
    aten.clamp_.default: aten.clamp.default,
    aten.clamp_min_.default: aten.clamp_min.default,
    aten.exp_.default: aten.exp.default,
}
ADD = {aten.add.Tensor, aten.add_.Tensor}
SUBTRACT = {aten.sub.Tensor, aten.sub_.Tensor}
MULTIPLY = {aten.mul.Tensor, aten.mul.Scalar, aten.mul_.Tensor, aten.mul_.Scalar}
DIVIDE = {aten.div.Tensor, aten.div.Scalar, aten.div_.Tensor, aten.div_.Scalar}
WHERE = {aten.where.self, aten.where.ScalarOther, aten.where.ScalarSelf}
FILLS = {aten.masked_fill_.Scalar, aten.masked_fill_.Tensor}
MASKED_FILL = FILLS | {aten.masked_fill.Scalar, aten.masked_fill.Tensor}
TANH = {aten.tanh.default, aten.tanh_.default}
CLAMP = {
    aten.clamp.default,
    aten.clamp_.default,
    aten.clamp_min.default,
    aten.clamp_min_.default,
    aten.maximum.default,
    aten.max.other,
}
DROPOUT = {aten.dropout.default}
SLICES = {aten.slice.Tensor, aten.narrow.default}
DETACH = aten.detach.default
DETACHED = {DETACH, aten.detach_.default}

# Read a tensor's shape and nothing else of it.
SHAPE_ONLY = {
    aten.full_like.default,
    aten.zeros_like.default,
    aten.ones_like.default,
    aten.empty_like.default,
    aten.sym_size.int,
}

# What may stand between query @ key^T and the softmax, some of it only to be declined by name.
SCORES_PASS = (
    CASTS
    | COPIES
    | FOLDS
    | MULTIPLY
    | DIVIDE
    | ADD
    | SUBTRACT
    | WHERE
    | MASKED_FILL
    | TANH
    | CLAMP
    | {aten.cat.default}
)

FAR = 64  # nodes: how far a look around goes that only finds a name for a reason
