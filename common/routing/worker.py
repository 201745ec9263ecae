"""A worker as the router sees it: what it announced, and the load on it."""

import asyncio
import logging
import time
from bisect import bisect_left
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from common.kv_events import KvEventStream, Lost, Update
from common.messages import LoadStat, ModelIdentity, WorkerInfo

log = logging.getLogger(__name__)

SILENT_SECONDS = 5.0  # without a report, which come every second
GAPS = 3  # times its longest silence so far
HUNG_SECONDS = 30.0  # beyond which no pace is an excuse
MISSED = 2  # questions in a row that it did not answer in time, as others did
PACE_SECONDS = 10.0  # of computing, after which what was before counts half
REPORT_SECONDS = 0.5  # a report may still count requests that ended this recently


@dataclass(slots=True, frozen=True)
class Prompt:
    """A prompt as the router sees it."""

    sequence_hashes: Sequence[int]  # one per full block, as prefix_index makes them
    blocks: float  # with the part of the last one that is not full

    @property
    def tail(self) -> float:
        """The part of the last block that is not full, and so is shared with nobody."""
        return self.blocks - len(self.sequence_hashes)


@dataclass(slots=True, eq=False)
class Lease:
    """A request in progress on a worker."""

    prompt: Prompt
    prefilled: asyncio.Event = field(default_factory=asyncio.Event)


