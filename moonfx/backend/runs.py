"""Which graphs run in a call, and what each of them is when it runs."""

import contextlib
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any

from moonfx.backend.records import Record
from moonfx.capture.plain_attention import unwatched


class _Thread(threading.local):
    ran: list[Record] | None = None


_thread = _Thread()


@contextlib.contextmanager
def graphs_that_ran() -> Iterator[list[Record]]:
    """The graphs that this thread runs meanwhile, each as often as it does."""
    outer, _thread.ran = _thread.ran, []
    try:
        yield _thread.ran
    finally:
        _thread.ran = outer


def recorded(
    run: Callable[..., Any], record: Record, dense: Callable[..., Any]
) -> Callable[..., Any]:
    """A compiled graph that tells when it runs.

    Args:
        dense: the same graph as it was written: what runs once the graph is overruled.
    """

    def run_recorded(*args: Any) -> Any:
        if _thread.ran is not None:
            _thread.ran.append(record)
        with unwatched():
            if not record.overruled:
                return run(*args)
            warnings.warn(f"moonfx: {record.overruled}", RuntimeWarning, stacklevel=2)
            return dense(*args)

    return run_recorded
