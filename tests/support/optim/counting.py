"""An optimizer of somebody's own, as the one that is converted."""

from typing import Any

import torch


class Counting(torch.optim.AdamW):
    """Somebody's own: it counts in its groups and in itself, and knows nothing of Muon."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.calls = 0

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.calls += 1
        for group in self.param_groups:
            group["seen"] = group.get("seen", 0) + 1
        super().step()
