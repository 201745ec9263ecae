"""Tool calls, found in what a model writes, wherever its tokens part the text."""

import json
from collections.abc import Iterator, Sequence
from typing import Any

from common.errors import InvalidRequest
from common.openai_request import ChatCompletionRequest, Function
from common.text.tool_calls import ToolCalls, constraint_of, together, tool_calls_of

import pytest

WEATHER = Function(
    name="get_weather",
    parameters={"type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}}},
)
STOP = Function(name="stop", parameters={"type": "object", "properties": {}})

# With everything in it that could be taken for the end of something.
ARGUMENTS = json.dumps({"city": 'Köln ["x"], {a}', "days": 2}, ensure_ascii=False)
PLAIN = json.dumps({"city": "Köln", "days": 2}, ensure_ascii=False)

HERMES = f'<tool_call>\n{{"name": "get_weather", "arguments": {ARGUMENTS}}}\n</tool_call>'
HERMES_STOP = '\n<tool_call>\n{"name": "stop", "arguments": {}}\n</tool_call>'
LLAMA3 = f'{{"name": "get_weather", "parameters": {ARGUMENTS}}}'
MISTRAL = f'[TOOL_CALLS] [{{"name": "get_weather", "arguments": {ARGUMENTS}}}'
CODER = """<tool_call>
<function=get_weather>
<parameter=city>
Köln
</parameter>
<parameter=days>
2
</parameter>
</function>
</tool_call>"""
FORCED = f'[{{"name": "get_weather", "parameters": {ARGUMENTS}}}'

# How the model writes (None: as a grammar makes it), its text, the arguments of the calls in it, and its other text.
CALLS: list[tuple[str | None, str, list[str], str]] = [
    ("hermes", HERMES, [ARGUMENTS], ""),
    ("hermes", "I look." + HERMES + HERMES_STOP, [ARGUMENTS, "{}"], "I look."),
    ("qwen25", HERMES, [ARGUMENTS], ""),
    ("qwen25", "I look." + HERMES + HERMES_STOP, [ARGUMENTS, "{}"], "I look."),
    ("llama3", LLAMA3, [ARGUMENTS], ""),
    ("llama3", "<|python_tag|>" + LLAMA3, [ARGUMENTS], ""),
    ("llama3", "<|python_tag|>" + LLAMA3 + ';{"name": "stop", "parameters": {}}', [ARGUMENTS, "{}"], ""),
    ("mistral", MISTRAL + "]", [ARGUMENTS], ""),
    ("mistral", MISTRAL + ', {"name": "stop", "arguments": {}}]', [ARGUMENTS, "{}"], ""),
    ("pythonic", '[get_weather(city="Köln", days=2)]', [PLAIN], ""),
    ("pythonic", '[get_weather(city="Köln", days=2), stop()]', [PLAIN, "{}"], ""),
    ("qwen3_coder", CODER, [PLAIN], ""),
    (None, FORCED + "]", [ARGUMENTS], ""),
    (None, FORCED + ', {"name": "stop", "parameters": {}}]', [ARGUMENTS, "{}"], ""),
]
NO_CALLS = [
    "",
    "Just text.",
    "a < b and [1, 2] {x} <tool",
    "[1, 2, 3] is a list",
    '{"a": 1}',
    "<tool_call>\nno JSON\n</tool_call>",
    '<tool_call>\n{"name": "nobody", "arguments": {}}\n</tool_call> and more',
    "[TOOL_CALLS] hm",
    "<|python_tag|>print(1)",
]
PARSERS = ["hermes", "qwen25", "llama3", "mistral", "pythonic", "qwen3_coder"]


def parted(text: str) -> Iterator[list[str]]:
    """The text as tokens could part it: at one border each, at every one, and in steps."""
    yield [text]
    for border in range(1, len(text)):
        yield [text[:border], text[border:]]
    for step in (1, 2, 3, 5, 7):
        yield [text[begin : begin + step] for begin in range(0, len(text), step)]


def found(parser: str | None, pieces: Sequence[str], **options: Any) -> tuple[str, list[tuple[str, str]]]:
    """The text, and name and arguments of each call, put together as clients do it."""
    tool_calls = ToolCalls([WEATHER, STOP], parser, **options)
    text, calls, ids = "", dict[int, tuple[str, str]](), set[str]()
    for part, deltas in [*map(tool_calls.add, pieces), tool_calls.add("", last=True)]:
        text += part
        for delta in deltas:
            assert delta.index is not None
            if delta.id:
                assert delta.index == len(calls), "calls come in order"
                assert delta.id not in ids
                ids.add(delta.id)
                calls[delta.index] = (delta.function.name or "", "")
            name, arguments = calls[delta.index]
            calls[delta.index] = (name, arguments + (delta.function.arguments or ""))
    assert tool_calls.found == bool(calls)
    return text, list(calls.values())


@pytest.mark.parametrize(("parser", "written", "arguments", "other"), CALLS)
def test_calls_are_found_wherever_the_text_is_parted(
    parser: str | None, written: str, arguments: list[str], other: str
) -> None:
    expected = (other, list(zip(("get_weather", "stop"), arguments, strict=False)))
    for pieces in parted(written):
        assert found(parser, pieces) == expected, pieces


@pytest.mark.parametrize("parser", PARSERS)
@pytest.mark.parametrize("text", NO_CALLS)
def test_what_only_looks_like_a_call_is_text(parser: str, text: str) -> None:
    for pieces in parted(text):
        assert found(parser, pieces) == (text, []), pieces


@pytest.mark.parametrize(("parser", "written", "arguments", "other"), CALLS)
def test_of_a_half_call_what_is_there_goes_on_once(
    parser: str | None, written: str, arguments: list[str], other: str
) -> None:
    """The answer was cut off: either the call has begun, with the beginning of its arguments, or all is text."""
    for end in range(len(written)):
        text, calls = found(parser, list(written[:end]))
        if not calls:
            assert text == written[:end]
        for (_, sent), whole in zip(calls, arguments, strict=False):
            assert whole.startswith(sent) or isinstance(json.loads(sent), dict), (end, sent)


def test_a_call_with_broken_arguments_is_not_text_too() -> None:
    broken = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "a",}}\n</tool_call> tail'
    for pieces in parted(broken):
        text, calls = found("hermes", pieces)
        assert (text, [name for name, _ in calls]) in [(broken, []), ("", ["get_weather"])], pieces


