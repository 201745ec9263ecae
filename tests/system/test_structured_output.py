"""The form of an answer is forced by a grammar, in real engines: schemas, expressions, choices, grammars and calls."""

import concurrent.futures
import json
import re
from collections.abc import Iterator
from enum import Enum
from typing import Any, Literal

from tests.system.conftest import Pipeline, said

import openai
import pytest
from jsonschema import Draft202012Validator
from pydantic import BaseModel, Field

TOKENS = 120


def obj(**properties: Any) -> dict[str, Any]:
    """An object with all of these."""
    return {"type": "object", "properties": properties, "required": [*properties], "additionalProperties": False}


def array(items: Any, **bounds: Any) -> dict[str, Any]:
    return {"type": "array", "items": items, **bounds}


WORD = {"type": "string", "maxLength": 12}
SHORT = {"type": "string", "pattern": "^[a-z]{1,8}$"}
INTEGER = {"type": "integer"}
DIGIT = {"type": "integer", "minimum": 0, "maximum": 9}
BOOLEAN = {"type": "boolean"}
NULL = {"type": "null"}

SCHEMAS: dict[str, Any] = {
    # One value.
    "null": NULL,
    "boolean": BOOLEAN,
    "integer": INTEGER,
    "integer from 1 to 6": {"type": "integer", "minimum": 1, "maximum": 6},
    "negative integer": {"type": "integer", "minimum": -20, "exclusiveMaximum": 0},
    "integer over 1000": {"type": "integer", "exclusiveMinimum": 1000, "maximum": 99999},
    "number from 0 to 1": {"type": "number", "minimum": 0, "maximum": 1},
    "number from -1.5 to 2.5": {"type": "number", "exclusiveMinimum": -1.5, "exclusiveMaximum": 2.5},
    "string": {"type": "string"},
    "string of 3 to 5": {"type": "string", "minLength": 3, "maxLength": 5},
    "string of exactly 7": {"type": "string", "minLength": 7, "maxLength": 7},
    "empty string": {"type": "string", "maxLength": 0},
    "pattern": {"type": "string", "pattern": "^[A-Z]{2}-[0-9]{4}$"},
    "pattern with a choice": {"type": "string", "pattern": "^(red|green|blue)(ish)?$"},
    "pattern with classes": {"type": "string", "pattern": r"^\d{3}-\w{2,4}$"},
    "enum": {"enum": ["router", "engine", "processor"]},
    "enum of a type": {"type": "string", "enum": ["a", "b"]},
    "enum of everything": {"enum": [1, "one", None, True, {"one": 1}, [1]]},
    "const": {"const": "always"},
    "const object": {"const": {"a": [1, "x", None]}},
    "two types": {"type": ["integer", "null"], "minimum": 0, "maximum": 99},
    # Formats.
    "date": {"type": "string", "format": "date"},
    "time": {"type": "string", "format": "time"},
    "date-time": {"type": "string", "format": "date-time"},
    "uuid": {"type": "string", "format": "uuid"},
    "ipv4": {"type": "string", "format": "ipv4"},
    "email": {"type": "string", "format": "email"},
    # Arrays.
    "empty array": array(INTEGER, maxItems=0),
    "three integers": array(DIGIT, minItems=3, maxItems=3),
    "up to two words": array(WORD, maxItems=2),
    "one to four of an enum": array({"enum": ["red", "green"]}, minItems=1, maxItems=4),
    "array of arrays": array(array(DIGIT, minItems=2, maxItems=2), minItems=2, maxItems=2),
    "tuple": {"type": "array", "prefixItems": [WORD, DIGIT, BOOLEAN], "items": False, "minItems": 3},
    "tuple and more": {"type": "array", "prefixItems": [SHORT], "items": DIGIT, "minItems": 2, "maxItems": 4},
    # Objects.
    "empty object": {"type": "object", "additionalProperties": False},
    "one property": obj(name=WORD),
    "four types": obj(name=WORD, age=DIGIT, tall=BOOLEAN, nothing=NULL),
    "optional properties": {
        "type": "object",
        "properties": {"a": DIGIT, "b": BOOLEAN, "c": WORD},
        "required": ["b"],
        "additionalProperties": False,
    },
    "all optional": {"type": "object", "properties": {"a": DIGIT, "b": BOOLEAN}, "additionalProperties": False},
    "nested": obj(user=obj(name=WORD, address=obj(city=WORD, zip={"type": "string", "pattern": "^[0-9]{5}$"}))),
    "deeply nested": obj(a=obj(b=obj(c=obj(d=obj(e=obj(f=DIGIT)))))),
    "array of objects": array(obj(id=DIGIT, tag=SHORT), minItems=2, maxItems=3),
    "object of arrays": obj(xs=array(DIGIT, maxItems=3), ys=array(BOOLEAN, minItems=1, maxItems=2)),
    "names that need escapes": obj(**{'a "b"': DIGIT, "c\\d": DIGIT, "é 😀": BOOLEAN, "": NULL}),
    "keywords as names": obj(type=DIGIT, required=BOOLEAN, enum=DIGIT, properties=NULL, default=DIGIT),
    "names of a pattern": {
        "type": "object",
        "patternProperties": {"^x[0-9]$": DIGIT},
        "additionalProperties": False,
        "minProperties": 1,
        "maxProperties": 2,
    },
    "any names": {"type": "object", "additionalProperties": DIGIT, "minProperties": 1, "maxProperties": 2},
    "twelve properties": obj(**{f"field_{number}": DIGIT for number in range(12)}),
    # Unions.
    "integer or word": {"anyOf": [DIGIT, SHORT]},
    "optional by null": obj(name=SHORT, nick={"anyOf": [SHORT, NULL]}),
    "either of two objects": {"anyOf": [obj(circle=obj(r=DIGIT)), obj(square=obj(side=DIGIT))]},
    "told apart by a field": {
        "oneOf": [
            obj(kind={"const": "cat"}, lives=DIGIT),
            obj(kind={"const": "dog"}, breed={"enum": ["pug", "collie"]}),
        ]
    },
    "array of a union": array({"anyOf": [DIGIT, BOOLEAN, NULL]}, minItems=3, maxItems=3),
    "all of one": {"allOf": [obj(a=DIGIT)]},
    # References.
    "reference": {
        "$defs": {"point": obj(x=DIGIT, y=DIGIT)},
        **obj(begin={"$ref": "#/$defs/point"}, end={"$ref": "#/$defs/point"}),
    },
    "reference by its older place": {"definitions": {"n": DIGIT}, **obj(n={"$ref": "#/definitions/n"})},
    "reference in a reference": {
        "$defs": {
            "a": obj(b={"$ref": "#/$defs/b"}),
            "b": array({"$ref": "#/$defs/c"}, minItems=1, maxItems=2),
            "c": DIGIT,
        },
        "$ref": "#/$defs/a",
    },
    "reference to a property": {**obj(first=SHORT, second={"$ref": "#/properties/first"})},
    "tree": {
        "$defs": {"node": obj(value=DIGIT, children=array({"$ref": "#/$defs/node"}, maxItems=2))},
        "$ref": "#/$defs/node",
    },
    "list with links": {
        "$defs": {"link": obj(value=DIGIT, next={"anyOf": [{"$ref": "#/$defs/link"}, NULL]})},
        "$ref": "#/$defs/link",
    },
    "expression": {
        "$defs": {
            "term": {
                "anyOf": [
                    DIGIT,
                    obj(op={"enum": ["+", "*"]}, left={"$ref": "#/$defs/term"}, right={"$ref": "#/$defs/term"}),
                ]
            }
        },
        "$ref": "#/$defs/term",
    },
    # As people write them.
    "person": {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "Person",
        "description": "Somebody.",
        **obj(
            name={**WORD, "description": "The first name.", "examples": ["Ada"]},
            email={"type": "string", "format": "email"},
            born={"type": "string", "format": "date"},
            height={"type": "number", "minimum": 0.5, "maximum": 2.5, "default": 1.7},
            roles=array({"enum": ["admin", "user"]}, minItems=1, maxItems=2),
        ),
    },
    "order": obj(
        id={"type": "string", "pattern": "^ORD-[0-9]{6}$"},
        status={"enum": ["open", "paid", "sent"]},
        lines=array(obj(sku=SHORT, count={"type": "integer", "minimum": 1, "maximum": 99}), minItems=1, maxItems=2),
        note={"anyOf": [WORD, NULL]},
    ),
}
FINISH = 50  # of them, at least; a small model writes the others for longer than it may


