"""The door: what HTTP clients get, and what the log says of it."""

import asyncio
import json
import logging
import re
import weakref
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from typing import Any

from common.engines.ports import free_ports
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
from common.http.exchange import Exchange
from common.http.server import listening
from common.messages import RouterStatus, WorkerStatus
from common.openai_api import ChatCompletionChunk, Routing
from common.openai_request import ChatCompletionRequest
from common.service import Service
from tests.unit.door import (
    CHAT,
    COMPLETIONS,
    HELLO,
    ONCE,
    Connection,
    Door,
    Play,
    ScriptedProcessors,
    chunk,
    first_chunk,
    raises,
    two_words,
    usage_chunk,
)
from tests.unit.stand_ins import without_garbage_collection

import httpx
import pytest
from dynamo.runtime import Context
from starlette.types import Message, Receive, Scope, Send

STREAM = {**HELLO, "stream": True}
EVERY_ERROR = [
    (InvalidRequest("no", param="x", code="c"), 400, None),
    (NotFound("gone"), 404, None),
    (Overloaded("full", retry_seconds=7), 503, "7"),
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
    assert answer.text.endswith("\n\n")
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


async def two_answers(request: ChatCompletionRequest, context: Context) -> AsyncGenerator[ChatCompletionChunk]:
    yield first_chunk()
    yield chunk("uno", routing=Routing(worker_id="w1", overlap_blocks=3), index=1)
    yield chunk(" two", "stop")
    yield chunk(" dos", "length", index=1)
    yield usage_chunk()


async def nothing(request: ChatCompletionRequest, context: Context) -> AsyncGenerator[ChatCompletionChunk]:
    return
    yield


def two_apart(go_on: asyncio.Event) -> Play:
    """The second word waits."""

    async def play(request: ChatCompletionRequest, context: Context) -> AsyncGenerator[ChatCompletionChunk]:
        yield first_chunk()
        await go_on.wait()
        yield chunk("two", "stop")

    return play


def waits(go_on: asyncio.Event, play: Play) -> Play:
    """The play, once it may go on."""

    async def late(request: ChatCompletionRequest, context: Context) -> AsyncGenerator[ChatCompletionChunk]:
        await go_on.wait()
        async for made in play(request, context):
            yield made

    return late


class TestAnswer:
    def test_one_body(self) -> None:
        answer = Door().post()
        assert answer.status_code == 200
        assert answer.json() == {
            "id": "chatcmpl-1",
            "object": "chat.completion",
            "created": 1,
            "model": "m",
            "system_fingerprint": None,
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
        """The role comes first, and the reason of the end last, each in an event of its own."""
        answer = Door().post(STREAM)
        common = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1, "model": "m"}
        deltas = [
            ({"role": "assistant", "content": ""}, None),
            ({"content": "one"}, None),
            ({"content": " two"}, None),
            ({}, "stop"),
        ]
        chunks = [
            {
                **common,
                "system_fingerprint": None,
                "choices": [{"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason}],
            }
            for delta, reason in deltas
        ]
        assert events(answer) == [*chunks, "[DONE]"]
        assert (answer.headers["cache-control"], answer.headers["x-accel-buffering"]) == ("no-cache", "no")
        assert "content-length" not in answer.headers

    def test_the_usage_is_an_event_if_asked_for(self) -> None:
        for include in (False, None):
            answer = Door().post({**STREAM, "stream_options": {"include_usage": include}})
            assert [event for event in events(answer)[:-1] if "usage" in event or not event["choices"]] == []

    @pytest.mark.parametrize(("path", "body"), [(CHAT, STREAM), (COMPLETIONS, {**ONCE, "stream": True})])
    def test_then_all_events_have_one_but_only_the_last_says_something(self, path: str, body: Any) -> None:
        answer = Door().post({**body, "stream_options": {"include_usage": True}}, path)
        *before, last, done = events(answer)
        assert {event["usage"] for event in before} == {None}
        assert all(event["choices"] for event in before)
        assert (last["choices"], last["usage"]["total_tokens"], done) == ([], 52, "[DONE]")

    def test_several_answers(self) -> None:
        answer = Door(two_answers).post()
        said = [(choice["message"]["content"], choice["finish_reason"]) for choice in answer.json()["choices"]]
        assert said == [("one two", "stop"), ("uno dos", "length")]
        assert [choice["index"] for choice in answer.json()["choices"]] == [0, 1]

    def test_of_several_answers_each_event_says_to_which_it_belongs(self) -> None:
        choices = [event["choices"][0] for event in events(Door(two_answers).post(STREAM))[:-1]]
        for index, words in enumerate((["", "one", " two", None], ["", "uno", " dos", None])):
            own = [choice for choice in choices if choice["index"] == index]
            assert [choice["delta"].get("content") for choice in own] == words
            assert [choice["finish_reason"] is None for choice in own] == [True, True, True, False]

    def test_who_answers_is_said_in_the_headers_alone(self) -> None:
        assert "routing" not in Door(two_answers).post(STREAM).text

    @pytest.mark.parametrize("stream", [True, False])
    def test_an_answer_that_does_not_come_is_missed(self, stream: bool) -> None:
        assert "without a finish_reason" in Door(two_words).post({**HELLO, "n": 2, "stream": stream}).text

    def test_each_chunk_is_written_as_it_comes(self) -> None:
        go_on = asyncio.Event()

        async def scenario(client: Connection) -> None:
            assert (await client.next())["status"] == 200
            assert await client.content() == "one"
            go_on.set()
            assert await client.content() == "two"
            assert (await client.event())["choices"][0]["finish_reason"] == "stop"
            assert await client.event() == "[DONE]"
            assert await client.next() == {"type": "http.response.body", "body": b"", "more_body": False}

        converse(Door(two_apart(go_on)), scenario)

    def test_no_layer_of_the_application_sees_the_events(self) -> None:
        """Each would cost time for every token."""
        seen = list[str]()
        door = Door()
        inner: Any = door.app._app

        async def spy(scope: Scope, receive: Receive, send: Send) -> None:
            async def spying(message: Message) -> None:
                seen.append(message["type"])
                await send(message)

            await inner(scope, receive, spying)

        door.app._app = spy
        assert events(door.post(STREAM))[-1] == "[DONE]"
        assert seen == ["http.response.start"]

    @pytest.mark.parametrize("body", [HELLO, STREAM])
    def test_who_answered(self, body: Any) -> None:
        headers = Door().post(body).headers
        assert (headers["x-worker-id"], headers["x-kv-overlap-blocks"]) == ("w1", "3")

    @pytest.mark.parametrize("body", [HELLO, STREAM])
    def test_an_answer_of_nothing_is_a_fault(self, body: Any) -> None:
        answer = Door(nothing).post(body)
        assert (answer.status_code, error_of(answer)["message"]) == (500, "the processor answered nothing")


class TestCompletions:
    """POST /v1/completions."""

    def test_one_body(self) -> None:
        answer = Door().post(ONCE, COMPLETIONS)
        assert answer.status_code == 200
        body = answer.json()
        assert body["usage"]["total_tokens"] == 52
        assert {name: body[name] for name in body if name != "usage"} == {
            "id": "chatcmpl-1",
            "object": "text_completion",
            "created": 1,
            "model": "m",
            "system_fingerprint": None,
            "choices": [{"index": 0, "text": "one two", "logprobs": None, "finish_reason": "stop"}],
        }
        assert answer.headers["x-worker-id"] == "w1"

    def test_events(self) -> None:
        answer = Door().post({**ONCE, "stream": True}, COMPLETIONS)
        common = {"id": "chatcmpl-1", "object": "text_completion", "created": 1, "model": "m"}
        chunks = [
            {
                **common,
                "system_fingerprint": None,
                "choices": [{"index": 0, "text": text, "logprobs": None, "finish_reason": reason}],
            }
            for text, reason in (("one", None), (" two", "stop"))
        ]
        assert events(answer) == [*chunks, "[DONE]"]

    def test_a_field_that_is_wrong_is_named(self) -> None:
        answer = Door().post({**ONCE, "suffix": "x"}, COMPLETIONS)
        assert (answer.status_code, error_of(answer)["param"]) == (400, "suffix")

    def test_a_stage_in_between_is_for_chats_only(self) -> None:
        door = Door(stage=ScriptedProcessors(raises(Internal("no chat"))))
        assert door.post(ONCE, COMPLETIONS).status_code == 200


class TestIgnoredFields:
    """What nobody here knows is ignored, and that is said."""

    @pytest.mark.parametrize("stream", [True, False])
    @pytest.mark.parametrize(("path", "body"), [(CHAT, HELLO), (COMPLETIONS, ONCE)])
    def test_in_a_header(self, path: str, body: Any, stream: bool) -> None:
        answer = Door().post({**body, "stream": stream, "max_token": 5, "colour": "red"}, path)
        assert (answer.status_code, answer.headers["x-ignored-fields"]) == (200, "max_token,colour")

    def test_whatever_their_names_are(self) -> None:
        answer = Door().post({**STREAM, "caf\xe9\n": 1, "stream_options": {"xyz": 1}})
        assert answer.headers["x-ignored-fields"] == "caf%C3%A9%0A,stream_options.xyz"

    def test_as_many_as_a_header_holds(self) -> None:
        answer = Door().post({**HELLO, **{f"{number:0100}": 1 for number in range(5000)}})
        assert len(answer.headers["x-ignored-fields"]) < 1000

    def test_if_there_are_any(self) -> None:
        assert "x-ignored-fields" not in Door().post({**HELLO, "max_token": None}).headers

    def test_and_once_in_the_log(self, caplog: pytest.LogCaptureFixture) -> None:
        caplog.set_level(logging.INFO)
        door = Door()
        for fields in ({"max_token": 5}, {"max_token": 6}, {"max_token": 7, "colour": 1}):
            door.post({**HELLO, **fields})
        lines = [record.message for record in caplog.records if record.name == "frontend"]
        assert [re.findall("'.*'", line) for line in lines] == [["'max_token'"], ["'colour'"]]

    def test_a_page_may_read_it(self) -> None:
        headers = Door(cors_origins=["*"]).post(headers={"origin": "http://page"}).headers
        assert "x-ignored-fields" in headers["access-control-expose-headers"]

    @pytest.mark.parametrize(("path", "body"), [(CHAT, HELLO), (COMPLETIONS, ONCE)])
    @pytest.mark.parametrize(
        ("fields", "param"),
        [
            ({"max_token": 5}, "max_token"),
            ({"a[b]": 5}, "a[b]"),
            ({"str": 5}, "str"),
            ({"stream": True, "stream_options": {"xyz": 1}}, "stream_options.xyz"),
        ],
    )
    def test_or_it_is_refused(self, path: str, body: Any, fields: dict[str, Any], param: str) -> None:
        door = Door(strict_fields=True)
        answer = door.post({**body, **fields}, path)
        assert (answer.status_code, error_of(answer)["message"]) == (400, f"unknown field {param!r}")
        assert error_of(answer)["param"] == param
        assert door.processors.requests == []

    def test_but_not_what_a_template_may_know(self) -> None:
        messages = [{"role": "user", "content": "x", "mood": "bad"}]
        assert Door(strict_fields=True).post({**HELLO, "messages": messages, "colour": None}).status_code == 200


class TestKeepalive:
    """A client that waits hears that it does not wait in vain."""

    def test_comments_come_and_then_the_answer(self) -> None:
        go_on = asyncio.Event()

        async def scenario(client: Connection) -> None:
            start = await client.next()
            headers = dict(start["headers"])
            assert start["status"] == 200
            assert headers.keys() >= {b"x-request-id", b"x-ignored-fields"}
            assert not headers.keys() & {b"x-worker-id", b"x-kv-overlap-blocks"}  # nobody knows them yet
            for _ in range(2):
                assert (await client.event()).startswith(":")
            go_on.set()
            while isinstance(event := await client.event(), str):
                assert event.startswith(":")
            assert event["choices"][0]["delta"]["role"] == "assistant"
            assert "routing" not in event
            assert await client.content() == "one"
            assert await client.content() == " two"

        converse(Door(waits(go_on, two_words), keepalive_seconds=0.01), scenario, {**STREAM, "colour": 1})

    def test_what_comes_just_as_it_begins_is_noted_all_the_same(self, log: Log) -> None:
        go_on = asyncio.Event()
        door = Door(waits(go_on, two_words), keepalive_seconds=0.01)
        app = door.app

        async def meanwhile(scope: Scope, receive: Receive, send: Send) -> None:
            async def sends(message: Message) -> None:
                go_on.set()
                await asyncio.sleep(0.01)
                await send(message)

            await app(scope, receive, sends)

        door.app = meanwhile
        assert "routing" not in door.post(STREAM).text
        assert " worker=w1 " in log()[0]

    def test_between_events_too(self) -> None:
        go_on = asyncio.Event()

        async def scenario(client: Connection) -> None:
            assert (await client.next())["status"] == 200
            assert await client.content() == "one"
            assert (await client.event()).startswith(":")
            go_on.set()
            assert await client.content() == "two"

        converse(Door(two_apart(go_on), keepalive_seconds=0.01), scenario)

    def test_an_error_is_an_event_then(self, log: Log) -> None:
        go_on = asyncio.Event()
        error = Unavailable("later", code="no_worker")

        async def scenario(client: Connection) -> None:
            assert (await client.next())["status"] == 200
            assert (await client.event()).startswith(":")
            go_on.set()
            while isinstance(event := await client.event(), str):
                pass
            assert event == error.body

        converse(Door(waits(go_on, raises(error)), keepalive_seconds=0.01), scenario)
        (line,) = log()
        assert "status=503" in line

    def test_so_is_an_answer_of_nothing(self) -> None:
        go_on = asyncio.Event()

        async def scenario(client: Connection) -> None:
            assert (await client.next())["status"] == 200
            go_on.set()
            while isinstance(event := await client.event(), str):
                pass
            assert event["error"]["message"] == "the processor answered nothing"

        converse(Door(waits(go_on, nothing), keepalive_seconds=0.01), scenario)

    def test_it_changes_nothing_for_those_who_need_not_wait(self) -> None:
        door = Door(keepalive_seconds=60)
        assert door.post(STREAM).text == Door().post(STREAM).text
        assert door.post(STREAM).headers["x-worker-id"] == "w1"
        assert Door(raises(Overloaded("full")), keepalive_seconds=60).post(STREAM).status_code == 503

    def test_one_body_has_no_comments(self) -> None:
        async def slow(request: ChatCompletionRequest, context: Context) -> AsyncGenerator[ChatCompletionChunk]:
            await asyncio.sleep(0.05)
            async for made in two_words(request, context):
                yield made

        answer = Door(slow, keepalive_seconds=0.01).post()
        assert answer.json()["choices"][0]["message"]["content"] == "one two"
        assert answer.headers["x-worker-id"] == "w1"

    def test_a_client_that_hangs_up_meanwhile_stops_the_request(self, log: Log) -> None:
        door = Door(until_stopped, keepalive_seconds=0.01)

        async def scenario(client: Connection) -> None:
            assert (await client.next())["status"] == 200
            assert (await client.event()).startswith(":")
            client.hang_up()

        converse(door, scenario)
        assert door.processors.contexts[0].is_stopped()
        (line,) = log()
        assert "status=499" in line


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
        role, first, last = events(answer)
        assert role["choices"][0]["delta"]["role"] == "assistant"
        assert first["choices"][0]["delta"]["content"] == "one"
        assert last == error.body

    def test_of_a_whole_answer_it_is_always_a_status(self) -> None:
        answer = Door(raises(Unavailable("later"), first_chunk())).post()
        assert (answer.status_code, error_of(answer)["message"]) == (503, "later")

    @pytest.mark.parametrize(
        ("fields", "param"), [({"max_tokens": "5"}, "max_tokens"), ({"audio": {}}, "audio"), ({"n": 0}, "n")]
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

    def test_a_server_that_is_being_stopped_answers_whoever_is_connected(self) -> None:
        door = Door()
        door.service.stop()
        assert door.post().status_code == 200

    def test_unless_it_has_lost_the_others(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(Service, "lost", True)
        door = Door()
        answer = door.post()
        assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
        assert "this server is being stopped" in error_of(answer)["message"]
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
            assert await client.content() == "one"
            assert (await client.event())["error"]["message"] == "ZeroDivisionError: by nothing"
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
        assert {name.strip() for name in exposed.split(",")} >= {
            *("x-request-id", "x-worker-id", "x-kv-overlap-blocks", "x-routed-by"),
        }

    @pytest.mark.parametrize("header", [{"x-request-id": "two words"}, {"expect": "wonders"}])
    def test_also_those_to_what_was_refused_at_the_door(self, header: dict[str, str]) -> None:
        answer = Door(cors_origins=["*"]).post(headers={"origin": "http://page", **header})
        assert (answer.status_code >= 400, answer.headers["access-control-allow-origin"]) == (True, "*")

    def test_also_those_to_our_own_faults(self) -> None:
        answer = Door(raises(RuntimeError("x")), cors_origins=["*"]).post(headers={"origin": "http://page"})
        assert (answer.status_code, answer.headers["access-control-allow-origin"]) == (500, "*")


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

    def test_several_answers_have_one_too(self, log: Log) -> None:
        Door(two_answers).post()
        (line,) = log()
        assert " finish_reason=length,stop " in line

    @pytest.mark.parametrize(
        ("play", "body", "status"),
        [
            (two_words, b"{", 400),
            (two_words, {**HELLO, "max_tokens": -1}, 400),
            (two_words, {**HELLO, "model": "x"}, 404),
            (two_words, b" " * (2**25 + 1), 413),
            (raises(Overloaded("full")), HELLO, 503),
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


async def breaks_off(request: ChatCompletionRequest, context: Context) -> AsyncGenerator[ChatCompletionChunk]:
    yield first_chunk()
    raise Internal("oh")


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


class TestTokens:
    """POST /tokenize and POST /detokenize."""

    def test_a_text_can_be_tokenized(self) -> None:
        answer = Door().post({"model": "m", "prompt": "abc"}, "/tokenize")
        assert answer.status_code == 200
        assert answer.json() == {"count": 3, "max_model_len": 64, "tokens": [0, 1, 2], "token_strs": None}

    def test_and_back(self) -> None:
        assert Door().post({"model": "m", "tokens": [1, 2]}, "/detokenize").json() == {"prompt": "1 2"}

    @pytest.mark.parametrize(("path", "body"), [("/tokenize", {"prompt": "x"}), ("/detokenize", {"tokens": [1]})])
    def test_of_several_models_one_must_be_named(self, path: str, body: dict[str, Any]) -> None:
        answer = Door().post(body, path)
        assert (answer.status_code, error_of(answer)["param"]) == (400, "model")
        assert "m, org/m" in error_of(answer)["message"]
        assert Door().post({**body, "model": "x"}, path).status_code == 404

    @pytest.mark.parametrize(
        ("path", "body", "param"),
        [("/tokenize", {"prompt": 5}, "prompt"), ("/detokenize", {"tokens": ["x"]}, "tokens[0]")],
    )
    def test_a_field_that_is_wrong_is_named(self, path: str, body: dict[str, Any], param: str) -> None:
        answer = Door().post({"model": "m", **body}, path)
        assert (answer.status_code, error_of(answer)["param"]) == (400, param)


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
        monkeypatch.setattr("common.http.status.ROUTER_SECONDS", 0.05)

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

    def test_a_stage_in_between_gets_the_requests_for_models_that_there_are(self) -> None:
        stage = ScriptedProcessors(two_words)
        door = Door(stage=stage)
        assert door.post().status_code == 200
        assert door.post({**HELLO, "model": "x"}).status_code == 404
        assert (len(stage.requests), len(door.processors.requests)) == (1, 0)


class Acquaintances:
    """Knows the requests that are still in memory."""

    def __init__(self) -> None:
        self.met: list[weakref.ref[Exchange]] = []

    @property
    def kept(self) -> list[Exchange]:
        return [exchange for known in self.met if (exchange := known())]

    def on_start(self, exchange: Exchange) -> None:
        self.met.append(weakref.ref(exchange))

    def on_first(self, exchange: Exchange) -> None:
        pass

    on_end = on_first


class TestMemory:
    @pytest.mark.parametrize("body", [HELLO, STREAM], ids=["whole", "streamed"])
    @pytest.mark.parametrize(
        "play",
        [two_words, raises(Overloaded("full")), breaks_off, one_until_stopped],
        ids=["answered", "refused", "broken off", "hung up on"],
    )
    def test_a_request_that_is_over_does_not_wait_for_the_garbage_collector(self, play: Play, body: Any) -> None:
        acquaintances = Acquaintances()
        door = Door(play, observers=[acquaintances])

        async def run() -> None:
            (port,) = free_ports(1)
            address, open_until = f"http://127.0.0.1:{port}", door.service.stopped
            async with (
                listening(door.app, "127.0.0.1", port, open_until),
                httpx.AsyncClient(base_url=address) as client,
            ):
                asking = asyncio.create_task(client.post(CHAT, json=body))
                if play is one_until_stopped:
                    while not acquaintances.kept:
                        await asyncio.sleep(0.01)
                    asking.cancel()
                await asyncio.wait([asking])
                deadline = asyncio.get_running_loop().time() + 10
                while acquaintances.kept and asyncio.get_running_loop().time() < deadline:
                    await asyncio.sleep(0.01)

        with without_garbage_collection():
            asyncio.run(run())
            assert len(acquaintances.met) == 1
            assert not acquaintances.kept


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

    @pytest.mark.parametrize(("path", "body"), [(CHAT, "ChatCompletion"), (COMPLETIONS, "TextCompletion")])
    def test_so_are_the_answers(self, path: str, body: str) -> None:
        description = Door().get("/openapi.json").json()
        responses = description["paths"][path]["post"]["responses"]
        assert responses.keys() >= {"200", "400", "404", "413", "500", "503"}
        events_too = responses["200"]["content"].pop("text/event-stream")
        assert events_too["example"].endswith("data: [DONE]\n\n")
        for status, response in responses.items():
            reference = response["content"]["application/json"]["schema"]["$ref"]
            assert reference.rpartition("/")[2] == (body if status == "200" else "ErrorBody")
            assert response["description"]
            assert reference.rpartition("/")[2] in description["components"]["schemas"]

    def test_no_answer_is_described_that_nobody_gets(self) -> None:
        """FastAPI would refuse with 422 what is wrong."""
        paths = Door().get("/openapi.json").json()["paths"]
        described = {path: method["responses"] for path, methods in paths.items() for method in methods.values()}
        assert [path for path, responses in described.items() if "422" in responses] == []

    def test_every_real_error_has_the_form_that_is_described(self) -> None:
        described = Door().get("/openapi.json").json()["components"]["schemas"]["ErrorDetail"]["properties"]
        for error, _, _ in EVERY_ERROR:
            assert error.body["error"].keys() == described.keys()
