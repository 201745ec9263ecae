"""What an engine tells routers: what it is, and everything that is in its KV cache."""

import asyncio
from collections.abc import AsyncIterator, Iterator

from common.engines.ports import loopback
from common.kv_events import KvEventStream, Update
from common.messages import CacheSnapshot, DescribeRequest, SnapshotRequest, StoredBlocks, WorkerInfo
from common.prefix_index import PrefixIndex

from dynamo.runtime import Context

PART_BLOCKS = 4096  # in one message of a snapshot

_SELF = 0


class Announcement:
    """Answers routers for an engine that publishes KV events.

    Engines keep their recent events only. This keeps an account of what all of them amount to, however long ago they
    were, for routers that come late or have lost some.
    """

    def __init__(self, info: WorkerInfo) -> None:
        self._info = info
        self._events = KvEventStream(loopback(info.kv_events), loopback(info.kv_replay))
        self._index = PrefixIndex()
        self._sequence = -1  # of the last batch of events that is in it

    async def describe(self, request: DescribeRequest, context: Context) -> AsyncIterator[WorkerInfo]:
        """Yield what this worker is."""
        yield self._info

    async def follow(self) -> None:
        """Keep the account. Runs until cancelled."""
        async for item, _ in self._index.follow(_SELF, self._events):
            if isinstance(item, Update):
                self._sequence = item.sequence

    async def snapshot(self, request: SnapshotRequest, context: Context) -> AsyncIterator[CacheSnapshot]:
        """Yield the whole account in parts; parents come before their children. What changes meanwhile may be in it
        or not: who goes on from `sequence` gets it again, and no event does harm twice."""
        sequence = self._sequence
        chains = await asyncio.to_thread(self._index.chains, _SELF)
        part, blocks = list[StoredBlocks](), 0
        for chain in _pieces(chains):
            if blocks + len(chain.block_ids) > PART_BLOCKS:
                yield CacheSnapshot(sequence=sequence, chains=part)
                part, blocks = [], 0
            part.append(chain)
            blocks += len(chain.block_ids)
        yield CacheSnapshot(sequence=sequence, chains=part)


def _pieces(chains: list[StoredBlocks]) -> Iterator[StoredBlocks]:
    """The chains, with those cut up that are too long for a message."""
    for chain in chains:
        for start in range(0, len(chain.block_ids), PART_BLOCKS):
            end = start + PART_BLOCKS
            yield StoredBlocks(
                parent_id=chain.block_ids[start - 1] if start else chain.parent_id,
                block_ids=chain.block_ids[start:end],
                local_hashes=chain.local_hashes[start:end],
            )
