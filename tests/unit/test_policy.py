"""What the routing policies choose, and why."""

import gc
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from itertools import count
from typing import Any

from common.messages import FindWorkerRequest
from common.routing.fleet import Fleet
from common.routing.policy import (
    POLICIES,
    Candidate,
    Weights,
    at_random,
    choose,
    kv,
    least_loaded,
    round_robin,
    session_affinity,
)
from common.routing.prefix_index import sequence_hashes
from common.routing.worker import Prompt, Worker
from tests.unit.stand_ins import identity

import pytest
from dynamo.llm import KvRouterConfig

DEFAULT = Weights()
UNIQUE = count(10**6)


@pytest.fixture
def leases() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def workers(count: int) -> list[Worker]:
    return [Worker(number, None) for number in range(1, count + 1)]


def candidate(worker: Worker, prompt: Prompt, overlap_blocks: int = 0) -> Candidate:
    request = FindWorkerRequest(model=identity(), local_hashes=[], tokens=0)
    return Candidate(worker, request, prompt, overlap_blocks, worker.held_blocks(prompt.sequence_hashes))


def prompt(blocks: float = 10, hashes: Sequence[int] | None = None) -> Prompt:
    """One of these blocks, or of blocks that no other prompt has."""
    return Prompt(sequence_hashes([next(UNIQUE) for _ in range(int(blocks))] if hashes is None else hashes), blocks)


def taken(candidates: list[Candidate], policy: Any = kv, weights: Weights = DEFAULT) -> Worker:
    return choose(candidates, policy, weights).worker


def test_a_policy_sees_who_else_could_take_it() -> None:
    candidates = [candidate(worker, prompt()) for worker in workers(3)]
    seen: list[list[Candidate]] = []

    def look(one: Candidate, weights: Weights) -> float:
        seen.append(list(one.peers))
        return 0.0

    choose(candidates, look, DEFAULT)
    assert seen == [candidates] * 3


def test_a_decision_leaves_nothing_to_the_garbage_collector() -> None:
    gc.collect()
    gc.disable()
    try:
        for _ in range(10):
            choose([candidate(worker, prompt()) for worker in workers(3)], kv, DEFAULT)
        assert gc.collect() == 0
    finally:
        gc.enable()


class TestKv:
    def test_the_weights_and_their_defaults_are_dynamo_s(self) -> None:
        theirs = KvRouterConfig()
        for name in ("overlap_score_credit", "prefill_load_scale", "decode_active_request_weight"):
            assert getattr(DEFAULT, name) == getattr(theirs, name)
        assert DEFAULT.router_temperature == 0

    def test_the_prefix_decides_between_idle_workers(self) -> None:
        cold, warm = workers(2)
        assert taken([candidate(cold, prompt()), candidate(warm, prompt(), overlap_blocks=3)]) is warm

    def test_the_cost_is_that_of_dynamo_s_formula_if_blocks_to_read_cost_as_much(self, leases: ExitStack) -> None:
        (worker,) = workers(1)
        leases.enter_context(worker.lease(prompt(4), 1))  # 3 to compute, 4 held
        waiting, held, new = 3, 4, 10
        dynamo = Weights(decode_load_scale=1)
        assert kv(candidate(worker, prompt(), overlap_blocks=6), dynamo) == (waiting + new - 6) + held + new
        dynamo = replace(dynamo, overlap_score_credit=0.5, prefill_load_scale=2, decode_active_request_weight=7)
        assert (
            kv(candidate(worker, prompt(), overlap_blocks=6), dynamo) == 2 * (waiting + new - 0.5 * 6) + held + new + 7
        )

    def test_a_block_to_read_costs_less_than_one_to_compute(self, leases: ExitStack) -> None:
        busy, idle = workers(2)
        leases.enter_context(busy.lease(prompt(50), 50))  # as much as 2.5 to compute
        assert taken([candidate(busy, prompt(), overlap_blocks=3), candidate(idle, prompt())]) is busy
        assert taken([candidate(busy, prompt(), overlap_blocks=2), candidate(idle, prompt())]) is idle

    def test_load_outweighs_a_short_prefix(self, leases: ExitStack) -> None:
        busy, idle = workers(2)
        leases.enter_context(busy.lease(prompt(40), 40))
        short, long = candidate(busy, prompt(), overlap_blocks=1), candidate(busy, prompt(), overlap_blocks=3)
        assert taken([short, candidate(idle, prompt())]) is idle
        assert taken([long, candidate(idle, prompt())]) is busy

    def test_equal_costs_are_drawn_by_lot(self) -> None:
        candidates = [candidate(worker, prompt()) for worker in workers(3)]
        counts = Counter(taken(candidates).instance_id for _ in range(600))
        assert min(counts[number] for number in (1, 2, 3)) > 100

    def test_siblings_of_a_burst_go_where_their_prefix_is_being_computed(self, leases: ExitStack) -> None:
        fleet = workers(4)
        where = list[int]()
        for number in range(12):
            sibling = prompt(102, [*range(100), 1000 + number, 2000 + number])
            best = choose([candidate(worker, sibling) for worker in fleet], kv, DEFAULT)
            leases.enter_context(best.worker.lease(sibling, best.overlap_blocks))
            where.append(best.worker.instance_id)
        assert len(set(where)) == 1
        assert fleet[where[0] - 1].prefill_blocks == 100 + 12 * 2

    def test_siblings_go_elsewhere_when_their_own_parts_are_too_much_for_one(self, leases: ExitStack) -> None:
        fleet = workers(4)
        where = Counter[int]()
        for number in range(12):
            sibling = prompt(60, [*range(20), *range(100 * (number + 1), 100 * (number + 1) + 40)])
            best = choose([candidate(worker, sibling) for worker in fleet], kv, DEFAULT)
            leases.enter_context(best.worker.lease(sibling, best.overlap_blocks))
            where[best.worker.instance_id] += 1
        assert set(where.values()) == {3}

    def test_a_temperature_spreads_the_choice(self) -> None:
        cheap, dear = workers(2)
        candidates = [candidate(cheap, prompt(), overlap_blocks=10), candidate(dear, prompt())]
        assert {taken(candidates) for _ in range(50)} == {cheap}
        counts = Counter(taken(candidates, weights=Weights(router_temperature=1.0)) for _ in range(1000))
        assert counts[cheap] / 1000 == pytest.approx(1 / (1 + 2.718**-1), abs=0.06)  # softmax of costs 0 and 1


