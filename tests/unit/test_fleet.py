"""Who may take a request, and what is said if nobody can."""

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import aclosing

from common.engines.ports import free_ports
from common.engines.publisher import KvEventPublisher
from common.errors import Unavailable
from common.kv_events import KvEventStream, Lost, Update
from common.messages import CacheSnapshot, FindWorkerRequest, LoadStat, ModelIdentity, StoredBlocks
from common.routing import fleet as fleet_module
from common.routing.fleet import Fleet
from common.routing.policy import Candidate
from common.routing.prefix_index import sequence_hashes
from common.routing.worker import Prompt, Worker
from tests.unit.stand_ins import identity, worker_info

import pytest


def fleet_of(*models: ModelIdentity | None) -> Fleet:
    """Workers 0, 1, … with these models; None announces nothing."""
    fleet = Fleet()
    for number, model in enumerate(models):
        fleet.add(Worker(number, worker_info(number, model=model, worker_id=str(number)) if model else None))
    return fleet


def asked_for(model: ModelIdentity, **fields: object) -> FindWorkerRequest:
    return FindWorkerRequest.decode({"model": model.encode(), "local_hashes": [1, 2], "tokens": 40, **fields})


def candidates(fleet: Fleet, model: ModelIdentity, **fields: object) -> list[Candidate]:
    request = asked_for(model, **fields)
    return fleet.candidates(request, Prompt(sequence_hashes(request.local_hashes), 2.5))


def ids(fleet: Fleet, model: ModelIdentity, **fields: object) -> list[int]:
    return [candidate.worker.instance_id for candidate in candidates(fleet, model, **fields)]


def refusal(fleet: Fleet, model: ModelIdentity, **fields: object) -> str:
    with pytest.raises(Unavailable) as refused:
        candidates(fleet, model, **fields)
    assert refused.value.code == "no_worker"
    return refused.value.message


class TestMatching:
    def test_several_models_work_side_by_side(self) -> None:
        fleet = fleet_of(identity("a"), identity("b", block_size=32), identity("a"))
        assert ids(fleet, identity("a")) == [0, 2]
        assert ids(fleet, identity("b", block_size=32)) == [1]

    def test_blocks_must_be_of_one_size(self) -> None:
        assert ids(fleet_of(identity(block_size=32), identity()), identity()) == [1]

    def test_tokenizers_must_be_the_same_where_both_are_known(self) -> None:
        fleet = fleet_of(identity(tokenizer="t"), identity(tokenizer="u"), identity())
        assert ids(fleet, identity(tokenizer="t")) == [0, 2]
        assert ids(fleet, identity()) == [0, 1, 2]

    def test_a_silent_worker_takes_anything(self) -> None:
        fleet = fleet_of(None, identity("a"))
        assert ids(fleet, identity("a")) == [0, 1]
        assert ids(fleet, identity("b", block_size=1, tokenizer="x")) == [0]

    def test_workers_that_failed_a_request_do_not_get_it_again(self) -> None:
        assert ids(fleet_of(identity(), identity(), identity()), identity(), excluded=[0, 2]) == [1]

    def test_who_comes_takes_requests_at_once_and_who_leaves_takes_none(self) -> None:
        fleet = fleet_of(identity(), identity("n"))
        assert ids(fleet, identity()) == [0]
        fleet.add(Worker(7, worker_info(7, model=identity())))
        fleet.add(Worker(8, worker_info(8, model=identity())))
        assert ids(fleet, identity()) == [0, 7, 8]
        fleet.forget(0)
        fleet.refuse(7, "w7", "it is odd")
        assert ids(fleet, identity()) == [8]


