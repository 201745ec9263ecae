"""The router's two pictures of a worker, its cache and its load."""

import itertools
import random
import time
from collections.abc import Iterator
from contextlib import ExitStack

from common.kv_events import RemovedBlocks
from common.messages import AllBlocksCleared, FindWorkerRequest, LoadStat, StoredBlocks
from common.routing.fleet import Fleet
from common.routing.prefix_index import PrefixIndex, sequence_hashes
from common.routing.worker import SILENT_SECONDS, Prompt, Worker
from tests.unit.stand_ins import identity, worker_info

import pytest

BLOCK = 4
HASHES = [101, 102, 103]
UNIQUE = itertools.count(10**6)


def stored(local_hashes: list[int], block_ids: list[int], parent_id: int | None = None) -> StoredBlocks:
    return StoredBlocks(parent_id=parent_id, block_ids=block_ids, local_hashes=local_hashes)


def worker_of_four() -> Worker:
    return Worker(1, worker_info(model=identity(block_size=BLOCK)))


def prompt(blocks: float, hashes: list[int] | None = None) -> Prompt:
    """One of these blocks, or of blocks that no other prompt has."""
    return Prompt(sequence_hashes([next(UNIQUE) for _ in range(int(blocks))] if hashes is None else hashes), blocks)


@pytest.fixture
def leases() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


class TestSequenceHashes:
    def test_equal_numbers_mean_equal_prefixes(self) -> None:
        one, other = sequence_hashes([1, 2, 3, 4]), sequence_hashes([1, 2, 9, 4])
        assert one[:2] == other[:2]
        assert one[2] != other[2]
        assert one[3] != other[3]


class TestPrefixIndex:
    def test_counts_the_leading_blocks_that_each_worker_has(self) -> None:
        index = PrefixIndex()
        index.apply(1, stored(HASHES, [10, 11, 12]))
        index.apply(2, stored(HASHES[:1], [5]))
        assert index.overlaps(HASHES) == {1: 3, 2: 1}
        assert index.overlaps(HASHES[1:]) == {}
        assert (index.blocks(1), index.blocks(2), index.blocks(3)) == (3, 1, 0)

    def test_chains_grow_from_their_parent(self) -> None:
        index = PrefixIndex()
        assert index.apply(1, stored(HASHES[:1], [10])) == sequence_hashes(HASHES)[:1]
        assert index.apply(1, stored(HASHES[1:], [11, 12], parent_id=10)) == sequence_hashes(HASHES)[1:]
        assert index.overlaps(HASHES) == {1: 3}

    def test_a_chain_without_its_beginning_is_not_counted(self) -> None:
        index = PrefixIndex()
        assert index.apply(1, stored(HASHES[1:], [11, 12], parent_id=10)) == []
        assert index.overlaps(HASHES) == {}
        assert index.blocks(1) == 2
        index.apply(1, stored(HASHES[:1], [10]))
        assert index.overlaps(HASHES) == {1: 3}

    def test_what_follows_a_removed_block_is_there_again_when_that_is(self) -> None:
        index = PrefixIndex()
        index.apply(1, stored(HASHES, [10, 11, 12]))
        index.apply(1, RemovedBlocks([11]))
        assert index.overlaps(HASHES) == {1: 1}
        index.apply(1, stored(HASHES[1:2], [11], parent_id=10))
        assert index.overlaps(HASHES) == {1: 3}

    def test_blocks_are_removed_in_any_order(self) -> None:
        index = PrefixIndex()
        index.apply(1, stored(HASHES, [10, 11, 12]))
        for left, block_id in ((2, 10), (1, 12), (0, 11)):
            index.apply(1, RemovedBlocks([block_id]))
            assert index.overlaps(HASHES) == {}
            assert index.blocks(1) == left

    def test_the_same_tokens_may_have_two_names(self) -> None:
        """With a cache salt or an adapter; another worker may have names of its own anyway."""
        index = PrefixIndex()
        index.apply(1, stored(HASHES, [10, 11, 12]))
        index.apply(1, stored(HASHES, [20, 21, 22]))
        index.apply(2, stored(HASHES, [30, 31, 32]))
        index.apply(1, RemovedBlocks([10, 11, 12]))
        assert index.overlaps(HASHES) == {1: 3, 2: 3}
        index.apply(2, RemovedBlocks([32]))
        index.apply(1, RemovedBlocks([21, 22]))
        assert index.overlaps(HASHES) == {1: 1, 2: 2}

    def test_removed_blocks_are_gone(self) -> None:
        index = PrefixIndex()
        index.apply(1, stored(HASHES, [10, 11, 12]))
        index.apply(1, RemovedBlocks([12, 99]))
        assert index.overlaps(HASHES) == {1: 2}
        index.apply(1, AllBlocksCleared())
        assert index.overlaps(HASHES) == {}

    def test_one_worker_is_forgotten_and_the_other_stays(self) -> None:
        index = PrefixIndex()
        for worker in (1, 2):
            index.apply(worker, stored(HASHES, [10, 11, 12]))
        index.forget(1)
        assert index.overlaps(HASHES) == {2: 3}

    def test_a_forgotten_worker_can_fill_its_cache_again(self) -> None:
        index = PrefixIndex()
        for _ in range(2):
            index.forget(1)
            index.apply(1, stored(HASHES, [10, 11, 12]))
        assert index.overlaps(HASHES) == {1: 3}

    def test_agrees_with_a_simple_account_of_random_events(self) -> None:
        chance = random.Random(1)
        index, account = PrefixIndex(), {1: set[tuple[int, ...]](), 2: set[tuple[int, ...]]()}
        for _ in range(500):
            worker = chance.choice([1, 2])
            blocks = tuple(chance.randrange(3) for _ in range(chance.randrange(1, 5)))
            if chance.random() < 0.6:
                prefixes = [blocks[: length + 1] for length in range(len(blocks))]
                index.apply(worker, stored(list(blocks), [hash(prefix) % 2**64 for prefix in prefixes]))
                account[worker] |= set(prefixes)
            else:  # engines evict the ends of chains first
                leaves = [leaf for leaf in account[worker] if not any(o[:-1] == leaf for o in account[worker])]
                if leaves:
                    leaf = chance.choice(sorted(leaves))
                    index.apply(worker, RemovedBlocks([hash(leaf) % 2**64]))
                    account[worker].discard(leaf)
            wanted = [chance.randrange(3) for _ in range(4)]
            lengths = {w: sum(tuple(wanted[: n + 1]) in paths for n in range(4)) for w, paths in account.items()}
            assert index.overlaps(wanted) == {w: length for w, length in lengths.items() if length}
            assert all(index.blocks(w) == len(paths) for w, paths in account.items())


