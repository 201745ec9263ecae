"""Router: chooses the worker that runs a prompt.

    inference.router.find_worker    block hashes and size of a prompt -> the worker, for as long as the stream is open

It follows the engines as they join and leave, and keeps two pictures of each: which blocks are in its KV cache, from
the events that the engine publishes on ZMQ, and how busy it is, from the requests sent there (a decision counts until
its stream ends) and from what the engine publishes itself. The cost that it weighs them with is in common/cost.py.

It knows nothing about text, tokens or answers: prompts come as hashes, and answers do not pass through it.

In production Dynamo this is `KvRouter` (lib/kv-router and lib/llm/src/kv_router), a Rust library inside the frontend.
"""

import argparse
import asyncio
import logging
from collections.abc import AsyncIterator

from common.cost import Candidate, choose
from common.errors import InvalidRequest, PipelineError, Unavailable
from common.kv_events import KvEventStream, Lost, load_stats
from common.messages import DescribeRequest, EngineOutput, FindWorkerRequest, RoutingDecision, WorkerInfo
from common.model import add_options, locate, served_name
from common.prefix_index import PrefixIndex
from common.program import Program, parser, run
from common.remote import Remote
from common.worker import Worker

from dynamo.runtime import Context, DistributedRuntime, dynamo_worker

log = logging.getLogger(__name__)

POLL_SECONDS = 0.1  # between looks at who is registered, a list in memory that the runtime keeps up to date
JOIN_SECONDS = 3.0  # how long a request waits for the first worker to be taken in
ANNOUNCE_SECONDS = 2.0  # how long a new worker may take to announce itself before it is taken for a silent one


