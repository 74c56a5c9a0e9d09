"""The one warning that something runs slower than it could, and what to install."""

import warnings

_warned = False


def warn_slow(what: str, reason: str) -> None:
    """Warns once per process, whichever part falls back first.

    A missing C++ compiler stops both Inductor and the attention kernel: that is one thing to mend.

    Args:
        what: what runs slower, and how.
        reason: what is missing, and how to get it.
    """
    global _warned
    if _warned:
        return
    _warned = True
    message = f"moonfx: {what}: {reason}. `moonfx doctor` checks the set-up."
    warnings.warn(message, RuntimeWarning, stacklevel=3)


def forget() -> None:
    """Lets the next fallback warn again."""
    global _warned
    _warned = False
