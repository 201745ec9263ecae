"""What an engine tells routers: what it is, and everything that is in its KV cache."""

from collections.abc import AsyncIterator

from common.engines.cache_account import CacheAccount
from common.engines.ports import loopback
from common.kv_events import KvEventStream, Update
from common.messages import CacheSnapshot, DescribeRequest, SnapshotRequest, WorkerInfo

from dynamo.runtime import Context

PART_BLOCKS = 4096  # in one message of a snapshot


class Announcement:
    """Answers routers for an engine that publishes KV events.

    Engines keep their recent events only. This keeps an account of what all of them amount to, however long ago they
    were, for routers that come late or have lost some.
    """

    def __init__(self, info: WorkerInfo) -> None:
        self._info = info
        self._events = KvEventStream(loopback(info.kv_events), loopback(info.kv_replay))
        self._account = CacheAccount()
        self._sequence = -1  # of the last batch of events that is in it

    async def describe(self, request: DescribeRequest, context: Context) -> AsyncIterator[WorkerInfo]:
        """Yield what this worker is."""
        yield self._info

    async def follow(self) -> None:
        """Keep the account. Runs until cancelled."""
        async for item in self._events:
            if not isinstance(item, Update):
                self._account = CacheAccount()
                continue
            for change in item.changes:
                self._account.apply(change)
            self._sequence = item.sequence

    async def snapshot(self, request: SnapshotRequest, context: Context) -> AsyncIterator[CacheSnapshot]:
        """Yield the whole account in parts."""
        sequence = self._sequence
        for chains in self._account.parts(PART_BLOCKS):
            yield CacheSnapshot(sequence=sequence, chains=chains)
