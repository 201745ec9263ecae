"""What the routing policies choose, and why."""

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

from common.policy import POLICIES, Candidate, Weights, at_random, choose, kv, least_loaded, round_robin
from common.prefix_index import path
from common.worker import Prompt, Worker

import pytest
from dynamo.llm import KvRouterConfig

DEFAULT = Weights()


@pytest.fixture
def leases() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def workers(count: int) -> list[Worker]:
    return [Worker(number, None, 16) for number in range(1, count + 1)]


def candidate(worker: Worker, prompt: Prompt, cached: int = 0) -> Candidate:
    return Candidate(worker, prompt, cached, worker.held_blocks(prompt.path))


def prompt(blocks: float = 10, hashes: Sequence[int] = ()) -> Prompt:
    return Prompt(path(hashes), blocks)


def taken(candidates: list[Candidate], policy: Any = kv, weights: Weights = DEFAULT) -> Worker:
    return choose(candidates, policy, weights).worker


class TestKv:
    def test_the_weights_and_their_defaults_are_dynamo_s(self) -> None:
        theirs = KvRouterConfig()
        for name in ("overlap_score_credit", "prefill_load_scale", "decode_active_request_weight"):
            assert getattr(DEFAULT, name) == getattr(theirs, name)
        assert DEFAULT.router_temperature == 0

    def test_the_prefix_decides_between_idle_workers(self) -> None:
        cold, warm = workers(2)
        assert taken([candidate(cold, prompt()), candidate(warm, prompt(), cached=3)]) is warm

    def test_the_cost_is_that_of_dynamo_s_formula_if_blocks_to_read_cost_as_much(self, leases: ExitStack) -> None:
        (worker,) = workers(1)
        leases.enter_context(worker.lease(prompt(4), 1))  # 3 to compute, 4 held
        waiting, held, new = 3, 4, 10
        dynamo = Weights(decode_load_scale=1)
        assert kv(candidate(worker, prompt(), cached=6), dynamo) == (waiting + new - 6) + held + new
        dynamo = replace(dynamo, overlap_score_credit=0.5, prefill_load_scale=2, decode_active_request_weight=7)
        assert kv(candidate(worker, prompt(), cached=6), dynamo) == 2 * (waiting + new - 0.5 * 6) + held + new + 7

    def test_a_block_to_read_costs_less_than_one_to_compute(self, leases: ExitStack) -> None:
        busy, idle = workers(2)
        leases.enter_context(busy.lease(prompt(10), 10))
        assert taken([candidate(busy, prompt(), cached=3), candidate(idle, prompt())]) is busy
        assert taken([candidate(busy, prompt(), cached=2), candidate(idle, prompt())]) is idle

    def test_load_outweighs_a_short_prefix(self, leases: ExitStack) -> None:
        busy, idle = workers(2)
        leases.enter_context(busy.lease(prompt(8), 8))
        short, long = candidate(busy, prompt(), cached=1), candidate(busy, prompt(), cached=3)
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
            leases.enter_context(best.worker.lease(sibling, best.cached, best.expected))
            where.append(best.worker.instance_id)
        assert len(set(where)) == 1
        assert fleet[where[0] - 1].prefill_blocks == 100 + 12 * 2

    def test_siblings_go_elsewhere_when_their_own_parts_are_too_much_for_one(self, leases: ExitStack) -> None:
        fleet = workers(4)
        where = Counter[int]()
        for number in range(12):
            sibling = prompt(60, [*range(20), *range(100 * (number + 1), 100 * (number + 1) + 40)])
            best = choose([candidate(worker, sibling) for worker in fleet], kv, DEFAULT)
            leases.enter_context(best.worker.lease(sibling, best.cached, best.expected))
            where[best.worker.instance_id] += 1
        assert set(where.values()) == {3}

    def test_a_temperature_spreads_the_choice(self) -> None:
        cheap, dear = workers(2)
        candidates = [candidate(cheap, prompt(), cached=10), candidate(dear, prompt())]
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
        assert taken([candidate(busy, prompt(), cached=10), candidate(idle, prompt())], least_loaded) is idle

    def test_random_takes_any(self, leases: ExitStack) -> None:
        busy, idle = workers(2)
        leases.enter_context(busy.lease(prompt(100), 0))
        candidates = [candidate(busy, prompt()), candidate(idle, prompt())]
        assert {taken(candidates, at_random) for _ in range(50)} == {busy, idle}

    def test_every_policy_has_a_name(self) -> None:
        assert list(POLICIES) == ["kv", "least-loaded", "round-robin", "random"]
