"""Routing by prefix and load over engines that come and go."""

import concurrent.futures
import signal
from collections import Counter
from collections.abc import Iterator
from typing import Any

from tests.system.conftest import Pipeline, Process, until

import pytest


def converse(pipeline: Pipeline, number: int, turns: int) -> list[tuple[str, int]]:
    """Hold a conversation, and return for each turn who answered and how many prompt tokens were cached."""
    messages: list[dict[str, str]] = []
    record = []
    for turn in range(turns):
        messages.append({"role": "user", "content": f"conversation {number}, turn {turn}: " + f"{number} is " * 20})
        response = pipeline.ask(messages, max_tokens=12)
        body = response.json()
        messages.append(body["choices"][0]["message"])
        cached = body["usage"]["prompt_tokens_details"]["cached_tokens"]
        record.append((response.headers["x-worker-id"], cached))
    return record


def test_conversations_stay_with_the_engine_that_holds_them(pipeline: Pipeline) -> None:
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        records = list(pool.map(lambda number: converse(pipeline, number, 5), range(20)))
    first_workers = Counter[str]()
    for record in records:
        workers, cached = {worker for worker, _ in record}, [tokens for _, tokens in record]
        assert len(workers) == 1
        assert cached == sorted(cached) and len(set(cached)) == len(cached)
        first_workers.update(workers)
    assert first_workers.keys() == {"0", "1"}
    assert min(first_workers.values()) >= 5


def test_load_spreads(pipeline: Pipeline) -> None:
    with concurrent.futures.ThreadPoolExecutor(12) as pool:
        ask = lambda number: pipeline.ask(f"{number} alone: " + "go on " * number, max_tokens=40)  # noqa: E731
        workers = Counter(response.headers["x-worker-id"] for response in pool.map(ask, range(24)))
    assert min(workers["0"], workers["1"]) >= 6


class TestAThirdEngine:
    @pytest.fixture(scope="class")
    @classmethod
    def third(cls, pipeline: Pipeline) -> Iterator[Process]:
        engine = pipeline.start("engine", "--worker-id", "2", name="engine-2")
        pipeline.wait_for_instances(engine=3)
        yield engine
        engine.close()

    def test_gets_work(self, pipeline: Pipeline, third: Process) -> None:
        def served_by_it(number: int = iter(range(1000)).__next__) -> bool:  # type: ignore[assignment]
            return pipeline.ask(f"a new subject, number {number}").headers["x-worker-id"] == "2"

        until(served_by_it, "an answer of the third engine")

    def test_its_death_loses_no_request(self, pipeline: Pipeline, third: Process) -> None:
        """Streams that it was in the middle of go on elsewhere, without a token lost or said twice."""
        questions = [f"question {number} of many" for number in range(12)]
        options: dict[str, Any] = {"max_tokens": 160, "ignore_eos": True}
        with concurrent.futures.ThreadPoolExecutor(len(questions)) as pool:
            answers = [pool.submit(pipeline.ask, question, **options) for question in questions]
            until(lambda: "worker=2" in (pipeline.folder / "router.log").read_text() or not pipeline.idle(), "work")
            third.signal(signal.SIGKILL)
            responses = [answer.result() for answer in answers]
        assert {response.status_code for response in responses} == {200}
        assert "leaves worker 2 after" in (pipeline.folder / "processor.log").read_text()
        for question, response in zip(questions, responses, strict=True):
            assert response.json()["choices"][0]["message"]["content"] == pipeline.answer(question, **options)

    def test_it_is_forgotten(self, pipeline: Pipeline, third: Process) -> None:
        third.signal(signal.SIGKILL) if third.popen.poll() is None else None
        pipeline.wait_for_instances(engine=2)
        workers = {pipeline.ask(f"after the end, {number}").headers["x-worker-id"] for number in range(8)}
        assert workers <= {"0", "1"}
