"""Records what a launcher would compile, without a GPU: Triton is told of a chip that is not here.

The real Python launchers run on tensors of the meta device, which have shapes and strides and no
memory. Triton binds and specialises the arguments as ever (1, multiples of 16, pointers, integers
beyond 32 bits) and is stopped before it compiles. So what is proved is what would be launched.
"""

import contextlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget

from moonfx.kernels.gpu import configs as gpu_configs


@dataclass(frozen=True)
class Launch:
    """A variant of a kernel: module.name, Triton's cache key, and what `triton.compile` takes."""

    name: str
    chip: str
    key: str
    kernel: Any
    signature: dict[str, str]
    constants: dict[tuple[int, ...], Any]
    attributes: dict[tuple[int, ...], Any]
    options: dict[str, Any]

    def compile(self) -> Any:
        source = triton.compiler.ASTSource(
            self.kernel, self.signature, self.constants, self.attributes
        )
        return triton.compile(source, target=target(self.chip), options=self.options)


class Driver:
    """The part of Triton's driver that binding asks for. A device is named by its chip."""

    def __init__(self, chip: str) -> None:
        self.chip = chip

    def get_current_target(self) -> GPUTarget:
        return target(self.chip)

    def get_current_device(self) -> str:
        return self.chip

    def get_current_stream(self, device: str) -> int:
        del device
        return 0


@contextlib.contextmanager
def recording(chip: str) -> Iterator[list[Launch]]:
    """The launches made inside, in order; none of them compiles or runs."""
    assert "TRITON_INTERPRET" not in os.environ, "kernels that are interpreted are never compiled"
    launches: list[Launch] = []

    def hook(*, key: str, fn: Any, compile: dict[str, Any], **_: object) -> bool:
        name = f"{fn.module}.{fn.name}".removeprefix("moonfx.kernels.gpu.")
        options = json.loads(compile["specialization_data"])["options"]
        launches.append(
            Launch(
                name,
                chip,
                f"{name} {key}",
                fn.jit_function,
                compile["signature"],
                compile["constants"],
                compile["configs"][0],
                {k: tuple(v) if isinstance(v, list) else v for k, v in options.items()},
            )
        )
        return True  # "compiled elsewhere": the launch ends here

    triton.runtime.driver.set_active(Driver(chip))
    with (
        mock.patch.object(triton.knobs.runtime, "jit_cache_hook", hook),
        mock.patch.object(gpu_configs, "architecture", return_value=chip),
        mock.patch.object(torch.version, "hip", None if chip.startswith("sm_") else chip),
    ):
        yield launches


def target(chip: str) -> GPUTarget:
    if chip.startswith("sm_"):
        return GPUTarget("cuda", int(chip.removeprefix("sm_")), 32)
    return GPUTarget("hip", chip, 64)
