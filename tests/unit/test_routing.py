"""The router's two pictures of a worker, its cache and its load, and the choice that they lead to."""

import random
from collections.abc import Iterator, Sequence
from contextlib import ExitStack

from common.cost import Candidate, choose
from common.messages import AllBlocksCleared, BlockRemoved, BlockStored, FindWorkerRequest, LoadStat
from common.prefix_index import PrefixIndex
from common.worker import Worker

import pytest
from dynamo.llm import compute_block_hash_for_seq

BLOCK = 4
TOKENS = tuple(range(3 * BLOCK))
HASHES = compute_block_hash_for_seq(list(TOKENS), BLOCK)


def stored(tokens: Sequence[int], names: list[int], parent: int | None = None) -> BlockStored:
    return BlockStored(block_hashes=list(names), parent_block_hash=parent, token_ids=list(tokens), block_size=BLOCK)


def prompt(blocks: int, *, hashes: list[int] | None = None) -> FindWorkerRequest:
    return FindWorkerRequest(block_hashes=hashes or [], tokens=blocks * BLOCK, block_size=BLOCK, model="m")


@pytest.fixture
def leases() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


class TestPrefixIndex:
    def test_counts_the_leading_blocks_that_each_worker_has(self) -> None:
        index = PrefixIndex()
        index.apply(1, stored(TOKENS, [10, 11, 12]))
        index.apply(2, stored(TOKENS[:BLOCK], [-5]))
        assert index.overlaps(HASHES) == {1: 3, 2: 1}
        assert index.overlaps(HASHES[1:]) == {}
        assert (index.blocks(1), index.blocks(2), index.blocks(3)) == (3, 1, 0)

    def test_chains_grow_from_their_parent(self) -> None:
        index = PrefixIndex()
        index.apply(1, stored(TOKENS[:BLOCK], [-10]))
        index.apply(1, stored(TOKENS[BLOCK:], [-11, -12], parent=-10))
        assert index.overlaps(HASHES) == {1: 3}

    def test_a_chain_without_its_beginning_is_not_counted(self) -> None:
        index = PrefixIndex()
        index.apply(1, stored(TOKENS[BLOCK:], [11, 12], parent=10))
        assert index.overlaps(HASHES) == {}
        assert index.blocks(1) == 0

    def test_removed_blocks_are_gone(self) -> None:
        index = PrefixIndex()
        index.apply(1, stored(TOKENS, [10, 11, 12]))
        index.apply(1, BlockRemoved(block_hashes=[12, 99]))
        assert index.overlaps(HASHES) == {1: 2}
        index.apply(1, AllBlocksCleared())
        assert index.overlaps(HASHES) == {}

    def test_one_worker_is_forgotten_and_the_other_stays(self) -> None:
        index = PrefixIndex()
        for worker in (1, 2):
            index.apply(worker, stored(TOKENS, [10, 11, 12]))
        index.forget(1)
        assert index.overlaps(HASHES) == {2: 3}

    def test_a_cleared_worker_can_fill_its_cache_again(self) -> None:
        index = PrefixIndex()
        for _ in range(2):
            index.clear(1)
            index.apply(1, stored(TOKENS, [10, 11, 12]))
        assert index.overlaps(HASHES) == {1: 3}

    def test_agrees_with_a_simple_account_of_random_events(self) -> None:
        chance = random.Random(1)
        index, account = PrefixIndex(), {1: set[tuple[int, ...]](), 2: set[tuple[int, ...]]()}
        for _ in range(500):
            worker = chance.choice([1, 2])
            blocks = [chance.randrange(3) for _ in range(chance.randrange(1, 5))]
            path = tuple(blocks)
            if chance.random() < 0.6:
                tokens = [token for block in blocks for token in [block] * BLOCK]
                names = [hash(path[: length + 1]) for length in range(len(path))]
                index.apply(worker, stored(tokens, names))
                account[worker] |= {path[: length + 1] for length in range(len(path))}
            else:  # engines evict the ends of chains first
                leaves = [leaf for leaf in account[worker] if not any(o[:-1] == leaf for o in account[worker])]
                if leaves:
                    leaf = chance.choice(sorted(leaves))
                    index.apply(worker, BlockRemoved(block_hashes=[hash(leaf)]))
                    account[worker].discard(leaf)
            wanted = [chance.randrange(3) for _ in range(4)]
            hashes = compute_block_hash_for_seq([token for block in wanted for token in [block] * BLOCK], BLOCK)
            lengths = {w: sum(tuple(wanted[: n + 1]) in paths for n in range(4)) for w, paths in account.items()}
            assert index.overlaps(hashes) == {w: length for w, length in lengths.items() if length}
            assert all(index.blocks(w) == len(paths) for w, paths in account.items())


