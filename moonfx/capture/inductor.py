"""The inner compilers that run a rewritten graph: Inductor, AOT eager, eager."""

import contextlib
import shutil
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch._dynamo
from torch import fx

from moonfx.capture.cache_key import Stamp
from moonfx.fallback import warn_slow

COMPILERS = ("inductor", "aot_eager", "eager")


def compile_graph(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    compiler: str,
    stamp: str,
    config: dict[str, Any] | None = None,
) -> Callable[..., Any]:
    """Hands a graph on to one of COMPILERS.

    Args:
        stamp: what the artifact depends on beside the graph and moonfx's sources.
        config: Inductor options of the user, as torch.compile(options=...) takes them.
    """
    if compiler == "inductor" and _inductor_lacks_compiler(example_inputs):
        compiler = "eager"
    if compiler == "eager":
        return gm.forward
    if compiler == "aot_eager":
        return torch._dynamo.lookup_backend("aot_eager")(gm, list(example_inputs))
    from torch._inductor import config as inductor_config
    from torch._inductor.compile_fx import compile_fx

    patches = dict(config or {})
    hook = "post_grad_custom_post_pass"
    theirs = patches.get(hook, getattr(inductor_config, hook))
    if theirs is None:
        patches[hook] = Stamp(stamp)
    else:
        hooks = list(theirs) if isinstance(theirs, list | tuple) else [theirs]
        patches[hook] = [*hooks, Stamp(stamp)]
    compiled: Any = compile_fx(gm, list(example_inputs), config_patches=patches)
    return compiled


def cpp_compiler() -> str | None:
    """The C++ compiler that Inductor will use, or None if there is none."""
    from torch._inductor import config as inductor_config

    named = inductor_config.cpp.cxx
    candidates = named if isinstance(named, list | tuple) else [named]
    for candidate in (*candidates, "g++", "clang++"):
        if candidate and shutil.which(candidate):
            return str(candidate)
    return None


def _inductor_lacks_compiler(example_inputs: Sequence[Any]) -> bool:
    tensors = [x for x in example_inputs if isinstance(x, torch.Tensor)]
    on_cpu = any(t.device.type == "cpu" for t in tensors)
    if not on_cpu or cpp_compiler() is not None:
        return False
    warn_slow(
        "no C++ compiler found, so the rewritten graph runs in eager mode, right but slower",
        "install one (apt-get install g++) or name it in CXX to get Inductor's speed",
    )
    return True


@contextlib.contextmanager
def empty_inductor_caches() -> Iterator[None]:
    """Inductor compiles what it compiled before, whether a file or this process remembers it."""
    from torch._inductor.utils import fresh_cache

    with fresh_cache():
        yield


def mode_options(mode: str | None) -> dict[str, Any]:
    """Inductor's options for a mode of torch.compile."""
    if mode is None or mode == "default":
        return {}
    return dict(torch._inductor.list_mode_options(mode))
