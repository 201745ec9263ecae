"""A worker as the router sees it: what it announced, and the load on it."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from common.messages import FindWorkerRequest, LoadStat, WorkerInfo


@dataclass(slots=True, eq=False)
class Lease:
    """A request in progress on a worker, in KV blocks."""

    blocks: float  # of its prompt
    prefill: float  # of those, the ones still to be computed; 0 once the prefill is done
    last_block: int | None  # the local hash of its last full block, which the worker stores when the prefill is done


class Worker:
    """One engine. `info` is None for one that announces nothing, which is routed to by load alone."""

    def __init__(self, instance_id: int, info: WorkerInfo | None, block_size: int) -> None:
        self.instance_id = instance_id
        self.info = info
        self.name = info.worker_id if info else str(instance_id)
        self._block_size = block_size
        self._leases: set[Lease] = set()
        self._other_prefill = 0.0
        self._other_decode = 0.0
        self.chosen_at = 0.0  # when it got its last request, on the monotonic clock

    @property
    def prefill_blocks(self) -> float:
        """Blocks that this worker still has to compute before it can begin with another prompt."""
        return self._other_prefill + sum(lease.prefill for lease in self._leases)

    @property
    def decode_blocks(self) -> float:
        """Blocks that the requests in progress hold, which each decoding step reads."""
        return self._other_decode + sum(lease.blocks for lease in self._leases)

    @property
    def requests(self) -> int:
        """Requests that this router sent here and that are in progress."""
        return len(self._leases)

    @contextmanager
    def lease(self, request: FindWorkerRequest, overlap_blocks: int) -> Iterator[None]:
        """Count a request as load on this worker."""
        blocks = request.tokens / self._block_size
        last_block = request.block_hashes[-1] if request.block_hashes else None
        lease = Lease(blocks=blocks, prefill=max(blocks - overlap_blocks, 0.0), last_block=last_block)
        self._leases.add(lease)
        self.chosen_at = time.monotonic()
        try:
            yield
        finally:
            self._leases.discard(lease)

    def stored(self, local_hashes: list[int]) -> None:
        """Blocks were stored here: the prompts that end with one of them are computed."""
        stored = set(local_hashes)
        for lease in self._leases:
            if lease.last_block in stored:
                lease.prefill = 0.0

    def reported(self, stat: LoadStat) -> None:
        """Take in the worker's own account. What it has beyond our leases is work that others sent, and the tokens
        generated so far."""
        waiting = stat.waiting_prefill_tokens / self._block_size
        used = stat.used_tokens / self._block_size
        self._other_prefill = max(waiting - sum(lease.prefill for lease in self._leases), 0.0)
        self._other_decode = max(used - sum(lease.blocks for lease in self._leases), 0.0)
