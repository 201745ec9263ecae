"""How long a worker is waited for."""

import argparse
import os
from dataclasses import dataclass
from typing import Self

DYNAMO_LIMIT = "DYN_HTTP_BACKEND_STREAM_TIMEOUT_SECS"


@dataclass(slots=True, frozen=True)
class Limits:
    """How long a worker may be silent, in seconds; 0 is for ever. Routers notice one that hangs much sooner, unless it
    is of a kind that reports no load."""

    first_token: float = 0.0
    next_token: float = 0.0

    @staticmethod
    def add_options(parser: argparse.ArgumentParser) -> None:
        """An option for each."""
        # Dynamo's own limit would end every stream that is quiet, also those that only say that a lease still runs.
        limit = os.environ.pop(DYNAMO_LIMIT, None)
        says = "a worker that is silent for so long {} is left for another one; 0: never"
        for name, default, when in (
            ("--first-token-seconds", 600.0, "before its first token"),
            ("--next-token-seconds", 60.0, "after one"),
        ):
            parser.add_argument(name, type=float, default=float(limit or default), help=says.format(when))

    @classmethod
    def of(cls, args: argparse.Namespace) -> Self:
        """Those of a command line."""
        return cls(args.first_token_seconds, args.next_token_seconds)

    def exceeded(self, silence: float, begun: bool) -> bool:
        """Whether that is too long. begun: whether there was a token."""
        limit = self.next_token if begun else self.first_token
        return 0 < limit < silence
