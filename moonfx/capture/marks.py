"""What functions are to Dynamo, said without importing Dynamo, which takes seconds.

torch.compiler's own decorators import it where a function is defined; these when one is traced, or
is called for the first time.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import torch

F = TypeVar("F", bound=Callable[..., Any])


def never_traced(function: F) -> F:
    """As torch.compiler.disable: the function runs as it is, also inside a compiled one."""
    return torch._disable_dynamo(function)  # type: ignore[return-value]


def constant_when_traced(function: F) -> F:
    """As torch.compiler.assume_constant_result: a trace calls it, and keeps what it returned."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function
