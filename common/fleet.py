"""The workers that a router may choose from: their caches, their load, and the ones that do not fit."""

import logging
import time
from collections.abc import Collection, Sequence

from common.messages import WorkerStatus
from common.policy import Candidate
from common.prefix_index import PrefixIndex
from common.worker import Prompt, Worker

log = logging.getLogger(__name__)


class Fleet:
    """All engines, as this router sees them. Who is in it is the business of membership.py."""

    def __init__(self) -> None:
        self.workers: dict[int, Worker] = {}
        self.index = PrefixIndex()
        self._refused: dict[int, WorkerStatus] = {}

    def add(self, worker: Worker) -> None:
        """Let a worker take requests."""
        if worker.name in {other.name for other in self.workers.values()}:
            log.warning("two workers are called %s: give each its own --worker-id", worker.name)
        self.workers[worker.instance_id] = worker

    def refuse(self, instance_id: int, name: str, reason: str) -> None:
        """Give a worker no requests, and say why."""
        log.error("refused worker %s (instance %d): %s", name, instance_id, reason)
        self.workers.pop(instance_id, None)
        self.index.forget(instance_id)
        self._refused[instance_id] = WorkerStatus(
            instance_id=instance_id, worker_id=name, status="refused", reason=reason
        )

    def is_refused(self, instance_id: int) -> bool:
        return instance_id in self._refused

    def forget(self, instance_id: int) -> None:
        """A worker has left."""
        self._refused.pop(instance_id, None)
        self.index.forget(instance_id)
        if worker := self.workers.pop(instance_id, None):
            log.info("worker %s left", worker.name)

    def candidates(self, prompt: Prompt, block_hashes: Sequence[int], excluded: Collection[int]) -> list[Candidate]:
        """The workers that may take a prompt, and how much of it each has."""
        cached = self.index.overlaps(block_hashes)
        return [
            Candidate(worker, prompt, cached.get(instance_id, 0), worker.held_blocks(prompt.path))
            for instance_id, worker in self.workers.items()
            if instance_id not in excluded
        ]

    def status(self) -> list[WorkerStatus]:
        """What is known of every worker, also of refused ones."""
        return [self._status(worker) for worker in self.workers.values()] + list(self._refused.values())

    def _status(self, worker: Worker) -> WorkerStatus:
        return WorkerStatus(
            instance_id=worker.instance_id,
            worker_id=worker.name,
            status="joined" if worker.info else "silent",
            total_blocks=worker.info.total_blocks if worker.info else None,
            cached_blocks=self.index.blocks(worker.instance_id),
            prefill_blocks=worker.prefill_blocks,
            decode_blocks=worker.decode_blocks,
            requests=worker.requests,
            routed_requests=worker.routed_requests,
            routed_blocks=worker.routed_blocks,
            overlap_blocks=worker.overlap_blocks,
            events=worker.events,
            lost=worker.lost,
            last_event_seconds=None if worker.event_at is None else time.monotonic() - worker.event_at,
            event_lag_seconds=worker.event_lag,
        )
