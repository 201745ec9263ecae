"""A worker's account of its own KV cache, for routers that come late or have lost events."""

import asyncio
from collections.abc import AsyncIterator, Iterator

from common.kv_events import KvEventStream, Update
from common.messages import CacheSnapshot, SnapshotRequest, StoredBlocks
from common.prefix_index import PrefixIndex

from dynamo.runtime import Context

PART_BLOCKS = 4096  # in one message of a snapshot

_SELF = 0


class OwnCache:
    """Engines keep their recent KV events only. This is what all of them amount to, however long ago they were."""

    def __init__(self, events: str, replay: str) -> None:
        self._events = KvEventStream(events, replay)
        self._index = PrefixIndex()
        self._sequence = -1  # of the last batch of events that is in it

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
            if blocks + len(chain.names) > PART_BLOCKS:
                yield CacheSnapshot(sequence=sequence, chains=part)
                part, blocks = [], 0
            part.append(chain)
            blocks += len(chain.names)
        yield CacheSnapshot(sequence=sequence, chains=part)


def _pieces(chains: list[StoredBlocks]) -> Iterator[StoredBlocks]:
    """The chains, with those cut up that are too long for a message."""
    for chain in chains:
        for start in range(0, len(chain.names), PART_BLOCKS):
            end = start + PART_BLOCKS
            parent = chain.names[start - 1] if start else chain.parent
            yield StoredBlocks(parent=parent, names=chain.names[start:end], hashes=chain.hashes[start:end])
