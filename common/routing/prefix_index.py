"""Which worker has which blocks in its KV cache: Dynamo's RadixTree, fed from ZMQ."""

from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Iterable, Sequence
from itertools import accumulate
from typing import Any

from common.kv_events import Change, KvEventStream, Lost, RemovedBlocks, Update
from common.messages import AllBlocksCleared, StoredBlocks

import msgspec
from dynamo.llm import RadixTree

_ROOT = 0
_BITS = 2**60 - 1  # of a sequence hash: for larger numbers Python takes half as much memory again
_OUT_OF_REACH = -1


def sequence_hashes(local_hashes: Sequence[int]) -> list[int]:
    """For each block, one number that stands for it and all those before it: equal numbers, equal prefixes.

    They are this process's own, of 60 bits, and made by Python's hash of pairs.
    """
    return list(accumulate(local_hashes, _sequence_hash, initial=_ROOT))[1:]


def _sequence_hash(before: int, local_hash: int) -> int:
    return hash((before, local_hash)) & _BITS


class _Block(msgspec.Struct, gc=False):
    """A block of one worker. There are millions: the garbage collector passes them by, since they refer to each other
    by their ids."""

    parent_id: int | None
    local_hash: int
    sequence_hash: int = _OUT_OF_REACH
    child_id: int | None = None  # of one block after it; it seldom has more


