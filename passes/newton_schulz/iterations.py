"""Joins steps to the iterations X_0 -> X_k that they make."""

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import fx

from moonfx.passes.context import Context
from moonfx.passes.graph.memory_versions import Memory, TensorVersion
from moonfx.passes.newton_schulz.chain import Chain, Partial
from moonfx.passes.newton_schulz.replaceable import check_own, check_replaceable
from moonfx.passes.newton_schulz.steps import Coefficients, Step
from moonfx.site import Declined

aten = torch.ops.aten


def chains(steps: dict[TensorVersion, Step], memory: Memory, context: Context) -> list[Chain]:
    """The longest iterations that the steps make, each with the reason why it is not replaced."""
    later = {value for step in steps.values() for value in step.results}
    found: list[Chain] = []
    for source in steps:
        if source not in later:
            found += _proved(source, steps, memory, context)
    return _distinct(found)


def _distinct(found: list[Chain]) -> list[Chain]:
    """One of each: X_0 and a copy of it may both be where one iteration is found to begin."""
    owner: dict[fx.Node, Chain] = {}
    kept = []
    for chain in sorted(found, key=lambda each: (each.reject is not None, -len(each.body))):
        others = [owner[node] for node in (*chain.body, chain.output) if node in owner]
        if any(o.reject is None or o.output is chain.output for o in others):
            continue
        owner |= dict.fromkeys((*chain.body, chain.output), chain)
        kept.append(chain)
    return [chain for chain in found if any(chain is each for each in kept)]


def _proved(
    source: TensorVersion, steps: dict[TensorVersion, Step], memory: Memory, context: Context
) -> Iterator[Chain]:
    """The iterations that begin with X_0, and whether they may be replaced.

    X_k is what the last step is copied to; or else that copy is another's.
    """
    pairs = (_followed(source, steps, memory, copied) for copied in (True, False))
    for partials in zip(*pairs, strict=True):
        for partial in partials:
            try:
                check_own(partial, memory)
                check_replaceable(partial.chain, memory, context)
            except Declined as reject:
                # Without its traceback, which holds on to the graph.
                partial.chain.reject = reject.with_traceback(None)
        chain, second = (partial.chain for partial in partials)
        yield second if second.reject is None and chain.reject is not None else chain


def _followed(
    source: TensorVersion, steps: dict[TensorVersion, Step], memory: Memory, copied: bool
) -> Iterator[Partial]:
    """The chains from one X_0: as many as there are iterations that read it."""
    stack = [(source, Partial(Chain(source, source.node)))]
    while stack:
        value, partial = stack.pop()
        step = steps.get(value)
        if step is None:
            partial.chain.source = _of_rank(partial.chain.value.dim(), steps[source], memory)
            partial.chain.body = set(partial.words)
            yield partial
        elif step.reject is not None:
            yield replace(partial, rejected=step.reject)
        else:
            branches = _branches(step, memory)
            longer = [_extended(partial, value, r, steps, memory, copied) for r in branches]
            stack += reversed(longer)


def _branches(step: Step, memory: Memory) -> list[dict[TensorVersion, tuple[Coefficients, bool]]]:
    """The results of a step, in groups: those of one group are made of the group's first."""
    found: dict[fx.Node, dict[TensorVersion, tuple[Coefficients, bool]]] = {}
    for result, numbers in step.results.items():
        body = step.body(result, memory) if len(step.results) > 1 else set()
        first = next((node for node in found if node in body), result.node)
        found.setdefault(first, {})[result] = numbers
    return list(found.values())


def _extended(
    partial: Partial,
    source: TensorVersion,
    results: dict[TensorVersion, tuple[Coefficients, bool]],
    steps: dict[TensorVersion, Step],
    memory: Memory,
    copied: bool,
) -> tuple[TensorVersion, Partial]:
    """A chain and one step more, and the X that it leads to."""
    step = replace(steps[source], results=results)
    result = next((v for v in results if v in steps), None)
    result = result or _last(source, step, copied)
    numbers, is_transposed = results[result]
    chain = replace(
        partial.chain,
        output=result.node,
        transposed=partial.chain.transposed ^ is_transposed,
        coefficients=[*partial.chain.coefficients, numbers],
    )
    words = dict(partial.words)
    for node in step.body(result, memory):
        words[node] = len(chain.coefficients), set(step.terms[memory.result(node)])
    return result, Partial(chain, words)


def _last(source: TensorVersion, step: Step, copied: bool) -> TensorVersion:
    """The result of a last step that is most like X_0: of as many dims, and not transposed."""
    dims = source.node.meta["val"].dim()

    def unlike(result: TensorVersion) -> tuple[bool, bool]:
        return result.node.meta["val"].dim() != dims, step.results[result][1]

    last = min(step.results, key=unlike)
    for copy in step.results if copied else ():
        if copy.node.target is aten.copy_.default and list(last.node.users) == [copy.node]:
            last = copy
    return last


def _of_rank(dims: int, step: Step, memory: Memory) -> TensorVersion:
    """X_0, or what it is a view of, with as many dims as X_k if there is one."""
    root = memory.of(step.source.node)
    views = (v for v, terms in step.given.items() if "X" in terms and memory.of(v.node) is root)
    return next((v for v in views if v.node.meta["val"].dim() == dims), step.source)