class TestWorker:
    def test_a_request_is_load_for_as_long_as_its_lease(self) -> None:
        worker = Worker(1, None, BLOCK)
        with worker.lease(prompt(10), overlap_blocks=4):
            assert (worker.prefill_blocks, worker.decode_blocks, worker.requests) == (6, 10, 1)
        assert (worker.prefill_blocks, worker.decode_blocks, worker.requests) == (0, 0, 0)

    def test_its_prefill_is_done_when_its_last_block_is_stored(self) -> None:
        worker = Worker(1, None, BLOCK)
        with worker.lease(prompt(3, hashes=[7, 8, 9]), 0), worker.lease(prompt(3, hashes=[7, 8, 5]), 0):
            worker.stored([7, 8])
            assert worker.prefill_blocks == 6
            worker.stored([9])
            assert (worker.prefill_blocks, worker.decode_blocks) == (3, 6)

    def test_what_a_worker_reports_beyond_our_leases_counts_too(self, leases: ExitStack) -> None:
        worker = Worker(1, None, BLOCK)
        leases.enter_context(worker.lease(prompt(10), 10))
        busy = LoadStat(running_requests=3, waiting_requests=1, used_tokens=100, total_tokens=999)
        worker.reported(busy)
        assert worker.decode_blocks == 25
        worker.reported(LoadStat(running_requests=0, waiting_requests=0, used_tokens=0, total_tokens=999))
        assert worker.decode_blocks == 10  # our request is on its way to it


class TestChoice:
    def candidate(self, worker: Worker, overlap: int = 0) -> Candidate:
        return Candidate(worker=worker, overlap_blocks=overlap)

    def test_the_prefix_decides_between_idle_workers(self) -> None:
        cold, warm = (self.candidate(Worker(number, None, BLOCK), overlap) for number, overlap in ((1, 0), (2, 3)))
        assert choose([cold, warm], 10) == (warm, 7)

    def test_load_outweighs_a_short_prefix(self, leases: ExitStack) -> None:
        busy, idle = Worker(1, None, BLOCK), Worker(2, None, BLOCK)
        leases.enter_context(busy.lease(prompt(8), 8))
        short, long = self.candidate(busy, overlap=5), self.candidate(busy, overlap=9)
        assert choose([short, self.candidate(idle)], 10)[0].worker is idle
        assert choose([long, self.candidate(idle)], 10)[0].worker is busy

    def test_waiting_prefills_cost_as_much_as_our_own(self, leases: ExitStack) -> None:
        busy, idle = Worker(1, None, BLOCK), Worker(2, None, BLOCK)
        leases.enter_context(busy.lease(prompt(4), 0))
        assert choose([self.candidate(busy), self.candidate(idle)], 10)[1] == 10
        assert self.candidate(busy).cost(10) == 10 + 4 + 4

    def test_among_equals_the_one_not_chosen_for_longest_wins(self) -> None:
        candidates = [self.candidate(Worker(number, None, BLOCK)) for number in (1, 2, 3)]
        turns = []
        for _ in range(7):
            worker = choose(candidates, 10)[0].worker
            turns.append(worker.instance_id)
            with worker.lease(prompt(10), 0):
                pass
        assert turns == [1, 2, 3, 1, 2, 3, 1]