def form(schema: Any) -> dict[str, Any]:
    return {"response_format": {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}}


def errors(schema: Any, text: str) -> list[str]:
    validator = Draft202012Validator(schema, format_checker=Draft202012Validator.FORMAT_CHECKER)
    return [error.message for error in validator.iter_errors(json.loads(text))]


@pytest.fixture(scope="module")
def client(pipeline: Pipeline) -> Iterator[openai.OpenAI]:
    with pipeline.openai() as client:
        yield client


class TestSchemas:
    @pytest.fixture(scope="class")
    @classmethod
    def answers(cls, pipeline: Pipeline) -> dict[str, tuple[str, str]]:
        """The answer to each schema, and its finish_reason. All are asked for at once, or it would take a minute."""

        def answer(name: str) -> tuple[str, str]:
            response = pipeline.ask(max_tokens=TOKENS, **form(SCHEMAS[name]))
            assert response.status_code == 200, response.text
            choice = response.json()["choices"][0]
            return choice["message"]["content"], choice["finish_reason"]

        with concurrent.futures.ThreadPoolExecutor(16) as pool:
            return dict(zip(SCHEMAS, pool.map(answer, SCHEMAS), strict=True))

    @pytest.mark.parametrize("name", SCHEMAS)
    def test_an_answer_that_is_finished_is_valid(self, answers: dict[str, tuple[str, str]], name: str) -> None:
        text, finish_reason = answers[name]
        assert finish_reason in ("stop", "length")
        assert text
        if finish_reason == "stop":
            assert errors(SCHEMAS[name], text) == []

    def test_most_are_finished(self, answers: dict[str, tuple[str, str]]) -> None:
        unfinished = [name for name, (_, finish_reason) in answers.items() if finish_reason != "stop"]
        assert len(SCHEMAS) - len(unfinished) >= FINISH, unfinished

    def test_streamed_answers_are_the_same(self, pipeline: Pipeline, answers: dict[str, tuple[str, str]]) -> None:
        names = [*SCHEMAS][::3]

        def streamed(name: str) -> str:
            return said(pipeline.stream(max_tokens=TOKENS, **form(SCHEMAS[name])))

        with concurrent.futures.ThreadPoolExecutor(16) as pool:
            assert list(pool.map(streamed, names)) == [answers[name][0] for name in names]

    def test_there_is_no_idle_white_space(self, answers: dict[str, tuple[str, str]]) -> None:
        for name in ("nested", "array of objects", "order"):
            text, _ = answers[name]
            assert text == json.dumps(json.loads(text), ensure_ascii=False)

    def test_strict_or_not_they_are_the_same(self, pipeline: Pipeline) -> None:
        plain, strict = form(SCHEMAS["nested"]), form(SCHEMAS["nested"])
        strict["response_format"]["json_schema"]["strict"] = True
        assert pipeline.answer(max_tokens=TOKENS, **plain) == pipeline.answer(max_tokens=TOKENS, **strict)

    def test_at_any_temperature(self, pipeline: Pipeline) -> None:
        schema = SCHEMAS["order"]
        body = pipeline.ask(n=8, temperature=2, seed=1, max_tokens=TOKENS, **form(schema)).json()
        finished = [choice["message"]["content"] for choice in body["choices"] if choice["finish_reason"] == "stop"]
        assert len(set(finished)) > 1
        assert [errors(schema, text) for text in finished] == [[]] * len(finished)

    def test_logprobs_are_those_of_the_tokens_that_the_grammar_allows_too(self, pipeline: Pipeline) -> None:
        choice = pipeline.ask(logprobs=True, top_logprobs=2, **form(SCHEMAS["enum"])).json()["choices"][0]
        entries = choice["logprobs"]["content"]
        assert "".join(entry["token"] for entry in entries) == choice["message"]["content"]
        assert all(entry["logprob"] <= 0 for entry in entries)

    def test_an_integer_has_no_more_digits_than_every_reader_takes(self, pipeline: Pipeline) -> None:
        choices = pipeline.ask(n=16, temperature=2, seed=1, max_tokens=40, **form(INTEGER)).json()["choices"]
        assert {choice["finish_reason"] for choice in choices} == {"stop"}
        assert all(abs(int(choice["message"]["content"])) < 2**53 for choice in choices)

    def test_of_text_completions(self, client: openai.OpenAI) -> None:
        schema = SCHEMAS["four types"]
        choice = client.completions.create(
            model=Pipeline.model, prompt="Hello", max_tokens=TOKENS, temperature=0, extra_body=form(schema)
        ).choices[0]
        assert choice.finish_reason == "stop"
        assert errors(schema, choice.text) == []


