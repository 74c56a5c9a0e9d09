"""One verdict per layer: whether it is sparse, the same in every call of the model.

before  a graph of 40 queries proves layers.3 causal; a step's graph proves one more query of it
after   the step is sparse because the 40 queries were; had they been declined, it would stay dense

A call of several queries shows how a layer makes its mask, and decides. A call of one query does
not: a window and a table of relative positions look causal from there. What it shows holds until a
call of several queries is seen. Nor does a call in training with dropout, which is dense by itself.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch

from moonfx.capture.sizes import hint_or_none
from moonfx.site import AttentionSite, Declined

Key = tuple[str, int]


@dataclass(frozen=True)
class Verdict:
    """What became of one layer's attention in one call.

    Args:
        sparse: whether it runs sparse.
        call: the call, in words.
        general: whether it shows how the layer makes its mask.
        reason: why it is dense, "" if it is sparse.
    """

    sparse: bool
    call: str
    general: bool
    reason: str = ""


@dataclass(frozen=True)
class Lost:
    """A layer that was sparse and is dense in another call.

    Args:
        key: its module name, and which attention of that it is.
        before, now: what became of it in the two calls.
        overruled: whether the first was a call of one query, which no longer counts.
    """

    key: Key
    before: Verdict
    now: Verdict
    overruled: bool = False

    def __str__(self) -> str:
        layer = self.key[0] or "(root)"
        if self.overruled:
            return (
                f"{layer} was taken to be sparse in {self.before.call}, which does not show its "
                f"whole mask, and is dense from {self.now.call} on: {self.now.reason}"
            )
        return (
            f"{layer} was sparse in {self.before.call} and is dense in {self.now.call}: "
            f"{self.now.reason}"
        )


class Verdicts:
    """The verdicts on a model's attentions, by layer and place within it."""

    def __init__(self) -> None:
        self._of: dict[Key, Verdict] = {}
        self._steps: dict[Key, list[Callable[[str], None]]] = {}

    def check(self, site: AttentionSite) -> None:
        """Checks that a site which could be sparse may be.

        Raises:
            Declined: if its layer is dense in calls that show more.
        """
        known = self._of.get(key_of(site))
        if known is not None and known.general and not known.sparse:
            raise Declined(
                f"dense in {known.call}, and a layer has one verdict: moonfx.sparsify called anew, "
                "or torch._dynamo.reset() for torch.compile, forgets it",
                site.output,
            )

    def sparse(self) -> dict[Key, Verdict]:
        """The attentions that are sparse."""
        return {key: verdict for key, verdict in self._of.items() if verdict.sparse}

    def note(
        self, sites: Iterable[AttentionSite], overrule: Callable[[str], None] = lambda why: None
    ) -> list[Lost]:
        """Takes note of what became of a graph's attentions.

        Args:
            overrule: told why, once a call that shows more says that they are not sparse.
        Returns:
            Those that were sparse before and are not now.
        """
        lost = []
        for site in sites:
            if site.action not in ("sparse", "declined") or site.key_length == 1:
                continue  # dense as the policy says, or the same either way
            key, now = key_of(site), _verdict(site)
            known = self._of.get(key)
            if known is not None and known.sparse and not now.sparse:
                lost.append(Lost(key, known, now, now.general and not known.general))
                if lost[-1].overruled:
                    for tell in self._steps.pop(key, []):
                        tell(str(lost[-1]))
            if now.sparse and not now.general:
                self._steps.setdefault(key, []).append(overrule)
            if known is None or (not known.general and (now.general or now.sparse)):
                self._of[key] = now
        return lost


_of_modules: WeakKeyDictionary[torch.nn.Module, Verdicts] = WeakKeyDictionary()


def verdicts_of(module: torch.nn.Module) -> Verdicts:
    """The verdicts on a module that torch.compile compiles, kept for as long as it lives."""
    return _of_modules.setdefault(module, Verdicts())


def forget() -> None:
    """Forgets the verdicts on modules that torch.compile compiles, as torch does their graphs."""
    _of_modules.clear()


def in_short(lost: Sequence[object]) -> str:
    """The first of several that were lost, in words, and how many there are beside it."""
    others = len(lost) - 1
    return f"{lost[0]}{f'; and {others} more, in the report' if others else ''}"


def key_of(site: AttentionSite) -> Key:
    """Which attention of its model a site is."""
    return site.layer, site.ordinal


def _verdict(site: AttentionSite) -> Verdict:
    queries, keys = _lengths(site)
    counts = [
        f"{n} {name if n != 1 else one}"
        for n, name, one in ((queries, "queries", "query"), (keys, "keys", "key"))
        if n is not None
    ]
    call = f"a call of {' and '.join(counts)}" if counts else "another call"
    reason = site.reject.reason if site.reject is not None else ""
    general = queries != 1 and not (site.reject is not None and site.reject.of_call)
    return Verdict(site.action == "sparse", call, general, reason)


def _lengths(site: AttentionSite) -> Sequence[int | None]:
    """How many queries and keys there are, as far as is known of a site declined early."""
    if site.query_length is not None:
        return site.query_length, site.key_length
    shape: Sequence[Any] = getattr(site.output.meta.get("val"), "shape", ())
    return (hint_or_none(shape[-2]) if len(shape) > 2 else None), None