class TestWorker:
    def test_a_request_is_load_for_as_long_as_its_lease(self) -> None:
        worker = worker_of_four()
        with worker.lease(prompt(10), overlap_blocks=4):
            assert (worker.prefill_blocks, worker.decode_blocks, worker.requests) == (6, 10, 1)
        assert (worker.prefill_blocks, worker.decode_blocks, worker.requests) == (0, 0, 0)
        assert (worker.routed_requests, worker.routed_blocks, worker.overlap_blocks) == (1, 10, 4)

    def test_its_prefill_is_done_when_its_last_block_is_stored(self) -> None:
        worker = worker_of_four()
        with worker.lease(prompt(3.5, [7, 8, 9]), 0) as one, worker.lease(prompt(3.5, [7, 8, 5]), 0) as other:
            worker.on_stored(sequence_hashes([7, 8]))
            assert not one.prefilled.is_set()
            worker.on_stored(sequence_hashes([7, 8, 9])[2:])
            assert one.prefilled.is_set()
            assert not other.prefilled.is_set()
            assert worker.prefill_blocks == 1.5

    def test_a_long_prompt_counts_for_less_with_each_part_that_is_stored(self) -> None:
        worker = worker_of_four()
        blocks = list(range(16))
        hashes = sequence_hashes(blocks)
        with worker.lease(prompt(16.5, blocks), overlap_blocks=2):
            left = []
            for end in (4, 8, 12, 16):
                worker.on_stored(hashes[end - 4 : end])
                left.append(worker.prefill_blocks)
            assert left == [12.5, 8.5, 4.5, 0]
            assert worker.decode_blocks == 16.5

    def test_parts_that_are_stored_in_any_order_count(self) -> None:
        worker = worker_of_four()
        hashes = sequence_hashes(range(8))
        with worker.lease(prompt(8, list(range(8))), 0), worker.lease(prompt(2), 0):
            worker.on_stored(hashes[4:6])
            assert worker.prefill_blocks == 8
            worker.on_stored(hashes[:4])
            worker.on_stored(hashes[:6])  # said twice
            assert worker.prefill_blocks == 4

    def test_what_others_have_computed_here_is_none_of_our_prompts(self) -> None:
        worker = worker_of_four()
        with worker.lease(prompt(3.5, [7, 8, 9]), 0):
            worker.on_stored(sequence_hashes([1, 2, 3, 4]))
            assert worker.prefill_blocks == 3.5
            worker.on_stored(sequence_hashes([7, 8]))  # ours, whoever asked for it
            assert worker.prefill_blocks == 1.5

    def test_a_shared_block_is_to_be_computed_while_anybody_needs_it(self) -> None:
        worker = worker_of_four()
        with ExitStack() as first:
            first.enter_context(worker.lease(prompt(3, [7, 8, 9]), 0))
            with worker.lease(prompt(3, [7, 8, 5]), 0):
                assert worker.prefill_blocks == 4
                first.close()  # before it was computed
                assert worker.prefill_blocks == 3
                worker.on_stored(sequence_hashes([7]))
                assert worker.prefill_blocks == 2
        assert worker.prefill_blocks == 0

    def test_the_last_block_of_a_prompt_stands_for_those_before_it(self) -> None:
        worker = worker_of_four()
        with worker.lease(prompt(3, [7, 8, 9]), 0):
            worker.on_stored(sequence_hashes([7, 8, 9])[2:])  # what was said of the others is lost
            assert worker.prefill_blocks == 0

    def test_what_is_to_be_computed_agrees_with_a_plain_account(self) -> None:
        """The blocks of prompts in progress that were not cached at the decision, and were not stored since."""
        worker, chance = worker_of_four(), random.Random(3)
        going: list[tuple[ExitStack, Prompt, set[int]]] = []
        for _ in range(1000):
            blocks = [chance.randrange(3) for _ in range(chance.randrange(1, 6))]
            match chance.randrange(3):
                case 0:
                    overlap, one = chance.randrange(len(blocks) + 1), prompt(len(blocks), blocks)
                    lease = ExitStack()
                    lease.enter_context(worker.lease(one, overlap))
                    going.append((lease, one, set(one.sequence_hashes[overlap:])))
                case 1:
                    stored = sequence_hashes(blocks)
                    worker.on_stored(stored)
                    done = [one.sequence_hashes for _, one, _ in going if one.sequence_hashes[-1] in stored]
                    for _, _, left in going:
                        left.difference_update(stored, *done)
                case 2 if going:
                    lease, _, left = going.pop(chance.randrange(len(going)))
                    lease.close()
                    for _, one, others in going:  # what it was to compute falls to those that need it too
                        others.update(left.intersection(one.sequence_hashes))
            assert worker.prefill_blocks == len(set().union(*(left for _, _, left in going)))

    def test_a_block_with_the_same_tokens_elsewhere_does_not_end_a_prefill(self) -> None:
        worker = worker_of_four()
        with worker.lease(prompt(3, [7, 8, 9]), 0):
            worker.on_stored(sequence_hashes([1, 2, 9]))
            assert worker.prefill_blocks == 3

    def test_shared_blocks_are_held_once(self) -> None:
        worker = worker_of_four()
        with worker.lease(prompt(3.5, [7, 8, 9]), 0):
            with worker.lease(prompt(3, [7, 8, 5]), 0):
                assert worker.decode_blocks == 4.5
                assert worker.held_blocks(sequence_hashes([7, 8, 5, 6])) == 3
                assert worker.held_blocks(sequence_hashes([8])) == 0
            assert worker.decode_blocks == 3.5
            assert worker.held_blocks(sequence_hashes([7, 8, 5, 6])) == 2

    def test_what_a_worker_reports_beyond_our_leases_counts_too(self, leases: ExitStack) -> None:
        worker = worker_of_four()
        leases.enter_context(worker.lease(prompt(10), 10))
        busy = LoadStat(
            running_requests=3, waiting_requests=1, used_tokens=100, total_tokens=999, waiting_prefill_tokens=60
        )
        worker.on_report(busy)
        assert (worker.prefill_blocks, worker.decode_blocks) == (5, 25)
        worker.on_report(LoadStat(running_requests=0, waiting_requests=0, used_tokens=0, total_tokens=999))
        assert (worker.prefill_blocks, worker.decode_blocks) == (0, 10)  # our request is on its way to it

    def test_a_report_from_before_our_request_ended_does_not_bring_it_back(self) -> None:
        worker = worker_of_four()
        with worker.lease(prompt(10), 0):
            pass
        worker.on_report(LoadStat(running_requests=1, waiting_requests=0, used_tokens=10 * BLOCK, total_tokens=999))
        assert worker.decode_blocks == 0

    def test_a_prompt_that_waits_with_all_its_blocks_cached_is_still_ours(self) -> None:
        worker = worker_of_four()
        with worker.lease(prompt(3, [7, 8, 9]), 0), worker.lease(prompt(3.5, [7, 8, 9]), 0):
            worker.on_stored(sequence_hashes([7, 8, 9]))
            report = LoadStat(
                running_requests=1,
                waiting_requests=1,
                used_tokens=3 * BLOCK,
                total_tokens=999,
                waiting_prefill_tokens=14,
            )
            worker.on_report(report)
            assert worker.prefill_blocks == 0

    def test_a_worker_that_never_reports_does_not_gather_what_has_ended(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("common.routing.worker.REPORT_SECONDS", 0.0)
        worker = worker_of_four()
        for _ in range(100):
            with worker.lease(prompt(3), 0):
                time.sleep(0.0001)
        assert len(worker._ended) < 5

    def test_nothing_is_left_of_many_requests(self) -> None:
        worker, chance, open_leases = worker_of_four(), random.Random(2), list[ExitStack]()
        for _ in range(300):
            hashes = [chance.randrange(2) for _ in range(chance.randrange(6))]
            lease = ExitStack()
            lease.enter_context(worker.lease(prompt(len(hashes) + 0.25, hashes), chance.randrange(len(hashes) + 1)))
            open_leases.append(lease)
            worker.on_stored(sequence_hashes([chance.randrange(2) for _ in range(4)]))
            if chance.random() < 0.4:
                open_leases.pop(chance.randrange(len(open_leases))).close()
        assert worker.decode_blocks > 10
        for lease in open_leases:
            lease.close()
        assert worker.prefill_blocks == pytest.approx(0)
        assert worker.decode_blocks == pytest.approx(0)
        assert worker.requests == 0


IDLE = LoadStat(running_requests=0, waiting_requests=0, used_tokens=0, total_tokens=999)


class Clock:
    """The time, for a worker."""

    def __init__(self) -> None:
        self.now = 1000.0

    def worker(self, number: int = 1) -> Worker:
        return Worker(number, worker_info(number), lambda: self.now)

    def reports(self, worker: Worker, *gaps: float) -> None:
        """Have a report come after each of these seconds, as one looks at the worker all the time."""
        for gap in gaps:
            self.wait(worker, gap)
            worker.on_report(IDLE)

    def wait(self, worker: Worker, seconds: float) -> None:
        self.now += seconds
        worker.check_silence()


@pytest.fixture
def clock() -> Clock:
    return Clock()


class TestSilence:
    """A worker that reports no more hangs."""

    def test_one_that_says_nothing_for_long_is_silent_until_it_speaks(self, clock: Clock) -> None:
        worker = clock.worker()
        clock.reports(worker, 1, 1)
        clock.wait(worker, SILENT_SECONDS - 0.1)
        assert worker.silent_since is None
        clock.wait(worker, 0.2)
        assert worker.silent_since is not None
        clock.reports(worker, 20)
        assert worker.silent_since is None

    def test_slow_is_not_hung(self, clock: Clock) -> None:
        worker = clock.worker()
        clock.reports(worker, 1, SILENT_SECONDS - 1)
        clock.wait(worker, SILENT_SECONDS + 3)
        assert worker.silent_since is None

    def test_one_that_was_taken_for_silent_by_mistake_is_not_so_again(self, clock: Clock) -> None:
        worker = clock.worker()
        clock.reports(worker, 1, 20)
        clock.wait(worker, 20)
        assert worker.silent_since is None

    def test_one_that_never_reported_may_be_of_a_kind_that_does_not(self, clock: Clock) -> None:
        worker = clock.worker()
        clock.wait(worker, 3600)
        assert worker.silent_since is None

    def test_one_that_reports_and_does_not_answer_hangs_too(self, clock: Clock) -> None:
        """An engine whose scheduler is another process, which goes on."""
        worker = clock.worker()
        clock.reports(worker, 1, 1)
        worker.on_question(answered=True)
        worker.on_question(answered=False)
        assert worker.silent_since is None
        clock.reports(worker, 1)
        worker.on_question(answered=False)
        clock.reports(worker, 1)
        assert worker.silent_since is not None
        worker.on_question(answered=True)
        assert worker.silent_since is None

    def test_it_gets_nothing_while_there_are_others(self, clock: Clock) -> None:
        fleet = Fleet()
        for number in (1, 2):
            fleet.add(clock.worker(number))
        one, two = fleet.workers.values()
        clock.reports(one, 1)
        clock.wait(one, SILENT_SECONDS + 1)
        request = FindWorkerRequest(model=identity(), local_hashes=[], tokens=1)
        assert [candidate.worker for candidate in fleet.candidates(request, prompt(1))] == [two]
        (status, _) = fleet.status()
        assert status.silent_seconds is not None and str(status.reason).startswith("silent since ")
        fleet.forget(2)
        assert [candidate.worker for candidate in fleet.candidates(request, prompt(1))] == [one]