class TestTheOthers:
    def test_round_robin_takes_turns(self) -> None:
        fleet = workers(3)
        turns = []
        for _ in range(9):
            worker = taken([candidate(worker, prompt()) for worker in fleet], round_robin)
            turns.append(worker.instance_id)
            with worker.lease(prompt(), 0):
                pass
        assert sorted(turns[:3]) == [1, 2, 3]
        assert turns == turns[:3] * 3

    def test_least_loaded_looks_at_nothing_else(self, leases: ExitStack) -> None:
        busy, idle = workers(2)
        leases.enter_context(busy.lease(prompt(1), 1))
        assert taken([candidate(busy, prompt(), overlap_blocks=10), candidate(idle, prompt())], least_loaded) is idle

    def test_random_takes_any(self, leases: ExitStack) -> None:
        busy, idle = workers(2)
        leases.enter_context(busy.lease(prompt(100), 0))
        candidates = [candidate(busy, prompt()), candidate(idle, prompt())]
        assert {taken(candidates, at_random) for _ in range(50)} == {busy, idle}

    def test_every_policy_has_a_name(self) -> None:
        assert {"kv", "session-affinity", "least-loaded", "round-robin", "random"} <= POLICIES.keys()


class TestSessionAffinity:
    """Asks as the router does, for prompts of ten blocks that nobody has cached."""

    def request(self, session: str | None, **fields: Any) -> FindWorkerRequest:
        return FindWorkerRequest(model=identity(), local_hashes=[], tokens=160, session=session, **fields)

    def ask(self, fleet: Fleet, session: str | None, leases: ExitStack | None = None, **fields: Any) -> Worker:
        request = self.request(session, **fields)
        best = choose(fleet.candidates(request, prompt()), session_affinity, DEFAULT)
        fleet.remember(request, best.worker.instance_id)
        if leases:
            leases.enter_context(best.worker.lease(best.prompt, 0))
        return best.worker

    def fleet(self, *loads: float, leases: ExitStack) -> Fleet:
        """Workers 1, 2, … with so many blocks to read."""
        fleet = Fleet()
        for worker, blocks in zip(workers(len(loads)), loads, strict=True):
            fleet.add(worker)
            leases.enter_context(worker.lease(prompt(blocks), overlap_blocks=int(blocks)))
        return fleet

    def test_a_session_stays_while_its_worker_has_at_most_twice_the_least_load(self, leases: ExitStack) -> None:
        fleet = self.fleet(10, 20, 15, leases=leases)
        fleet.remember(self.request("s"), 2)
        assert {self.ask(fleet, "s").instance_id for _ in range(10)} == {2}

    def test_it_leaves_one_that_is_busier(self, leases: ExitStack) -> None:
        fleet = self.fleet(10, 21, 15, leases=leases)
        fleet.remember(self.request("s"), 2)
        assert {self.ask(fleet, "s").instance_id for _ in range(10)} == {1}

    def test_and_stays_where_it_went(self, leases: ExitStack) -> None:
        fleet = self.fleet(10, 21, leases=leases)
        fleet.remember(self.request("s"), 2)
        with ExitStack() as load:
            assert self.ask(fleet, "s", load).instance_id == 1
        leases.enter_context(fleet.workers[1].lease(prompt(10), 10))
        assert {self.ask(fleet, "s").instance_id for _ in range(10)} == {1}

    def test_an_idle_one_is_left_for_nobody(self, leases: ExitStack) -> None:
        fleet = self.fleet(0, 0, 0, leases=leases)
        fleet.remember(self.request("s"), 3)
        assert {self.ask(fleet, "s").instance_id for _ in range(10)} == {3}

    @pytest.mark.parametrize("session", [None, "another"])
    def test_without_a_session_it_is_kv(self, session: str | None, leases: ExitStack) -> None:
        fleet = self.fleet(10, 20, 15, leases=leases)
        fleet.remember(self.request("s"), 2)
        assert self.ask(fleet, session).instance_id == 1
        for held, cached in ((prompt(), 0), (prompt(), 7)):
            one = candidate(fleet.workers[2], held, overlap_blocks=cached)
            assert session_affinity(one, DEFAULT) == kv(one, DEFAULT)

    def test_a_worker_that_failed_the_request_or_left_is_not_gone_back_to(self, leases: ExitStack) -> None:
        fleet = self.fleet(10, 12, leases=leases)
        fleet.remember(self.request("s"), 2)
        assert self.ask(fleet, "s", excluded=[2]).instance_id == 1
        fleet.remember(self.request("s"), 2)
        fleet.forget(2)
        assert self.ask(fleet, "s").instance_id == 1