class Colour(Enum):
    RED = "red"
    BLUE = "blue"


class Point(BaseModel):
    x: int = Field(ge=0, le=9)
    y: int = Field(ge=0, le=9)


class Circle(BaseModel):
    kind: Literal["circle"]
    radius: int


class Square(BaseModel):
    kind: Literal["square"]
    side: int


class Drawing(BaseModel):
    """What pydantic can say and models are asked for."""

    colour: Colour
    points: list[Point] = Field(min_length=1, max_length=2)
    shape: Circle | Square
    next: "Drawing | None"


class TestPydanticModels:
    MESSAGES: Any = (({"role": "user", "content": "Draw!"}),)

    def test_are_what_the_client_parses(self, client: openai.OpenAI) -> None:
        completion = client.chat.completions.parse(
            model=Pipeline.model, messages=self.MESSAGES, response_format=Drawing, temperature=0
        )
        drawing = completion.choices[0].message.parsed
        assert isinstance(drawing, Drawing)
        assert 1 <= len(drawing.points) <= 2

    def test_are_what_the_client_parses_at_the_end_of_a_stream(self, client: openai.OpenAI) -> None:
        with client.chat.completions.stream(
            model=Pipeline.model, messages=self.MESSAGES, response_format=Drawing, temperature=0
        ) as events:
            kinds = [event.type for event in events]
            drawing = events.get_final_completion().choices[0].message.parsed
        assert isinstance(drawing, Drawing)
        assert kinds.count("content.delta") > 3
        assert kinds.count("content.done") == 1


