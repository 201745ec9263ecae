"""Simulated engines in virtual time: what Dynamo's mocker does as an SGLang engine, without waiting for it.

A forward pass computes up to 8,192 tokens of the prompts that wait, first come, first served, and leaves the rest of
one that does not fit to the next pass. Answers go on only where no prompt waits. How long a pass takes is the mocker's
polynomial (lib/mocker in Dynamo 1.6.1). Requests that are dealt out in turn have the same times here as there; but here
a KV cache never runs out of room for what is in progress.
"""

import heapq
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import count

from common.kv_events import Change, RemovedBlocks
from common.messages import LoadStat, StoredBlocks
from common.routing.worker import Prompt

PASS_TOKENS = 8192  # prompt tokens that a forward pass computes at most
UNSIGNED = 2**64 - 1

Action = Callable[[], None]


class Timeline:
    """Virtual time: what is to happen, and when."""

    def __init__(self) -> None:
        self.now = 0.0  # seconds
        self._order = count()
        self._due: list[tuple[float, int, Action]] = []

    def clock(self) -> float:
        """The time, for who takes a clock."""
        return self.now

    def after(self, seconds: float, action: Action) -> None:
        """Let something happen. What is due at the same time happens in the order in which it was said."""
        heapq.heappush(self._due, (self.now + seconds, next(self._order), action))

    def run(self) -> None:
        """Go on until nothing is left to happen."""
        while self._due:
            self.now, _, action = heapq.heappop(self._due)
            action()


@dataclass(slots=True, eq=False)
class Request:
    """A request, and what becomes of it. Times are in seconds."""

    arrival: float
    prompt: Prompt
    local_hashes: list[int]  # of each full block, its own tokens alone
    tokens: int
    output_tokens: int
    materialized: int = 0  # tokens of the prompt that are in the engine's KV cache
    cached: int = 0  # of those, the ones that it found there
    generated: int = 0
    first_token: float | None = None
    finished: float | None = None


@dataclass(slots=True, frozen=True)
class Step:
    """What an engine does in a forward pass: tokens to compute for prompts, or one token of each answer."""

    seconds: float
    prefill: Sequence[tuple[Request, int]] = ()  # prompts, and how far each of them gets
    decode: Sequence[Request] = ()


def prefill_seconds(tokens: float) -> float:
    """How long a pass over so many new prompt tokens takes, at the mocker's own speed."""
    return (4.209989e-07 * tokens**2 + 1.518344e-02 * tokens + 16.50142) / 1000


def decode_seconds(tokens: float, capacity: float) -> float:
    """How long a step takes for answers with so many tokens in a KV cache that has room for `capacity`."""
    used = min(tokens / capacity, 1.0)
    return max(-25.74 * used**2 + 54.01 * used + 5.74, 1.0) / 1000


