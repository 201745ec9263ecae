"""Prompts that wait until a worker has room for them: the shortest goes first, and what would wait too long is refused.

An engine computes prompts in the order in which they came, on the worker that was chosen when they came. As long as a
prompt waits here, both can still be decided: a short one does not stand behind a long one, and each is sent with what
is known then of caches and loads. And only here can be known how long it would wait.

In production Dynamo this is the queue of the KvRouter (`router_queue_threshold`, `router_queue_policy`;
lib/kv-router/src/scheduling/queue.rs), off by default, in which a long prompt can be overtaken for ever.
"""

import asyncio
import math
import time
from bisect import insort
from collections import defaultdict
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field

from common.errors import Cancelled, Overloaded
from common.messages import FindWorkerRequest
from common.routing.policy import Candidate, Options, option
from common.routing.worker import Worker

AGEING = 1000.0  # tokens that a prompt gets ahead in a second
LOOK = 8  # prompts at the head of the queue for which room is looked for
LONGEST = 10_000  # prompts in a queue
NEWS_SECONDS = 1.0  # without any from a worker, after which its load is not believed
POLL_SECONDS = 0.005  # between looks at the workers: much less than an engine takes for what it has
MAX_RETRY_SECONDS = 60
SWEEP_SECONDS = 0.25  # between looks at who does not wait any more


@dataclass(slots=True, frozen=True)
class QueueOptions(Options):
    """When prompts wait, and how long."""

    queue_tokens: float = option(
        2048.0, "prompts wait while the worker that is best for them has so many tokens to compute; 0: they do not"
    )
    max_waiting: float = option(30.0, "seconds that a prompt may wait; one that would wait longer is refused")


Find = Callable[[], Sequence[Candidate]]  # who may take a prompt; it raises Unavailable if nobody may


@dataclass(slots=True, eq=False)
class Waiting:
    """A prompt that came to a queue."""

    find: Find
    is_over: Callable[[], bool]
    request: FindWorkerRequest
    since: float  # on the queue's clock
    blocks: float = 0.0  # to compute
    order: tuple[float, float] = (0.0, 0.0)  # what is less goes first
    # Once it has its turn: among whom, and the best of them.
    candidates: Sequence[Candidate] = ()
    best: Candidate = field(init=False, repr=False)
    seconds: float = 0.0  # that it has waited
    turn: asyncio.Future[None] | None = None