class _Cache:
    """One worker's blocks by their ids, and which of them prompts can reach: those that have all before them."""

    def __init__(self) -> None:
        self.blocks: dict[int | None, _Block] = {None: _Block(None, 0, _ROOT)}  # and what prompts begin with
        self._children = defaultdict[int | None, set[int]](set)  # by block id, there or not: those but its `child_id`
        self._names: dict[int, int] = {}  # by sequence hash, how many blocks within reach have it
        # What changed since the tree was told, parents first: the sequence hashes that came within reach, each with the
        # one before it and its local hash, and those that got out of it.
        self.gained: dict[int, tuple[int, int]] = {}
        self.lost: dict[int, None] = {}

    def store(self, block_id: int, parent_id: int | None, local_hash: int) -> None:
        """Add a block. One that has its id and is another gives way to it."""
        if known := self.blocks.get(block_id):
            if (known.parent_id, known.local_hash) == (parent_id, local_hash):
                return
            self.remove(block_id)
        parent = self.blocks.get(parent_id)
        if parent and parent.child_id is None:
            parent.child_id = block_id
        else:
            self._children[parent_id].add(block_id)
        self.blocks[block_id] = _Block(parent_id, local_hash)
        if parent and parent.sequence_hash != _OUT_OF_REACH:
            self._reach(block_id)

    def remove(self, block_id: int) -> bool:
        """Forget a block. Returns whether it was there."""
        if not (block := self.blocks.pop(block_id, None)):
            return False
        parent = self.blocks.get(block.parent_id)
        if parent and parent.child_id == block_id:
            parent.child_id = None
        else:
            self._children[block.parent_id].remove(block_id)
            if not self._children[block.parent_id]:
                del self._children[block.parent_id]
        if block.child_id is not None:
            self._children[block_id].add(block.child_id)
        self._leave(block_id, block)
        return True

    def _after(self, block_id: int, block: _Block) -> Iterable[int]:
        children = self._children.get(block_id, ())
        return children if block.child_id is None else (block.child_id, *children)

    def _reach(self, block_id: int) -> None:
        """A block has all before it now, and so have those after it."""
        waiting = [block_id]
        while waiting:
            block_id = waiting.pop()
            block = self.blocks[block_id]
            before = self.blocks[block.parent_id].sequence_hash
            block.sequence_hash = sequence_hash = _sequence_hash(before, block.local_hash)
            names = self._names[sequence_hash] = self._names.get(sequence_hash, 0) + 1
            if sequence_hash in self.lost:
                del self.lost[sequence_hash]
            elif names == 1:
                self.gained[sequence_hash] = before, block.local_hash
            waiting += self._after(block_id, block)

    def _leave(self, block_id: int, block: _Block) -> None:
        """A block is no longer there, and those after it are out of reach."""
        leaving = [(block_id, block)]
        while leaving:
            block_id, block = leaving.pop()
            if (sequence_hash := block.sequence_hash) == _OUT_OF_REACH:
                continue
            block.sequence_hash = _OUT_OF_REACH
            if self._names[sequence_hash] > 1:
                self._names[sequence_hash] -= 1
            else:
                self._names.pop(sequence_hash)
                if not self.gained.pop(sequence_hash, None):
                    self.lost[sequence_hash] = None
            leaving += [(child_id, self.blocks[child_id]) for child_id in self._after(block_id, block)]


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
        self._caches = defaultdict[int, _Cache](_Cache)  # by instance
        self._event_id = 0
        # KV events, by type and by what Dynamo calls what became of them. Of those that come in any case there are none
        # at first, or whoever collects the counts would miss the first ones.
        self.applied = Counter({("stored", "ok"): 0, ("removed", "ok"): 0})

    def overlaps(self, local_hashes: Sequence[int]) -> dict[int, int]:
        """By instance, how many leading blocks of a prompt it has. One that has none is not in it."""
        # Whatever its stub says, scores are by instance and data-parallel rank, which is 0 for all that `_apply` says.
        scores: Any = self._tree.find_matches(list(local_hashes)).scores
        return {instance_id: blocks for (instance_id, _rank), blocks in scores.items()}

    def blocks(self, instance_id: int) -> int:
        """How many blocks a worker has in its cache, also of those that no prompt can reach."""
        return len(self._caches[instance_id].blocks) - 1 if instance_id in self._caches else 0

    async def follow(self, instance_id: int, events: KvEventStream) -> AsyncIterator[tuple[Update | Lost, list[int]]]:
        """Keep a worker's blocks true. Yield each thing that came, and the sequence hashes of the blocks stored."""
        async for item in events:
            if isinstance(item, Lost):
                self.forget(instance_id)
                yield item, []
            else:
                yield item, self.apply(instance_id, *item.changes)

    def apply(self, instance_id: int, *changes: Change) -> list[int]:
        """Take in changes of a worker's cache, in their order, and return the sequence hashes of the blocks stored.

        The tree is told once, what they amount to: each event for it is a trip to another thread, which takes longer
        than all the rest of a block.
        """
        stored = [sequence_hash for change in changes for sequence_hash in self._take_in(instance_id, change)]
        self._tell_tree(instance_id, self._caches[instance_id])
        return stored

    def forget(self, instance_id: int) -> None:
        """Forget a worker's blocks."""
        self._tree.remove_worker(instance_id)
        self._caches.pop(instance_id, None)

    def _take_in(self, instance_id: int, change: Change) -> list[int]:
        cache = self._caches[instance_id]
        match change:
            case StoredBlocks(parent_id=parent_id):
                for block_id, local_hash in zip(change.block_ids, change.local_hashes, strict=True):
                    cache.store(block_id, parent_id, local_hash)
                    parent_id = block_id
                hashes = [cache.blocks[block_id].sequence_hash for block_id in change.block_ids]
                stored = [sequence_hash for sequence_hash in hashes if sequence_hash != _OUT_OF_REACH]
                self.applied["stored", "ok" if stored else "parent_block_not_found"] += 1
                return stored
            case RemovedBlocks():
                removed = [block_id for block_id in change.block_ids if cache.remove(block_id)]
                self.applied["removed", "ok" if removed else "block_not_found"] += 1
            case AllBlocksCleared():
                self.forget(instance_id)
                self.applied["cleared", "ok"] += 1
        return []

    def _tell_tree(self, instance_id: int, cache: _Cache) -> None:
        if cache.lost:
            self._apply(instance_id, {"removed": {"block_hashes": list(cache.lost)}})
        chains, ends = list[dict[str, object]](), dict[int, list[dict[str, int]]]()
        for sequence_hash, (before, local_hash) in cache.gained.items():
            if before not in ends:
                ends[before] = []
                chains.append({"parent_hash": None if before == _ROOT else before, "blocks": ends[before]})
            ends[sequence_hash] = chain = ends.pop(before)
            chain.append({"block_hash": sequence_hash, "tokens_hash": local_hash})
        for stored in chains:
            self._apply(instance_id, {"stored": stored})
        cache.lost, cache.gained = {}, {}

    def _apply(self, instance_id: int, data: object) -> None:
        self._event_id += 1
        self._tree.apply_event(instance_id, msgspec.json.encode({"event_id": self._event_id, "data": data}))