class Router:
    """Follows the workers and chooses among them."""

    def __init__(
        self, engines: Remote[EngineOutput], describe: Remote[WorkerInfo], model: str, block_size: int
    ) -> None:
        self._engines = engines
        self._describe = describe
        self._model = model
        self._block_size = block_size
        self._workers: dict[int, Worker] = {}
        self._refused: set[int] = set()
        self._index = PrefixIndex()
        self.closing = asyncio.Event()

    async def find_worker(self, request: FindWorkerRequest, context: Context) -> AsyncIterator[RoutingDecision]:
        """Yield the decision, then hold it as load on the worker until the caller ends the stream or dies."""
        await self._somebody_joined()
        decision = self._decide(request)
        with self._workers[decision.instance_id].lease(request, decision.overlap_blocks):
            yield decision
            closing = asyncio.create_task(self.closing.wait())
            await asyncio.wait((context.async_killed_or_stopped(), closing), return_when=asyncio.FIRST_COMPLETED)
            closing.cancel()

    async def _somebody_joined(self) -> None:
        """Return at once, unless the first workers are just being taken in."""
        deadline = asyncio.get_running_loop().time() + JOIN_SECONDS
        while not self._workers and asyncio.get_running_loop().time() < deadline:
            if not set(self._engines.instance_ids()) - self._refused:
                return
            await asyncio.sleep(POLL_SECONDS)

    def _decide(self, request: FindWorkerRequest) -> RoutingDecision:
        if (request.model, request.block_size) != (self._model, self._block_size):
            raise InvalidRequest(
                f"the processor asks for model {request.model} in blocks of {request.block_size} tokens, the router "
                f"has {self._model} in blocks of {self._block_size}: start both with the same --model and --block-size"
            )
        overlaps = self._index.overlaps(request.block_hashes)
        candidates = [
            Candidate(worker, overlaps.get(instance_id, 0))
            for instance_id, worker in self._workers.items()
            if instance_id not in request.excluded
        ]
        if not candidates:
            raise Unavailable("no engine serves the model now; try again in a moment", code="no_worker")
        best, cost = choose(candidates, request.tokens / self._block_size)
        return RoutingDecision(
            instance_id=best.worker.instance_id,
            worker_id=best.worker.name,
            overlap_blocks=best.overlap_blocks,
            cost=cost,
            context_length=best.worker.info.context_length if best.worker.info else None,
        )

    async def follow_workers(self) -> None:
        """Learn of engines that join, forget those that leave."""
        following: dict[int, asyncio.Task[None]] = {}
        while True:
            registered = set(self._engines.instance_ids())
            for instance_id in registered - following.keys():
                following[instance_id] = asyncio.create_task(self._follow(instance_id))
            for instance_id in following.keys() - registered:
                following.pop(instance_id).cancel()
            await asyncio.sleep(POLL_SECONDS)

    async def _follow(self, instance_id: int) -> None:
        """Take a worker in, keep its pictures true until it leaves, and forget it."""
        try:
            info = await self._announcement(instance_id)
            if info and (reason := self._misfit(info)):
                self._refused.add(instance_id)
                log.error("refused worker %s (instance %d): %s", info.worker_id, instance_id, reason)
                return
            worker = Worker(instance_id, info, self._block_size)
            if worker.name in {other.name for other in self._workers.values()}:
                log.warning("two workers are called %s: give each its own --worker-id", worker.name)
            self._workers[instance_id] = worker
            if info is None:
                log.warning("worker %s announces nothing, so it is routed to by load alone", worker.name)
                await asyncio.Event().wait()
            else:
                log.info("worker %s joined: %d blocks of %d tokens", worker.name, info.total_blocks, info.block_size)
                await asyncio.gather(self._follow_cache(worker, info), self._follow_load(worker, info))
        except Exception:
            self._refused.add(instance_id)
            log.exception("worker %d can no longer be followed and gets no more requests", instance_id)
        finally:
            if instance_id in self._workers:
                log.info("worker %s left", self._workers.pop(instance_id).name)
            self._index.forget(instance_id)

    async def _announcement(self, instance_id: int) -> WorkerInfo | None:
        """What a worker says of itself; None for one that has no such endpoint, like Dynamo's own workers."""
        deadline = asyncio.get_running_loop().time() + ANNOUNCE_SECONDS
        while asyncio.get_running_loop().time() < deadline:
            if instance_id in self._describe.instance_ids():
                try:
                    return await asyncio.wait_for(self._describe.call(DescribeRequest(), instance_id), timeout=5)
                except (PipelineError, TimeoutError) as error:
                    log.warning("worker %d does not describe itself yet: %s", instance_id, error)
                    deadline += POLL_SECONDS  # it will, or it will leave
            await asyncio.sleep(POLL_SECONDS)
        return None

    def _misfit(self, info: WorkerInfo) -> str | None:
        """Why this router cannot use a worker: with other blocks or another model no prefix would ever match."""
        if info.block_size != self._block_size:
            return f"its KV blocks have {info.block_size} tokens, this router's {self._block_size} (--block-size)"
        if info.model != self._model:
            return f"it serves {info.model}, this router {self._model} (--model)"
        return None

    async def _follow_cache(self, worker: Worker, info: WorkerInfo) -> None:
        async for batch in KvEventStream(info.kv_events, info.kv_replay):
            if isinstance(batch, Lost):
                self._index.clear(worker.instance_id)
                continue
            for event in batch.events:
                worker.stored(self._index.apply(worker.instance_id, event))

    async def _follow_load(self, worker: Worker, info: WorkerInfo) -> None:
        async for stat in load_stats(info.load):
            worker.reported(stat)


@dynamo_worker()
async def main(runtime: DistributedRuntime, args: argparse.Namespace) -> None:
    engines = await Remote.connect(runtime, "inference.engine.generate", EngineOutput)
    describe = await Remote.connect(runtime, "inference.engine.describe", WorkerInfo)
    router = Router(engines, describe, served_name(locate(args.model), args.model_name), args.block_size)
    async with Program(runtime, args) as program:
        program.background(router.follow_workers())
        await program.serve("inference.router.find_worker", router.find_worker, FindWorkerRequest)
        await program.needs(engines)
        await program.stopped()
        router.closing.set()


if __name__ == "__main__":
    options = parser(__doc__)
    add_options(options)
    run(main, options.parse_args())
