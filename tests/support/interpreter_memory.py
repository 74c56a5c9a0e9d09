"""Watches the memory of kernels under Triton's interpreter, for what would go wrong on a GPU alone.

The interpreter runs one program after another, and each from its first line to its last. Programs
and threads of a GPU have no such order, so every access of a launch is an error here

    outside     of the storages that the launch was given
    race        to what another program of the launch writes, or has read and this one writes
    hurry       to what the same program wrote, or has read and now writes, without a barrier since
    twice       of two elements of one store to one place, unless they are alike

Elements are told apart by their first byte.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import numpy as np
import torch
from numpy.typing import NDArray
from triton.runtime import interpreter

NOBODY, SEVERAL = -1, -2


class Watch:
    """Who read and wrote each byte of a launch's storages, and after which of its barriers."""

    def __init__(self) -> None:
        self.program = self.barriers = self.accesses = 0

    def launch(self, tensors: list[torch.Tensor]) -> None:
        sizes = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}
        self.base = np.array(sorted(sizes), dtype=np.int64)
        self.size = np.array([sizes[base] for base in self.base.tolist()], dtype=np.int64)
        self.place = np.cumsum(self.size) - self.size
        total = int(self.size.sum())
        self.reader, self.writer = (np.full(total, NOBODY, np.int64) for _ in range(2))
        self.read_at, self.written_at = (np.full(total, NOBODY, np.int64) for _ in range(2))

    def start(self, program: int) -> None:
        self.program, self.barriers = program, 0

    def find(self, pointers: Any, mask: Any) -> NDArray[np.int64]:
        address = pointers.data[np.asarray(mask.data).astype(bool)].astype(np.int64)
        if address.size == 0:
            return address
        width = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        storage = np.searchsorted(self.base, address, side="right") - 1
        offset = address - self.base[storage]
        inside = (storage >= 0) & (offset + width <= self.size[storage])
        assert inside.all(), "outside"
        self.accesses += address.size
        return self.place[storage] + offset

    def load(self, pointers: Any, mask: Any) -> None:
        at, me = self.find(pointers, mask), self.program
        assert np.isin(self.writer[at], (NOBODY, me)).all(), "race"
        assert (self.written_at[at] != self.stamp()).all(), "hurry"
        self.reader[at] = np.where(np.isin(self.reader[at], (NOBODY, me)), me, SEVERAL)
        self.read_at[at] = self.stamp()

    def store(self, pointers: Any, value: Any, mask: Any) -> None:
        at, me = self.find(pointers, mask), self.program
        values = np.broadcast_to(value.data, pointers.data.shape)[
            np.asarray(mask.data).astype(bool)
        ]
        _, first, which = np.unique(at, return_index=True, return_inverse=True)
        assert (values == values[first][which]).all(), "twice"
        assert np.isin(self.writer[at], (NOBODY, me)).all(), "race"
        assert np.isin(self.reader[at], (NOBODY, me)).all(), "race"
        assert (self.written_at[at] != self.stamp()).all(), "hurry"
        assert (self.read_at[at] != self.stamp()).all(), "hurry"
        self.writer[at], self.written_at[at] = me, self.stamp()

    def stamp(self) -> int:
        """A number for this program between two of its barriers."""
        return self.program << 32 | self.barriers


def tensors_of(argument: Any) -> Iterator[torch.Tensor]:
    """The tensors in a kernel's argument."""
    if isinstance(argument, torch.Tensor):
        yield argument
    elif isinstance(argument, tuple | list):
        for part in argument:
            yield from tensors_of(part)
    elif hasattr(argument, "block_shape"):  # a descriptor
        yield argument.base


@contextmanager
def watched() -> Iterator[Watch]:
    """Inside, a launch that does one of the above raises Triton's InterpreterError."""
    watch, builder = Watch(), interpreter.InterpreterBuilder

    def before(name: str, of: type, step: Callable[..., None]) -> Any:
        original = getattr(of, name)

        def run(self: Any, *arguments: Any, **named: Any) -> Any:
            step(self, *arguments, **named)
            return original(self, *arguments, **named)

        return mock.patch.object(of, name, run)

    def launch(_: Any, arguments: Any, named: dict[str, Any]) -> None:
        watch.launch([x for one in (*arguments, *named.values()) for x in tensors_of(one)])

    def start(self: Any, x: int, y: int, z: int) -> None:
        _, ny, nz = self.grid_dim
        watch.start((x * ny + y) * nz + z)

    def load(_: Any, pointers: Any, mask: Any, *__: Any, **___: Any) -> None:
        watch.load(pointers, mask)

    def store(_: Any, pointers: Any, value: Any, mask: Any, *__: Any) -> None:
        watch.store(pointers, value, mask)

    def barrier(_: Any) -> None:
        watch.barriers += 1

    with ExitStack() as stack:
        stack.enter_context(before("_init_args_hst", interpreter.GridExecutor, launch))
        stack.enter_context(before("set_grid_idx", builder, start))
        stack.enter_context(before("create_masked_load", builder, load))
        stack.enter_context(before("create_masked_store", builder, store))
        stack.enter_context(before("create_barrier", builder, barrier))
        yield watch