# Forms that are no schema, and what an answer of that form fully matches.
EBNF = 'root ::= greeting " " name\ngreeting ::= "hello" | "bye"\nname ::= [A-C] [a-z]{2,3} "!"'
FORMS: list[tuple[dict[str, Any], str]] = [
    ({"regex": r"[A-C][0-9]{3}"}, r"[A-C][0-9]{3}"),
    ({"guided_regex": r"(yes|no), \d{1,3}%"}, r"(yes|no), \d{1,3}%"),
    ({"structured_outputs": {"regex": r"\w{2,5}( \w{2,5})?\."}}, r"\w{2,5}( \w{2,5})?\."),
    ({"guided_choice": ["left", "right"]}, "left|right"),
    ({"structured_outputs": {"choice": ["a+b", "(c)", "日本語", 'say "x"']}}, r'a\+b|\(c\)|日本語|say "x"'),
    ({"ebnf": EBNF}, r"(hello|bye) [A-C][a-z]{2,3}!"),
    ({"guided_grammar": EBNF}, r"(hello|bye) [A-C][a-z]{2,3}!"),
    ({"structured_outputs": {"grammar": EBNF}}, r"(hello|bye) [A-C][a-z]{2,3}!"),
    ({"guided_json": SCHEMAS["boolean"]}, "true|false"),
    ({"guided_json": '{"type": "boolean"}'}, "true|false"),
    ({"json_schema": '{"enum": [1, 2]}'}, "1|2"),
    ({"structured_outputs": {"json": {"const": None}}}, "null"),
]


class TestOtherForms:
    @pytest.mark.parametrize(("fields", "pattern"), FORMS)
    def test_the_whole_answer_has_it(self, pipeline: Pipeline, fields: dict[str, Any], pattern: str) -> None:
        choice = pipeline.ask(max_tokens=60, **fields).json()["choices"][0]
        assert choice["finish_reason"] == "stop"
        assert re.fullmatch(pattern, choice["message"]["content"])

    @pytest.mark.parametrize(("fields", "pattern"), FORMS[::3])
    def test_whatever_is_sampled(self, pipeline: Pipeline, fields: dict[str, Any], pattern: str) -> None:
        choices = pipeline.ask(max_tokens=60, temperature=2, n=4, **fields).json()["choices"]
        assert all(re.fullmatch(pattern, choice["message"]["content"]) for choice in choices)

    @pytest.mark.parametrize(
        "fields", [{"response_format": {"type": "json_object"}}, {"structured_outputs": {"json_object": True}}]
    )
    def test_any_json_object(self, pipeline: Pipeline, fields: dict[str, Any]) -> None:
        choices = pipeline.ask(max_tokens=60, n=8, temperature=1, seed=1, **fields).json()["choices"]
        assert all(choice["message"]["content"].startswith("{") for choice in choices)
        finished = [choice for choice in choices if choice["finish_reason"] == "stop"]
        assert finished
        assert all(isinstance(json.loads(choice["message"]["content"]), dict) for choice in finished)

    def test_plain_text_is_free(self, pipeline: Pipeline) -> None:
        assert pipeline.answer(response_format={"type": "text"}) == pipeline.answer()


