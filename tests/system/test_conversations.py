"""Routing by prefix and load over engines that come and go."""

import concurrent.futures
import itertools
import signal
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

from tests.system.conftest import Pipeline, Process, until

import pytest


class Conversation:
    """A conversation, and for each turn who answered and how many prompt tokens were cached."""

    def __init__(self, pipeline: Pipeline, number: int) -> None:
        self._pipeline = pipeline
        self._number = number
        self._messages: list[dict[str, str]] = []
        self.workers: set[str] = set()
        self.cached: list[int] = []

    def turn(self) -> None:
        question = f"conversation {self._number}, turn {len(self.cached)}: " + f"{self._number} is " * 20
        self._messages.append({"role": "user", "content": question})
        response = self._pipeline.ask(self._messages, max_tokens=12)
        body = response.json()
        self._messages.append(body["choices"][0]["message"])
        self.workers.add(response.headers["x-worker-id"])
        self.cached.append(body["usage"]["prompt_tokens_details"]["cached_tokens"])


def test_conversations_stay_with_the_engine_that_holds_them(pipeline: Pipeline) -> None:
    conversations = [Conversation(pipeline, number) for number in range(20)]
    for _ in range(5):
        for conversation in conversations:
            conversation.turn()
    for conversation in conversations:
        assert len(conversation.workers) == 1
        assert conversation.cached == sorted(set(conversation.cached))
    held = Counter(worker for conversation in conversations for worker in conversation.workers)
    assert min(held["0"], held["1"]) >= 5


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
        numbers = itertools.count()

        def served_by_it() -> bool:
            return pipeline.ask(f"{next(numbers)} is a new subject").headers["x-worker-id"] == "2"

        until(served_by_it, "an answer of the third engine")

    def test_its_death_loses_no_request(self, pipeline: Pipeline, third: Process) -> None:
        """Streams that it was in the middle of go on elsewhere, without a token lost or said twice."""
        questions = [f"Count from {number} to {number + 9}." for number in range(1, 13)]
        options: dict[str, Any] = {"max_tokens": 400, "ignore_eos": True}
        with concurrent.futures.ThreadPoolExecutor(len(questions)) as pool:
            answers = [pool.submit(pipeline.ask, question, **options) for question in questions]
            until(lambda: not pipeline.idle(), "work")
            time.sleep(0.3)
            third.signal(signal.SIGKILL)
            responses = [answer.result() for answer in answers]
        assert {response.status_code for response in responses} == {200}
        assert "migrates from worker 2 after" in (pipeline.folder / "processor.log").read_text()
        for question, response in zip(questions, responses, strict=True):
            assert response.json()["choices"][0]["message"]["content"] == pipeline.answer(question, **options)

    def test_it_is_forgotten(self, pipeline: Pipeline, third: Process) -> None:
        third.close()
        pipeline.wait_for_instances(engine=2)
        workers = {pipeline.ask(f"after the end, {number}").headers["x-worker-id"] for number in range(8)}
        assert workers <= {"0", "1"}