def test_no_arguments_are_an_empty_object() -> None:
    for pieces in parted('<tool_call>\n{"name": "stop", "arguments": null}\n</tool_call>'):
        assert found("hermes", pieces) == ("", [("stop", "{}")]), pieces


def test_arguments_come_while_they_are_written() -> None:
    tool_calls = ToolCalls([WEATHER], "hermes")
    parts = [delta for character in HERMES for delta in tool_calls.add(character)[1]]
    assert [part.function.name for part in parts if part.id] == ["get_weather"]
    assert len(parts) > 5


@pytest.mark.parametrize("parser", ["hermes", "qwen25"])
def test_one_call_is_all_that_goes_on_where_only_one_is_wanted(parser: str) -> None:
    assert found(parser, [HERMES + HERMES_STOP], parallel=False) == ("", [("get_weather", ARGUMENTS)])


def test_parts_of_a_call_that_go_out_at_once_are_one() -> None:
    tool_calls = ToolCalls([WEATHER, STOP], "hermes")
    parts = [delta for piece in (*HERMES, *HERMES_STOP) for delta in tool_calls.add(piece)[1]]
    first, second = together([*parts, *tool_calls.add("", last=True)[1]])
    assert (first.index, first.function.name, first.function.arguments) == (0, "get_weather", ARGUMENTS)
    assert (second.index, second.function.name, second.function.arguments) == (1, "stop", "{}")


def request(**fields: Any) -> ChatCompletionRequest:
    tools = [{"type": "function", "function": function.model_dump(exclude_none=True)} for function in (WEATHER, STOP)]
    hello = {"model": "m", "messages": [{"role": "user", "content": "hello"}], "tools": tools}
    return ChatCompletionRequest.decode(hello | fields)


def names(constraint: dict[str, Any] | None) -> set[str]:
    assert constraint
    return {name for name in ("get_weather", "stop") if f'"{name}"' in json.dumps(constraint["json"])}


def test_a_call_that_must_be_made_is_json() -> None:
    assert names(constraint_of(request(tool_choice="required"), "hermes")) == {"get_weather", "stop"}


def test_of_a_call_that_must_be_made_by_name_only_the_arguments_are_written() -> None:
    named = request(tool_choice={"type": "function", "function": {"name": "stop"}})
    assert constraint_of(named, None) == {"json": STOP.parameters}
    call = tool_calls_of(named, "hermes")
    assert call
    deltas = [delta for piece in ("{", "}") for delta in call.add(piece)[1]]
    assert [(delta.function.name, delta.function.arguments) for delta in deltas] == [("stop", "{"), (None, "}")]
    assert call.add("", last=True) == ("", [])


def test_without_parallel_calls_there_is_one() -> None:
    constraint = constraint_of(request(tool_choice="required", parallel_tool_calls=False), None)
    assert constraint
    assert constraint["json"]["maxItems"] == 1


def test_a_call_that_may_be_made_is_free_unless_a_tool_is_strict() -> None:
    assert constraint_of(request(), "hermes") is None
    strict = [{"type": "function", "function": {"name": "f", "strict": True, "parameters": {"type": "object"}}}]
    constraint = constraint_of(request(tools=strict), "hermes")
    assert constraint
    assert "<tool_call>" in json.dumps(constraint["structural_tag"])


def test_there_are_calls_only_where_they_can_be() -> None:
    assert tool_calls_of(request(), "hermes")
    assert tool_calls_of(request(tool_choice="required"), None)
    assert not tool_calls_of(request(), None)
    assert not tool_calls_of(request(tool_choice="none"), "hermes")
    assert not tool_calls_of(request(response_format={"type": "json_object"}), "hermes")


def test_tools_that_contradict_each_other_are_refused() -> None:
    def tool(name: str, kind: str) -> dict[str, Any]:
        parameters = {"type": "object", "$defs": {"x": {"type": kind}}, "properties": {"a": {"$ref": "#/$defs/x"}}}
        return {"type": "function", "function": {"name": name, "parameters": parameters}}

    with pytest.raises(InvalidRequest, match="tools: "):
        constraint_of(request(tools=[tool("f", "string"), tool("g", "integer")], tool_choice="required"), None)