PARAMETERS: dict[str, Any] = {
    "nothing": {"type": "object", "properties": {}, "additionalProperties": False},
    "a choice": obj(unit={"enum": ["celsius", "kelvin"]}),
    "several": obj(id=DIGIT, on=BOOLEAN, tags=array(SHORT, minItems=1, maxItems=2)),
    "optional": {"type": "object", "properties": {"a": DIGIT, "b": BOOLEAN}, "required": ["b"]},
    "nested": obj(place=obj(x=DIGIT, y=DIGIT), names=array({"enum": ["a", "b"]}, maxItems=2)),
    "reference": {"$defs": {"n": DIGIT}, **obj(n={"$ref": "#/$defs/n"}, m={"$ref": "#/$defs/n"})},
    "union": obj(value={"anyOf": [DIGIT, NULL, {"enum": ["all"]}]}),
}
TOOLS: list[dict[str, Any]] = [
    {"type": "function", "function": {"name": name.replace(" ", "_"), "parameters": parameters}}
    for name, parameters in PARAMETERS.items()
]
ONE_CALL: dict[str, Any] = {"tool_choice": "required", "parallel_tool_calls": False, "max_tokens": TOKENS}


def calls_of(choice: dict[str, Any]) -> list[tuple[str, Any]]:
    """Name and arguments of each, if the answer is finished."""
    functions = [call["function"] for call in choice["message"]["tool_calls"]]
    return [(function["name"], json.loads(function["arguments"])) for function in functions]


class TestForcedCalls:
    """The demonstration model knows no tools. It calls them all the same."""

    @pytest.mark.parametrize("name", PARAMETERS)
    def test_the_only_tool_that_there_is(self, pipeline: Pipeline, name: str) -> None:
        (tool,) = (tool for tool in TOOLS if tool["function"]["name"] == name.replace(" ", "_"))
        choice = pipeline.ask(
            tools=[tool], tool_choice="required", parallel_tool_calls=False, max_tokens=TOKENS
        ).json()["choices"][0]
        assert choice["finish_reason"] == "tool_calls"
        ((called, arguments),) = calls_of(choice)
        assert called == tool["function"]["name"]
        assert errors(PARAMETERS[name], json.dumps(arguments)) == []
        assert choice["message"]["content"] is None

    @pytest.mark.parametrize("name", PARAMETERS)
    def test_the_named_one_of_all(self, pipeline: Pipeline, name: str) -> None:
        named = {"type": "function", "function": {"name": name.replace(" ", "_")}}
        choice = pipeline.ask(tools=TOOLS, tool_choice=named, max_tokens=TOKENS).json()["choices"][0]
        ((called, arguments),) = calls_of(choice)
        assert called == name.replace(" ", "_")
        assert errors(PARAMETERS[name], json.dumps(arguments)) == []

    def test_any_of_all(self, pipeline: Pipeline) -> None:
        body = pipeline.ask(tools=TOOLS, n=8, temperature=2, seed=1, **ONE_CALL).json()
        finished = [choice for choice in body["choices"] if choice["finish_reason"] == "tool_calls"]
        assert len(finished) >= 6
        for choice in finished:
            ((name, arguments),) = calls_of(choice)
            assert errors(PARAMETERS[name.replace("_", " ")], json.dumps(arguments)) == []

    def test_streamed_they_are_the_same(self, pipeline: Pipeline) -> None:
        fields: dict[str, Any] = {
            "tools": TOOLS[:3],
            "tool_choice": "required",
            "max_tokens": TOKENS,
            "parallel_tool_calls": False,
        }
        ((name, arguments),) = calls_of(pipeline.ask(**fields).json()["choices"][0])
        chunks = pipeline.stream(**fields)
        parts = [call for chunk in chunks for call in chunk["choices"][0]["delta"].get("tool_calls", ())]
        assert [part["function"]["name"] for part in parts if part["function"].get("name")] == [name]
        assert json.loads("".join(part["function"].get("arguments", "") for part in parts)) == arguments
        assert said(chunks) == ""

    def test_by_the_old_names(self, pipeline: Pipeline) -> None:
        functions = [tool["function"] for tool in TOOLS]
        choice = pipeline.ask(functions=functions, function_call={"name": "a_choice"}, max_tokens=TOKENS).json()[
            "choices"
        ][0]
        call = choice["message"]["function_call"]
        assert call["name"] == "a_choice"
        assert errors(PARAMETERS["a choice"], call["arguments"]) == []


