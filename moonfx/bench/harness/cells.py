"""Numbers as cells of a table: "-" for what was not measured."""


def number(value: float | None, pattern: str = ".2f") -> str:
    """By a format specification."""
    return "-" if value is None else format(value, pattern)


def milliseconds(seconds: float | None) -> str:
    """Three digits after the point below ten milliseconds, else one."""
    if seconds is None:
        return "-"
    return f"{seconds * 1e3:.3f}" if seconds < 0.01 else f"{seconds * 1e3:.1f}"
