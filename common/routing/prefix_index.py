"""Which worker has which blocks in its KV cache: Dynamo's RadixTree, fed from ZMQ."""

from collections import Counter
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from itertools import accumulate
from typing import Any

from common.kv_events import Change, KvEventStream, Lost, RemovedBlocks, Update
from common.messages import AllBlocksCleared, StoredBlocks

import msgspec
from dynamo.llm import RadixTree

_ROOT = 0


def sequence_hashes(local_hashes: Sequence[int], parent: int = _ROOT) -> list[int]:
    """For each block, one number that stands for it and all those before it: equal numbers, equal prefixes.

    They are this process's own, 64 bits with a sign, and made by Python's hash of pairs.
    """
    return list(accumulate(local_hashes, _sequence_hash, initial=parent))[1:]


def _sequence_hash(before: int, local_hash: int) -> int:
    return hash((before, local_hash))


class _Cache:
    """One worker's blocks by their ids, and which of them prompts can reach: those that have all before them."""

    def __init__(self) -> None:
        self.blocks: dict[int, tuple[int | None, int]] = {}  # by block id: its parent's, and its local hash
        self.hashes: dict[int, int] = {}  # by block id, the sequence hashes of those within reach
        # By block id, whether that is there or not. Tuples, because lists would keep the garbage collector busy.
        self._children: dict[int, tuple[int, ...]] = {}
        self._names: dict[int, int] = {}  # by sequence hash, how many block ids within reach have it

    def add(self, block_id: int, parent_id: int | None, local_hash: int) -> Iterator[tuple[int, int, int]]:
        """Yields the sequence hashes that come within reach, parents first: the one before, itself, its local hash."""
        self.blocks[block_id] = parent_id, local_hash
        if parent_id is not None:
            self._children[parent_id] = (*self._children.get(parent_id, ()), block_id)
        waiting = [block_id] if parent_id is None or parent_id in self.hashes else []
        while waiting:
            block_id = waiting.pop()
            parent_id, local_hash = self.blocks[block_id]
            before = _ROOT if parent_id is None else self.hashes[parent_id]
            self.hashes[block_id] = sequence_hash = _sequence_hash(before, local_hash)
            names = self._names[sequence_hash] = self._names.get(sequence_hash, 0) + 1
            if names == 1:
                yield before, sequence_hash, local_hash
            waiting += self._children.get(block_id, ())

    def discard(self, block_id: int) -> Iterator[int]:
        """Yields the sequence hashes that get out of reach, parents first."""
        parent_id, _ = self.blocks.pop(block_id, (None, 0))
        if parent_id is not None:
            siblings = self._children.pop(parent_id)
            place = siblings.index(block_id)
            if rest := siblings[:place] + siblings[place + 1 :]:
                self._children[parent_id] = rest
        leaving = [block_id]
        while leaving:
            block_id = leaving.pop()
            if (sequence_hash := self.hashes.pop(block_id, None)) is not None:
                self._names[sequence_hash] -= 1
                if not self._names[sequence_hash]:
                    del self._names[sequence_hash]
                    yield sequence_hash
                leaving += self._children.get(block_id, ())


class PrefixIndex:
    """The KV caches of all workers, searched by prompt.

    A block is known in two ways. Its *local hash*, `compute_block_hash_for_seq` of its tokens, is the same for everyone
    and is what prompts are searched by. Its *block id* is the engine's own, stands for the block in its place after all
    those before it, and is what the engine calls it when it is removed.

    The tree never sees block ids. It knows a node by the first id that any worker gave it, and raises an error at any
    other, so it would not let go of a block that two workers, or one with two salts, call by two names; and it forgets
    what comes after a removed block, which can be within reach again once that is stored anew. So here each worker's
    blocks are kept by their ids, and the tree is given sequence hashes as they come within reach and get out of it.
    """

    def __init__(self) -> None:
        self._tree = RadixTree()
        self._caches: dict[int, _Cache] = {}  # by instance
        self._event_id = 0
        # KV events, by type and by what Dynamo calls what became of them. Of those that come in any case there are none
        # at first, or whoever collects the counts would miss the first ones.
        self.applied = Counter({("stored", "ok"): 0, ("removed", "ok"): 0})

    def overlaps(self, local_hashes: Sequence[int]) -> dict[int, int]:
        """By instance, how many leading blocks of a prompt it has. One that has none is not in it."""
        # Whatever its stub says, scores are by instance and data-parallel rank.
        scores: Any = self._tree.find_matches(list(local_hashes)).scores
        overlaps: dict[int, int] = {}
        for (instance_id, _rank), blocks in scores.items():
            overlaps[instance_id] = max(blocks, overlaps.get(instance_id, 0))
        return overlaps

    def blocks(self, instance_id: int) -> int:
        """How many blocks a worker has in its cache, also of those that no prompt can reach."""
        return len(self._caches[instance_id].blocks) if instance_id in self._caches else 0

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
                stored = self._store(instance_id, change)
                self.applied["stored", "ok" if stored else "parent_block_not_found"] += 1
                return stored
            case RemovedBlocks():
                removed = self._remove(instance_id, change.block_ids)
                self.applied["removed", "ok" if removed else "block_not_found"] += 1
            case AllBlocksCleared():
                self.clear(instance_id)
                self.applied["cleared", "ok"] += 1
        return []

    def clear(self, instance_id: int) -> None:
        """Forget a worker's blocks."""
        self._tree.clear_all_blocks(instance_id)
        self._caches.pop(instance_id, None)

    def forget(self, instance_id: int) -> None:
        """Forget a worker."""
        self._tree.remove_worker(instance_id)
        self._caches.pop(instance_id, None)

    def _store(self, instance_id: int, stored: StoredBlocks) -> list[int]:
        cache = self._caches.setdefault(instance_id, _Cache())
        parents = (stored.parent_id, *stored.block_ids)
        chain = dict(zip(stored.block_ids, zip(parents, stored.local_hashes, strict=False), strict=True))
        self._remove(instance_id, [name for name, block in chain.items() if cache.blocks.get(name, block) != block])
        new = [(name, block) for name, block in chain.items() if name not in cache.blocks]
        self._add_to_tree(instance_id, [node for name, block in new for node in cache.add(name, *block)])
        return [cache.hashes[name] for name in chain if name in cache.hashes]

    def _remove(self, instance_id: int, block_ids: Iterable[int]) -> bool:
        """Whether any of these blocks was there."""
        cache = self._caches.get(instance_id, _Cache())
        if lost := [node for block_id in block_ids for node in cache.discard(block_id)]:
            self._apply(instance_id, {"removed": {"block_hashes": list(map(_node, lost))}})
        return bool(lost)

    def _add_to_tree(self, instance_id: int, nodes: Iterable[tuple[int, int, int]]) -> None:
        chains = list[tuple[int, list[dict[str, int]]]]()  # by what is before them
        for before, sequence_hash, local_hash in nodes:
            if not chains or chains[-1][1][-1]["block_hash"] != _node(before):
                chains.append((before, []))
            chains[-1][1].append({"block_hash": _node(sequence_hash), "tokens_hash": local_hash})
        for before, blocks in chains:
            parent = None if before == _ROOT else _node(before)
            self._apply(instance_id, {"stored": {"parent_hash": parent, "blocks": blocks}})

    def _apply(self, instance_id: int, data: object) -> None:
        self._event_id += 1
        self._tree.apply_event(instance_id, msgspec.json.encode({"event_id": self._event_id, "data": data}))


def _node(sequence_hash: int) -> int:
    """What the tree calls a block: it takes no sign."""
    return sequence_hash % 2**64
