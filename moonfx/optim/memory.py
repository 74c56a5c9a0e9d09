"""How many bytes of state the Muon parameters of an optimizer have, and had on AdamW."""

from typing import NamedTuple

from tabulate import tabulate
from torch import Tensor

from moonfx.optim.muon import Muon
from moonfx.optim.sharding import is_sharded
from moonfx.optim.state import low_bit


class StateMemory(NamedTuple):
    """Bytes of state of the parameters that Muon steps, those of this process.

    Attributes:
        numbers: in the parameters.
        adamw: two moments in the parameters' dtype, as AdamW holds them.
        held: what this optimizer holds.
        muon: a momentum in the parameters' dtype.
        int8: a momentum in 8 bits where that is taken, else in the parameters' dtype.
    """

    numbers: int
    adamw: int
    held: int
    muon: int
    int8: int

    def __str__(self) -> str:
        names = {"adamw": "AdamW", "muon": "Muon", "int8": "Muon, int8", "held": "this optimizer"}
        rows = [
            (name, size, size / max(self.adamw, 1))
            for name, size in ((names[key], getattr(self, key)) for key in names)
        ]
        title = f"state of the {self.numbers:,} numbers that Muon steps"
        headers = (title, "bytes", "of AdamW's")
        return tabulate(rows, headers, floatfmt=".3f", intfmt=",", disable_numparse=[0])


def state_memory(optimizer: Muon) -> StateMemory:
    """What the state of a converted optimizer takes, by what it holds, and would take otherwise.

    The step counters, four bytes a parameter with any optimizer, count everywhere.
    """
    numbers = adamw = muon = int8 = held = 0
    for group in optimizer.param_groups:
        for p in group["params"]:
            if not optimizer.on_muon(p):
                continue
            local = p.to_local() if is_sharded(p) else p
            numbers += local.numel()
            adamw += 2 * local.nbytes + 4
            muon += local.nbytes + 4
            int8 += low_bit.size(local, "int8") + 4
            values = optimizer.state.get(p, {}).values()
            held += sum(size_of(x) for x in values if isinstance(x, Tensor))
    return StateMemory(numbers, adamw, held, muon, int8)


def size_of(x: Tensor) -> int:
    """The bytes of a tensor in this process: of a wrapper, those of what it wraps."""
    if is_sharded(x):
        return size_of(x.to_local())
    if type(x) is Tensor or not hasattr(x, "__tensor_flatten__"):
        return x.nbytes
    return sum(size_of(getattr(x, name)) for name in x.__tensor_flatten__()[0])
