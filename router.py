"""Router: chooses the worker that runs a prompt.

    inference.router.find_worker    block hashes and size of a prompt -> the worker, for as long as the stream is open
    inference.router.workers        what this router knows of each worker

It keeps two pictures of each engine: which blocks are in its KV cache, from the events that the engine publishes on
ZMQ (common/routing/membership.py), and how busy it is, from the requests sent there (a decision counts until its stream
ends) and from what the engine publishes itself (common/routing/worker.py). How it weighs the two is in
common/routing/policy.py.

It knows nothing about models, text, tokens or answers: prompts come as hashes, a worker fits if it and the request name
the same model, and answers do not pass through here.

In production Dynamo this is `KvRouter` (lib/kv-router and lib/llm/src/kv_router), a Rust library inside the frontend.
`--policy dynamo` runs its scheduler here.
"""

import argparse
import logging
import sys
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from functools import partial

from common.events import WATCH_ROUTER, Decided, Feed
from common.log import log_request
from common.messages import (
    CACHE,
    DESCRIBE_WORKER,
    FIND_WORKER,
    GENERATE,
    WORKERS,
    FindWorkerRequest,
    RouterStatus,
    RoutingDecision,
    WorkerCost,
    WorkersRequest,
)
from common.remote import Remote
from common.routing.fleet import Fleet
from common.routing.membership import Membership
from common.routing.metrics import RouterMetrics
from common.routing.overlap_watch import OverlapWatch
from common.routing.policy import POLICIES, Candidate, Leasing, Weights, choose, lease_best
from common.routing.prefix_index import sequence_hashes
from common.routing.queue import Queue, QueueOptions, Queues
from common.routing.worker import Prompt
from common.service import Service, first_of, parser, run

from dynamo.runtime import Context, DistributedRuntime, dynamo_worker

log = logging.getLogger(__name__)

AGAIN_SECONDS = 5.0  # after which a decision is sent again, to see that somebody is there


class Router:
    """Chooses among the workers of a fleet."""

    def __init__(
        self,
        fleet: Fleet,
        membership: Membership,
        lease: Leasing,
        *,
        policy: str,
        queues: Queues,
        feed: Feed,
        metrics: RouterMetrics,
        stopped: Callable[[], Awaitable[None]],
    ) -> None:
        self._fleet = fleet
        self._membership = membership
        self._lease = lease
        self._policy = policy
        self._queues = queues
        self._feed = feed
        self._metrics = metrics
        self._stopped = stopped
        self._watches: defaultdict[str, OverlapWatch] = defaultdict(OverlapWatch)  # by model

    async def find_worker(self, request: FindWorkerRequest, context: Context) -> AsyncIterator[RoutingDecision]:
        """Yield the decision, then hold it as load on the worker until the caller ends the stream or dies.

        Raises Unavailable if no worker fits, Overloaded if the prompt would have to wait too long for one.
        """
        await self._membership.settled()
        began = self._metrics.on_asked()
        prompt = Prompt(sequence_hashes(request.local_hashes), request.tokens / request.model.block_size)
        find = partial(self._fleet.candidates, request, prompt)
        turn = await self._queues[request.model.name].turn(find, context.is_stopped)
        candidates, watch = turn.candidates, self._watches[request.model.name]
        found = any(candidate.overlap_blocks for candidate in candidates)
        watch.on_asked(prompt, found, [candidate.worker for candidate in candidates])
        request_id = request.request_id or context.id()
        tell = self._feed.teller(request_id)
        costs = [candidate.explained for candidate in candidates] if tell or request.explain else []
        async with self._lease(candidates, turn.best) as best:
            if tell:
                tell(self._decided(best, costs))
            self._metrics.on_decided(candidates, best, began + turn.seconds)
            self._fleet.remember(request, best.worker.instance_id)
            log_request(
                log,
                context,
                request_id=request_id,
                worker=best.worker.name,
                prompt_blocks=round(prompt.blocks, 1),
                overlap_blocks=best.overlap_blocks,
                waited_ms=round(1000 * turn.seconds, 1) or None,
            )
            yield (decision := best.decision(costs if request.explain else ()))
            # The runtime may miss a caller that leaves in this very moment, and finds out when it has more to send.
            while not await first_of(context.async_killed_or_stopped(), self._stopped(), seconds=AGAIN_SECONDS):
                yield decision
        watch.on_finished(prompt)

    def _decided(self, best: Candidate, costs: Sequence[WorkerCost]) -> Decided:
        return Decided(
            router=self._feed.instance_id,
            policy=self._policy,
            worker_id=best.worker.name,
            prompt_blocks=best.prompt.blocks,
            overlap_blocks=best.overlap_blocks,
            costs=list(costs),
        )

    async def workers(self, request: WorkersRequest, context: Context) -> AsyncIterator[RouterStatus]:
        """Yield what this router knows of each worker."""
        yield RouterStatus(
            router=int(self._feed.instance_id),
            policy=self._policy,
            waiting=sum(map(len, self._queues.values())),
            workers=self._fleet.status(),
            unserved=list(self._fleet.unserved.values()),
        )


