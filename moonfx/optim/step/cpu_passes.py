"""The CPU's own passes over a matrix before and after Newton-Schulz, and when they can be taken.

They are no operators of torch: they change their operands, and only an eager step takes them, on
plain tensors that nobody watches. Everybody else gets the torch operations that they stand for.
"""

from torch import Tensor
from torch.nn import Parameter

from moonfx.capture.optimizers import watched
from moonfx.kernels.cpu import library
from moonfx.kernels.cpu import muon as muon_cpu
from moonfx.optim.matrices import Layout

_PLAIN = (Tensor, Parameter)


def supports(weight: Tensor, grad: Tensor, buffer: Tensor, layout: Layout) -> bool:
    """Whether the matrices of a parameter with these tensors can be handed to the kernels."""
    tensors = (weight, grad, buffer)
    plain = all(type(x) in _PLAIN and x.is_cpu and x.is_contiguous() for x in tensors)
    if not plain or weight.dtype not in muon_cpu.DTYPES or watched():
        return False
    repeated_columns = layout.dim == 1 and layout.outer > 1  # steps of two sizes within a row
    apart = repeated_columns or layout.kind in ("middle", "last")
    same = grad.dtype == buffer.dtype == weight.dtype
    return same and not apart and library.available() is None


def gather(
    weight: Tensor,
    grad: Tensor,
    buffer: Tensor,
    out: Tensor,
    *,
    momentum: float,
    nesterov: bool,
    sign: float,
    decay: float,
    eps: float,
) -> None:
    """M <- mu M + (1 - mu) (sign G + decay W), and into bfloat16 `out` U / max(|U|, eps)."""
    tensors = {"weight": weight, "grad": grad, "buffer": buffer, "update": out}
    numbers = {"momentum": momentum, "nesterov": nesterov, "sign": sign, "decay": decay, "eps": eps}
    muon_cpu.call("gather", tensors, numbers)


def scatter(
    weight: Tensor,
    update: Tensor,
    *,
    keep: float,
    amount: float,
    decay: float,
    cautious: bool,
    exact: bool,
    eps: float,
) -> None:
    """W <- keep W + amount O; `cautious`: W - decay W where O W > 0; `exact`: amount / RMS(O)."""
    numbers = {"keep": keep, "amount": amount, "decay": decay, "cautious": cautious, "exact": exact}
    muon_cpu.call("scatter", {"weight": weight, "update": update}, {**numbers, "eps": eps})
