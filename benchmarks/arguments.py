"""What command lines of several benchmarks have in common."""

import argparse
from collections.abc import Sequence

PARTS = ("engines", "routers", "processors", "frontends")


def count(text: str) -> int:
    """For argparse: a number of things."""
    if (value := int(text)) < 1:
        raise ValueError
    return value


def factor(text: str) -> float:
    """For argparse: by how much something is larger, or how long it takes."""
    if not 0 < (value := float(text)) < float("inf"):
        raise ValueError
    return value


def add_parts(parser: argparse.ArgumentParser, engines: int) -> None:
    """Options for how many of each part there are: so many engines, two of all others."""
    for name in PARTS:
        parser.add_argument(f"--{name}", type=count, default=engines if name == "engines" else 2)


def parts(args: argparse.Namespace) -> Sequence[str]:
    """What they are to launch.py."""
    return [text for name in PARTS for text in (f"--{name}", str(getattr(args, name)))]
