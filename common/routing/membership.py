"""Who is in the fleet: engines are followed as they join, work and leave."""

import asyncio
import logging
from collections.abc import AsyncIterator

from common.errors import PipelineError
from common.kv_events import KvEventStream, load_stats
from common.messages import (
    CacheSnapshot,
    DescribeRequest,
    EngineOutput,
    GenerateRequest,
    SnapshotRequest,
    WorkerInfo,
)
from common.remote import Remote
from common.routing.fleet import Fleet
from common.routing.worker import Worker

from dynamo.runtime import Context

log = logging.getLogger(__name__)

POLL_SECONDS = 0.1  # between looks at who is registered, a list in memory that the runtime keeps up to date
SETTLE_SECONDS = 3.0  # how long the first requests wait for the workers that are there to be taken in
AGAIN_SECONDS = 1.0  # before another attempt to follow a cache
ASK_SECONDS = 1.0  # between questions whether workers are there
THERE_SECONDS = 2.0  # to answer them
ANNOUNCE_SECONDS = 2.0  # how long a new worker may take to announce itself before it is taken for a silent one


class Membership:
    """Keeps a fleet true to what is registered in etcd and to what the engines publish."""

    def __init__(
        self,
        fleet: Fleet,
        *,
        engines: Remote[GenerateRequest, EngineOutput],
        describe: Remote[DescribeRequest, WorkerInfo],
        cache: Remote[SnapshotRequest, CacheSnapshot],
    ) -> None:
        self._engines = engines
        self._fleet = fleet
        self._describe = describe
        self._cache = cache
        self._settled = False

    async def settled(self) -> None:
        """Return at once, unless the first workers are just being taken in: a router that has just started decides as
        well as one that has run for long."""
        now = asyncio.get_running_loop().time
        deadline = now() + SETTLE_SECONDS
        while not self._is_settled() and now() < deadline:
            await asyncio.sleep(POLL_SECONDS)
        self._settled = True

    def _is_settled(self) -> bool:
        if self._settled and self._fleet.workers:
            return True
        registered = self._engines.instance_ids()
        return all(map(self._is_known, registered)) and (bool(registered) or self._settled)

    async def follow(self) -> None:
        """Learn of engines that join, forget those that leave or hang. Runs until cancelled."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._follow_registered())
            group.create_task(self._ask())

    async def _follow_registered(self) -> None:
        following: dict[int, asyncio.Task[None]] = {}
        while True:
            registered = set(self._engines.instance_ids())
            for instance_id in registered - following.keys():
                following[instance_id] = asyncio.create_task(self._follow(instance_id))
            for instance_id in following.keys() - registered:
                following.pop(instance_id).cancel()
                self._fleet.forget(instance_id)
            for worker in self._fleet.workers.values():
                worker.check_silence()
            await asyncio.sleep(POLL_SECONDS)

    async def _ask(self) -> None:
        """Ask the workers whether they are there: what reports their load need not be what answers requests."""
        while True:
            await asyncio.sleep(ASK_SECONDS)
            registered = set(self._describe.instance_ids())
            answers = await self._describe.ask_all(DescribeRequest(), THERE_SECONDS)
            there = {info.instance_id for info in answers}
            for worker in self._fleet.workers.values():
                if there and worker.instance_id in registered:  # if nobody answers, the fault is not with them
                    worker.on_question(answered=worker.instance_id in there)

    async def _follow(self, instance_id: int) -> None:
        """Take a worker in, and keep its pictures true until it leaves."""
        name = str(instance_id)
        try:
            info = await self._announcement(instance_id)
            worker = Worker(instance_id, info)
            name = worker.name
            self._fleet.add(worker)
            if info is None:
                log.warning("worker %s announces nothing, so it is routed to by load alone", name)
                return
            size = f"{info.total_blocks} blocks of {info.model.block_size} tokens"
            log.info("worker %s joined: %s, %s", name, info.model.name, size)
            async with asyncio.TaskGroup() as group:
                group.create_task(self._follow_cache(worker, info))
                group.create_task(self._follow_load(worker, info))
        except Exception as error:
            log.exception("worker %s can no longer be followed", name)
            self._fleet.refuse(instance_id, name, f"it can no longer be followed: {type(error).__name__}: {error}")

    async def _announcement(self, instance_id: int) -> WorkerInfo | None:
        """What a worker says of itself; None for one that has no such endpoint, like Dynamo's own workers."""
        now = asyncio.get_running_loop().time
        deadline = now() + ANNOUNCE_SECONDS
        while now() < deadline:
            if instance_id in self._describe.instance_ids() and instance_id in self._cache.instance_ids():
                try:
                    return await asyncio.wait_for(self._describe.call(DescribeRequest(), instance_id), timeout=5)
                except (PipelineError, TimeoutError) as error:
                    log.warning("worker %d does not describe itself yet: %s", instance_id, error or "no answer in 5 s")
                    deadline = now() + ANNOUNCE_SECONDS  # it will, or it will leave
            await asyncio.sleep(POLL_SECONDS)
        return None

    async def _follow_cache(self, worker: Worker, info: WorkerInfo) -> None:
        def snapshot() -> AsyncIterator[CacheSnapshot]:
            return self._cache.stream(SnapshotRequest(), Context(), [worker.instance_id])

        while True:
            worker.stream = KvEventStream(info.kv_events, info.kv_replay, snapshot)
            try:
                async for item, stored in self._fleet.index.follow(worker.instance_id, worker.stream):
                    worker.on_update(item)
                    worker.on_stored(stored)
            except PipelineError as error:
                log.warning("worker %s gives no snapshot of its cache yet: %s", worker.name, error)
            except Exception:
                log.exception("the cache of worker %s is read again from the beginning", worker.name)
            # Nothing is known of its cache now, which is no reason to give it no work.
            self._fleet.index.forget(worker.instance_id)
            await asyncio.sleep(AGAIN_SECONDS)

    async def _follow_load(self, worker: Worker, info: WorkerInfo) -> None:
        async for stat in load_stats(info.load):
            worker.on_report(stat)

    def _is_known(self, instance_id: int) -> bool:
        """Whether a worker's first picture is complete."""
        if worker := self._fleet.workers.get(instance_id):
            return worker.info is None or (worker.stream is not None and worker.stream.up_to_date)
        return self._fleet.is_refused(instance_id)
