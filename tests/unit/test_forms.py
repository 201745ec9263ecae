"""What clients get of the chunks that a processor makes."""

import json
from collections.abc import Sequence
from typing import Any

from common.http.forms import ChatForm, Form, TextForm
from common.openai_api import (
    ChatCompletionChunk,
    ChunkChoice,
    Delta,
    FunctionDelta,
    Logprobs,
    TokenLogprob,
    ToolCallDelta,
    TopLogprob,
)

import msgspec
import pytest

USAGE = {"prompt_tokens": 2, "completion_tokens": 3, "total_tokens": 5}


def chunk(
    delta: Delta, finish_reason: str | None = None, *, index: int = 0, logprobs: Logprobs | None = None
) -> ChatCompletionChunk:
    return chunk_of(ChunkChoice(index=index, delta=delta, finish_reason=finish_reason, logprobs=logprobs))


def chunk_of(*choices: ChunkChoice) -> ChatCompletionChunk:
    return ChatCompletionChunk(id="x", created=1, model="m", system_fingerprint="fp", choices=[*choices])


def text(content: str, finish_reason: str | None = None, index: int = 0, *tokens: str) -> ChatCompletionChunk:
    """tokens: whose logprobs go with it."""
    return chunk(Delta(content=content), finish_reason, index=index, logprobs=logprobs(*tokens) if tokens else None)


def usage_chunk() -> ChatCompletionChunk:
    made = chunk_of()
    made.usage = USAGE
    return made


def logprobs(*tokens: str) -> Logprobs:
    return Logprobs(
        content=[
            TokenLogprob(
                token=token,
                logprob=-0.5,
                bytes=list(token.encode()),
                top_logprobs=[TopLogprob(token=token, logprob=-0.5, bytes=list(token.encode()))],
            )
            for token in tokens
        ]
    )


def call(index: int, arguments: str, name: str | None = None) -> ToolCallDelta:
    function = FunctionDelta(name=name, arguments=arguments)
    if name:
        return ToolCallDelta(index=index, id=f"call_{index}", type="function", function=function)
    return ToolCallDelta(index=index, function=function)


def sent(body: object) -> Any:
    """A body as clients read it."""
    return json.loads(msgspec.json.encode(body))


def events(form: Form, *chunks: ChatCompletionChunk) -> list[Any]:
    return [sent(event) for made in chunks for event in form.events(made)]


def choices(*chunks: ChatCompletionChunk) -> list[Any]:
    """Those of the events of a chat, one each."""
    made = events(ChatForm(), *chunks)
    assert {len(event["choices"]) for event in made} == {1}
    return [event["choices"][0] for event in made]


def whole(form: Form, chunks: Sequence[ChatCompletionChunk]) -> Any:
    return sent(form.whole(chunks))


