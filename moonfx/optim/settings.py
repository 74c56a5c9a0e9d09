"""How Muon steps, and the words under which an optimizer's groups hold it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from moonfx.kernels.reference.newton_schulz import JORDAN

# Which optimizer steps a parameter.
MUON, ADAMW = "muon", "adamw"

# What a group holds beside AdamW's own: how Muon steps, and the beta1 that its momentum goes with.
SETTINGS = ("momentum", "nesterov", "coefficients", "exact_rms", "decay")
FOLLOWED = "followed_beta1"
GROUP_KEYS = (*SETTINGS, FOLLOWED)


def is_muons(group: Mapping[str, Any]) -> bool:
    """Whether a group is a moonfx.Muon's."""
    return all(key in group for key in GROUP_KEYS)


@dataclass(frozen=True)
class Settings:
    """How Muon steps.

    Attributes:
        momentum: mu.
        coefficients: (a, b, c) of each Newton-Schulz iteration.
        exact_rms: scale each update by its own root mean square, not by the one it should have.
        decay: "decoupled", "cautious" (only where it moves with the update) or "coupled" (AdamW's
            forerunner: into the gradient).
        rms: the target of parameters that are added later.
        momentum_dtype: None for the first moment's own, or "int8", torchao's state in 8 bits.
        compile: True, False or None, which takes what is faster.
    """

    momentum: float = 0.95
    nesterov: bool = True
    coefficients: list[list[float]] = field(default_factory=lambda: [list(JORDAN)] * 5)
    exact_rms: bool = False
    decay: str = "decoupled"
    rms: float = 0.2
    momentum_dtype: str | None = None
    compile: bool | None = None

    def of_group(self) -> dict[str, Any]:
        """What every group holds of them."""
        values = {name: getattr(self, name) for name in SETTINGS}
        return {**values, "coefficients": [list(row) for row in self.coefficients]}
