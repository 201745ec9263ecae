"""Schemas: what a grammar enforces, and what is refused because it does not."""

from typing import Any

from common.errors import InvalidRequest
from common.text.schemas import MAX_INTEGER, check_constraint

import pytest

STRING, INTEGER = {"type": "string"}, {"type": "integer"}


@pytest.mark.parametrize(
    ("schema", "says"),
    [
        ({"not": STRING}, "not at #"),
        ({"type": "object", "if": {}, "then": {}}, "if at #"),
        ({"type": "array", "items": STRING, "uniqueItems": True}, "uniqueItems at #"),
        ({"type": "object", "properties": {"a": {"type": "array", "contains": {}}}}, "contains at #/properties/a"),
        ({"anyOf": [STRING, {"not": {}}]}, "not at #/anyOf/1"),
        ({"minimum": 3}, "minimum without type at #"),
        ({"pattern": "a"}, "pattern without type"),
        ({"type": "string", "pattern": "a", "maxLength": 3}, "maxLength beside pattern"),
        ({"type": "integer", "multipleOf": 5}, "multipleOf at #"),
        ({"type": "string", "pattern": 'a"b'}, 'a pattern with "'),
        ({"type": "string", "pattern": r"a\\b"}, "a pattern with"),
        ({"type": "string", "pattern": "(?=a)b"}, "a pattern with (?="),
        ({"type": "string", "enum": ["a", 1]}, "a value with another type"),
        ({"type": "string", "const": 1}, "a value with another type"),
        ({"type": "object", "anyOf": [{"type": "string"}]}, "a schema with another type"),
        ({"patternProperties": {"^a$": {}}}, "patternProperties without type"),
        ({"type": "array", "prefixItems": [STRING] * 1000}, "too large"),
        ({"enum": list(range(1001))}, "too large"),
        ({"type": "object", "properties": {}, "anyOf": [{"required": []}]}, "properties beside anyOf"),
        ({"enum": ["a"], "const": "a"}, "const beside enum"),
        ({"$ref": "#/$defs/a", "$defs": {"a": INTEGER}, "minimum": 3}, "minimum beside $ref"),
        ({"$ref": "http://elsewhere/schema"}, "$ref http://elsewhere/schema"),
        ({"$ref": "#"}, "leads back to itself"),
        ({"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"}, "leads back"),
        ({"allOf": [STRING, STRING]}, "allOf with more than one"),
        ({"type": "object", "properties": {"a": INTEGER}, "required": ["z"]}, "required z"),
        ({"type": "object", "properties": {}, "patternProperties": {"a": {}}}, "patternProperties beside properties"),
    ],
)
def test_what_is_not_enforced_is_refused_with_its_place(schema: dict[str, Any], says: str) -> None:
    with pytest.raises(InvalidRequest) as refusal:
        check_constraint({"json": schema})
    assert says in refusal.value.message


@pytest.mark.parametrize(
    "schema",
    [
        {},
        {"type": "string", "format": "date", "title": "T", "description": "d", "default": "x", "examples": ["not"]},
        {"type": "object", "properties": {"not": STRING, "if": STRING}, "required": ["not"]},
        {"enum": [{"not": 1}], "type": "object"},
        {"$ref": "#/$defs/a", "$defs": {"a": STRING}, "description": "d"},
        {"type": "object", "anyOf": [{"type": "object", "properties": {"a": STRING}}]},
        {"type": ["string", "null"], "maxLength": 3},
        {"type": "array", "items": STRING, "uniqueItems": False},
        {"type": "string", "pattern": "^[^a].\\W\\d$"},
        {"type": "string", "nullable": True, "contentEncoding": "base64"},
    ],
)
def test_the_rest_is_taken_as_it_is(schema: dict[str, Any]) -> None:
    assert check_constraint({"json": schema}) == {"json": schema}


def test_what_is_no_schema_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="not valid at #/properties/a/type"):
        check_constraint({"json": {"properties": {"a": {"type": "strin"}}}})


def test_integers_have_an_end() -> None:
    schema = {"type": "array", "items": INTEGER}
    assert check_constraint({"json": schema}) == {
        "json": {"type": "array", "items": {"type": "integer", "minimum": -MAX_INTEGER, "maximum": MAX_INTEGER}}
    }
    own = {"type": "integer", "exclusiveMinimum": 0, "maximum": 9}
    assert check_constraint({"json": own}) == {"json": own}
    assert check_constraint({"json": {"type": "integer", "enum": [1]}}) == {"json": {"type": "integer", "enum": [1]}}


@pytest.mark.parametrize("constraint", [None, {"regex": "a"}, {"choice": ["a"]}, {"structural_tag": {"not": 1}}])
def test_other_forms_are_none_of_its_business(constraint: dict[str, Any] | None) -> None:
    assert check_constraint(constraint) == constraint
