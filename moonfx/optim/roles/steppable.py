"""Whether an optimizer can step a parameter at all, and Muon in the layout that a role gave it.

Judged before any work, so that nothing is refused at a step, when AdamW's half has moved already.
"""

from dataclasses import replace

import torch
from torch import Tensor, nn

from moonfx.optim.matrices import shapes
from moonfx.optim.roles.table import ONE_MATRIX, ROLES, RoleRow
from moonfx.optim.settings import ADAMW, MUON


def check_initialized(name: str, p: Tensor) -> None:
    """Checks that a parameter has numbers.

    Raises:
        ValueError: if it is a lazy module's, which makes it of the first batch.
    """
    if nn.parameter.is_lazy(p):
        raise ValueError(
            f"{name} has no shape yet: it belongs to a lazy module, which must see a batch first; "
            "call the model with one, then make the AdamW and convert it"
        )


def check_dense(name: str, p: Tensor) -> None:
    """Checks that a parameter and its gradient are dense.

    Raises:
        ValueError: naming it.
    """
    for word, tensor in (("", p), ("'s gradient", p.grad)):
        if tensor is not None and tensor.layout is not torch.strided:
            raise ValueError(
                f"{name}{word} is sparse ({tensor.layout}): Muon needs whole matrices; an "
                "nn.Embedding made with sparse=False has dense gradients"
            )


def judged(row: RoleRow, p: Tensor) -> RoleRow:
    """A row that can be stepped: as it is, or on AdamW where its layout fits no such shape.

    Raises:
        ValueError: if Muon would step complex numbers.
    """
    if row.optimizer != MUON:
        return row
    if p.is_complex():
        raise ValueError(
            f"{row.name or 'a parameter'} is complex ({p.dtype}), and Newton-Schulz and the update "
            "RMS are for real matrices: leave it on AdamW (roles={name: 'adamw'}), or make the "
            "parameter its real view (torch.view_as_real)"
        )
    try:
        shapes(row.shape, row.layout)
    except ValueError as error:
        seen = row.why.removesuffix(f"; {ROLES[row.role].why}") if row.role in ROLES else row.why
        why = f"{seen}; {error}: roles={{name: Layout(...)}} says where its matrices lie"
        return replace(row, optimizer=ADAMW, why=why, layout=ONE_MATRIX)
    return row
