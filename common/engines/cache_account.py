"""What is in an engine's KV cache, by all the events that it ever published."""

import logging
from collections import defaultdict
from collections.abc import Iterator

from common.kv_events import Change, RemovedBlocks
from common.messages import AllBlocksCleared, StoredBlocks

log = logging.getLogger(__name__)


class CacheAccount:
    """The blocks of one cache, each with the block before it. Nothing is searched here, so it needs no tree."""

    def __init__(self) -> None:
        self._blocks: dict[int, tuple[int | None, int]] = {}  # by block id: its parent's, and its local hash

    def apply(self, change: Change) -> None:
        """Take in a change of the cache."""
        match change:
            case StoredBlocks():
                parent_id = change.parent_id
                if parent_id is not None and parent_id not in self._blocks:
                    log.debug("blocks were stored after one that was never seen; they cannot be placed")
                    return
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
        """All blocks as chains of at most `longest`, parents before their children. A block whose parent is gone, which
        no prompt can reach, is in none."""
        children = defaultdict[int | None, list[int]](list)
        for block_id, (parent_id, _) in self._blocks.items():
            children[parent_id].append(block_id)
        starts: list[tuple[int | None, int]] = [(None, block_id) for block_id in children[None]]
        while starts:
            parent_id, block_id = starts.pop()
            chain = [block_id]
            while len(following := children.get(chain[-1], [])) == 1 and len(chain) < longest:
                chain += following
            starts += [(chain[-1], block_id) for block_id in following]
            hashes = [self._blocks[block_id][1] for block_id in chain]
            yield StoredBlocks(parent_id=parent_id, block_ids=chain, local_hashes=hashes)
