"""A router before simulated engines, in virtual time: the router's own accounts, policies and choice."""

import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial

from benchmarks.measure import mean, percentile
from benchmarks.trace import TraceRequest
from benchmarks.virtual import UNSIGNED, Engine, Request, Timeline
from common.kv_events import Change
from common.messages import FindWorkerRequest, LoadStat, ModelIdentity, WorkerInfo
from common.routing.fleet import Fleet
from common.routing.policy import POLICIES, Candidate, Weights, choose
from common.routing.prefix_index import sequence_hashes
from common.routing.queue import Queue, QueueOptions, Waiting
from common.routing.worker import Lease, Prompt, Worker

REPORT_SECONDS = 0.1  # between looks of an engine of ours at what it is doing
STALE_REPORTS = 3  # without a new pass, and the engine is idle
DETECTION_SECONDS = 0.01  # from an engine's death until its requests are sent again


@dataclass(slots=True, frozen=True)
class Conditions:
    """What a trace is replayed on."""

    speedups: tuple[float, ...] = (0.4,) * 8  # of each engine, over the mocker's own speed
    blocks: int = 12288  # KV blocks of an engine
    block_size: int = 64  # tokens
    routers: int = 1  # that take turns; each knows its own requests and what the engines tell
    event_lag: float = 0.0  # seconds from the end of a pass until routers know of it
    death: float | None = None  # of the first engine, as a share of the time in which requests come

    @property
    def tokens(self) -> int:
        """That the KV cache of an engine has room for."""
        return self.blocks * self.block_size


@dataclass(slots=True, frozen=True)
class Figures:
    """What came out. Times are in seconds."""

    ttft_mean: float
    ttft_p99: float
    total_mean: float
    total_p99: float
    cached: float  # share of the prompt tokens
    busy: float  # share of the time that engines were in a pass


class DynamoWorker(Worker):
    """A worker with the accounts of Dynamo's KvRouter: a prompt counts in full until all of it is computed, whoever
    else needs the same blocks. It reads no reports."""

    def __init__(self, instance_id: int, info: WorkerInfo | None, clock: Callable[[], float]) -> None:
        super().__init__(instance_id, info, clock)
        self._charges: dict[Lease, float] = {}

    @property
    def prefill_blocks(self) -> float:
        return sum(blocks for lease, blocks in self._charges.items() if not lease.prefilled.is_set())

    @contextmanager
    def lease(self, prompt: Prompt, overlap_blocks: int) -> Iterator[Lease]:
        with super().lease(prompt, overlap_blocks) as lease:
            self._charges[lease] = prompt.blocks - overlap_blocks
            yield lease
        del self._charges[lease]

    def on_report(self, stat: LoadStat) -> None:
        pass


def dynamo(candidate: Candidate, weights: Weights) -> float:
    """The cost in Dynamo's KvRouter (lib/kv-router/src/scheduling/selector.rs), with its default weights."""
    worker, blocks = candidate.worker, candidate.prompt.blocks
    return (
        worker.prefill_blocks
        + blocks
        - candidate.overlap_blocks
        + worker.decode_blocks
        + blocks
        - candidate.held_blocks
    )


def blocks_of(request: TraceRequest, block_size: int) -> list[int]:
    """A local hash for each full block of a prompt: equal ones are made of the same pieces at the same places."""
    hashes: list[int] = []
    parts: tuple[int, ...] = ()
    room = block_size
    for piece, tokens in request.pieces:
        begin = 0
        while tokens - begin >= room:
            hashes.append(hash((*parts, piece, begin)) & UNSIGNED)
            begin, parts, room = begin + room, (), block_size
        if begin < tokens:
            parts, room = (*parts, piece, begin), room - (tokens - begin)
    return hashes


def requests_of(trace: Sequence[TraceRequest], block_size: int) -> list[Request]:
    """What engines are asked for."""
    requests = []
    for one in trace:
        local_hashes, tokens = blocks_of(one, block_size), one.input_tokens
        prompt = Prompt(sequence_hashes(local_hashes), tokens / block_size)
        requests.append(Request(one.arrival, prompt, local_hashes, tokens, one.output_tokens))
    return requests


class Router:
    """Decides as router.py does, in virtual time."""

    def __init__(
        self,
        choose: Callable[[Sequence[Candidate]], Candidate],
        queue: QueueOptions,
        workers: Sequence[Worker],
        model: ModelIdentity,
        clock: Callable[[], float],
    ) -> None:
        self.fleet = Fleet()
        for worker in workers:
            self.fleet.add(worker)
        self._queue = Queue(queue, self.fleet.workers.values, choose, clock)
        self._waiting: dict[Waiting, Request] = {}
        self._model = model
        self._leases: dict[Request, ExitStack] = {}

    def ask(self, request: Request) -> Iterator[tuple[Request, int]]:
        """A request has come. Yield those that go to workers now, and to which."""
        asked = FindWorkerRequest.model_construct(
            model=self._model, local_hashes=request.local_hashes, tokens=request.tokens, excluded=[]
        )
        find = partial(self.fleet.candidates, asked, request.prompt)
        waiting = self._queue.admit(find)
        if waiting.candidates:
            yield request, self._take(request, waiting)
        else:
            self._waiting[waiting] = request
        yield from self.take()

    def take(self) -> Iterator[tuple[Request, int]]:
        """Yield the requests whose turn it is, and the workers that they go to."""
        while waiting := self._queue.next():
            request = self._waiting.pop(waiting)
            yield request, self._take(request, waiting)

    def _take(self, request: Request, waiting: Waiting) -> int:
        """Count a request as load on the worker that is chosen for it."""
        best = waiting.best
        lease = self._leases[request] = ExitStack()
        lease.enter_context(best.worker.lease(best.prompt, best.overlap_blocks))
        return best.worker.instance_id

    def release(self, request: Request) -> None:
        """The stream of a request has ended."""
        self._leases.pop(request).close()

    def learn(self, instance_id: int, changes: Sequence[Change]) -> None:
        """KV events came."""
        if worker := self.fleet.workers.get(instance_id):
            worker.on_stored([block for change in changes for block in self.fleet.index.apply(instance_id, change)])


