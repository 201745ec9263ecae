"""Routing policies: which worker gets a prompt.

A policy is a function from a candidate to its cost. The lowest cost wins; equal ones are drawn by lot. To add a
policy, write a function and put it into `POLICIES`.
"""

import argparse
import math
import random
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field, fields
from typing import Any, Self

from common.messages import FindWorkerRequest, RoutingDecision, WorkerCost
from common.routing.worker import Prompt, Worker

import msgspec

BUSIER = 2.0  # than the least loaded worker, and a session leaves its own


def option(default: float, says: str) -> Any:
    """A field of Options."""
    return field(default=default, metadata={"help": says})


@dataclass(slots=True, frozen=True)
class Options:
    """Numbers that the command line sets."""

    @classmethod
    def add(cls, add_argument: Callable[..., object]) -> None:
        """An option for each. add_argument: of a parser, or of a group in one."""
        for one in fields(cls):
            add_argument(f"--{one.name.replace('_', '-')}", type=float, default=one.default, help=one.metadata["help"])

    @classmethod
    def of(cls, args: argparse.Namespace) -> Self:
        """Those of a command line."""
        return cls(**{one.name: getattr(args, one.name) for one in fields(cls)})


@dataclass(slots=True, frozen=True)
class Weights(Options):
    """What `kv` weighs its terms with. Names and defaults are those of Dynamo's KvRouterConfig, but for the last."""

    overlap_score_credit: float = option(1.0, "what a cached block saves; 0 ignores the caches, above 1 saves extra")
    prefill_load_scale: float = option(1.0, "what a block to compute costs; higher, and first tokens come sooner")
    decode_active_request_weight: float = option(0.0, "blocks that each request in progress costs, however long it is")
    router_temperature: float = option(0.0, "above 0, draw workers, the cheaper the likelier: less of a herd")
    decode_load_scale: float = option(0.05, "what a block to read costs; Dynamo always takes 1, as one to compute")


# There is one for every worker and request, and a dataclass takes twice as long.
class Candidate(msgspec.Struct, eq=False):
    """A worker that could take a prompt."""

    worker: Worker
    request: FindWorkerRequest
    prompt: Prompt
    overlap_blocks: int  # leading blocks of the prompt that it has cached
    held_blocks: int  # leading blocks of the prompt that requests in progress there hold, computed or about to be
    had_session: bool = False  # whether it got the last request of the same session
    peers: Sequence["Candidate"] = ()  # all that could take it, this one among them, while a policy looks at it
    cost: float = 0.0  # in blocks, by the policy that chose, once it has

    @property
    def explained(self) -> WorkerCost:
        """Its cost and what that is made of, for people; before there is a lease for this prompt."""
        return WorkerCost(
            worker_id=self.worker.name,
            overlap_blocks=self.overlap_blocks,
            expected_blocks=self.expected_blocks,
            prefill_blocks=self.worker.prefill_blocks,
            decode_blocks=self.worker.decode_blocks,
            cost=self.cost,
        )

    def decision(self, reasons: Sequence[WorkerCost] = ()) -> RoutingDecision:
        """The answer if it is chosen, with the costs of those that are to be explained."""
        info = self.worker.info
        return RoutingDecision(
            instance_id=self.worker.instance_id,
            worker_id=self.worker.name,
            overlap_blocks=self.overlap_blocks,
            cost=self.cost,
            context_length=info.context_length if info else None,
            simulated=info is not None and info.simulated,
            reasons=list(reasons),
        )

    @property
    def expected_blocks(self) -> int:
        """Leading blocks of the prompt that will be in its cache when the prompt's turn comes."""
        return max(self.overlap_blocks, self.held_blocks)


Policy = Callable[[Candidate, Weights], float]


