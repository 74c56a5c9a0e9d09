"""A causal language model called whole, by a cache in single tokens, and by a cache in chunks.

`wrong(name, form, order)` builds one architecture (tests/support/architectures.py), makes it sparse
and calls it in one order of calls: what a token is told must not depend on the way it comes in.
"""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import moonfx
from tests.support.architectures import UNBUILT, NotOffered, build

BLOCK, TOPK = 4, 3
PROMPT, CHUNK = 18, 3  # of 24 tokens
TOLERANCE = 2e-3  # what a cache's other order of sums may add up to over the layers

Call = Callable[..., Any]


def whole(call: Call, ids: Tensor) -> Tensor:
    """Logits [B, N, V] of one pass over all tokens."""
    logits: Tensor = call(input_ids=ids, use_cache=False).logits
    return logits


def pieces(call: Call, ids: Tensor, size: int) -> Tensor:
    """Logits of a prompt and then `size` tokens at a time, by the model's own cache."""
    result = call(input_ids=ids[:, :PROMPT], use_cache=True)
    found = [result.logits]
    for start in range(PROMPT, ids.shape[1], size):
        cache = result.past_key_values
        result = call(input_ids=ids[:, start : start + size], past_key_values=cache, use_cache=True)
        found.append(result.logits)
    return torch.cat(found, 1)


def steps(call: Call, ids: Tensor) -> Tensor:
    return pieces(call, ids, 1)


def chunks(call: Call, ids: Tensor) -> Tensor:
    return pieces(call, ids, CHUNK)


def short(call: Call, ids: Tensor) -> Tensor:
    """A pass over fewer tokens, after which lengths are symbols."""
    return whole(call, ids[:, :14])


ORDERS: dict[str, tuple[Callable[[Call, Tensor], Tensor], ...]] = {
    "whole first": (whole, steps, chunks),
    "short first": (short, whole, chunks, steps),
    "cache first": (steps, chunks, short, whole),
}


class Unfit(Exception):
    """The architecture says nothing: it is not built, or differs by its cache as it is."""


def wrong(name: str, form: str, order: str) -> dict[str, float]:
    """Which ways of calling differ from the whole pass, and by how much of the largest logit.

    Raises:
        Unfit: saying why the architecture shows nothing.
    """
    model, ids = _built(name, form)
    moonfx.sparsify(model, BLOCK, TOPK, compiler="eager", on_miss="warn")
    with torch.no_grad():
        found = {each.__name__: each(model, ids) for each in ORDERS[order]}
    if not moonfx.report(model).rewritten:
        raise Unfit("nothing of it is sparse")
    return {
        way: difference
        for way in ("steps", "chunks")
        if (difference := _difference(found[way], found["whole"])) > TOLERANCE
    }


def _built(name: str, form: str) -> tuple[torch.nn.Module, Tensor]:
    if name in UNBUILT:
        raise Unfit(UNBUILT[name])
    try:
        case = build(name, form)
    except NotOffered:
        raise Unfit(f"transformers offers no {form} form of it") from None
    model, ids = case.model.eval(), case.inputs["input_ids"]
    dense = copy.deepcopy(model)
    with torch.no_grad():
        expected = whole(dense, ids)
        for way in (steps, chunks):
            if (by := _difference(way(dense, ids), expected)) > TOLERANCE:
                raise Unfit(f"densely its {way.__name__} differ already, by {by:.1e}")
    return model, ids


def _difference(a: Tensor, b: Tensor) -> float:
    if a.shape != b.shape:
        return float("inf")
    return float((a - b).abs().max() / b.abs().max().clamp_min(1e-6))