class Engine:
    """One engine. It tells of changes in its cache, and of requests that are done, at the end of a pass."""

    def __init__(
        self,
        timeline: Timeline,
        *,
        blocks: int,
        block_size: int,
        speedup: float,
        on_changes: Callable[[Sequence[Change]], None],
        on_done: Callable[[Request], None],
    ) -> None:
        self._timeline = timeline
        self._blocks = blocks
        self._block_size = block_size
        self._speedup = speedup
        self._on_changes = on_changes
        self._on_done = on_done
        self._cache: OrderedDict[int, None] = OrderedDict()  # sequence hashes, the one not used for longest first
        self._waiting: deque[Request] = deque()
        self._running: list[Request] = []
        self._step: Step | None = None
        self.stat = self._stat()
        self.steps = 0
        self.computed_tokens = 0
        self.busy_seconds = 0.0

    @property
    def _capacity(self) -> int:
        return self._blocks * self._block_size

    def submit(self, request: Request) -> None:
        """Queue a request."""
        self._waiting.append(request)
        self._start()

    def abandon(self) -> list[Request]:
        """Die, and return the requests that were in progress, to begin again elsewhere with what they have."""
        computing = [request for request, _ in self._step.prefill] if self._step else []
        left = list(dict.fromkeys([*self._running, *computing, *self._waiting]))
        for request in left:
            request.output_tokens -= request.generated
            request.materialized = request.generated = 0
        self._waiting.clear()
        self._running.clear()
        self._step = None
        return left

    def _start(self) -> None:
        if self._step is None and (step := self._next_step()):
            self._step = step
            self._timeline.after(step.seconds, lambda: self._end(step))

    def _next_step(self) -> Step | None:
        prefill, new = self._batch()
        if prefill:
            self.computed_tokens += new
            return Step(prefill_seconds(new) / self._speedup, prefill)
        if self._running:
            tokens = sum(request.tokens + request.generated for request in self._running)
            return Step(decode_seconds(tokens, self._capacity) / self._speedup, decode=list(self._running))
        return None

    def _batch(self) -> tuple[list[tuple[Request, int]], int]:
        """The prompts of the next pass, how far each gets, and the tokens to compute for them."""
        batch: list[tuple[Request, int]] = []
        room, new = PASS_TOKENS, 0
        while self._waiting and room > 0:
            request = self._waiting[0]
            if not request.materialized:
                request.materialized = request.cached = self._find(request)
            wanted = request.tokens - request.materialized
            taken = min(wanted, room)
            batch.append((request, request.materialized + taken))
            room -= -(-taken // self._block_size) * self._block_size
            new += taken
            if taken < wanted:
                break  # it stays the first to wait
            self._waiting.popleft()
        return batch, new

    def _find(self, request: Request) -> int:
        """How many tokens of a prompt are in the cache. The last one is computed always: it gives the first token."""
        found = 0
        for block in request.prompt.sequence_hashes:
            if block not in self._cache:
                break
            found += 1
        return min(found * self._block_size, request.tokens - 1)

    def _end(self, step: Step) -> None:
        if step is not self._step:
            return  # the engine died meanwhile
        self._step = None
        self.steps += 1
        self.busy_seconds += step.seconds
        changes = [change for request, reached in step.prefill for change in self._store(request, reached)]
        changes += self._evict()
        first = [request for request, reached in step.prefill if reached == request.tokens]
        self.stat = self._stat(step)
        self._running += first
        answered = self._answer(first or step.decode)
        if changes:
            self._on_changes(changes)
        for request in answered:
            self._on_done(request)
        self._start()

    def _store(self, request: Request, reached: int) -> Iterable[Change]:
        """Put what was computed of a prompt into the cache."""
        hashes = request.prompt.sequence_hashes[: reached // self._block_size]
        request.materialized = reached
        known = next((number for number, block in enumerate(hashes) if block not in self._cache), len(hashes))
        for block in reversed(hashes):  # so that of a prompt that is not used any more the end goes first
            self._cache[block] = None
            self._cache.move_to_end(block)
        if known < len(hashes):
            yield StoredBlocks(
                parent_id=hashes[known - 1] & UNSIGNED if known else None,
                block_ids=[block & UNSIGNED for block in hashes[known:]],
                local_hashes=request.local_hashes[known : len(hashes)],
            )

    def _evict(self) -> Iterable[Change]:
        excess = len(self._cache) - self._blocks
        if excess > 0:
            yield RemovedBlocks([self._cache.popitem(last=False)[0] & UNSIGNED for _ in range(excess)])

    def _answer(self, requests: Sequence[Request]) -> list[Request]:
        """Give each of them a token, and return those that have all of theirs."""
        now = self._timeline.now
        done = []
        for request in requests:
            request.generated += 1
            if request.first_token is None:
                request.first_token = now
            if request.generated >= request.output_tokens:
                request.finished = now
                done.append(request)
        if done:
            self._running = [request for request in self._running if request.finished is None]
        return done

    def _stat(self, step: Step | None = None) -> LoadStat:
        """What the mocker reports of a pass: only what took part in it is used, and whole prompts wait."""
        step = step or Step(0.0)
        return LoadStat(
            running_requests=len(step.prefill) + len(step.decode),
            waiting_requests=len(self._waiting),
            used_tokens=sum(reached for _, reached in step.prefill)
            + sum(request.tokens + request.generated for request in step.decode),
            total_tokens=self._capacity,
            waiting_prefill_tokens=sum(request.tokens for request in self._waiting),
        )
