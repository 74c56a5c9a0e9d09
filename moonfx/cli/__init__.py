"""The `moonfx` command."""

from moonfx.cli.command import main

__all__ = ["main"]
