"""How large an update each parameter is to have: a number, AdamW's on noise, or its own so far."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from moonfx.optim.roles.table import RoleRow
from moonfx.optim.settings import MUON
from moonfx.optim.state.adamw import Source
from moonfx.optim.state.floats import gathered
from moonfx.optim.step.gaussian_rms import noise_rms
from moonfx.optim.step.norms import root_mean_square


def targets(rms: float | str, source: Source, table: Sequence[RoleRow]) -> list[float | None]:
    """The update RMS to ask for, of each parameter in the order of the groups; None on AdamW.

    Args:
        rms: a number; "betas", what AdamW's update has on gradients that are noise,
            sqrt((1 - beta1) / (1 + beta1)) (kexue.fm/archives/11267); or "measured", each
            parameter's own in the last step: RMS of m_hat / (sqrt(v_hat) + eps). What has no
            measure (no state yet, or a gradient of zeros) takes that of "betas".
        source: the AdamW.
        table: a row per parameter.
    """
    found: list[float | None] = []
    for row, (group, p) in zip(table, source.members(), strict=True):
        if row.optimizer != MUON:
            found.append(None)
        elif isinstance(rms, (int, float)):
            found.append(float(rms))
        else:
            measured = _measured(source, group, p) if rms == "measured" else 0.0
            found.append(measured or noise_rms(source.betas(group)[0]))
    return found


def _measured(source: Source, group: dict[str, Any], p: Tensor) -> float:
    first, second = source.first_moment(p), source.second_moment(p)
    step = source.steps(p, group)
    if first is None or second is None or step < 1:
        return 0.0
    beta1, beta2 = source.betas(group)
    v = (gathered(second).float() / (1 - beta2**step)).sqrt_().add_(group["eps"])
    return root_mean_square(gathered(first).float() / (1 - beta1**step) / v)
