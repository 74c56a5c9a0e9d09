"""A mode in which an operator that makes the host wait for a GPU is an error, on any device."""

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

# Operators whose result, or the size of it, the host must read from the device.
WAITS = {
    *("_local_scalar_dense", "is_nonzero", "equal", "nonzero", "masked_select"),
    *("unique_dim", "_unique", "_unique2", "unique_consecutive", "bincount", "repeat_interleave"),
}
# Operators that copy from the host's memory.
COPIES = {"lift_fresh", "lift_fresh_copy"}


class NoWaits(TorchDispatchMode):
    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        name = func._schema.name.removeprefix("aten::")
        if name in WAITS | COPIES:
            raise AssertionError(f"the host waits for {name}")
        if name == "index" and any(x is not None and x.dtype == torch.bool for x in args[1]):
            raise AssertionError("the host waits for an index of booleans")
        return func(*args, **(kwargs or {}))
