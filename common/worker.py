"""A worker as the router sees it: what it announced, and the load on it."""

import asyncio
import time
from bisect import bisect_left
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from common.kv_events import Lost, Update
from common.messages import LoadStat, WorkerInfo

REPORT_SECONDS = 0.5  # that a worker's report may be old: it may still count requests that have ended


@dataclass(slots=True, frozen=True)
class Prompt:
    """A prompt as the router sees it."""

    path: Sequence[int]  # one number per full block, as prefix_index.path makes them
    blocks: float  # with the part of the last one that is not full


@dataclass(slots=True, eq=False)
class Lease:
    """A request in progress on a worker."""

    prompt: Prompt
    prefill: float  # blocks of the prompt still to be computed; 0 once the prefill is done
    prefilled: asyncio.Event = field(default_factory=asyncio.Event)


class Worker:
    """One engine. `info` is None for one that announces nothing, which is routed to by load alone.

    All load is in KV blocks. It is known from three sources: our own leases, from the moment of the decision; KV
    events, which say when a prefill is done; and the worker's own reports, which also know of work that others sent
    and of tokens generated since.
    """

    def __init__(self, instance_id: int, info: WorkerInfo | None, block_size: int) -> None:
        self.instance_id = instance_id
        self.info = info
        self.name = info.worker_id if info else str(instance_id)
        self._block_size = block_size
        self._held: Counter[int] = Counter()  # by path, the leases that a block is in
        self._tails = 0.0  # blocks of leases that are not full, and so shared with nobody
        self._leased = 0.0  # blocks of all leases, shared ones counted for each
        self._ended: deque[tuple[float, float]] = deque()  # when leases ended of late, and their blocks
        self._prefill = 0.0
        self._prefilling: dict[int, list[Lease]] = {}  # by path of the last full block, which ends the prefill
        self._unfinished = 0.0  # blocks of the whole prompts of those
        self._other_prefill = 0.0
        self._other_decode = 0.0
        self.chosen_at = 0.0  # when it got its last request, on the monotonic clock
        self.requests = 0  # in progress, of those that this router sent here
        self.routed_requests = 0
        self.routed_blocks = 0.0
        self.overlap_blocks = 0
        self.events = 0
        self.lost = 0
        self.event_at: float | None = None  # when the last event came, on the monotonic clock
        self.event_lag: float | None = None  # seconds

    @property
    def prefill_blocks(self) -> float:
        """Blocks that this worker still has to compute before it can begin with another prompt."""
        return self._prefill + self._other_prefill

    @property
    def decode_blocks(self) -> float:
        """Blocks that the requests in progress hold, which each decoding step reads. Shared ones count once."""
        return len(self._held) + self._tails + self._other_decode

    def held_blocks(self, path: Sequence[int]) -> int:
        """How many leading blocks of a prompt are part of requests in progress here: they are in the cache, or soon
        will be."""
        held = self._held
        if not path or path[0] not in held:
            return 0
        return bisect_left(path, True, key=lambda block: block not in held)

    @contextmanager
    def lease(self, prompt: Prompt, overlap_blocks: int, expected_blocks: int = 0) -> Iterator[Lease]:
        """Count a request as load on this worker.

        overlap_blocks: leading blocks of the prompt that are in the cache; expected_blocks: that will be by the time
        that the request's turn comes.
        """
        prefill = max(prompt.blocks - max(overlap_blocks, expected_blocks), 0.0)
        lease = Lease(prompt, prefill)
        self._add(lease)
        self.chosen_at = time.monotonic()
        self.routed_requests += 1
        self.routed_blocks += prompt.blocks
        self.overlap_blocks += overlap_blocks
        try:
            yield lease
        finally:
            self._prefill_done(lease)
            self._remove(lease)

    def _add(self, lease: Lease) -> None:
        prompt = lease.prompt
        self.requests += 1
        self._leased += prompt.blocks
        self._tails += prompt.blocks - len(prompt.path)
        self._held.update(prompt.path)
        self._prefill += lease.prefill
        self._unfinished += prompt.blocks
        if prompt.path:
            self._prefilling.setdefault(prompt.path[-1], []).append(lease)

    def _remove(self, lease: Lease) -> None:
        prompt, held = lease.prompt, self._held
        self._forget_ended()
        self._ended.append((time.monotonic(), prompt.blocks))
        self.requests -= 1
        self._leased -= prompt.blocks
        self._tails -= prompt.blocks - len(prompt.path)
        for block in prompt.path:
            if held[block] == 1:
                del held[block]
            else:
                held[block] -= 1
        if prompt.path and (waiting := self._prefilling.get(prompt.path[-1])):
            waiting.remove(lease)
            if not waiting:
                del self._prefilling[prompt.path[-1]]

    def _forget_ended(self) -> None:
        while self._ended and self._ended[0][0] < time.monotonic() - REPORT_SECONDS:
            self._ended.popleft()

    def _prefill_done(self, lease: Lease) -> None:
        if not lease.prefilled.is_set():
            self._prefill -= lease.prefill
            self._unfinished -= lease.prompt.blocks
            lease.prefill = 0.0
            lease.prefilled.set()

    def stored(self, paths: Iterable[int]) -> None:
        """Blocks were stored here: the prompts that end with one of them are computed."""
        for block in paths:
            for lease in self._prefilling.get(block, ()):
                self._prefill_done(lease)

    def updated(self, item: Update | Lost) -> None:
        """KV events came, or are lost."""
        if isinstance(item, Lost):
            self.lost += 1
        elif item.lag is not None:
            self.events += 1
            self.event_at = time.monotonic()
            self.event_lag = item.lag

    def reported(self, stat: LoadStat) -> None:
        """Take in the worker's own account. What it has beyond our leases is work that others sent, and the tokens
        generated so far.

        Workers differ in whether cached tokens of a waiting prompt are waiting, and shared ones held twice; and their
        reports come late. So only what our leases cannot explain in any of these ways counts.
        """
        self._forget_ended()
        explained = self._leased + sum(blocks for _, blocks in self._ended)
        waiting = stat.waiting_prefill_tokens / self._block_size
        used = stat.used_tokens / self._block_size
        beyond = max(waiting + used - explained, 0.0)
        self._other_prefill = min(max(waiting - self._unfinished, 0.0), beyond)
        self._other_decode = max(used - explained, 0.0)
