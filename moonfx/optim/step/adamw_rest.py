"""The parameters that stay on AdamW, stepped by the user's own optimizer class.

What steps is an object of that class with the attributes (block sizes, stochastic rounding) of the
one that was converted, made without its constructor: it has no hooks, it shares the state, and
for each step it is given the groups, each with the parameters that are not Muon's. So whatever the
class does is done, whether it is torch's AdamW in any of its forms, torchao's or somebody's own.
"""

from collections.abc import Callable, MutableMapping, Sequence
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from moonfx.capture.marks import never_traced
from moonfx.capture.optimizers import bare_step, no_hooks, without_hooks

Stays = Callable[[Tensor], bool]  # whether AdamW steps a parameter

# What belongs to the object that was converted, or to those who drive it, and not to its class.
_ITS_OWN = ("state", "param_groups", "grad_scale", "found_inf")


class Rest:
    """Steps the AdamW parameters of a converted optimizer.

    Args:
        source: the optimizer that was converted, of whatever class.
    """

    def __init__(self, source: Optimizer) -> None:
        self.kind = type(source)
        self.attributes = {
            name: value
            for name, value in without_hooks(vars(source)).items()
            if name not in _ITS_OWN
        }

    def optimizer(
        self,
        groups: Sequence[dict[str, Any]],
        state: MutableMapping[Tensor, Any],
        stays: Stays = lambda p: False,
    ) -> Optimizer:
        """The user's optimizer over the parameters of the groups that stay, at their settings."""
        made = self.kind.__new__(self.kind)
        made.__dict__.update(self.attributes, **no_hooks())
        made.__dict__["state"] = state
        made.__dict__["param_groups"] = [
            {**group, "params": [p for p in group["params"] if stays(p)]} for group in groups
        ]
        return made

    def step(
        self, groups: Sequence[dict[str, Any]], state: MutableMapping[Tensor, Any], stays: Stays
    ) -> None:
        """One step of the parameters that stay on AdamW."""
        if any(stays(p) for group in groups for p in group["params"]):
            self._step(groups, state, stays)

    @never_traced  # torch traces its own optimizers only where the user made them
    def _step(
        self, groups: Sequence[dict[str, Any]], state: MutableMapping[Tensor, Any], stays: Stays
    ) -> None:
        made = self.optimizer(groups, state, stays)
        bare_step(self.kind)(made)
        # Some classes count in their groups, or in themselves.
        for group, stepped in zip(groups, made.param_groups, strict=True):
            group.update({k: v for k, v in stepped.items() if k != "params"})
        self.attributes.update({k: v for k, v in vars(made).items() if k in self.attributes})
