"""The door: what HTTP clients get, and what the log says of it."""

import asyncio
import json
import logging
import re
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from typing import Any

import frontend
from common.errors import (
    Cancelled,
    Internal,
    InvalidRequest,
    NotFound,
    Overloaded,
    PipelineError,
    Unavailable,
    Unreachable,
)
from common.messages import RouterStatus, WorkerStatus
from common.openai_api import ChatCompletionChunk, ChatCompletionRequest, Routing
from tests.unit.door import (
    CHAT,
    HELLO,
    Connection,
    Door,
    Play,
    ScriptedProcessors,
    chunk,
    first_chunk,
    raises,
    two_words,
)

import httpx
import pytest
from dynamo.runtime import Context
from starlette.types import Message, Receive, Scope, Send

STREAM = {**HELLO, "stream": True}
EVERY_ERROR = [
    (InvalidRequest("no", param="x", code="c"), 400, None),
    (NotFound("gone"), 404, None),
    (Overloaded("full"), 429, "1"),
    (Cancelled("by somebody"), 499, None),
    (Internal("oh"), 500, None),
    (Unavailable("later", code="no_worker"), 503, "1"),
    (Unreachable("nobody", code="no_processor"), 503, "1"),
]


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    """The lines that the log has for requests."""
    caplog.set_level(logging.INFO)
    return lambda: [
        record.message
        for record in caplog.records
        if record.name == "common.http.exchange" and record.levelno == logging.INFO
    ]


