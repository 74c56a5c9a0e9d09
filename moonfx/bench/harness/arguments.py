"""Types of argparse's arguments: what they refuse is refused before anything is measured."""

from argparse import ArgumentTypeError
from pathlib import Path

import torch


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
