"""What a client may send, and what it is told about what it may not."""

from typing import Any

from common.errors import InvalidRequest
from common.openai_api import ChatCompletionRequest

import pytest

HELLO = {"model": "m", "messages": [{"role": "user", "content": "hello"}]}


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"messages": [{"role": role, "content": "x"} for role in ("system", "developer", "user", "assistant", "tool")]},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]},
        {"messages": [{"role": "assistant", "content": None, "tool_calls": []}, {"role": "tool", "content": "x"}]},
        {"max_tokens": 1, "temperature": 0, "top_p": 1, "top_k": -1, "min_p": 0, "seed": -1},
        {"max_tokens": 5, "max_completion_tokens": 5},
        {"stop": "x"},
        {"stop": ["a", "b", "c", "d"]},
        {"stop": None, "max_tokens": None, "temperature": None},
        {"stream": None, "ignore_eos": None, "stream_options": None},
        {"stream": True, "stream_options": {"include_usage": None}},
        {"messages": [{"role": "tool", "content": "x", "tool_call_id": "1", "name": "f", "more": [1]}]},
        {"presence_penalty": -2, "frequency_penalty": 2, "ignore_eos": True},
        {"stream": True, "stream_options": {"include_usage": True}},
        {"n": 1, "logprobs": False, "tools": [], "response_format": {"type": "text"}, "user": "u", "metadata": {}},
    ],
)
def test_accepted(fields: dict[str, Any]) -> None:
    ChatCompletionRequest.decode({**HELLO, **fields})


@pytest.mark.parametrize(
    ("fields", "param", "says"),
    [
        ({"model": 5}, "model", "valid string"),
        ({"messages": []}, "messages", "at least 1"),
        ({"messages": "x"}, "messages", "valid list"),
        ({"messages": [{"role": "king", "content": "x"}]}, "messages[0].role", "'user'"),
        ({"messages": [{"role": "user"}]}, "messages[0]", "needs content"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content", "valid string"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content[0].text", "required"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            "messages[0].content",
            "image_url is not supported",
        ),
        ({"max_tokens": 0}, "max_tokens", "greater than or equal to 1"),
        ({"max_tokens": "5"}, "max_tokens", "valid integer"),
        ({"max_tokens": True}, "max_tokens", "valid integer"),
        ({"temperature": -0.1}, "temperature", "greater than or equal to 0"),
        ({"temperature": float("nan")}, "temperature", "finite"),
        ({"temperature": 2.1}, "temperature", "less than or equal to 2"),
        ({"top_p": 0}, "top_p", "greater than 0"),
        ({"top_k": -2}, "top_k", "greater than or equal to -1"),
        ({"min_p": 2}, "min_p", "less than or equal to 1"),
        ({"seed": 2**63}, "seed", "less than or equal"),
        ({"presence_penalty": 3}, "presence_penalty", "less than or equal to 2"),
        ({"stop": ["a"] * 5}, "stop", "at most 4"),
        ({"stop": ""}, "stop", "empty"),
        ({"stream": "yes"}, "stream", "valid boolean"),
        ({"stream_options": {"include_usage": True}}, None, "only allowed when stream"),
        ({"max_tokens": 1, "max_completion_tokens": 2}, None, "different things"),
        ({"max_token": 5}, "max_token", "unknown field 'max_token'"),
        ({"a[b]": 5}, "a[b]", "unknown field 'a[b]'"),
        ({"[": 5}, "[", "unknown field '['"),
        ({"str": None}, "str", "unknown field 'str'"),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "x", "str": 1}]}]},
            "messages[0].content[0].str",
            "unknown field",
        ),
        ({"messages": [{"role": "assistant", "tool_calls": 5}]}, "messages[0].tool_calls", "valid list"),
        ({"messages": [{"role": "assistant", "tool_calls": [1]}]}, "messages[0].tool_calls[0]", "valid dict"),
        (
            {"messages": [{"role": "assistant", "tool_calls": [{"name": "f"}]}]},
            "messages[0].tool_calls[0].function",
            "required",
        ),
        ({"messages": [{"role": "tool", "content": "x", "tool_call_id": 5}]}, "messages[0].tool_call_id", "string"),
        ({"model": None}, "model", "required"),
        ({"n": 2}, "n", "not supported"),
        ({"logprobs": True}, "logprobs", "not supported"),
        ({"tools": [{"type": "function"}]}, "tools", "not supported"),
        ({"response_format": {"type": "json_object"}}, "response_format.type", "not supported"),
    ],
)
def test_refused_with_the_field_and_the_reason(fields: dict[str, Any], param: str | None, says: str) -> None:
    with pytest.raises(InvalidRequest) as refusal:
        ChatCompletionRequest.decode({**HELLO, **fields})
    assert refusal.value.param == param
    assert says in refusal.value.message


@pytest.mark.parametrize("body", [[], None, 5, "x"])
def test_body_must_be_an_object(body: Any) -> None:
    with pytest.raises(InvalidRequest, match="must be a JSON object"):
        ChatCompletionRequest.decode(body)


def test_missing_field_has_its_code() -> None:
    with pytest.raises(InvalidRequest) as refusal:
        ChatCompletionRequest.decode({"messages": HELLO["messages"]})
    assert (refusal.value.param, refusal.value.code) == ("model", "missing_required_parameter")


def test_parts_are_joined() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    request = ChatCompletionRequest.decode({**HELLO, "messages": [{"role": "user", "content": parts}]})
    assert request.messages[0].text == "ab"
