"""What each attention layer should become, and how a layer finds its own policy."""

import difflib
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import asdict, dataclass


def check_block_topk_sinks(block: int, topk: int, sinks: int) -> None:
    """Checks one MoBA setting.

    Raises:
        TypeError: if one of the three is not an int.
        ValueError: if block or topk < 1, sinks < 0 or sinks >= topk.
    """
    for name, given in (("block", block), ("topk", topk), ("sinks", sinks)):
        if not isinstance(given, int) or isinstance(given, bool):
            raise TypeError(f"{name} must be an int, got {given!r} ({type(given).__name__})")
    if block < 1:
        raise ValueError(f"block must be at least 1 token, got {block}")
    if topk < 1:
        raise ValueError(f"topk must be at least 1 block (the query's own), got {topk}")
    if not 0 <= sinks < topk:
        hint = "topk=1 needs sinks=0" if topk == 1 else f"topk={topk} takes 0 to {topk - 1}"
        raise ValueError(
            f"sinks must be at least 0 and less than topk, which counts the sink blocks and the "
            f"query's own; got sinks={sinks} with topk={topk} ({hint})"
        )


def check_flag(name: str, given: object) -> None:
    """Checks that an argument is True or False.

    Raises:
        TypeError: if it is not a bool.
    """
    if not isinstance(given, bool):
        raise TypeError(f"{name} must be True or False, got {given!r} ({type(given).__name__})")


