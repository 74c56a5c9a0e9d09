"""Arguments of all benchmarks: what they refuse is refused before anything is measured."""

import importlib.util
from argparse import ArgumentTypeError
from pathlib import Path

import torch

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def device(text: str) -> str:
    """A device that torch can use here."""
    try:
        torch.empty(0, device=text)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ArgumentTypeError(
            f"must be cpu, or a GPU that torch can use, got {text!r} ({reason})"
        ) from error
    return text


def new_file(text: str) -> str:
    """A file that can be written."""
    if not Path(text).absolute().parent.is_dir():
        raise ArgumentTypeError(f"must be a file in a folder that exists, got {text!r}")
    return text


def why_no_plot() -> str | None:
    """Why `--plot` cannot draw, and the remedy; None where it can."""
    if importlib.util.find_spec("matplotlib") is None:
        return "--plot needs matplotlib: pip install matplotlib, or moonfx[plot]"
    return None
