"""The form that a client wants is the form that it gets, from SGLang's grammar back-end."""

import json
import re
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

from tests.system.conftest import Pipeline

import jsonschema
import openai
import pydantic
import pytest

TOKENS = 250  # enough for each of the schemas below, unless the tiny model finds no end to a text
STRING, INTEGER = {"type": "string", "maxLength": 6}, {"type": "integer", "minimum": 0, "maximum": 99}


def record(required: bool = True, **properties: Any) -> dict[str, Any]:
    """An object with these properties and no others."""
    needed = {"required": [*properties]} if required else {}
    return {"type": "object", "properties": properties, "additionalProperties": False, **needed}


def array(items: Any, least: int = 0, most: int = 3) -> dict[str, Any]:
    return {"type": "array", "items": items, "minItems": least, "maxItems": most}


NODE = record(value=INTEGER, next={"anyOf": [{"type": "null"}, {"const": 1}]})
TREE = {
    "$defs": {
        "node": record(value=INTEGER, children=array({"$ref": "#/$defs/leaf"}, 0, 2)),
        "leaf": record(leaf=INTEGER),
    },
    "$ref": "#/$defs/node",
}
LIST = {
    "$defs": {"list": record(head=INTEGER, tail={"anyOf": [{"type": "null"}, {"$ref": "#/$defs/list"}]})},
    **record(list={"$ref": "#/$defs/list"}),
}

# From the simplest to what agents send.
SCHEMAS: list[dict[str, Any]] = [
    {"type": "boolean"},
    {"type": "null"},
    {"const": "only this"},
    {"const": 42},
    {"enum": ["red", "green", "blue"]},
    {"enum": [1, "two", None, True]},
    INTEGER,
    {"type": "integer"},
    {"type": "integer", "exclusiveMinimum": 10, "exclusiveMaximum": 13},
    {"type": "integer", "minimum": -5, "maximum": -3},
    {"type": "number", "minimum": 0, "maximum": 1},
    STRING,
    {"type": "string", "minLength": 3, "maxLength": 3},
    {"type": "string", "pattern": "^[A-Z]{2}[0-9]{3}$"},
    {"type": "string", "pattern": "^(north|south)-(east|west)$"},
    {"type": "string", "format": "date"},
    {"type": "string", "format": "time"},
    {"type": "string", "format": "date-time"},
    {"type": "string", "format": "uuid"},
    {"type": "string", "format": "ipv4"},
    {"type": ["integer", "null"], "minimum": 0, "maximum": 9},
    {"anyOf": [INTEGER, {"type": "boolean"}]},
    {"oneOf": [{"const": "a"}, {"const": "b"}]},
    array({"type": "boolean"}),
    array(INTEGER, 2, 2),
    array({"enum": ["x", "y"]}, 1, 4),
    array(array({"type": "boolean"}, 1, 2), 1, 2),
    {"type": "array", "prefixItems": [INTEGER, {"type": "boolean"}], "items": False, "minItems": 2, "maxItems": 2},
    {"type": "array", "maxItems": 0, "items": INTEGER},
    record(),
    record(a=INTEGER),
    record(a=INTEGER, b={"type": "boolean"}),
    record(required=False, a=INTEGER, b={"type": "boolean"}),
    record(name=STRING, age=INTEGER),
    record(colour={"enum": ["red", "green"]}, size={"enum": ["S", "M", "L"]}),
    record(inner=record(deeper=record(deepest={"type": "boolean"}))),
    record(items=array(record(id=INTEGER, ok={"type": "boolean"}), 1, 2)),
    record(value={"anyOf": [INTEGER, {"type": "null"}]}),
    record(kind={"const": "circle"}, radius={"type": "integer", "minimum": 1, "maximum": 9}),
    {"anyOf": [record(kind={"const": "a"}, x=INTEGER), record(kind={"const": "b"}, y={"type": "boolean"})]},
    {"oneOf": [record(circle=INTEGER), record(square=INTEGER)]},
    {"$defs": {"port": INTEGER}, **record(first={"$ref": "#/$defs/port"}, second={"$ref": "#/$defs/port"})},
    {"definitions": {"flag": {"type": "boolean"}}, **record(flag={"$ref": "#/definitions/flag"})},
    NODE,
    TREE,
    LIST,
    record(point={"type": "array", "prefixItems": [INTEGER, INTEGER], "items": False, "minItems": 2, "maxItems": 2}),
    record(tags=array({"type": "string", "pattern": "^[a-z]{1,4}$"}, 1, 2), level={"enum": ["low", "high"]}),
    record(when={"type": "string", "format": "date"}, who={"type": "string", "pattern": "^[A-Z][a-z]{1,5}$"}),
    {
        "type": "object",
        "patternProperties": {"^[a-z]{1,3}$": INTEGER},
        "additionalProperties": False,
        "maxProperties": 2,
    },
    {"allOf": [record(a=INTEGER)]},
    record(
        city={"enum": ["Paris", "Rome"]},
        days=INTEGER,
        units={"anyOf": [{"enum": ["C", "F"]}, {"type": "null"}]},
        options=record(required=False, hourly={"type": "boolean"}, wind={"type": "boolean"}),
    ),
]


@pytest.fixture(scope="module")
def client(pipeline: Pipeline) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"http://127.0.0.1:{pipeline.port}/v1", api_key="any", max_retries=0)


def ask(client: openai.OpenAI, **fields: Any) -> Any:
    messages: Any = [{"role": "user", "content": "What does the router do?"}]
    options: Any = {"max_tokens": TOKENS, "temperature": 0, **fields}
    return client.chat.completions.create(model="pipeline-chat", messages=messages, **options).choices[0]


def json_schema(schema: dict[str, Any], *, strict: bool = True) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "form", "strict": strict, "schema": schema}}


