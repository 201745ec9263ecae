"""A worker for a prompt, and how long it is waited for."""

import argparse
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Self

from common.messages import RoutingDecision
from common.patience import Hopeless

GONE_SECONDS = 2.0  # of silence of a worker that is no longer registered; one that drains is not silent
DYNAMO_LIMIT = "DYN_HTTP_BACKEND_STREAM_TIMEOUT_SECS"


@dataclass(slots=True, frozen=True)
class Limits:
    """How long a worker may be silent, in seconds; 0 is for ever. Routers notice one that hangs much sooner, unless it
    is one that reports no load."""

    first_token: float
    next_token: float

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


@dataclass(slots=True)
class Lease:
    """The worker that a prompt has, for as long as it is needed."""

    decision: RoutingDecision
    revoked: str | None = None  # why the worker is not to be waited for any longer, once that is so

    def hopeless(self, limits: Limits, instance_ids: Callable[[], list[int]]) -> Hopeless:
        """When to give the worker up. instance_ids: those that are registered now."""
        instance_id = self.decision.instance_id

        def reason(silence: float, begun: bool) -> str | None:
            if self.revoked:
                return self.revoked
            limit = limits.next_token if begun else limits.first_token
            if limit and silence > limit:
                return f"it has said nothing for {silence:.0f} s"
            if silence > GONE_SECONDS and instance_id not in instance_ids():
                return f"it is no longer registered, and has said nothing for {silence:.0f} s"
            return None

        return reason