class TestCandidates:
    def test_it_shows_the_request(self) -> None:
        found = candidates(fleet_of(identity(), identity()), identity(), session="s", priority=7, request_id="r")
        for candidate in found:
            request = candidate.request
            assert (request.session, request.priority, request.request_id, request.tokens) == ("s", 7, "r", 40)

    def test_it_shows_who_had_the_session(self) -> None:
        fleet = fleet_of(identity(), identity())
        fleet.remember(asked_for(identity(), session="s"), 1)
        for session, had in {"s": [False, True], "t": [False, False]}.items():
            assert [candidate.had_session for candidate in candidates(fleet, identity(), session=session)] == had

    def test_the_same_session_of_another_model_is_another_one(self) -> None:
        fleet = fleet_of(identity(), identity("n"))
        for model, instance_id in ((identity(), 0), (identity("n"), 1)):
            fleet.remember(asked_for(model, session="s"), instance_id)
        assert [candidates(fleet, model, session="s")[0].had_session for model in (identity(), identity("n"))] == [
            True,
            True,
        ]

    def test_it_shows_what_is_cached_and_what_is_about_to_be(self) -> None:
        fleet = fleet_of(identity(), identity(), None)
        fleet.index.apply(0, StoredBlocks(parent_id=None, block_ids=[5], local_hashes=[1]))
        with fleet.workers[1].lease(Prompt(sequence_hashes([1, 2]), 2.0), 0):
            found = candidates(fleet, identity())
        assert [candidate.overlap_blocks for candidate in found] == [1, 0, 0]
        assert [candidate.held_blocks for candidate in found] == [0, 2, 0]
        assert [candidate.expected_blocks for candidate in found] == [1, 2, 0]

    def test_the_sessions_that_were_quiet_for_longest_are_forgotten(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(fleet_module, "SESSIONS", 3)
        fleet = fleet_of(identity())
        for session in ("a", "b", "c", "a", "d", "e"):
            fleet.remember(asked_for(identity(), session=session), 0)
        kept = [session for session in "abcde" if candidates(fleet, identity(), session=session)[0].had_session]
        assert kept == ["a", "d", "e"]


class TestNobody:
    def test_what_does_not_fit_is_said(self) -> None:
        fleet = fleet_of(identity(block_size=32), identity("n"), identity(tokenizer="u"))
        assert refusal(fleet, identity(tokenizer="t")) == (
            "no engine fits: you ask for m in blocks of 16 tokens; "
            "engine 0 has KV blocks of 32 tokens (--block-size); engine 1 serves n; "
            "engine 2 has a different tokenizer, u and not t (--model)"
        )

    def test_no_engine_at_all(self) -> None:
        assert refusal(fleet_of(), identity()) == "no engine serves m now; try again in a moment"

    def test_all_have_failed_the_request(self) -> None:
        fleet = fleet_of(identity(), identity(), identity("n"))
        message = "every engine that serves m has failed this request; try again in a moment"
        assert refusal(fleet, identity(), excluded=[0, 1]) == message
        assert fleet.unserved == {}

    def test_it_is_shown_until_somebody_fits(self) -> None:
        fleet = fleet_of(identity(block_size=32))
        message = refusal(fleet, identity())
        assert list(fleet.unserved.values()) == [message]
        refusal(fleet, identity("n"))
        refusal(fleet, identity())
        assert len(fleet.unserved) == 2
        fleet.add(Worker(1, worker_info(1)))
        assert ids(fleet, identity()) == [1]
        assert [text.partition(";")[0] for text in fleet.unserved.values()] == [
            "no engine fits: you ask for n in blocks of 16 tokens"
        ]

    def test_not_without_end(self) -> None:
        fleet = fleet_of(identity())
        for number in range(100):
            refusal(fleet, identity(f"m{number}"))
        assert len(fleet.unserved) == fleet_module.UNSERVED

    def test_a_worker_that_serves_the_model_s_name_and_does_not_fit_is_a_mistake(
        self, caplog: pytest.LogCaptureFixture
    ) -> None:
        fleet = fleet_of(identity(block_size=32), identity("n"), identity())
        for _ in range(3):
            assert ids(fleet, identity()) == [2]
        reasons = [status.reason for status in fleet.status()]
        assert reasons == ["has KV blocks of 32 tokens (--block-size)", None, None]
        errors = [record.message for record in caplog.records if record.levelno == logging.ERROR]
        assert errors == [
            "worker 0 gets no requests for m in blocks of 16 tokens: it has KV blocks of 32 tokens (--block-size)"
        ]


class TestStatus:
    def test_of_a_worker_that_joined_a_silent_one_and_a_refused_one(self) -> None:
        fleet = fleet_of(identity(), None)
        fleet.index.apply(0, StoredBlocks(parent_id=None, block_ids=[5, 6], local_hashes=[1, 2]))
        fleet.refuse(7, "w7", "it can no longer be followed")
        with fleet.workers[0].lease(Prompt([1, 2], 2.5), overlap_blocks=1):
            joined, silent, refused = fleet.status()
        assert (joined.status, joined.worker_id, joined.model, joined.cached_blocks) == ("joined", "0", identity(), 2)
        assert (joined.requests, joined.prefill_blocks, joined.decode_blocks, joined.overlap_blocks) == (1, 1.5, 2.5, 1)
        assert (silent.status, silent.worker_id, silent.model, silent.total_blocks) == ("silent", "1", None, None)
        assert (refused.status, refused.worker_id, refused.reason) == ("refused", "w7", "it can no longer be followed")

    def test_a_refused_one_gets_nothing_and_is_forgotten_when_it_leaves(self) -> None:
        fleet = fleet_of(identity(), identity())
        fleet.refuse(0, "0", "it can no longer be followed")
        assert ids(fleet, identity()) == [1]
        assert fleet.is_refused(0)
        fleet.forget(0)
        assert not fleet.is_refused(0)
        assert [status.instance_id for status in fleet.status()] == [1]

    def test_one_that_leaves_takes_its_cache_along(self) -> None:
        fleet = fleet_of(identity(), identity())
        fleet.index.apply(0, StoredBlocks(parent_id=None, block_ids=[5], local_hashes=[1]))
        fleet.forget(0)
        assert fleet.index.overlaps([1]) == {}
        assert ids(fleet, identity()) == [1]

    def test_two_of_one_name_are_warned_of(self, caplog: pytest.LogCaptureFixture) -> None:
        fleet = fleet_of(identity())
        fleet.add(Worker(9, worker_info(9, worker_id="0")))
        assert "two workers are called 0: give each its own --worker-id" in caplog.text
        assert ids(fleet, identity()) == [0, 9]

    def test_a_report_of_one_that_announces_nothing_says_nothing(self) -> None:
        """Its blocks have an unknown size."""
        worker = Worker(1, None)
        worker.on_report(LoadStat(running_requests=1, waiting_requests=0, used_tokens=99, total_tokens=999))
        assert worker.decode_blocks == 0


def test_the_first_snapshot_of_a_cache_is_no_loss() -> None:
    async def run() -> None:
        events, replay = (f"tcp://127.0.0.1:{port}" for port in free_ports(2))
        info = worker_info(kv_events=events, kv_replay=replay)
        publisher, worker = KvEventPublisher(info), Worker(1, info)
        answering = asyncio.create_task(publisher.answer_replays())

        async def snapshot() -> AsyncIterator[CacheSnapshot]:
            yield CacheSnapshot(sequence=4, chains=[])

        for block_id in range(6):
            await publisher.publish_removed([block_id])
        items = KvEventStream(events, replay, snapshot).__aiter__()
        async with aclosing(items):  # type: ignore[type-var]
            read: list[Update | Lost] = [await asyncio.wait_for(anext(items), 30) for _ in range(2)]
        for item in read:
            worker.on_update(item)
        assert (worker.lost, worker.events) == (0, 1)
        worker.on_update(Lost())
        assert worker.lost == 1
        answering.cancel()
        publisher._live.close(0)
        publisher._replay.close(0)

    asyncio.run(run())