class Worker:
    """One engine. `info` is None for one that announces nothing, which is routed to by load alone.

    All load is in KV blocks. It is known from three sources: our own leases, from the moment of the decision; KV
    events, which say how far their prompts are computed; and the worker's own reports, which also know of work that
    others sent and of tokens generated since.
    """

    def __init__(self, instance_id: int, info: WorkerInfo | None, clock: Callable[[], float] = time.monotonic) -> None:
        self.instance_id = instance_id
        self.info = info
        self.name = info.worker_id if info else str(instance_id)
        self._clock = clock
        self._held: Counter[int] = Counter()  # by sequence hash, the leases that a block is in
        self._tails = 0.0  # blocks of leases that are not full, and so shared with nobody
        self._leased = 0.0  # blocks of all leases, shared ones counted for each
        self._ended: deque[tuple[float, float]] = deque()  # when leases ended of late, and their blocks
        self._uncomputed: set[int] = set()  # those of them that are not in the cache yet
        self._uncomputed_tails = 0.0  # of prompts whose prefill is not done
        self._prefilling: dict[int, list[Lease]] = {}  # by the last full block, which ends the prefill
        self._unfinished = 0.0  # blocks of the whole prompts of those
        self._other_prefill = 0.0
        self._other_decode = 0.0
        self.report: LoadStat | None = None  # its last own account
        self.reported_at = 0.0  # when that came, on the monotonic clock; 0 if none has
        self.reason: str | None = None  # why it does not fit requests for its own model
        self.unfit_for: set[str] = set()  # such requests that the log knows of
        self.stream: KvEventStream | None = None  # its KV events
        self._computing_since = 0.0  # when it last stored or got something to compute, on its clock
        self._computing_seconds = 0.0  # that it computed of late
        self._computed_blocks = 0.0  # in that time
        self.stored_at: float | None = None  # when it last said that it stored something, on its clock
        self.chosen_at = 0.0  # when it got its last request, on its clock
        self.requests = 0  # in progress, of those that this router sent here
        self.routed_requests = 0
        self.routed_blocks = 0.0
        self.overlap_blocks = 0
        self.events = 0
        self.lost = 0
        self.event_at: float | None = None  # when the last event came, on its clock
        self.event_lag: float | None = None  # seconds
        self.silent_since: float | None = None  # seconds since the epoch
        self._longest_gap = 0.0  # seconds between two reports
        self._missed = 0  # questions since it answered one
        self._answered_at = clock()

    @property
    def prefill_blocks(self) -> float:
        """Blocks that this worker still has to compute before it can begin with another prompt. Those that several
        prompts share count once, and none from when it is stored: engines store a long prompt in parts."""
        return len(self._uncomputed) + self._uncomputed_tails + self._other_prefill

    @property
    def decode_blocks(self) -> float:
        """Blocks that the requests in progress hold, which each decoding step reads. Shared ones count once."""
        return len(self._held) + self._tails + self._other_decode

    @property
    def leased(self) -> tuple[float, float]:
        """Blocks to compute, and held, by our leases alone."""
        return len(self._uncomputed) + self._uncomputed_tails, len(self._held) + self._tails

    @property
    def reported(self) -> tuple[float, float] | None:
        """The same by its own last account; None if it gave none."""
        if not (report := self.report):
            return None
        return report.waiting_prefill_tokens / self.block_size, report.used_tokens / self.block_size

    @property
    def block_size(self) -> int:
        """Tokens in a block; 0 if it does not say."""
        return self.info.model.block_size if self.info else 0

    @property
    def heard_seconds(self) -> float | None:
        """Time since anything came from it; None if nothing has."""
        heard_at = max(self.reported_at, self.event_at or 0.0)
        return self._clock() - heard_at if heard_at else None

    def mismatch(self, model: ModelIdentity) -> str | None:
        """Why it cannot run requests for `model`; None if it can. One that announces nothing may be any."""
        return model.mismatch(self.info.model) if self.info else None

    def held_blocks(self, sequence_hashes: Sequence[int]) -> int:
        """How many leading blocks of a prompt are part of requests in progress here: they are in the cache, or soon
        will be."""
        held = self._held
        if not sequence_hashes or sequence_hashes[0] not in held:
            return 0
        return bisect_left(sequence_hashes, True, key=lambda block: block not in held)

    @contextmanager
    def lease(self, prompt: Prompt, overlap_blocks: int) -> Iterator[Lease]:
        """Count a request as load on this worker.

        overlap_blocks: leading blocks of the prompt that are in the cache.
        """
        lease = Lease(prompt)
        self._add(lease, overlap_blocks)
        self.chosen_at = self._clock()
        self.routed_requests += 1
        self.routed_blocks += prompt.blocks
        self.overlap_blocks += overlap_blocks
        try:
            yield lease
        finally:
            self._prefill_done(lease)
            self._remove(lease)

    def _add(self, lease: Lease, overlap_blocks: int) -> None:
        prompt = lease.prompt
        self.requests += 1
        self._leased += prompt.blocks
        self._tails += prompt.tail
        self._held.update(prompt.sequence_hashes)
        if not self._uncomputed:
            self._computing_since = self._clock()
        self._uncomputed.update(prompt.sequence_hashes[overlap_blocks:])
        self._uncomputed_tails += prompt.tail
        self._unfinished += prompt.blocks
        if prompt.sequence_hashes:
            self._prefilling.setdefault(prompt.sequence_hashes[-1], []).append(lease)

    def _remove(self, lease: Lease) -> None:
        prompt, held = lease.prompt, self._held
        self._forget_ended()
        self._ended.append((self._clock(), prompt.blocks))
        self.requests -= 1
        self._leased -= prompt.blocks
        self._tails -= prompt.tail
        for block in prompt.sequence_hashes:
            if held[block] == 1:
                held.pop(block)  # a Counter's own del takes ten times as long
                self._uncomputed.discard(block)
            else:
                held[block] -= 1
        if prompt.sequence_hashes and (waiting := self._prefilling.get(prompt.sequence_hashes[-1])):
            waiting.remove(lease)
            if not waiting:
                del self._prefilling[prompt.sequence_hashes[-1]]

    def _forget_ended(self) -> None:
        while self._ended and self._ended[0][0] < self._clock() - REPORT_SECONDS:
            self._ended.popleft()

    def _prefill_done(self, lease: Lease) -> None:
        if not lease.prefilled.is_set():
            self._uncomputed_tails -= lease.prompt.tail
            self._unfinished -= lease.prompt.blocks
            lease.prefilled.set()

    def on_stored(self, sequence_hashes: Collection[int]) -> None:
        """Blocks were stored here, and need no more be computed: a prompt that ends with one of them is done."""
        before = len(self._uncomputed)
        self._uncomputed.difference_update(sequence_hashes)
        if sequence_hashes:
            self._on_computed(before - len(self._uncomputed))
        for block in sequence_hashes:
            for lease in self._prefilling.get(block, ()):
                self._uncomputed.difference_update(lease.prompt.sequence_hashes)
                self._prefill_done(lease)

    def _on_computed(self, blocks: int) -> None:
        self.stored_at = now = self._clock()
        if blocks:
            self._computed_blocks += blocks
            self._computing_seconds += now - self._computing_since
            self._computing_since = now
            if self._computing_seconds > PACE_SECONDS:
                self._computing_seconds /= 2
                self._computed_blocks /= 2

    @property
    def pace(self) -> float | None:
        """Blocks that it computes in a second while it has any to compute; None if that is not known."""
        return self._computed_blocks / self._computing_seconds if self._computing_seconds else None

    def on_update(self, item: Update | Lost) -> None:
        """KV events came, or are lost."""
        if isinstance(item, Lost):
            self.lost += 1
        elif item.batches:
            self.events += item.batches
            self.event_at = self._clock()
            self.event_lag = item.lag

    def check_silence(self) -> None:
        """Take it for silent if it was not heard of for long: it hangs, or cannot be reached."""
        silence = self._silence()
        if silence and self.silent_since is None:
            self.silent_since = time.time() - silence
            log.warning("worker %s is silent: nothing has come from it for %.1f s", self.name, silence)
        elif not silence and self.silent_since is not None:
            log.info("worker %s speaks again", self.name)
            self.silent_since = None

    def _silence(self) -> float | None:
        """Seconds of it, if they are too many. Its reports may come from another process than its answers do, and one
        of the two hang.

        How long it may be without a report depends on its own pace: what is slow reports seldom. One that never
        reported may be of a kind that does not.
        """
        if self._missed >= MISSED:
            return self._clock() - self._answered_at
        silence = self._clock() - self.reported_at
        too_long = silence > min(max(SILENT_SECONDS, GAPS * self._longest_gap), HUNG_SECONDS)
        return silence if self.reported_at and too_long else None

    def on_question(self, *, answered: bool) -> None:
        """It was asked whether it is there, and answered in time, or others did."""
        self._missed = 0 if answered else self._missed + 1
        if answered:
            self._answered_at = self._clock()
        self.check_silence()

    def on_report(self, stat: LoadStat) -> None:
        """Take in the worker's own account. What it has beyond our leases is work that others sent, and the tokens
        generated so far.

        Workers differ in whether cached tokens of a waiting prompt are waiting, and shared ones held twice; and their
        reports come late. So only what our leases cannot explain in any of these ways counts.
        """
        if self.info is None:
            return
        now = self._clock()
        if self.reported_at:
            self._longest_gap = max(self._longest_gap, now - self.reported_at)
        self.reported_at = now
        self.check_silence()
        self.report = stat
        self._forget_ended()
        explained = self._leased + sum(blocks for _, blocks in self._ended)
        waiting, used = self.reported or (0.0, 0.0)
        beyond = max(waiting + used - explained, 0.0)
        self._other_prefill = min(max(waiting - self._unfinished, 0.0), beyond)
        self._other_decode = max(used - explained, 0.0)
