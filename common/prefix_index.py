"""Which worker has which blocks in its KV cache: Dynamo's RadixTree, fed from ZMQ."""

import logging
from collections.abc import AsyncIterator, Sequence
from itertools import accumulate
from typing import Any

from common.kv_events import Change, KvEventStream, Lost, RemovedBlocks, Update
from common.messages import AllBlocksCleared, StoredBlocks

import msgspec
from dynamo.llm import RadixTree

log = logging.getLogger(__name__)

_ROOT = 0


def path(block_hashes: Sequence[int], parent: int = _ROOT) -> list[int]:
    """For each block, one number that stands for it and all those before it: equal numbers, equal prefixes.

    Dynamo calls them sequence hashes. These are this process's own, and made by Python's hash of pairs.
    """
    return list(accumulate(block_hashes, lambda before, block: hash((before, block)), initial=parent))[1:]


class _Block(msgspec.Struct):
    block_hash: int
    tokens_hash: int


class _Stored(msgspec.Struct):
    parent_hash: int | None
    blocks: list[_Block]


class _Data(msgspec.Struct):
    stored: _Stored


class _Event(msgspec.Struct):
    data: _Data


class _Dumped(msgspec.Struct):
    """What RadixTree.dump_tree_as_events gives, a chain of blocks each."""

    worker_id: int
    event: _Event


class PrefixIndex:
    """The KV caches of all workers, searched by prompt.

    A block has two names. Its *local* hash, `compute_block_hash_for_seq` of its tokens, is the same for everyone and
    is what prompts are searched by. Its *name* is the engine's own, stands for the block in its place after all those
    before it, and is what the engine calls it when it is removed.
    """

    def __init__(self) -> None:
        self._tree = RadixTree()
        self._paths: dict[int, dict[int, int]] = {}  # by worker and name, the path of each block that it has
        self._event_id = 0

    def overlaps(self, block_hashes: Sequence[int]) -> dict[int, int]:
        """By worker, how many leading blocks of a prompt it has. A worker that has none is not in it."""
        scores: Any = self._tree.find_matches(list(block_hashes)).scores  # by (worker, rank), whatever its stub says
        overlaps: dict[int, int] = {}
        for (worker, _rank), blocks in scores.items():
            overlaps[worker] = max(blocks, overlaps.get(worker, 0))
        return overlaps

    def blocks(self, worker: int) -> int:
        """How many blocks a worker has in its cache."""
        return len(self._paths.get(worker, ()))

    def chains(self, worker: int) -> list[StoredBlocks]:
        """A worker's blocks as chains, parents before their children."""
        events = (msgspec.json.decode(event, type=_Dumped) for event in self._tree.dump_tree_as_events())
        return [
            StoredBlocks(
                parent=event.event.data.stored.parent_hash,
                names=[block.block_hash for block in event.event.data.stored.blocks],
                hashes=[block.tokens_hash for block in event.event.data.stored.blocks],
            )
            for event in events
            if event.worker_id == worker
        ]

    async def follow(self, worker: int, events: KvEventStream) -> AsyncIterator[tuple[Update | Lost, list[int]]]:
        """Keep a worker's blocks true. Yield each thing that came, and the paths of the blocks that it stored."""
        async for item in events:
            paths: list[int] = []
            if isinstance(item, Lost):
                self.clear(worker)
            else:
                for change in item.changes:
                    paths += self.apply(worker, change)
            yield item, paths

    def apply(self, worker: int, change: Change) -> list[int]:
        """Take in a change of a worker's cache, and return the paths of the blocks that it stored."""
        match change:
            case StoredBlocks():
                return self._store(worker, change)
            case RemovedBlocks():
                self._remove(worker, change)
            case AllBlocksCleared():
                self.clear(worker)
        return []

    def clear(self, worker: int) -> None:
        """Forget a worker's blocks."""
        self._tree.clear_all_blocks(worker)
        self._paths.pop(worker, None)

    def forget(self, worker: int) -> None:
        """Forget a worker."""
        self._tree.remove_worker(worker)
        self._paths.pop(worker, None)

    def _store(self, worker: int, stored: StoredBlocks) -> list[int]:
        known = self._paths.setdefault(worker, {})
        if stored.parent is not None and stored.parent not in known:
            log.debug("worker %d stored blocks after one that was never seen; they cannot be placed", worker)
            return []
        blocks = [
            {"block_hash": name, "tokens_hash": tokens}
            for name, tokens in zip(stored.names, stored.hashes, strict=True)
        ]
        self._apply(worker, {"stored": {"parent_hash": stored.parent, "blocks": blocks}})
        paths = path(stored.hashes, _ROOT if stored.parent is None else known[stored.parent])
        known.update(zip(stored.names, paths, strict=True))
        return paths

    def _remove(self, worker: int, removed: RemovedBlocks) -> None:
        known = self._paths.get(worker, {})
        names = [name for name in removed.names if name in known]
        if names:
            self._apply(worker, {"removed": {"block_hashes": names}})
            for name in names:
                known.pop(name, None)

    def _apply(self, worker: int, data: object) -> None:
        self._event_id += 1
        self._tree.apply_event(worker, msgspec.json.encode({"event_id": self._event_id, "data": data}))
