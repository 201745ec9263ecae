"""The workers that a router may choose from: their caches, their load, and which of them fit a request."""

import logging
import time
from collections import OrderedDict
from functools import lru_cache

from common.errors import Unavailable
from common.messages import FindWorkerRequest, ModelIdentity, WorkerStatus
from common.routing.policy import Candidate
from common.routing.prefix_index import PrefixIndex
from common.routing.worker import Prompt, Worker

log = logging.getLogger(__name__)

SESSIONS = 100_000  # remembered; the one that was quiet for longest is forgotten first
UNSERVED = 16  # identities that nobody fits, shown to people


class Fleet:
    """All engines, as this router sees them. Who is in it is the business of membership.py."""

    def __init__(self) -> None:
        self.workers: dict[int, Worker] = {}
        self.index = PrefixIndex()
        self.unserved: OrderedDict[str, str] = OrderedDict()  # by what requests asked for, why no engine fits
        self._refused: dict[int, WorkerStatus] = {}
        self._sessions: OrderedDict[tuple[str, str], int] = OrderedDict()  # by model and session, who had it last
        self._fitting = lru_cache(UNSERVED)(self._find_fitting)  # remembered until somebody comes or leaves

    def add(self, worker: Worker) -> None:
        """Let a worker take requests."""
        if worker.name in {other.name for other in self.workers.values()}:
            log.warning("two workers are called %s: give each its own --worker-id", worker.name)
        self.workers[worker.instance_id] = worker
        self._fitting.cache_clear()

    def refuse(self, instance_id: int, name: str, reason: str) -> None:
        """Give a worker no requests, and say why."""
        log.error("refused worker %s (instance %d): %s", name, instance_id, reason)
        self.workers.pop(instance_id, None)
        self._fitting.cache_clear()
        self.index.forget(instance_id)
        self._refused[instance_id] = WorkerStatus(
            instance_id=instance_id, worker_id=name, status="refused", reason=reason
        )

    def is_refused(self, instance_id: int) -> bool:
        """Whether it gets no requests at all."""
        return instance_id in self._refused

    def forget(self, instance_id: int) -> None:
        """A worker has left."""
        self._refused.pop(instance_id, None)
        self.index.forget(instance_id)
        if worker := self.workers.pop(instance_id, None):
            self._fitting.cache_clear()
            log.info("worker %s left", worker.name)

    def candidates(self, request: FindWorkerRequest, prompt: Prompt) -> list[Candidate]:
        """The workers that may take a prompt, and how much of it each has. Raises Unavailable, with what does not fit,
        if there is none."""
        model, excluded, workers = request.model, request.excluded, self._fitting(request.model)
        if excluded:
            workers = [worker for worker in workers if worker.instance_id not in excluded]
        if not workers:
            raise Unavailable(self._nobody(request), code="no_worker")
        workers = [worker for worker in workers if worker.silent_since is None] or workers
        if request.beside is not None:
            workers = [worker for worker in workers if worker.instance_id == request.beside] or workers
        if self.unserved:
            self.unserved.pop(describe_request(model), None)
        overlaps, hashes = self.index.overlaps(request.local_hashes), prompt.sequence_hashes
        session = self._sessions.get((model.name, request.session)) if request.session else None
        return [
            Candidate(
                worker,
                request,
                prompt,
                overlaps.get(worker.instance_id, 0),
                worker.held_blocks(hashes),
                worker.instance_id == session,
            )
            for worker in workers
        ]

    def _find_fitting(self, model: ModelIdentity) -> list[Worker]:
        return [worker for worker in self.workers.values() if self._fits(worker, model)]

    def _fits(self, worker: Worker, model: ModelIdentity) -> bool:
        """Whether a worker can run requests for a model. One that says it serves it and does not fit is a mistake."""
        reason = worker.mismatch(model)
        if reason is None:
            worker.reason = None
        elif worker.info and worker.info.model.name == model.name:
            worker.reason = reason
            if (wanted := describe_request(model)) not in worker.unfit_for:
                worker.unfit_for.add(wanted)
                log.error("worker %s gets no requests for %s: it %s", worker.name, wanted, reason)
        return reason is None

    def remember(self, request: FindWorkerRequest, instance_id: int) -> None:
        """A request goes to a worker, and with it its session, if it names one."""
        if request.session is None:
            return
        key = (request.model.name, request.session)
        self._sessions[key] = instance_id
        self._sessions.move_to_end(key)
        if len(self._sessions) > SESSIONS:
            self._sessions.popitem(last=False)

    def _nobody(self, request: FindWorkerRequest) -> str:
        """Why no worker can take a request."""
        reasons = [(worker.name, worker.mismatch(request.model)) for worker in self.workers.values()]
        if any(reason is None for _, reason in reasons):
            return f"every engine that serves {request.model.name} has failed this request; try again in a moment"
        if not reasons:
            return f"no engine serves {request.model.name} now; try again in a moment"
        engines = "; ".join(f"engine {name} {reason}" for name, reason in reasons)
        text = f"no engine fits: you ask for {describe_request(request.model)}; {engines}"
        self.unserved[describe_request(request.model)] = text
        if len(self.unserved) > UNSERVED:
            self.unserved.popitem(last=False)
        return text

    def status(self) -> list[WorkerStatus]:
        """What is known of every worker, also of refused ones."""
        return [self._status(worker) for worker in self.workers.values()] + list(self._refused.values())

    def _status(self, worker: Worker) -> WorkerStatus:
        since = worker.silent_since
        return WorkerStatus(
            instance_id=worker.instance_id,
            worker_id=worker.name,
            status="joined" if worker.info else "silent",
            model=worker.info.model if worker.info else None,
            reason=worker.reason if since is None else time.strftime("silent since %F %T", time.localtime(since)),
            silent_seconds=None if since is None else time.time() - since,
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
            heard_seconds=worker.heard_seconds,
            last_event_seconds=None if worker.event_at is None else time.monotonic() - worker.event_at,
            event_lag_seconds=worker.event_lag,
        )


def describe_request(model: ModelIdentity) -> str:
    """What a request asks for, in words."""
    return f"{model.name} in blocks of {model.block_size} tokens"