class Cluster:
    """Routers and engines that share a timeline."""

    def __init__(
        self, policy: str, conditions: Conditions, weights: Weights | None = None, queue: QueueOptions | None = None
    ) -> None:
        self._conditions = conditions
        self._timeline = Timeline()
        self._engines = [
            Engine(
                self._timeline,
                blocks=conditions.blocks,
                block_size=conditions.block_size,
                speedup=speedup,
                on_changes=partial(self._tell, number),
                on_done=self._done,
            )
            for number, speedup in enumerate(conditions.speedups)
        ]
        model = ModelIdentity(name="simulated", block_size=conditions.block_size)
        kind = DynamoWorker if policy == "dynamo" else Worker
        self._routers = [
            Router(
                partial(
                    choose, policy=dynamo if policy == "dynamo" else POLICIES[policy], weights=weights or Weights()
                ),
                QueueOptions(0) if policy == "dynamo" else queue or QueueOptions(),
                [kind(number, self._info(number, model), self._timeline.clock) for number in range(len(self._engines))],
                model,
                self._timeline.clock,
            )
            for _ in range(conditions.routers)
        ]
        self._router_of: dict[Request, Router] = {}
        self._dead: set[int] = set()

    def _info(self, number: int, model: ModelIdentity) -> WorkerInfo:
        blocks = self._conditions.blocks
        return WorkerInfo(
            instance_id=number,
            worker_id=str(number),
            model=model,
            total_blocks=blocks,
            context_length=self._conditions.tokens,
            kv_events="",
            kv_replay="",
            load="",
        )

    def replay(self, trace: Sequence[TraceRequest]) -> Figures:
        """Let the requests of a trace come when they are due, and go on until all are answered."""
        requests = requests_of(trace, self._conditions.block_size)
        for number, request in enumerate(requests):
            self._router_of[request] = self._routers[number % len(self._routers)]
            self._timeline.after(request.arrival, partial(self._route, request))
        if self._conditions.death is not None:
            self._timeline.after(self._conditions.death * requests[-1].arrival, partial(self._kill, 0))
        for number, engine in enumerate(self._engines):
            self._timeline.after(REPORT_SECONDS, partial(self._report, number, engine.steps, 0))
        self._timeline.run()
        return self._figures(requests)

    def _route(self, request: Request) -> None:
        self._send(self._router_of[request].ask(request))

    def _send(self, taken: Iterable[tuple[Request, int]]) -> None:
        for request, number in taken:
            self._engines[number].submit(request)

    def _tell(self, number: int, changes: Sequence[Change]) -> None:
        for router in self._routers:
            if self._conditions.event_lag:
                self._timeline.after(self._conditions.event_lag, partial(self._learn, router, number, changes))
            else:
                self._learn(router, number, changes)

    def _learn(self, router: Router, number: int, changes: Sequence[Change]) -> None:
        router.learn(number, changes)
        self._send(router.take())

    def _done(self, request: Request) -> None:
        router = self._router_of.pop(request)
        router.release(request)
        self._send(router.take())

    def _report(self, number: int, steps: int, repeated: int) -> None:
        """Publish an engine's load as engine.py does for a mocker, as long as there is anything to do."""
        if number in self._dead or not self._router_of:
            return
        engine = self._engines[number]
        repeated = repeated + 1 if engine.steps == steps else 0
        idle = LoadStat(running_requests=0, waiting_requests=0, used_tokens=0, total_tokens=self._conditions.tokens)
        for router in self._routers:
            router.fleet.workers[number].on_report(engine.stat if repeated < STALE_REPORTS else idle)
            self._send(router.take())
        self._timeline.after(REPORT_SECONDS, partial(self._report, number, engine.steps, repeated))

    def _kill(self, number: int) -> None:
        """An engine dies, and its requests go elsewhere."""
        self._dead.add(number)
        for router in self._routers:
            router.fleet.forget(number)
        for request in self._engines[number].abandon():
            self._router_of[request].release(request)
            self._timeline.after(DETECTION_SECONDS, partial(self._route, request))

    def _figures(self, requests: Sequence[Request]) -> Figures:
        ttfts = sorted((one.first_token or 0.0) - one.arrival for one in requests)
        totals = sorted((one.finished or 0.0) - one.arrival for one in requests)
        return Figures(
            ttft_mean=mean(ttfts),
            ttft_p99=percentile(ttfts, 99),
            total_mean=mean(totals),
            total_p99=percentile(totals, 99),
            cached=sum(one.cached for one in requests) / sum(one.tokens for one in requests),
            busy=sum(engine.busy_seconds for engine in self._engines) / len(self._engines) / self._timeline.now,
        )


def simulate(
    policy: str,
    trace: Sequence[TraceRequest],
    conditions: Conditions,
    weights: Weights | None = None,
    queue: QueueOptions | None = None,
    seed: int = 1,
) -> Figures:
    """Replay a trace with a policy of router.py, or with Dynamo's (`dynamo`). The same seed gives the same figures."""
    random.seed(seed)  # equal costs are drawn by lot
    return Cluster(policy, conditions, weights, queue).replay(trace)