def test_answers_obey_their_schema(client: openai.OpenAI) -> None:
    assert len(SCHEMAS) >= 50
    with ThreadPoolExecutor(16) as threads:
        choices = list(threads.map(lambda schema: ask(client, response_format=json_schema(schema)), SCHEMAS))
    for schema, choice in zip(SCHEMAS, choices, strict=True):
        assert choice.finish_reason == "stop", (schema, choice.message.content)
        jsonschema.validate(json.loads(choice.message.content), schema)


@pytest.mark.parametrize("strict", [True, False])
def test_streamed_or_not_strict_or_not_they_are_the_same(client: openai.OpenAI, strict: bool) -> None:
    form = json_schema(SCHEMAS[-1], strict=strict)
    messages: Any = [{"role": "user", "content": "What does the router do?"}]
    options: Any = {"response_format": form, "temperature": 0, "max_tokens": TOKENS}
    chunks = client.chat.completions.create(model="pipeline-chat", messages=messages, stream=True, **options)
    streamed = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert streamed == ask(client, response_format=form).message.content
    assert not re.search(r"[\n\t]|  ", streamed), "no idle white space"


def test_a_json_object(client: openai.OpenAI) -> None:
    choice = ask(client, response_format={"type": "json_object"}, max_tokens=20)
    assert choice.message.content.startswith("{")


@pytest.mark.parametrize(
    ("form", "pattern"),
    [
        ({"guided_regex": "[0-9]{3}-[a-c]{2}"}, "[0-9]{3}-[a-c]{2}"),
        ({"regex": "(yes|no)!"}, "(yes|no)!"),
        ({"guided_choice": ["a.b", "a+b (c)"]}, r"a\.b|a\+b \(c\)"),
        ({"structured_outputs": {"choice": ["one", "two"]}}, "one|two"),
        ({"guided_grammar": 'root ::= "x" tail\ntail ::= "1" | "2"'}, "x[12]"),
        ({"ebnf": 'root ::= "a" | "b"'}, "[ab]"),
        ({"guided_json": {"enum": [1, 2]}}, "[12]"),
        ({"json_schema": '{"const": "x"}'}, '"x"'),
    ],
)
def test_other_forms(client: openai.OpenAI, form: dict[str, Any], pattern: str) -> None:
    choice = ask(client, extra_body=form)
    assert (choice.finish_reason, bool(re.fullmatch(pattern, choice.message.content))) == ("stop", True)


@pytest.mark.parametrize(
    ("form", "says"),
    [
        ({"guided_json": {"type": "strin"}}, "'strin'"),
        ({"guided_json": record(a={"type": "array", "uniqueItems": True})}, "uniqueItems at #/properties/a"),
        ({"guided_json": {"not": {"type": "string"}}}, "not at #"),
        ({"guided_json": {"if": True, "then": False}}, "if at #"),
        ({"guided_json": {"$ref": "#/$defs/nothing"}}, "nothing"),
        ({"guided_regex": "[a-"}, "regex"),
        ({"guided_grammar": "root = x"}, "grammar"),
    ],
)
def test_what_cannot_be_had_is_refused_by_its_name(client: openai.OpenAI, form: dict[str, Any], says: str) -> None:
    with pytest.raises(openai.BadRequestError, match=re.escape(says)):
        ask(client, extra_body=form)


class Part(pydantic.BaseModel):
    language: Literal["Rust", "Python"]
    ports: list[Literal[1, 2]] = pydantic.Field(max_length=2)


def test_the_client_s_own_models(client: openai.OpenAI) -> None:
    messages: Any = [{"role": "user", "content": "What does the router do?"}]
    parsed = client.chat.completions.parse(
        model="pipeline-chat", messages=messages, response_format=Part, temperature=0
    )
    assert isinstance(parsed.choices[0].message.parsed, Part)
    with client.chat.completions.stream(
        model="pipeline-chat", messages=messages, response_format=Part, temperature=0
    ) as stream:
        stream.until_done()
    assert stream.get_final_completion().choices[0].message.parsed == parsed.choices[0].message.parsed


TOOLS: list[dict[str, Any]] = [
    {"name": "get_weather", "parameters": SCHEMAS[-1]},
    {"name": "stop_engine", "parameters": record(engine={"enum": [0, 1]})},
    {"name": "list_engines"},
]


def tools() -> Any:
    return [{"type": "function", "function": function} for function in TOOLS]


@pytest.mark.parametrize("function", TOOLS, ids=lambda function: function["name"])
def test_a_named_call_is_made(client: openai.OpenAI, function: dict[str, Any]) -> None:
    choice = ask(client, tools=tools(), tool_choice={"type": "function", "function": {"name": function["name"]}})
    (call,) = choice.message.tool_calls
    assert (choice.finish_reason, choice.message.content, call.function.name) == ("tool_calls", None, function["name"])
    jsonschema.validate(json.loads(call.function.arguments), function.get("parameters", {}))


@pytest.mark.parametrize("stream", [True, False])
def test_some_call_is_made(client: openai.OpenAI, stream: bool) -> None:
    options: Any = {"tools": tools(), "tool_choice": "required", "parallel_tool_calls": False}
    messages: Any = [{"role": "user", "content": "Stop engine 1, please."}]
    if stream:
        with client.chat.completions.stream(
            model="pipeline-chat", messages=messages, temperature=0, **options
        ) as events:
            events.until_done()
        choice: Any = events.get_final_completion().choices[0]
    else:
        choice = ask(client, **options)
    (call,) = choice.message.tool_calls
    assert choice.finish_reason == "tool_calls"
    parameters = {function["name"]: function.get("parameters", {}) for function in TOOLS}[call.function.name]
    jsonschema.validate(json.loads(call.function.arguments), parameters)