class TestEventsOfAChat:
    def test_the_role_comes_first_and_the_reason_last(self) -> None:
        assert choices(chunk(Delta(role="assistant", content="a"), "stop")) == [
            {"index": 0, "delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None},
            {"index": 0, "delta": {"content": "a"}, "logprobs": None, "finish_reason": None},
            {"index": 0, "delta": {}, "logprobs": None, "finish_reason": "stop"},
        ]

    def test_what_says_nothing_else_is_no_event(self) -> None:
        made = choices(chunk(Delta(role="assistant", content="")), chunk(Delta(content="")), text("", "length"))
        assert [(choice["delta"], choice["finish_reason"]) for choice in made] == [
            ({"role": "assistant", "content": ""}, None),
            ({}, "length"),
        ]

    def test_each_has_the_names_of_the_answer(self) -> None:
        for event in events(ChatForm(), chunk(Delta(role="assistant", content="a"), "stop")):
            assert event | {"choices": []} == {
                "id": "x",
                "object": "chat.completion.chunk",
                "created": 1,
                "model": "m",
                "system_fingerprint": "fp",
                "choices": [],
            }

    def test_thoughts_and_text_can_come_together(self) -> None:
        first, second = choices(chunk(Delta(role="assistant", content="b", reasoning_content="a")))
        assert first["delta"] == {"role": "assistant", "content": ""}
        assert second["delta"] == {"content": "b", "reasoning_content": "a"}

    def test_tool_calls(self) -> None:
        begun = chunk(Delta(role="assistant", tool_calls=[call(0, "", "f")]))
        role, name, arguments, end = choices(begun, chunk(Delta(tool_calls=[call(0, "{}")]), "tool_calls"))
        assert role["delta"] == {"role": "assistant", "content": ""}
        assert name["delta"]["tool_calls"] == [
            {"index": 0, "id": "call_0", "type": "function", "function": {"name": "f", "arguments": ""}}
        ]
        assert arguments["delta"] == {"tool_calls": [{"index": 0, "function": {"arguments": "{}"}}]}
        assert (end["delta"], end["finish_reason"]) == ({}, "tool_calls")

    def test_a_call_in_its_old_form(self) -> None:
        called = chunk(Delta(function_call=FunctionDelta(name="f", arguments="{}")), "function_call")
        event, end = choices(called)
        assert event["delta"] == {"function_call": {"name": "f", "arguments": "{}"}}
        assert (end["delta"], end["finish_reason"]) == ({}, "function_call")

    def test_logprobs_go_with_the_text_and_are_sent_without_one_too(self) -> None:
        first = chunk(Delta(role="assistant", content="a"), logprobs=logprobs("a"))
        role, event, late, end = choices(first, text("", "stop", 0, "b"))
        assert role["logprobs"] is None
        assert event["logprobs"] == {
            "content": [
                {
                    "token": "a",
                    "logprob": -0.5,
                    "bytes": [97],
                    "top_logprobs": [{"token": "a", "logprob": -0.5, "bytes": [97]}],
                }
            ],
            "refusal": None,
        }
        assert [entry["token"] for entry in late["logprobs"]["content"]] == ["b"]
        assert (end["logprobs"], end["finish_reason"]) == (None, "stop")

    def test_several_answers_come_as_they_come(self) -> None:
        begun = [chunk(Delta(role="assistant", content=""), index=index) for index in (0, 1)]
        made = choices(*begun, text("a"), text("b", "stop", 1), text("c", "length"))
        assert [(choice["index"], choice["delta"].get("content"), choice["finish_reason"]) for choice in made] == [
            (0, "", None),
            (1, "", None),
            (0, "a", None),
            (1, "b", None),
            (1, None, "stop"),
            (0, "c", None),
            (0, None, "length"),
        ]

    def test_answers_in_one_chunk_have_events_of_their_own(self) -> None:
        both = chunk_of(ChunkChoice(delta=Delta(content="a")), ChunkChoice(index=1, delta=Delta(content="b")))
        assert [(choice["index"], choice["delta"]["content"]) for choice in choices(both)] == [(0, "a"), (1, "b")]

    def test_the_usage_goes_on_as_it_is(self) -> None:
        (event,) = events(ChatForm(), usage_chunk())
        assert (event["choices"], event["usage"]) == ([], USAGE)

    def test_if_it_is_wanted_all_others_say_null(self) -> None:
        first = chunk(Delta(role="assistant", content="a"), "stop")
        first.usage = None
        assert [event["usage"] for event in events(ChatForm(), first)] == [None] * 3


class TestWholeChat:
    def test_it_is_put_together(self) -> None:
        first = chunk(Delta(role="assistant", content="a"))
        assert whole(ChatForm(), [first, text("b"), text("", "stop"), usage_chunk()]) == {
            "id": "x",
            "object": "chat.completion",
            "created": 1,
            "model": "m",
            "system_fingerprint": "fp",
            "choices": [
                {
                    "index": 0,
                    "message": {"role": "assistant", "content": "ab", "refusal": None},
                    "logprobs": None,
                    "finish_reason": "stop",
                }
            ],
            "usage": USAGE,
        }

    @staticmethod
    def choice(*chunks: ChatCompletionChunk) -> Any:
        (made,) = whole(ChatForm(), chunks)["choices"]
        return made

    def test_it_need_not_say_anything(self) -> None:
        assert self.choice(chunk(Delta(role="assistant", content=""), "stop"))["message"]["content"] == ""

    def test_thoughts_are_apart(self) -> None:
        message = self.choice(
            chunk(Delta(role="assistant", reasoning_content="a")),
            chunk(Delta(reasoning_content="b", content="c")),
            text("d", "stop"),
        )["message"]
        assert (message["reasoning_content"], message["content"]) == ("ab", "cd")

    def test_each_tool_call_is_put_together(self) -> None:
        choice = self.choice(
            chunk(Delta(role="assistant", tool_calls=[call(0, "", "f")])),
            chunk(Delta(tool_calls=[call(0, '{"a": ')])),
            chunk(Delta(tool_calls=[call(0, "1}"), call(1, "", "g")])),
            chunk(Delta(tool_calls=[call(1, "{}")]), "tool_calls"),
        )
        assert choice["message"]["tool_calls"] == [
            {"id": "call_0", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}},
            {"id": "call_1", "type": "function", "function": {"name": "g", "arguments": "{}"}},
        ]
        assert (choice["message"]["content"], choice["finish_reason"]) == (None, "tool_calls")

    def test_text_before_a_tool_call_stays(self) -> None:
        message = self.choice(text("Well"), chunk(Delta(tool_calls=[call(0, "{}", "f")]), "tool_calls"))["message"]
        assert (message["content"], len(message["tool_calls"])) == ("Well", 1)

    def test_a_call_in_its_old_form(self) -> None:
        message = self.choice(
            chunk(Delta(role="assistant", function_call=FunctionDelta(name="f", arguments='{"a"'))),
            chunk(Delta(function_call=FunctionDelta(arguments=": 1}")), "function_call"),
        )["message"]
        assert message["function_call"] == {"name": "f", "arguments": '{"a": 1}'}
        assert message["content"] is None
        assert "tool_calls" not in message

    def test_logprobs_are_all_there(self) -> None:
        choice = self.choice(text("a", None, 0, "a"), text("bc", None, 0, "b", "c"), text("", "stop"))
        assert [entry["token"] for entry in choice["logprobs"]["content"]] == ["a", "b", "c"]

    def test_several_answers_are_in_their_order(self) -> None:
        chunks = [text("b", index=1), text("a"), text("d", "length", 1), text("c", "stop"), usage_chunk()]
        made = whole(ChatForm(), chunks)["choices"]
        assert [(choice["index"], choice["message"]["content"], choice["finish_reason"]) for choice in made] == [
            (0, "ac", "stop"),
            (1, "bd", "length"),
        ]

    def test_a_usage_that_nobody_said_is_null(self) -> None:
        assert whole(ChatForm(), [text("a", "stop")])["usage"] is None


