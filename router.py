"""Router: chooses the worker that runs a prompt.

    inference.router.find_worker    block hashes and size of a prompt -> the worker, for as long as the stream is open
    inference.router.workers        what this router knows of each worker

It keeps two pictures of each engine: which blocks are in its KV cache, from the events that the engine publishes on
ZMQ (common/membership.py), and how busy it is, from the requests sent there (a decision counts until its stream ends)
and from what the engine publishes itself (common/worker.py). How it weighs the two is in common/policy.py.

It knows nothing about text, tokens or answers: prompts come as hashes, and answers do not pass through it.

In production Dynamo this is `KvRouter` (lib/kv-router and lib/llm/src/kv_router), a Rust library inside the frontend.
`--policy dynamo` runs that one here.
"""

import argparse
import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import fields

from common.errors import InvalidRequest, Unavailable
from common.fleet import Fleet
from common.kv_router import DynamoPolicy
from common.membership import Membership
from common.messages import FindWorkerRequest, RouterStatus, RoutingDecision, WorkerCost, WorkersRequest
from common.model import Agreement, add_options, locate
from common.overlap_watch import OverlapWatch
from common.policy import POLICIES, Candidate, Weights, choose, kv
from common.prefix_index import path
from common.program import Program, parser, run
from common.worker import Prompt

from dynamo.runtime import Context, DistributedRuntime, dynamo_worker


class Router:
    """Chooses among the workers of a fleet."""

    def __init__(
        self,
        fleet: Fleet,
        membership: Membership,
        agreement: Agreement,
        policy: str,
        weights: Weights,
        instance_id: int,
        dynamo: DynamoPolicy | None = None,
    ) -> None:
        self._fleet = fleet
        self._membership = membership
        self._agreement = agreement
        self._policy = policy
        self._weights = weights
        self._instance_id = instance_id
        self._dynamo = dynamo
        self._watch = OverlapWatch()
        self.closing = asyncio.Event()

    async def find_worker(self, request: FindWorkerRequest, context: Context) -> AsyncIterator[RoutingDecision]:
        """Yield the decision, then hold it as load on the worker until the caller ends the stream or dies."""
        self._check(request)
        await self._membership.settled()
        prompt = Prompt(path(request.block_hashes), request.tokens / self._agreement.block_size)
        async with self._lease(request, prompt) as found:
            yield found
            closing = asyncio.create_task(self.closing.wait())
            await asyncio.wait((context.async_killed_or_stopped(), closing), return_when=asyncio.FIRST_COMPLETED)
            closing.cancel()
        self._watch.finished(prompt)

    async def workers(self, request: WorkersRequest, context: Context) -> AsyncIterator[RouterStatus]:
        """Yield what this router knows of each worker."""
        yield RouterStatus(router=self._instance_id, policy=self._policy, workers=self._fleet.status())

    def _check(self, request: FindWorkerRequest) -> None:
        processor = Agreement(request.model, request.tokenizer, request.block_size)
        if reason := self._agreement.misfit(processor):
            raise InvalidRequest(
                f"the router refuses this processor: {reason}; start both with the same --model and --block-size"
            )

    @asynccontextmanager
    async def _lease(self, request: FindWorkerRequest, prompt: Prompt) -> AsyncIterator[RoutingDecision]:
        """Choose a worker, and count the prompt as its load for as long as the block runs."""
        candidates = self._candidates(request, prompt)
        if self._dynamo and not request.excluded:
            async with self._dynamo.lease(request, candidates) as best:
                yield decision(best)
            return
        best = choose(candidates, POLICIES.get(self._policy, kv), self._weights)
        with best.worker.lease(prompt, best.cached, best.expected):
            yield decision(best, candidates if request.explain else ())

    def _candidates(self, request: FindWorkerRequest, prompt: Prompt) -> list[Candidate]:
        """The workers that may take the prompt. Raises Unavailable if there is none."""
        candidates = self._fleet.candidates(prompt, request.block_hashes, request.excluded)
        if not candidates:
            raise Unavailable("no engine serves the model now; try again in a moment", code="no_worker")
        self._watch.asked(prompt, any(candidate.cached for candidate in candidates), self._fleet.workers.values())
        return candidates


def decision(best: Candidate, reasons: Sequence[Candidate] = ()) -> RoutingDecision:
    return RoutingDecision(
        instance_id=best.worker.instance_id,
        worker_id=best.worker.name,
        overlap_blocks=best.cached,
        cost=best.cost,
        context_length=best.worker.info.context_length if best.worker.info else None,
        reasons=[
            WorkerCost(
                worker_id=candidate.worker.name,
                cached=candidate.cached,
                expected=candidate.expected,
                prefill=candidate.worker.prefill_blocks,
                decode=candidate.worker.decode_blocks,
                cost=candidate.cost,
            )
            for candidate in reasons
        ],
    )


@dynamo_worker()
async def main(runtime: DistributedRuntime, args: argparse.Namespace) -> None:
    agreement = Agreement.of(locate(args.model), args)
    weights = Weights(**{field.name: getattr(args, field.name) for field in fields(Weights)})
    fleet = Fleet()
    membership = await Membership.connect(runtime, fleet, agreement)
    dynamo = DynamoPolicy(runtime, agreement.block_size, weights) if args.policy == "dynamo" else None
    instance_id = runtime.endpoint("inference.router.find_worker").connection_id()
    router = Router(fleet, membership, agreement, args.policy, weights, instance_id, dynamo)
    async with Program(runtime, args) as program:
        program.add("inference.router.workers", router.workers, WorkersRequest)
        program.add("inference.router.find_worker", router.find_worker, FindWorkerRequest)
        program.background(membership.follow())
        await program.serve()
        await program.needs(membership.engines)
        await program.stopped()
        router.closing.set()


def arguments() -> argparse.ArgumentParser:
    options = parser(__doc__)
    add_options(options)
    options.add_argument(
        "--policy", choices=[*POLICIES, "dynamo"], default="kv", help="dynamo: its own KvRouter, to compare with"
    )
    weights = options.add_argument_group("weights of the policies kv and dynamo")
    weights.add_argument(
        "--overlap-score-credit", type=float, default=1.0, help="what a cached block saves; 0 ignores the caches"
    )
    weights.add_argument(
        "--prefill-load-scale", type=float, default=1.0, help="what a block to compute costs, against one to read"
    )
    weights.add_argument(
        "--decode-load-scale", type=float, default=0.25, help="what a block to read costs; KvRouter always takes 1"
    )
    weights.add_argument(
        "--decode-active-request-weight", type=float, default=0.0, help="blocks that each request in progress costs"
    )
    weights.add_argument(
        "--router-temperature", type=float, default=0.0, help="above 0, draw workers, the cheaper the likelier"
    )
    return options


if __name__ == "__main__":
    run(main, arguments().parse_args())