def choice_by(policy: str, weights: Weights, queue: QueueOptions, fleet: Fleet) -> tuple[Queues, Leasing]:
    """By the policy of this name, the queues that choose workers, and what leases them then."""
    if policy == "dynamo":
        from common.routing.dynamo_policy import DynamoPolicy

        any_one = partial(Queue, QueueOptions(0), fleet.workers.values, lambda candidates: candidates[0])
        return Queues(any_one), DynamoPolicy(fleet, weights).lease  # which chooses, and has a queue of its own
    best = partial(choose, policy=POLICIES[policy], weights=weights)
    return Queues(partial(Queue, queue, fleet.workers.values, best)), lease_best


@dynamo_worker()
async def main(runtime: DistributedRuntime, args: argparse.Namespace) -> None:
    workers, find_worker = runtime.endpoint(WORKERS.path), runtime.endpoint(FIND_WORKER.path)
    events = runtime.endpoint(WATCH_ROUTER.path)
    engines = Remote(GENERATE, await runtime.endpoint(GENERATE.path).client())
    describe = Remote(DESCRIBE_WORKER, await runtime.endpoint(DESCRIBE_WORKER.path).client())
    cache = Remote(CACHE, await runtime.endpoint(CACHE.path).client())
    fleet = Fleet()
    membership = Membership(fleet, engines=engines, describe=describe, cache=cache)
    queues, lease = choice_by(args.policy, Weights.of(args), QueueOptions.of(args), fleet)
    async with Service(runtime, drain_seconds=args.drain_seconds) as service:
        feed = Feed(find_worker.connection_id(), service.stopped)
        router = Router(
            fleet,
            membership,
            lease,
            policy=args.policy,
            queues=queues,
            feed=feed,
            metrics=RouterMetrics(service.registry, fleet, feed.instance_id, queues.values()),
            stopped=service.stopped,
        )
        service.add(events, WATCH_ROUTER, feed.watch)
        service.add(workers, WORKERS, router.workers)
        service.add(find_worker, FIND_WORKER, router.find_worker)
        service.background(membership.follow())
        await service.serve()
        await service.wait_for(engines)
        await service.stopped()


def arguments() -> argparse.ArgumentParser:
    """The command line."""
    options = parser(__doc__)
    options.add_argument(
        "--policy", choices=[*POLICIES, "dynamo"], default="kv", help="dynamo: its own scheduler, to compare with"
    )
    Weights.add(options.add_argument_group("weights of the policies kv and dynamo").add_argument)
    QueueOptions.add(options.add_argument)
    return options


if __name__ == "__main__":
    sys.exit(run(main, arguments().parse_args()))
