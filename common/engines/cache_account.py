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

    def copy(self) -> "CacheAccount":
        """The account as it is now."""
        account = CacheAccount()
        account._blocks = dict(self._blocks)
        return account

    def chains(self, longest: int) -> Iterator[StoredBlocks]:
        """All blocks as chains of at most `longest`. They were stored as chains, so most follow each other here too."""
        chain: StoredBlocks | None = None
        for block_id, (parent_id, local_hash) in self._blocks.items():
            if chain is None or chain.block_ids[-1] != parent_id or len(chain.block_ids) == longest:
                if chain:
                    yield chain
                chain = StoredBlocks(parent_id=parent_id, block_ids=[], local_hashes=[])
            chain.block_ids.append(block_id)
            chain.local_hashes.append(local_hash)
        if chain:
            yield chain
