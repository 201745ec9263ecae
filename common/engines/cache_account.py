"""What is in an engine's KV cache, by all the events that it ever published."""

from collections.abc import Iterator

from common.kv_events import Change, RemovedBlocks
from common.messages import AllBlocksCleared, StoredBlocks


class CacheAccount:
    """The blocks of one cache, each with the block before it, whether that is there or not. Nothing is searched here,
    so it needs no tree."""

    def __init__(self) -> None:
        self._blocks: dict[int, tuple[int | None, int]] = {}  # by block id: its parent's, and its local hash

    def apply(self, change: Change) -> None:
        """Take in a change of the cache."""
        match change:
            case StoredBlocks(parent_id=parent_id):
                for block_id, local_hash in zip(change.block_ids, change.local_hashes, strict=True):
                    self._blocks[block_id] = (parent_id, local_hash)
                    parent_id = block_id
            case RemovedBlocks():
                for block_id in change.block_ids:
                    self._blocks.pop(block_id, None)
            case AllBlocksCleared():
                self._blocks = {}

    def parts(self, most: int) -> Iterator[list[StoredBlocks]]:
        """All blocks of this moment as chains, `most` blocks in a part. They were stored as chains, so most follow each
        other here too. An empty cache is one empty part."""
        blocks = list(self._blocks.items())
        for first in range(0, len(blocks) or 1, most):
            part: list[StoredBlocks] = []
            for block_id, (parent_id, local_hash) in blocks[first : first + most]:
                if not part or part[-1].block_ids[-1] != parent_id:
                    part.append(StoredBlocks(parent_id=parent_id, block_ids=[], local_hashes=[]))
                part[-1].block_ids.append(block_id)
                part[-1].local_hashes.append(local_hash)
            yield part
