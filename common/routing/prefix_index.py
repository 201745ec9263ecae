"""Which worker has which blocks in its KV cache: Dynamo's RadixTree, fed from ZMQ."""

import logging
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from itertools import accumulate
from typing import Any

from common.kv_events import Change, KvEventStream, Lost, RemovedBlocks, Update
from common.messages import AllBlocksCleared, StoredBlocks

import msgspec
from dynamo.llm import RadixTree

log = logging.getLogger(__name__)

_ROOT = 0


def sequence_hashes(local_hashes: Sequence[int], parent: int = _ROOT) -> list[int]:
    """For each block, one number that stands for it and all those before it: equal numbers, equal prefixes.

    They are this process's own, 64 bits with a sign, and made by Python's hash of pairs.
    """
    return list(accumulate(local_hashes, lambda before, block: hash((before, block)), initial=parent))[1:]


class PrefixIndex:
    """The KV caches of all workers, searched by prompt.

    A block is known in two ways. Its *local hash*, `compute_block_hash_for_seq` of its tokens, is the same for everyone
    and is what prompts are searched by. Its *block id* is the engine's own, stands for the block in its place after all
    those before it, and is what the engine calls it when it is removed.
    """

    def __init__(self) -> None:
        self._tree = RadixTree()
        self._hashes: dict[int, dict[int, int]] = {}  # by instance and block id, the sequence hash of each block
        self._event_id = 0
        self.applied = Counter[tuple[str, str]]()  # KV events, by type and by what Dynamo calls what became of them

    def overlaps(self, local_hashes: Sequence[int]) -> dict[int, int]:
        """By instance, how many leading blocks of a prompt it has. One that has none is not in it."""
        # Whatever its stub says, scores are by instance and data-parallel rank.
        scores: Any = self._tree.find_matches(list(local_hashes)).scores
        overlaps: dict[int, int] = {}
        for (instance_id, _rank), blocks in scores.items():
            overlaps[instance_id] = max(blocks, overlaps.get(instance_id, 0))
        return overlaps

    def blocks(self, instance_id: int) -> int:
        """How many blocks a worker has in its cache."""
        return len(self._hashes.get(instance_id, ()))

    async def follow(self, instance_id: int, events: KvEventStream) -> AsyncIterator[tuple[Update | Lost, list[int]]]:
        """Keep a worker's blocks true. Yield each thing that came, and the sequence hashes of the blocks stored."""
        async for item in events:
            stored: list[int] = []
            if isinstance(item, Lost):
                self.clear(instance_id)
            else:
                for change in item.changes:
                    stored += self.apply(instance_id, change)
            yield item, stored

    def apply(self, instance_id: int, change: Change) -> list[int]:
        """Take in a change of a worker's cache, and return the sequence hashes of the blocks stored."""
        match change:
            case StoredBlocks():
                return self._store(instance_id, change)
            case RemovedBlocks():
                self._remove(instance_id, change)
            case AllBlocksCleared():
                self.clear(instance_id)
                self.applied["cleared", "ok"] += 1
        return []

    def clear(self, instance_id: int) -> None:
        """Forget a worker's blocks."""
        self._tree.clear_all_blocks(instance_id)
        self._hashes.pop(instance_id, None)

    def forget(self, instance_id: int) -> None:
        """Forget a worker."""
        self._tree.remove_worker(instance_id)
        self._hashes.pop(instance_id, None)

    def _store(self, instance_id: int, stored: StoredBlocks) -> list[int]:
        known = self._hashes.setdefault(instance_id, {})
        if stored.parent_id is not None and stored.parent_id not in known:
            log.debug("instance %d stored blocks after one that was never seen; they cannot be placed", instance_id)
            self.applied["stored", "parent_block_not_found"] += 1
            return []
        self.applied["stored", "ok"] += 1
        blocks = [
            {"block_hash": block_id, "tokens_hash": local_hash}
            for block_id, local_hash in zip(stored.block_ids, stored.local_hashes, strict=True)
        ]
        self._apply(instance_id, {"stored": {"parent_hash": stored.parent_id, "blocks": blocks}})
        parent = _ROOT if stored.parent_id is None else known[stored.parent_id]
        hashes = sequence_hashes(stored.local_hashes, parent)
        known.update(zip(stored.block_ids, hashes, strict=True))
        return hashes

    def _remove(self, instance_id: int, removed: RemovedBlocks) -> None:
        known = self._hashes.get(instance_id, {})
        block_ids = [block_id for block_id in removed.block_ids if block_id in known]
        self.applied["removed", "ok" if block_ids else "block_not_found"] += 1
        if block_ids:
            self._apply(instance_id, {"removed": {"block_hashes": block_ids}})
            for block_id in block_ids:
                known.pop(block_id, None)

    def _apply(self, instance_id: int, data: object) -> None:
        self._event_id += 1
        self._tree.apply_event(instance_id, msgspec.json.encode({"event_id": self._event_id, "data": data}))