class TestText:
    def test_each_chunk_is_an_event(self) -> None:
        common = {"id": "x", "object": "text_completion", "created": 1, "model": "m", "system_fingerprint": "fp"}
        assert events(TextForm(), chunk(Delta(role="assistant", content="a")), text("b", "stop")) == [
            {**common, "choices": [{"index": 0, "text": "a", "logprobs": None, "finish_reason": None}]},
            {**common, "choices": [{"index": 0, "text": "b", "logprobs": None, "finish_reason": "stop"}]},
        ]

    def test_it_is_put_together(self) -> None:
        assert whole(TextForm(), [text("a"), text("b", "stop"), usage_chunk()]) == {
            "id": "x",
            "object": "text_completion",
            "created": 1,
            "model": "m",
            "system_fingerprint": "fp",
            "choices": [{"index": 0, "text": "ab", "logprobs": None, "finish_reason": "stop"}],
            "usage": USAGE,
        }

    def test_several_answers_are_in_their_order(self) -> None:
        made = whole(TextForm(), [text("b", "stop", 1), text("a", "length"), usage_chunk()])["choices"]
        assert [(choice["index"], choice["text"], choice["finish_reason"]) for choice in made] == [
            (0, "a", "length"),
            (1, "b", "stop"),
        ]

    def test_the_usage_is_an_event(self) -> None:
        (event,) = events(TextForm(), usage_chunk())
        assert (event["choices"], event["usage"]) == ([], USAGE)

    CHUNKS: Sequence[ChatCompletionChunk] = (
        text("ab", None, 0, "ab"),
        text("x", None, 1, "x"),
        text("cde", None, 0, "c", "de"),
        text("f", "stop", 0, "f"),
        text("yz", "stop", 1, "y", "z"),
    )

    def test_logprobs_say_where_their_tokens_begin(self) -> None:
        first, second = whole(TextForm(), self.CHUNKS)["choices"]
        assert first["logprobs"] == {
            "tokens": ["ab", "c", "de", "f"],
            "token_logprobs": [-0.5] * 4,
            "top_logprobs": [{token: -0.5} for token in ("ab", "c", "de", "f")],
            "text_offset": [0, 2, 3, 5],
        }
        assert second["logprobs"]["text_offset"] == [0, 1, 2]

    @pytest.mark.parametrize(("index", "offsets"), [(0, [[0], [2, 3], [5]]), (1, [[0], [1, 2]])])
    def test_in_events_too(self, index: int, offsets: list[list[int]]) -> None:
        made = [choice for event in events(TextForm(), *self.CHUNKS) for choice in event["choices"]]
        assert [choice["logprobs"]["text_offset"] for choice in made if choice["index"] == index] == offsets
