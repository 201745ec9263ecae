"""A worker's own account of its cache can be given to somebody who knows nothing of it."""

import asyncio

from common.engines.announcement import PART_BLOCKS, Announcement
from common.messages import CacheSnapshot, SnapshotRequest, StoredBlocks
from common.routing.prefix_index import PrefixIndex
from tests.unit.stand_ins import worker_info

from dynamo.runtime import Context


def snapshot(cache: Announcement) -> list[CacheSnapshot]:
    async def parts() -> list[CacheSnapshot]:
        return [part async for part in cache.snapshot(SnapshotRequest(), Context())]

    return asyncio.run(parts())


def cache_of(*chains: StoredBlocks) -> Announcement:
    cache = Announcement(worker_info())
    for chain in chains:
        cache._account.apply(chain)
    return cache


def test_an_empty_cache_has_a_snapshot_too() -> None:
    assert snapshot(cache_of()) == [CacheSnapshot(sequence=-1, chains=[])]


def test_a_large_cache_comes_in_parts_that_fit_into_messages() -> None:
    count = 3 * PART_BLOCKS + 5
    blocks = list(range(1, count + 1))
    branch = StoredBlocks(parent_id=7, block_ids=[count + 1], local_hashes=[0])
    parts = snapshot(cache_of(StoredBlocks(parent_id=None, block_ids=blocks, local_hashes=blocks), branch))
    assert len(parts) == 4
    assert all(sum(len(chain.block_ids) for chain in part.chains) <= PART_BLOCKS for part in parts)
    index = PrefixIndex()
    for part in parts:
        for chain in part.chains:
            index.apply(1, chain)
    assert index.overlaps(blocks) == {1: count}
    assert index.overlaps([*blocks[:7], 0]) == {1: 8}