def kv(candidate: Candidate, weights: Weights) -> float:
    """Blocks to compute there before the first token, plus blocks that each decoding step there will read:

        prefill_load_scale * max(0, waiting + prompt - overlap_score_credit * overlap) + decode_load_scale * decode

    as in Dynamo's KvRouter (lib/kv-router/src/scheduling/selector.rs). The first term is the time until the first
    token, for prefills run one after the other; the second stands for the time of each token after it.

    Three things are different. To read a block is cheaper than to compute it, so `decode_load_scale` is not 1: with 1,
    one long conversation in progress outweighs all that a worker has cached. Blocks that the worker is about to compute
    for another request are as good as cached, and waiting for them costs nothing, because this prompt needs them
    anyway: so a burst of prompts with the same new prefix computes it once, on one worker, instead of once on each.
    Without that, so small a weight would let all prompts of a kind run to one worker. And what waits gets less as the
    parts of a long prompt are stored, not only when all of it is. `benchmarks/simulate.py` shows what each is worth.
    """
    worker, blocks = candidate.worker, candidate.prompt.blocks
    overlap, held = candidate.overlap_blocks, candidate.held_blocks
    expected = overlap if overlap > held else held  # no max() here: it takes three times as long, for each worker
    waiting = worker.prefill_blocks - (expected - overlap)
    prefill = (waiting if waiting > 0 else 0.0) + blocks - weights.overlap_score_credit * expected
    decode = worker.decode_blocks + blocks - held
    return (
        weights.prefill_load_scale * (prefill if prefill > 0 else 0.0)
        + weights.decode_load_scale * decode
        + weights.decode_active_request_weight * worker.requests
    )


def session_affinity(candidate: Candidate, weights: Weights) -> float:
    """The worker that had the session's last request, unless it is busy, at more than twice the load of the least
    loaded one: then as `kv`."""
    if candidate.had_session:
        least = min(least_loaded(peer, weights) for peer in candidate.peers)
        if least_loaded(candidate, weights) <= BUSIER * least:
            return -1.0  # less than kv ever says
    return kv(candidate, weights)


def least_loaded(candidate: Candidate, weights: Weights) -> float:
    """The worker with the fewest blocks to compute and to read."""
    return candidate.worker.prefill_blocks + candidate.worker.decode_blocks


def round_robin(candidate: Candidate, weights: Weights) -> float:
    """The worker that was not chosen for longest."""
    return candidate.worker.chosen_at


def at_random(candidate: Candidate, weights: Weights) -> float:
    """Any worker."""
    return 0.0


POLICIES: dict[str, Policy] = {
    "kv": kv,
    "session-affinity": session_affinity,
    "least-loaded": least_loaded,
    "round-robin": round_robin,
    "random": at_random,
}


# From candidates and the best of them to the one that gets the prompt, as its load for as long as the block runs.
Leasing = Callable[[Sequence[Candidate], Candidate], AbstractAsyncContextManager[Candidate]]


@asynccontextmanager
async def lease_best(candidates: Sequence[Candidate], best: Candidate) -> AsyncIterator[Candidate]:
    """Count the prompt as load on the best for as long as the block runs."""
    with best.worker.lease(best.prompt, best.overlap_blocks):
        yield best


def choose(candidates: Sequence[Candidate], policy: Policy, weights: Weights) -> Candidate:
    """The candidate that a policy takes. Sets the cost of each."""
    for candidate in candidates:
        candidate.peers = candidates
        candidate.cost = policy(candidate, weights)
        candidate.peers = ()  # or each decision would leave a circle to the garbage collector
    costs = [candidate.cost for candidate in candidates]
    if weights.router_temperature > 0:
        return random.choices(candidates, _softmax(costs, weights.router_temperature))[0]
    lowest = min(costs)
    return random.choice([candidate for candidate in candidates if candidate.cost == lowest])


def _softmax(costs: Sequence[float], temperature: float) -> list[float]:
    """Chances, from costs scaled to a range of 1 (as softmax_sample in Dynamo's selector.rs)."""
    lowest = min(costs)
    scale = (max(costs) - lowest) * temperature or 1.0
    return [math.exp((lowest - cost) / scale) for cost in costs]
