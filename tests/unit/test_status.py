"""Whether a request would be answered: by what the parts say, and by asking for a token."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any

from common.errors import Unavailable
from common.messages import ModelIdentity, RouterStatus, WorkerStatus
from common.openai_api import ChatCompletionChunk
from common.openai_request import ChatCompletionRequest, CompletionRequest
from tests.unit.door import Door, ScriptedProcessors, chunk, raises, two_words
from tests.unit.stand_ins import Handler

import httpx
import pytest
from dynamo.runtime import Context


async def nothing(body: Any, context: Context) -> AsyncIterator[Any]:
    return
    yield


def engine(name: str, reason: str | None = None, model: str | None = "m") -> WorkerStatus:
    identity = ModelIdentity(name=model, block_size=16) if model else None
    return WorkerStatus(instance_id=1, worker_id=name, status="joined", model=identity, reason=reason)


def knows(*workers: WorkerStatus) -> Handler:
    """A router's answer."""

    async def status(body: Any, context: Context) -> AsyncIterator[Any]:
        yield RouterStatus(router=1, policy="kv", workers=list(workers)).encode()

    return status


def door(*workers: WorkerStatus, processor: int = 1, router: int = 2) -> Door:
    stages = {"processor": dict.fromkeys(range(processor), nothing), "router": dict.fromkeys(range(router), nothing)}
    return Door(stages=stages, routers={1: knows(*workers)} if workers else {})


class TestHealth:
    """GET /health."""

    def test_all_are_there(self) -> None:
        healthy = door(engine("one"))
        answer = healthy.get("/health")
        assert answer.status_code == 200
        assert answer.json() == {"status": "healthy", "instances": {"processor": 1, "router": 2}}
        healthy.service.stop()
        answer = healthy.get("/health")
        assert (answer.status_code, answer.json()["reason"]) == (503, "this server is being stopped")
        assert healthy.get("/live").json() == {"status": "live"}

    @pytest.mark.parametrize(
        ("ill", "reason"),
        [
            (door(engine("one"), router=0), "no router is running"),
            (door(), "no router answers"),
            (door(engine("one", "is silent")), "no engine can be asked for m: one is silent"),
            (door(engine("one", model="other")), "no engine can be asked for m"),
        ],
    )
    def test_what_is_wrong_is_said(self, ill: Door, reason: str) -> None:
        answer = ill.get("/health")
        assert (answer.status_code, answer.json()["status"], answer.json()["reason"]) == (503, "unhealthy", reason)

    @pytest.mark.parametrize("worker", [engine("new"), engine("one that announces nothing", model=None)])
    def test_one_engine_that_can_be_asked_is_enough(self, worker: WorkerStatus) -> None:
        assert door(engine("old", "is silent"), worker).get("/health").status_code == 200

    def test_processors_that_hang_are_no_use(self, monkeypatch: pytest.MonkeyPatch) -> None:
        async def nobody(self: ScriptedProcessors, seconds: float) -> set[str]:
            return set()

        monkeypatch.setattr(ScriptedProcessors, "alive", nobody)
        assert door(engine("one")).get("/health").json()["reason"] == "no processor answers"


class TestReady:
    """GET /health/ready."""

    def test_each_model_is_asked_for_a_token(self) -> None:
        ready = Door(two_words)
        answer = ready.get("/health/ready")
        assert (answer.status_code, answer.json()) == (200, {"status": "ready", "instances": {}})
        asked: list[Any] = ready.processors.requests
        assert {request.model for request in asked} == {"m", "org/m"}
        assert all(isinstance(request, CompletionRequest) and request.max_tokens == 1 for request in asked)

    def test_one_that_does_not_answer_is_named(self) -> None:
        async def play(request: ChatCompletionRequest, context: Context) -> AsyncGenerator[ChatCompletionChunk]:
            if request.model == "m":
                raise Unavailable("no engine serves m")
            yield chunk("one", "length")

        answer = Door(play).get("/health/ready")
        assert (answer.status_code, answer.json()["reason"]) == (503, "m: no engine serves m")

    def test_an_answer_must_be_whole(self) -> None:
        async def half(request: ChatCompletionRequest, context: Context) -> AsyncGenerator[ChatCompletionChunk]:
            yield chunk("one")

        assert "m answered nothing" in Door(half).get("/health/ready").json()["reason"]

    def test_it_does_not_wait_for_ever(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("common.http.canary.ANSWER_SECONDS", 0.05)

        async def hangs(request: ChatCompletionRequest, context: Context) -> AsyncGenerator[ChatCompletionChunk]:
            await asyncio.Event().wait()
            yield chunk("never")

        hung = Door(hangs)
        assert "m has made no token in 0.05 s" in hung.get("/health/ready").json()["reason"]
        assert all(context.is_stopped() for context in hung.processors.contexts)

    def test_many_who_want_to_know_share_an_answer(self, monkeypatch: pytest.MonkeyPatch) -> None:
        shared = Door(two_words)

        async def get(client: httpx.AsyncClient) -> int:
            return (await client.get("/health/ready")).status_code

        async def run() -> None:
            transport = httpx.ASGITransport(app=shared.app)
            async with httpx.AsyncClient(transport=transport, base_url="http://door") as client:
                assert await asyncio.gather(*(get(client) for _ in range(20))) == [200] * 20
                assert await get(client) == 200
                assert len(shared.processors.requests) == 2  # one for each model
                monkeypatch.setattr("common.http.canary.FRESH_SECONDS", 0.0)
                await get(client)
                assert len(shared.processors.requests) == 4

        asyncio.run(run())

    def test_a_stage_in_between_is_asked_too(self) -> None:
        stage = ScriptedProcessors(raises(Unavailable("the guard sleeps")))
        answer = Door(stage=stage).get("/health/ready")
        assert (answer.status_code, answer.json()["reason"]) == (503, "m: the guard sleeps; org/m: the guard sleeps")
        assert all(isinstance(request, ChatCompletionRequest) for request in stage.requests)

    def test_a_server_that_is_being_stopped_is_not(self) -> None:
        stopped = Door(two_words)
        stopped.service.stop()
        answer = stopped.get("/health/ready")
        assert (answer.status_code, answer.json()["reason"]) == (503, "this server is being stopped")