@pytest.fixture
def tracebacks(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    return lambda: [record.message for record in caplog.records if record.exc_info]


Log = Callable[[], list[str]]

PREFLIGHT = {
    "origin": "http://page",
    "access-control-request-method": "POST",
    "access-control-request-headers": "content-type,x-session-id",
}


def events(answer: httpx.Response) -> list[Any]:
    """The server-sent events of an answer."""
    assert answer.headers["content-type"].startswith("text/event-stream")
    data = [event.removeprefix("data: ") for event in answer.text.split("\n\n")[:-1]]
    return [event if event == "[DONE]" else json.loads(event) for event in data]


def error_of(answer: httpx.Response) -> dict[str, Any]:
    error: dict[str, Any] = answer.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    return error


def converse(door: Door, scenario: Callable[[Connection], Awaitable[None]], body: Any = STREAM) -> None:
    async def run() -> None:
        async with Connection(door, body) as connection:
            await scenario(connection)
            await connection.end()

    asyncio.run(run())


class TestAnswer:
    def test_one_body(self) -> None:
        answer = Door().post()
        assert answer.status_code == 200
        assert answer.json() == {
            "id": "chatcmpl-1",
            "object": "chat.completion",
            "created": 1,
            "model": "m",
            "choices": [
                {
                    "index": 0,
                    "message": {"role": "assistant", "content": "one two", "refusal": None},
                    "logprobs": None,
                    "finish_reason": "stop",
                }
            ],
            "usage": {
                "prompt_tokens": 50,
                "completion_tokens": 2,
                "total_tokens": 52,
                "prompt_tokens_details": {"cached_tokens": 48},
            },
        }

    def test_events(self) -> None:
        answer = Door().post(STREAM)
        common = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1, "model": "m"}
        first, last = ({"role": "assistant", "content": "one"}, None), ({"content": " two"}, "stop")
        chunks = [
            {**common, "choices": [{"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason}]}
            for delta, reason in (first, last)
        ]
        assert events(answer) == [*chunks, "[DONE]"]
        assert answer.headers["cache-control"] == "no-cache"
        assert "content-length" not in answer.headers

    def test_the_usage_is_an_event_if_asked_for(self) -> None:
        for include, there in ((True, True), (False, False), (None, False)):
            answer = Door().post({**STREAM, "stream_options": {"include_usage": include}})
            usages = [event for event in events(answer)[:-1] if "usage" in event]
            assert [(event["choices"], event["usage"]["total_tokens"]) for event in usages] == [([], 52)] * there

    def test_each_chunk_is_written_as_it_comes(self) -> None:
        go_on = asyncio.Event()

        async def play(request: ChatCompletionRequest, context: Context) -> AsyncGenerator[ChatCompletionChunk]:
            yield first_chunk()
            await go_on.wait()
            yield chunk("two", "stop")

        async def scenario(client: Connection) -> None:
            assert (await client.next())["status"] == 200
            assert (await client.event())["choices"][0]["delta"]["content"] == "one"
            go_on.set()
            assert (await client.event())["choices"][0]["delta"]["content"] == "two"
            assert await client.event() == "[DONE]"
            assert await client.next() == {"type": "http.response.body", "body": b"", "more_body": False}

        converse(Door(play), scenario)

    def test_no_layer_of_the_application_sees_the_events(self) -> None:
        """Each would cost time for every token."""
        seen = list[str]()
        door = Door(cors_origins=["*"])
        inner: Any = door.app._app

        async def spy(scope: Scope, receive: Receive, send: Send) -> None:
            async def spying(message: Message) -> None:
                seen.append(message["type"])
                await send(message)

            await inner(scope, receive, spying)

        door.app._app = spy  # type: ignore[assignment]
        assert events(door.post(STREAM, headers={"origin": "http://page"}))[-1] == "[DONE]"
        assert seen == ["http.response.start"]

    @pytest.mark.parametrize("body", [HELLO, STREAM])
    def test_who_answered(self, body: Any) -> None:
        headers = Door().post(body).headers
        assert (headers["x-worker-id"], headers["x-kv-overlap-blocks"]) == ("w1", "3")

    @pytest.mark.parametrize("body", [HELLO, STREAM])
    def test_an_answer_of_nothing_is_a_fault(self, body: Any) -> None:
        async def nothing(request: ChatCompletionRequest, context: Context) -> AsyncGenerator[ChatCompletionChunk]:
            return
            yield

        answer = Door(nothing).post(body)
        assert (answer.status_code, error_of(answer)["message"]) == (500, "the processor answered nothing")


class TestErrors:
    @pytest.mark.parametrize("body", [HELLO, STREAM])
    @pytest.mark.parametrize(("error", "status", "retry_after"), EVERY_ERROR)
    def test_before_the_first_event_it_is_a_status(
        self, body: Any, error: PipelineError, status: int, retry_after: str | None
    ) -> None:
        answer = Door(raises(error)).post(body)
        assert answer.status_code == status
        assert answer.json() == error.body
        assert answer.headers.get("retry-after") == retry_after
        assert answer.headers["content-type"] == "application/json"

    @pytest.mark.parametrize(("error", "status", "retry_after"), EVERY_ERROR)
    def test_after_it_an_event_and_the_last_one(
        self, error: PipelineError, status: int, retry_after: str | None
    ) -> None:
        answer = Door(raises(error, first_chunk())).post(STREAM)
        assert answer.status_code == 200
        first, last = events(answer)
        assert first["choices"][0]["delta"]["content"] == "one"
        assert last == error.body

    def test_of_a_whole_answer_it_is_always_a_status(self) -> None:
        answer = Door(raises(Unavailable("later"), first_chunk())).post()
        assert (answer.status_code, error_of(answer)["message"]) == (503, "later")

    @pytest.mark.parametrize(
        ("fields", "param"), [({"max_tokens": "5"}, "max_tokens"), ({"max_token": 5}, "max_token"), ({"n": 2}, "n")]
    )
    def test_a_field_that_is_wrong_is_named(self, fields: dict[str, Any], param: str) -> None:
        answer = Door().post({**HELLO, **fields})
        assert (answer.status_code, error_of(answer)["param"]) == (400, param)

    def test_a_model_that_nobody_serves(self) -> None:
        answer = Door().post({**HELLO, "model": "x"})
        error = error_of(answer)
        assert (answer.status_code, error["code"], error["param"]) == (404, "model_not_found", "model")

    def test_a_path_or_a_method_that_does_not_exist(self) -> None:
        answer = Door().get("/v1/nonsense")
        assert (answer.status_code, error_of(answer)["type"]) == (404, "invalid_request_error")
        answer = Door().get(CHAT)
        assert answer.status_code == 405
        assert CHAT in error_of(answer)["message"]

    def test_when_it_is_being_stopped_that_is_the_reason(self) -> None:
        door = Door(raises(Cancelled("stopped")))
        door.service.stop()
        answer = door.post()
        assert answer.status_code == 503
        assert "this server is being stopped" in error_of(answer)["message"]

    def test_a_server_that_is_being_stopped_takes_no_new_request(self) -> None:
        door = Door()
        door.service.stop()
        answer = door.post()
        assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
        assert door.processors.requests == []

    @pytest.mark.parametrize("body", [HELLO, STREAM])
    def test_an_answer_that_ends_without_a_reason_is_a_fault(self, body: Any) -> None:
        async def cut_short(request: ChatCompletionRequest, context: Context) -> AsyncGenerator[ChatCompletionChunk]:
            yield first_chunk()

        answer = Door(cut_short).post(body)
        fault = events(answer)[-1] if body is STREAM else answer.json()
        assert "ended its answer without a finish_reason" in fault["error"]["message"]
        assert fault["error"]["type"] == "server_error"

    def test_a_usage_that_is_none_is_not_the_client_s_fault(self) -> None:
        async def odd(request: ChatCompletionRequest, context: Context) -> AsyncGenerator[ChatCompletionChunk]:
            made = first_chunk()
            made.usage = {"prompt_tokens": "many"}
            yield made

        answer = Door(odd).post()
        assert answer.status_code == 500
        assert "invalid Usage" in error_of(answer)["message"]

    def test_a_bug_is_a_500_with_one_traceback(self, log: Log, tracebacks: Log) -> None:
        answer = Door(raises(ZeroDivisionError("by nothing"))).post(headers={"x-request-id": "mine"})
        assert answer.status_code == 500
        error = error_of(answer)
        assert (error["type"], error["message"]) == ("server_error", "ZeroDivisionError: by nothing")
        assert answer.headers["x-request-id"] == "mine"
        assert tracebacks() == ["request_id=mine failed"]
        (line,) = log()
        assert "status=500" in line

    def test_a_bug_in_the_middle_of_a_stream_does_not_look_like_its_end(self, log: Log, tracebacks: Log) -> None:
        async def scenario(client: Connection) -> None:
            assert (await client.next())["status"] == 200
            assert (await client.event())["choices"]
            await client.end()
            assert client.unread == 0  # nothing says that it is complete, and so the server closes the connection

        converse(Door(raises(ZeroDivisionError("by nothing"), first_chunk())), scenario)
        assert len(tracebacks()) == 1
        (line,) = log()
        assert "status=500" in line

    def test_an_expectation_that_cannot_be_met(self) -> None:
        answer = Door().post(headers={"expect": "wonders"})
        assert (answer.status_code, error_of(answer)["type"]) == (417, "invalid_request_error")
        assert answer.headers["x-request-id"]
        assert Door().post(headers={"expect": "100-continue"}).status_code == 200


class TestHeaders:
    def test_a_request_keeps_the_id_of_its_caller(self) -> None:
        door = Door()
        assert door.post(headers={"x-request-id": "mine"}).headers["x-request-id"] == "mine"
        (context,) = door.processors.contexts
        assert context.metadata["x-request-id"] == "mine"
        assert context.id() != "mine"  # the runtime tells requests apart by it

    def test_without_one_it_gets_a_new_one(self) -> None:
        door = Door()
        first, second = (door.post().headers["x-request-id"] for _ in range(2))
        assert first != second
        assert [context.metadata["x-request-id"] for context in door.processors.contexts] == [first, second]

    @pytest.mark.parametrize("request_id", ["x" * 129, "caf\xe9", "a\tb", "\x7f"])
    def test_an_id_that_no_log_could_show_is_refused(self, request_id: str) -> None:
        answer = Door().post(headers=[(b"x-request-id", request_id.encode("latin-1"))])
        assert answer.status_code == 400
        assert "x-request-id" in error_of(answer)["message"]
        assert re.fullmatch("[0-9a-f]{32}", answer.headers["x-request-id"])

    def test_the_longest_id(self) -> None:
        assert Door().post(headers={"x-request-id": "x" * 128}).headers["x-request-id"] == "x" * 128

    @pytest.mark.parametrize("path", ["/live", "/v1/models", "/nonsense", "/workers"])
    def test_every_answer_has_one(self, path: str) -> None:
        assert Door().get(path, headers={"x-request-id": "mine"}).headers["x-request-id"] == "mine"

    def test_a_worker_may_have_any_name(self) -> None:
        async def named(request: ChatCompletionRequest, context: Context) -> AsyncGenerator[ChatCompletionChunk]:
            yield chunk("one", "stop", Routing(worker_id="a:1/模", overlap_blocks=0))

        assert Door(named).post().headers["x-worker-id"] == "a:1/%E6%A8%A1"

    def test_of_two_headers_one_is_checked_and_used(self) -> None:
        answer = Door().post(headers=[("x-priority", "5"), ("x-priority", "junk")])
        assert answer.status_code == 400

    def test_session_and_priority_go_along(self) -> None:
        door = Door()
        door.post(headers={"x-session-id": "s", "x-priority": "-3", "x-other": "o"})
        metadata = dict(door.processors.contexts[0].metadata)
        assert metadata.keys() == {"x-request-id", "x-session-id", "x-priority"}
        assert (metadata["x-session-id"], metadata["x-priority"]) == ("s", "-3")

    @pytest.mark.parametrize("priority", ["abc", "1.5", "99999999999", ""])
    def test_a_priority_is_an_integer(self, priority: str) -> None:
        answer = Door().post(headers={"x-priority": priority})
        assert answer.status_code == 400
        error = error_of(answer)
        assert error["param"] == "x-priority"
        assert "x-priority" in error["message"]


class TestCors:
    def test_it_is_off_by_default(self) -> None:
        door = Door()
        assert "access-control-allow-origin" not in door.post(headers={"origin": "http://page"}).headers
        assert door.request("OPTIONS", CHAT, headers=PREFLIGHT).status_code == 405

    @pytest.mark.parametrize("origin", ["http://page", "*"])
    def test_a_preflight_is_answered(self, origin: str) -> None:
        answer = Door(cors_origins=[origin]).request("OPTIONS", CHAT, headers=PREFLIGHT)
        assert answer.status_code == 200
        assert answer.headers["access-control-allow-origin"] == origin
        assert "POST" in answer.headers["access-control-allow-methods"]
        assert "x-session-id" in answer.headers["access-control-allow-headers"]

    def test_that_of_another_page_is_not(self) -> None:
        answer = Door(cors_origins=["http://other"]).request("OPTIONS", CHAT, headers=PREFLIGHT)
        assert answer.status_code == 400
        assert "access-control-allow-origin" not in answer.headers

    @pytest.mark.parametrize("body", [HELLO, STREAM, {**HELLO, "model": "x"}, []])
    def test_a_page_may_read_every_answer_and_its_headers(self, body: Any) -> None:
        headers = Door(cors_origins=["http://page"]).post(body, headers={"origin": "http://page"}).headers
        assert headers["access-control-allow-origin"] == "http://page"
        exposed = headers["access-control-expose-headers"]
        assert {name.strip() for name in exposed.split(",")} >= {"x-request-id", "x-worker-id", "x-kv-overlap-blocks"}


class TestLog:
    def test_a_request_has_one_line(self, log: Log) -> None:
        for body in (HELLO, STREAM):
            Door().post(body, headers={"x-request-id": "mine"})
        assert len(log()) == 2
        for line in log():
            assert re.fullmatch(
                r"POST /v1/chat/completions request_id=mine status=200 worker=w1 overlap_blocks=3 prompt_tokens=50 "
                r"cached_tokens=48 completion_tokens=2 finish_reason=stop ttft_ms=\d+\.\d duration_ms=\d+\.\d",
                line,
            )

    @pytest.mark.parametrize(
        ("play", "body", "status"),
        [
            (two_words, b"{", 400),
            (two_words, {**HELLO, "max_token": 1}, 400),
            (two_words, {**HELLO, "model": "x"}, 404),
            (two_words, b" " * (2**25 + 1), 413),
            (raises(Overloaded("full")), HELLO, 429),
            (raises(Unavailable("later")), HELLO, 503),
            (raises(Unavailable("later"), first_chunk()), STREAM, 503),
            (raises(Internal("oh")), HELLO, 500),
        ],
    )
    def test_so_has_one_that_is_refused_or_fails(
        self, play: Play, body: Any, status: int, log: Log, tracebacks: Log
    ) -> None:
        Door(play).post(body, headers={"x-request-id": "mine"})
        (line,) = log()
        assert line.startswith(f"POST /v1/chat/completions request_id=mine status={status} ")
        assert re.search(r' error=".+"$', line)
        assert tracebacks() == []

    @pytest.mark.parametrize("headers", [{"x-request-id": "x" * 129}, {"expect": "wonders"}, {"x-priority": "abc"}])
    def test_or_whose_headers_are_refused(self, headers: dict[str, str], log: Log) -> None:
        answer = Door().post(headers=headers)
        (line,) = log()
        assert f"status={answer.status_code}" in line

    @pytest.mark.parametrize("path", ["/v1/models", "/v1/models/m", "/live", "/health", "/docs", "/openapi.json"])
    def test_what_is_only_looked_at_has_none(self, path: str, log: Log) -> None:
        Door().get(path)
        assert log() == []

    def test_what_a_client_sends_cannot_break_the_line(self, log: Log) -> None:
        Door().post({**HELLO, "model": 'x\n"status=200"'})
        (line,) = log()
        assert "\n" not in line


async def until_stopped(request: ChatCompletionRequest, context: Context) -> AsyncGenerator[ChatCompletionChunk]:
    await context.async_killed_or_stopped()
    raise Cancelled("the caller went away")
    yield


async def one_until_stopped(request: ChatCompletionRequest, context: Context) -> AsyncGenerator[ChatCompletionChunk]:
    yield first_chunk()
    await context.async_killed_or_stopped()
    raise Cancelled("the caller went away")


async def deaf(request: ChatCompletionRequest, context: Context) -> AsyncGenerator[ChatCompletionChunk]:
    yield first_chunk()
    while not context.is_stopped():
        await asyncio.sleep(0.001)
        yield chunk("more")
    raise Cancelled("the caller went away")


class TestHangUp:
    @pytest.mark.parametrize("body", [HELLO, STREAM])
    @pytest.mark.parametrize("play", [until_stopped, one_until_stopped, deaf])
    def test_it_stops_the_request_and_is_a_499_in_the_log(self, play: Play, body: Any, log: Log) -> None:
        door = Door(play)

        async def scenario(client: Connection) -> None:
            while not door.processors.contexts:
                await asyncio.sleep(0)
            if body is STREAM and play is not until_stopped:
                assert (await client.next())["status"] == 200
                assert (await client.event())["choices"]
            else:
                await asyncio.sleep(0.02)
            assert not door.processors.contexts[0].is_stopped()
            client.hang_up()

        converse(door, scenario, body)
        assert door.processors.contexts[0].is_stopped()
        (line,) = log()
        assert "status=499" in line
        assert "error=" not in line
        assert door.service._in_progress == set()

    def test_in_the_middle_of_the_body_it_is_no_mistake_of_the_body(self, log: Log, tracebacks: Log) -> None:
        parts: list[dict[str, Any]] = [
            {"type": "http.request", "body": b'{"model": ', "more_body": True},
            {"type": "http.disconnect"},
        ]

        async def receive() -> dict[str, Any]:
            return parts.pop(0) if len(parts) > 1 else parts[0]

        async def send(message: Any) -> None:
            pass

        scope = {"type": "http", "http_version": "1.1", "method": "POST", "path": CHAT, "raw_path": CHAT.encode()}
        scope |= {"query_string": b"", "headers": [], "asgi": {"version": "3.0"}}  # type: ignore[dict-item]
        asyncio.run(Door().app(scope, receive, send))
        (line,) = log()
        assert "status=499" in line
        assert tracebacks() == []

    def test_a_client_that_reads_nothing_is_given_up(self, log: Log, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(frontend, "CLIENT_SECONDS", 0.05)
        door = Door(two_words)

        async def run() -> None:
            async with Connection(door, STREAM, room=2) as client:  # for the start and one event
                await client.end()

        asyncio.run(run())
        assert door.processors.contexts[0].is_stopped()
        (line,) = log()
        assert "status=499" in line

    def test_an_answer_that_is_complete_was_not_hung_up_on(self, log: Log) -> None:
        async def scenario(client: Connection) -> None:
            while (await client.next())["type"] != "http.response.start":
                pass
            while await client.event() != "[DONE]":
                pass
            await client.next()
            client.hang_up()

        converse(Door(), scenario)
        (line,) = log()
        assert "status=200" in line

    def test_a_stopping_server_waits_for_requests_that_are_in_progress(self) -> None:
        door = Door(until_stopped)

        async def scenario(client: Connection) -> None:
            while not door.processors.contexts:
                await asyncio.sleep(0)
            (context,) = door.service._in_progress
            door.service.stop()
            context.stop_generating()
            assert (await client.next())["status"] == 503

        converse(door, scenario)


class TestOtherPaths:
    def test_the_models(self) -> None:
        listed = Door().get("/v1/models").json()
        card = {"object": "model", "created": 1, "owned_by": "inference", "context_length": 64}
        assert listed == {"object": "list", "data": [{"id": "m", **card}, {"id": "org/m", **card}]}

    @pytest.mark.parametrize("model", ["m", "org/m"])
    def test_one_model(self, model: str) -> None:
        assert Door().get(f"/v1/models/{model}").json()["id"] == model

    def test_one_that_is_not_here(self) -> None:
        answer = Door().get("/v1/models/x/y")
        assert (answer.status_code, error_of(answer)["code"]) == (404, "model_not_found")

    def test_workers_have_ids_that_a_browser_can_hold(self) -> None:
        big = 2**63 - 1

        async def status(body: Any, context: Context) -> AsyncIterator[Any]:
            worker = WorkerStatus(instance_id=big, worker_id="w", status="joined")
            yield RouterStatus(router=big - 1, policy="kv", workers=[worker]).encode()

        (router,) = Door(routers={big - 1: status}).get("/workers").json()["routers"]
        assert (router["router"], router["workers"][0]["instance_id"]) == (str(big - 1), str(big))

    def test_a_router_that_is_dead_or_hangs_does_not_hide_the_others(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("frontend.ROUTER_SECONDS", 0.05)

        async def alive(body: Any, context: Context) -> AsyncIterator[Any]:
            yield RouterStatus(router=1, policy="kv", workers=[]).encode()

        async def hung(body: Any, context: Context) -> AsyncIterator[Any]:
            await asyncio.Event().wait()
            yield

        async def dead(body: Any, context: Context) -> AsyncIterator[Any]:
            raise Exception("Unavailable: NATS request failed")
            yield

        (router,) = Door(routers={1: alive, 2: hung, 3: dead}).get("/workers").json()["routers"]
        assert router["router"] == "1"
        answer = Door(routers={2: hung, 3: dead}).get("/workers")
        assert (answer.status_code, error_of(answer)["code"]) == (503, "no_router")

    def test_without_a_router(self) -> None:
        answer = Door().get("/workers")
        assert (answer.status_code, error_of(answer)["code"]) == (503, "no_router")
        assert answer.headers["retry-after"] == "1"

    def test_without_a_processor(self) -> None:
        answer = Door(raises(Unavailable("no processor is running", code="no_processor"))).post()
        assert (answer.status_code, error_of(answer)["code"]) == (503, "no_processor")

    def test_health_is_that_of_every_stage(self) -> None:
        async def nothing(body: Any, context: Context) -> AsyncIterator[Any]:
            yield

        healthy = Door(stages={"processor": {1: nothing}, "router": {1: nothing, 2: nothing}})
        answer = healthy.get("/health")
        assert answer.status_code == 200
        assert answer.json() == {"status": "healthy", "instances": {"processor": 1, "router": 2}}
        answer = Door(stages={"processor": {1: nothing}, "router": {}}).get("/health")
        assert answer.status_code == 503
        assert answer.json() == {"status": "unhealthy", "instances": {"processor": 1, "router": 0}}
        healthy.service.stop()
        assert healthy.get("/health").status_code == 503
        assert healthy.get("/live").json() == {"status": "live"}

    def test_a_stage_in_between_gets_the_requests_for_models_that_there_are(self) -> None:
        stage = ScriptedProcessors(two_words)
        door = Door(stage=stage)
        assert door.post().status_code == 200
        assert door.post({**HELLO, "model": "x"}).status_code == 404
        assert (len(stage.requests), len(door.processors.requests)) == (1, 0)


class TestDocumentation:
    def test_the_pages_answer(self) -> None:
        assert "/openapi.json" in Door().get("/docs").text
        assert Door().get("/openapi.json").json()["info"]["title"]

    def test_the_request_is_described(self) -> None:
        description = Door().get("/openapi.json").json()
        post = description["paths"][CHAT]["post"]
        reference = post["requestBody"]["content"]["application/json"]["schema"]["$ref"]
        schema = description["components"]["schemas"][reference.rpartition("/")[2]]
        (example,) = schema["examples"]
        ChatCompletionRequest.decode(example)
        assert schema["required"] == ["model", "messages"]
        assert schema["properties"]["messages"]["description"]
        assert {parameter["name"] for parameter in post["parameters"]} == {"x-request-id", "x-session-id", "x-priority"}
        assert all(parameter["description"] for parameter in post["parameters"])

    def test_so_are_the_answers(self) -> None:
        description = Door().get("/openapi.json").json()
        responses = description["paths"][CHAT]["post"]["responses"]
        assert responses.keys() >= {"200", "400", "404", "413", "429", "500", "503"}
        for status, response in responses.items():
            reference = response["content"]["application/json"]["schema"]["$ref"]
            assert reference.rpartition("/")[2] == ("ChatCompletion" if status == "200" else "ErrorBody")
            assert response["description"]

    def test_no_answer_is_described_that_nobody_gets(self) -> None:
        """FastAPI would refuse with 422 what is wrong."""
        paths = Door().get("/openapi.json").json()["paths"]
        described = {path: method["responses"] for path, methods in paths.items() for method in methods.values()}
        assert [path for path, responses in described.items() if "422" in responses] == []

    def test_every_real_error_has_the_form_that_is_described(self) -> None:
        described = Door().get("/openapi.json").json()["components"]["schemas"]["ErrorDetail"]["properties"]
        for error, _, _ in EVERY_ERROR:
            assert error.body["error"].keys() == described.keys()
