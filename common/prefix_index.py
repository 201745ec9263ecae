"""Which worker has which blocks in its KV cache: Dynamo's RadixTree, fed from ZMQ."""

import json
import logging
from collections.abc import Sequence
from typing import Any

from common.messages import AllBlocksCleared, BlockRemoved, BlockStored, KvEvent

from dynamo.llm import RadixTree, compute_block_hash_for_seq

log = logging.getLogger(__name__)

_UNSIGNED = 2**64


class PrefixIndex:
    """The KV caches of all workers, searched by prompt.

    A block has two names. Its *local* hash, `compute_block_hash_for_seq` of its tokens, is the same for everyone and
    is what prompts are searched by. Its *block* hash is the engine's own, stands for the block in its place after all
    those before it, and is what a worker calls it when it is removed.
    """

    def __init__(self) -> None:
        self._tree = RadixTree()
        self._blocks: dict[int, set[int]] = {}  # by worker, the block hashes that it has
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
        return len(self._blocks.get(worker, ()))

    def apply(self, worker: int, event: KvEvent) -> list[int]:
        """Take in one event of a worker, and return the local hashes of the blocks that it stored."""
        match event:
            case BlockStored():
                return self._store(worker, event)
            case BlockRemoved():
                self._remove(worker, event)
            case AllBlocksCleared():
                self.clear(worker)
        return []

    def clear(self, worker: int) -> None:
        """Forget a worker's blocks."""
        self._tree.clear_all_blocks(worker)
        self._blocks.pop(worker, None)

    def forget(self, worker: int) -> None:
        """Forget a worker."""
        self._tree.remove_worker(worker)
        self._blocks.pop(worker, None)

    def _store(self, worker: int, event: BlockStored) -> list[int]:
        known = self._blocks.setdefault(worker, set())
        parent = None if event.parent_block_hash is None else _unsigned(event.parent_block_hash)
        if parent is not None and parent not in known:
            log.debug("worker %d stored blocks after one that was never seen; they cannot be placed", worker)
            return []
        names = [_unsigned(name) for name in event.block_hashes]
        local = compute_block_hash_for_seq(event.token_ids, event.block_size)
        blocks = [{"block_hash": name, "tokens_hash": tokens} for name, tokens in zip(names, local, strict=True)]
        self._apply(worker, {"stored": {"parent_hash": parent, "blocks": blocks}})
        known.update(names)
        return list(local)

    def _remove(self, worker: int, event: BlockRemoved) -> None:
        known = self._blocks.get(worker, set())
        names = [name for name in map(_unsigned, event.block_hashes) if name in known]
        if names:
            self._apply(worker, {"removed": {"block_hashes": names}})
            known.difference_update(names)

    def _apply(self, worker: int, data: object) -> None:
        self._event_id += 1
        self._tree.apply_event(worker, json.dumps({"event_id": self._event_id, "data": data}).encode())


def _unsigned(name: int | bytes) -> int:
    """A block hash as the tree takes it, 64 bits without a sign. SGLang's have a sign, vLLM's may be longer bytes."""
    return int.from_bytes(name[-8:], "big") if isinstance(name, bytes) else name % _UNSIGNED
