"""What is said when a model or a step gains nothing, as its owner asked with `on_miss`."""

import warnings
from collections.abc import Sequence

from moonfx.report.report import Report

ON_MISS = ("warn", "raise", "ignore")


class NothingRewritten(RuntimeError):
    """No attention became sparse, no iteration is proved, although on_miss="raise"."""


def check_choice(name: str, given: object, choices: Sequence[str]) -> None:
    if given not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {given!r}")


def miss(on_miss: str, report: Report, what: str, problem: str | None = None) -> None:
    """Says that nothing became sparse, or what else missed its aim, as `on_miss` asks."""
    if on_miss == "ignore":
        return
    disabled = f" (passes disabled: {', '.join(report.disabled)})" if report.disabled else ""
    message = f"moonfx: {problem or f'no attention of {what} became sparse'}{disabled}\n{report}"
    if on_miss == "raise":
        raise NothingRewritten(message)
    warnings.warn(message, stacklevel=3)