class Queue:
    """The prompts that wait for workers of one model.

    A prompt has its turn when the worker that is best for it, by the router's policy, has less than `queue_tokens` to
    compute. Of those that could go, the one with the fewest blocks to compute goes first; for each second that it waits
    it counts as shorter. What a session has in the queue already counts as part of its next prompt, so that a session
    with many does not push back those with few. Higher priorities go before lower ones.
    """

    def __init__(
        self,
        options: QueueOptions,
        workers: Callable[[], Collection[Worker]],
        choose: Callable[[Sequence[Candidate]], Candidate],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._options = options
        self._workers = workers
        self._choose = choose
        self._clock = clock
        self._line: list[Waiting] = []
        self._sessions = defaultdict[str, float](float)  # blocks that each has in the queue
        self._stuck: set[int] = set()  # the workers that had room when none of the first in line wanted it
        self._serving: asyncio.Task[None] | None = None

    def __len__(self) -> int:
        return len(self._line)

    async def turn(self, find: Find, is_over: Callable[[], bool]) -> Waiting:
        """Return a prompt when it has its turn.

        is_over: whether nobody waits for it any more. Raises Overloaded if it would wait too long, Cancelled if it is
        over first, and what `find` raises.
        """
        waiting = self.admit(find, is_over)
        if waiting.candidates:
            return waiting
        waiting.turn = asyncio.get_running_loop().create_future()
        if not self._serving or self._serving.done():
            self._serving = asyncio.create_task(self._serve())
        try:
            await waiting.turn
        finally:
            self._remove(waiting)
        waiting.seconds = self._clock() - waiting.since
        return waiting

    async def _serve(self) -> None:
        """Give turns as long as somebody waits."""
        sweep_at = self._clock()
        while self._line:
            if self._clock() >= sweep_at:
                sweep_at += SWEEP_SECONDS
                self._sweep()
            waiting = self.next()
            await asyncio.sleep(0 if waiting else POLL_SECONDS)  # with 0, whoever has its turn now is leased first

    def admit(self, find: Find, is_over: Callable[[], bool] = lambda: False) -> Waiting:
        """Give a prompt its turn, or else put it into the queue. Raises Overloaded if it would wait too long there, and
        what `find` raises."""
        candidates = find()
        waiting = Waiting(find, is_over, candidates[0].request, since=self._clock())
        if not self._options.queue_tokens or waiting.request.begun:
            waiting.candidates, waiting.best = candidates, self._choose(candidates)
        elif self._line or not self._may_go(waiting, candidates):
            self._line_up(waiting, candidates)
        return waiting

    def _line_up(self, waiting: Waiting, candidates: Sequence[Candidate]) -> None:
        request, ageing = waiting.request, AGEING / waiting.request.model.block_size
        self._check(request, candidates)
        waiting.blocks = min(candidate.prompt.blocks - candidate.expected_blocks for candidate in candidates)
        # In the second half of the time that it may wait, nobody comes before it who was not there before.
        session = self._sessions.get(request.session or "", 0.0)
        length = min(session + waiting.blocks, ageing * self._options.max_waiting / 2)
        waiting.order = -request.priority, length + ageing * waiting.since
        if request.session:
            self._sessions[request.session] = session + waiting.blocks
        insort(self._line, waiting, key=lambda one: one.order)
        self._stuck.clear()

    def _check(self, request: FindWorkerRequest, candidates: Sequence[Candidate]) -> None:
        """Raises Overloaded if what waits already takes the workers half of the time that a prompt may wait: in the
        other half, others may come before it."""
        ahead = sum(waiting.blocks for waiting in self._line if waiting.request.priority >= request.priority)
        paces = [candidate.worker.pace for candidate in candidates if candidate.worker.pace]
        seconds = ahead / (sum(paces) / len(paces) * len(candidates)) if paces else 0.0
        allowed = self._options.max_waiting / 2
        if seconds > allowed or len(self._line) >= LONGEST:
            raise self._refusal(seconds - allowed)

    def _refusal(self, seconds: float) -> Overloaded:
        retry = min(max(math.ceil(seconds), 1), MAX_RETRY_SECONDS)
        text = f"the engines have more to do than they can: {len(self._line)} prompts wait already"
        return Overloaded(f"{text}; try again in {retry} s", code="overloaded", retry_seconds=retry)

    def next(self) -> Waiting | None:
        """Whose turn it is now, if it is anybody's; it is no longer in the queue."""
        room = {worker.instance_id for worker in self._workers() if self._has_room(worker)}
        if not room or room == self._stuck:
            return None
        for waiting in self._line[:LOOK]:
            if self._is_next(waiting):
                self._remove(waiting)
                return waiting
        self._stuck = room
        return None

    def _is_next(self, waiting: Waiting) -> bool:
        turn = waiting.turn
        try:
            if not self._may_go(waiting, waiting.find()):
                return False
        except Exception as error:
            if turn and not turn.done():
                turn.set_exception(error)
            return True
        if turn and not turn.done():
            turn.set_result(None)
        return True

    def _may_go(self, waiting: Waiting, candidates: Sequence[Candidate]) -> bool:
        """Whether the best of the candidates has room, which then is the prompt's."""
        best = self._choose(candidates)
        if has_room := self._has_room(best.worker):
            waiting.candidates, waiting.best = candidates, best
        return has_room

    def _has_room(self, worker: Worker) -> bool:
        """Whether a worker has little to compute, or its events do not tell."""
        if worker.stored_at is None or worker.prefill_blocks * worker.block_size < self._options.queue_tokens:
            return True
        return self._clock() - max(worker.stored_at, worker.chosen_at) > NEWS_SECONDS

    def _sweep(self) -> None:
        """Send away who has waited for too long, or has gone."""
        for waiting in list(self._line):
            if not waiting.turn or waiting.turn.done():
                continue
            if waiting.is_over():
                waiting.turn.set_exception(Cancelled("the caller went away"))
            elif self._clock() - waiting.since > self._options.max_waiting:
                waiting.turn.set_exception(self._refusal(self._options.max_waiting))

    def _remove(self, waiting: Waiting) -> None:
        if waiting in self._line:
            self._line.remove(waiting)
            if session := waiting.request.session:
                self._sessions[session] -= waiting.blocks
        if not self._line:
            self._sessions.clear()


Queues = defaultdict[str, Queue]  # by model
