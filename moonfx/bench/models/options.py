"""What the benchmarks of whole models are asked: the policy of every attention."""

import argparse
from typing import Any

from moonfx.policy import check_block_topk_sinks

NAMES = ("block", "topk", "sinks")


def add_numbers(parser: argparse.ArgumentParser, *numbers: tuple[str, int, str]) -> None:
    """Arguments that are whole numbers: name, default, help."""
    for name, default, help_text in numbers:
        parser.add_argument(
            f"--{name}", type=int, default=default, help=f"{help_text} (%(default)s)"
        )


def add_policy(parser: argparse.ArgumentParser) -> None:
    add_numbers(
        parser,
        ("block", 128, "tokens per block"),
        ("topk", 8, "blocks that a query attends"),
        ("sinks", 1, "first blocks that are always attended"),
    )


def policy(options: argparse.Namespace) -> dict[str, Any]:
    return {name: getattr(options, name) for name in NAMES}


def check_policy(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Ends with the usage if the policy is none."""
    try:
        check_block_topk_sinks(**policy(options))
    except ValueError as error:
        parser.error(str(error))