# What an engine would not obey, or could not: the word that the message has for it.
NOT_ENFORCED: list[tuple[str, Any]] = [
    ("uniqueItems", array(DIGIT, uniqueItems=True)),
    ("not", {"not": {"type": "string"}}),
    ("if", {"type": "object", "if": {"required": ["a"]}, "then": {"required": ["b"]}}),
    ("dependentRequired", {"type": "object", "dependentRequired": {"a": ["b"]}}),
    ("dependentSchemas", {"type": "object", "dependentSchemas": {"a": {"required": ["b"]}}}),
    ("contains", {"type": "array", "contains": {"const": 1}}),
    ("multipleOf", {"type": "number", "multipleOf": 0.5}),
]
NO_SCHEMA: list[tuple[str, Any]] = [
    ("strin", {"type": "strin"}),
    ("properties", {"type": "object", "properties": [1]}),
    ("required", {"type": "object", "required": "a"}),
    ("minimum", {"type": "integer", "minimum": "1"}),
    ("pattern", {"type": "string", "pattern": "["}),
]


class TestRefusals:
    @pytest.mark.parametrize(("keyword", "schema"), [*NOT_ENFORCED, *NO_SCHEMA])
    @pytest.mark.parametrize("place", ["the schema", "in a property", "in an item", "in a definition", "a tool"])
    def test_a_schema_that_no_engine_obeys(self, pipeline: Pipeline, keyword: str, schema: Any, place: str) -> None:
        forms = {
            "the schema": form(schema),
            "in a property": form(obj(a=obj(b=schema))),
            "in an item": form(array(array(schema))),
            "in a definition": form({"$defs": {"x": schema}, **obj(a={"$ref": "#/$defs/x"})}),
            "a tool": {
                "tools": [{"type": "function", "function": {"name": "f", "parameters": obj(a=schema)}}],
                "tool_choice": "required",
            },
        }
        response = pipeline.ask(**forms[place])
        assert response.status_code == 400
        assert keyword in response.json()["error"]["message"]

    @pytest.mark.parametrize("keyword", [keyword for keyword, _ in NOT_ENFORCED])
    def test_a_property_can_have_the_name_of_a_keyword(self, pipeline: Pipeline, keyword: str) -> None:
        choice = pipeline.ask(max_tokens=40, **form(obj(**{keyword: DIGIT}))).json()["choices"][0]
        assert json.loads(choice["message"]["content"]).keys() == {keyword}

    @pytest.mark.parametrize(
        "fields",
        [
            {"regex": "[a-"},
            {"regex": "(a"},
            {"ebnf": "root ::= nowhere"},
            {"ebnf": "this is no grammar"},
            {"guided_json": "{"},
            {"guided_json": "[]"},
            {"structured_outputs": {"choice": []}},
            form({"$ref": "#/$defs/nowhere"}),
            form({"type": "integer", "minimum": 3, "maximum": 2}),
            {"response_format": {"type": "json_schema"}},
            {"response_format": {"type": "yaml"}},
            {"regex": "a", "guided_choice": ["a"]},
        ],
        ids=str,
    )
    @pytest.mark.parametrize("stream", [False, True])
    def test_a_form_that_is_none(self, pipeline: Pipeline, fields: dict[str, Any], stream: bool) -> None:
        response = pipeline.ask(stream=stream, **fields)
        assert response.status_code == 400
        assert response.json()["error"]["type"] == "invalid_request_error"

    def test_a_call_of_a_tool_that_is_not_there(self, pipeline: Pipeline) -> None:
        named = {"type": "function", "function": {"name": "g"}}
        response = pipeline.ask(tools=TOOLS, tool_choice=named)
        assert response.status_code == 400
        assert "tool_choice" in response.json()["error"]["message"]

    def test_after_all_this_it_still_answers(self, pipeline: Pipeline) -> None:
        assert pipeline.answer()
