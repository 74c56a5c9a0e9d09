"""Graphs as readable Python, and the artifacts of torch's structured traces (tlparse)."""

import logging
import re

from torch import fx
from torch._logging import trace_structured
from torch._logging._internal import LazyTraceHandler, trace_log


def readable(gm: fx.GraphModule) -> str:
    """A graph and its bodies as Python, with the shape, dtype and strides of each value."""
    text = gm.print_readable(print_output=False, include_stride=True)
    return re.sub(r"class <\w+>\(", "class Graph(", text)


def tracing() -> bool:
    """Whether someone asked for structured traces (TORCH_TRACE)."""
    # Torch's handler removes itself if no one did; others (pytest's) only listen.
    handlers = (h for h in trace_log.handlers if isinstance(h, LazyTraceHandler))
    return trace_log.isEnabledFor(logging.DEBUG) and any(handlers)


def trace_artifact(name: str, text: str) -> None:
    """Leaves a text for tlparse, where structured traces are on."""
    metadata = {"name": name, "encoding": "string"}
    trace_structured("artifact", metadata_fn=lambda: metadata, payload_fn=lambda: text)