def _names(name: str, given: object) -> tuple[str, ...]:
    """The names that an argument holds, each once, in an order of their own.

    Raises:
        TypeError: if it is not a list, a tuple or a set of strings.
    """
    kinds = list | tuple | set | frozenset
    if not isinstance(given, kinds) or not all(isinstance(each, str) for each in given):
        raise TypeError(f"{name} must be a list of names, got {given!r} ({type(given).__name__})")
    return tuple(sorted(set(given)))


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The words that end an error on an unknown name: the nearest known one, "" if none is near."""
    near = difflib.get_close_matches(name, list(known), n=1)
    return f" (did you mean {near[0]!r}?)" if near else ""


@dataclass(frozen=True)
class LayerPolicy:
    """MoBA settings of one attention layer.

    Args:
        block: tokens per block, >= 1.
        topk: blocks that a query attends, its own and the sinks included, >= 1.
        sinks: first blocks that are always selected, 0 <= sinks < topk.

    Raises:
        TypeError: if one is not an int.
        ValueError: if one is out of range.
    """

    block: int = 4096
    topk: int = 12
    sinks: int = 1

    def __post_init__(self) -> None:
        check_block_topk_sinks(self.block, self.topk, self.sinks)

    def __str__(self) -> str:
        return f"{self.block}/{self.topk}/{self.sinks}"

    def to_dict(self) -> dict[str, int]:
        return asdict(self)


Layers = Mapping[str | int, LayerPolicy | None]


class Policies:
    """The policy of every layer of one model.

    A layer's own policy is the first that fits: its module name or the longest name of a module
    around it, a "re:<regex>" on its name, its attention index, the default.

    Args:
        default: for layers that `layers` does not name.
        layers: {module name | "re:<regex>" | attention index: LayerPolicy | None}; None keeps the
            layer dense. Indices count the attentions in the order in which the model runs them.
        dense_last: how many attentions at the end stay dense (the paper's layer-wise hybrid).
        causal_only: whether bidirectional self-attention stays dense.
        recompute_routing: whether the backward chooses blocks again instead of keeping the choice.
        disable_passes: names of passes that do not run on the model's graphs.
    """

    def __init__(
        self,
        default: LayerPolicy,
        layers: Layers | None = None,
        dense_last: int = 0,
        causal_only: bool = True,
        recompute_routing: bool = False,
        disable_passes: Collection[str] = (),
    ) -> None:
        self.default, self.dense_last, self.causal_only = default, dense_last, causal_only
        self.recompute_routing = recompute_routing
        self.names: dict[str, LayerPolicy | None] = {}
        self.patterns: list[tuple[re.Pattern[str], LayerPolicy | None]] = []
        self.indices: dict[int, LayerPolicy | None] = {}
        if not isinstance(dense_last, int) or isinstance(dense_last, bool):
            raise TypeError(f"dense_last must be an int, at least 0, got {dense_last!r}")
        if dense_last < 0:
            raise ValueError(f"dense_last must be at least 0, got {dense_last}")
        check_flag("causal_only", causal_only)
        check_flag("recompute_routing", recompute_routing)
        self.disable_passes = _names("disable_passes", disable_passes)
        if layers is not None and not isinstance(layers, Mapping):
            raise TypeError(
                "layers must be a mapping {module name | 're:<regex>' | index: LayerPolicy | None}"
                f", got {type(layers).__name__}"
            )
        for key, policy in (layers or {}).items():
            self._add(key, policy)

    def _add(self, key: str | int, policy: LayerPolicy | None) -> None:
        if policy is not None and not isinstance(policy, LayerPolicy):
            raise TypeError(
                f"layers[{key!r}] must be a moonfx.LayerPolicy or None (dense), got {policy!r}"
            )
        if isinstance(key, str) and key.startswith("re:"):
            try:
                self.patterns.append((re.compile(key[3:]), policy))
            except re.error as error:
                raise ValueError(f"layers[{key!r}] is not a regular expression: {error}") from None
        elif isinstance(key, str):
            self.names[key] = policy
        elif isinstance(key, int) and not isinstance(key, bool):
            if key < 0:
                raise ValueError(f"layers[{key}]: an attention index must be at least 0")
            self.indices[key] = policy
        else:
            raise TypeError(
                f"a key of layers must be a module name, 're:<regex>' or an index, got {key!r}"
            )

    @property
    def uniform(self) -> bool:
        """Whether every layer has the same policy."""
        return not (self.names or self.patterns or self.indices or self.dense_last)

    def check_names(self, modules: Mapping[str, str]) -> None:
        """Checks that each name and pattern of `layers` fits a module.

        Args:
            modules: every name of the model's modules -> the one that reports use.
        Raises:
            ValueError: naming the unknown ones, with the nearest names.
        """
        for name in self.names:
            if name not in modules:
                near = difflib.get_close_matches(name, modules, n=3, cutoff=0.3)
                hint = f"; nearest: {', '.join(near)}" if near else ""
                raise ValueError(f"layers[{name!r}]: the model has no module of that name{hint}")
        self.names = {modules[name]: policy for name, policy in self.names.items()}
        for pattern, _ in self.patterns:
            if not any(pattern.search(m) for m in modules):
                raise ValueError(f"layers['re:{pattern.pattern}'] matches no module of the model")

    def find(self, layer: str, index: int) -> LayerPolicy | None:
        """The policy of a layer, None for dense."""
        around = [n for n in self.names if layer == n or layer.startswith(n + ".") or n == ""]
        if around:
            return self.names[max(around, key=len)]
        for pattern, policy in self.patterns:
            if pattern.search(layer):
                return policy
        return self.indices.get(index, self.default)

    def unused(self, layers: list[str]) -> list[str]:
        """Keys of `layers` that fit none of the model's attentions, in words."""
        names = [
            repr(n) for n in self.names if not any(x == n or x.startswith(n + ".") for x in layers)
        ]
        patterns = [
            f"'re:{p.pattern}'" for p, _ in self.patterns if not any(p.search(x) for x in layers)
        ]
        return names + patterns + [str(i) for i in self.indices if i >= len(layers)]

    def __str__(self) -> str:
        parts = [
            str(self.default),
            f"dense_last={self.dense_last}",
            f"causal_only={self.causal_only}",
            f"recompute_routing={self.recompute_routing}",
            f"disable_passes={','.join(self.disable_passes)}",
        ]
        parts += [f"{k}:{v}" for k, v in sorted(self.names.items())]
        parts += [f"re:{p.pattern}:{v}" for p, v in self.patterns]
        parts += [f"{k}:{v}" for k, v in sorted(self.indices.items())]
        return " ".join(parts)
