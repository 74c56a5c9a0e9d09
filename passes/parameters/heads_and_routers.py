"""Which products give what the model returns: heads. Which choose experts: routers.

head      y = linear(h, w); y * scale, tanh(y / 30) * 30, y[:, -1:], cross_entropy(y, labels)
          mean + std * randn, multinomial(softmax(y)), softplus(y): parameters of a distribution
router    y = linear(h, w); softmax(y).topk(2), and what is trained acts on what comes of it
"""

import torch

from moonfx.passes.graph.nodes import aten
from moonfx.passes.graph.operators import (
    ADD,
    CLAMP,
    DIVIDE,
    EXP,
    LOG_SOFTMAX,
    MASKED_FILL,
    MULTIPLY,
    SOFTMAX,
    SUBTRACT,
    TANH,
    WHERE,
)
from moonfx.passes.graph.walks import reachable
from moonfx.passes.parameters.dataflow import CREATES, WRITES, DataFlow, FlowValue, Worklist
from moonfx.passes.parameters.element_positions import REARRANGE, SAME, is_pointwise
from moonfx.passes.parameters.values import op_name
from moonfx.passes.parameters.weight_products import PROBABILITIES, is_product
from moonfx.passes.parameters.weight_uses import GATHERS, TABLES

CHOICES = {aten.topk.default, aten.argmax.default, aten.sort.default, aten.argsort.default}
_LOSSES = LOG_SOFTMAX | {
    aten.cross_entropy_loss.default,
    aten.nll_loss.default,
    aten.nll_loss_nd.default,
    aten.nll_loss_forward.default,
    aten.binary_cross_entropy_with_logits.default,
    aten.mse_loss.default,
    aten.l1_loss.default,
    aten.smooth_l1_loss.default,
    aten.huber_loss.default,
    aten.logsumexp.default,
    aten.argmax.default,
}
# Scores of scores, beside what acts on each of them by itself.
_SCORES = REARRANGE | SAME | SOFTMAX | LOG_SOFTMAX
_SHIFTS, _SCALES = ADD | SUBTRACT, MULTIPLY | DIVIDE
# Noise without bounds, which is no mask of a dropout.
_NOISE = {"randn", "randn_like", "normal", "exponential", "log_normal", "cauchy"}
_DRAWN_BY = {
    "multinomial", "bernoulli", "normal", "poisson", "binomial", "_standard_gamma",
    "_sample_dirichlet",
}  # fmt: skip
_LEAVES_LOGITS = (
    _SHIFTS
    | _SCALES
    | WHERE
    | MASKED_FILL
    | CLAMP
    | EXP
    | {aten.index_fill.int_Scalar, aten.gather.default, aten.softplus.default}
)


def produces_logits(flow: DataFlow, output: FlowValue) -> bool:
    """Whether all that becomes of a product is what the model returns, or a loss."""
    ends = 0
    worklist = Worklist(flow, [output])
    for value in worklist:
        if value.target in _LOSSES and value is not output:
            ends += 1
            continue
        if value.dtype is torch.bool:
            continue  # what is asked of it: a check, a mask
        if value is not output and not _leaves_logits(flow, value, worklist):
            return _ends_model(flow, output)
        ends += value.returned
        worklist.add(value.users)
    return ends > 0 or _ends_model(flow, output)


def _leaves_logits(flow: DataFlow, value: FlowValue, ours: Worklist) -> bool:
    """Whether an operator gives logits of logits: it moves, masks, scales or caps them."""
    others = [x for x in value.reads if x not in ours]
    if value.target in REARRANGE:
        return True  # also logits[mask]
    if value.target in SAME | CREATES | WRITES | PROBABILITIES:
        return True
    if value.target in TANH:  # a softcap: tanh(logits / cap), where a pooler is tanh(logits)
        return value.reads[0].target in _SCALES
    computed = [x for x in others if flow.active(x) and flow.trained(x)]
    return value.target in _LEAVES_LOGITS and not computed


def _ends_model(flow: DataFlow, output: FlowValue) -> bool:
    """Whether nothing trained acts on a product any more, and it gives numbers or a distribution.

    A number is a loss. Of a distribution something is drawn.
    """
    returned, arrays = False, False
    reached: list[FlowValue] = []
    worklist = Worklist(flow, [output])
    for value in worklist:
        if value is not output:
            if any(_is_weight(flow, x) for x in value.reads):
                return False
            reached.append(value)
        returned |= value.returned
        arrays |= value.returned and (value is output or bool(value.shape))
        worklist.add(value.users)
    return returned and (not arrays or any(map(_draws, reached)))


def _draws(value: FlowValue) -> bool:
    """Whether a value is drawn by what it reads, or is moved by noise: mean + std * noise."""
    if op_name(value) in _DRAWN_BY:
        return True
    return value.target in _SHIFTS and any(map(_is_noise, value.reads))


def _is_noise(value: FlowValue) -> bool:
    values = reachable([value], lambda x: () if is_product(x) else x.reads)
    return any(op_name(x) in _NOISE for x in values)


def _is_weight(flow: DataFlow, value: FlowValue) -> bool:
    return flow.trained(value) and not flow.active(value)


def routes(flow: DataFlow, output: FlowValue) -> bool:
    """Whether the best of a product's features are chosen, and what is trained acts after it."""
    worklist = Worklist(flow, [output])
    for value in worklist:
        if value.target in CHOICES:
            return _acted_on(flow, value)
        if value is output or value.target in _SCORES or is_pointwise(value):
            worklist.add(value.users)
    return False


def _acted_on(flow: DataFlow, value: FlowValue) -> bool:
    worklist = Worklist(flow, [value])
    for each in worklist:
        weights = is_product(each) or each.target in GATHERS | TABLES
        if each is not value and weights and any(_is_weight(flow, x) for x in each.reads):
            return True
        worklist.add(each.users)
    return False
