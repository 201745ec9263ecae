"""JSON schemas that an answer is to obey: what an engine's grammar does not enforce is refused, not forgotten.

What it enforces was tried keyword by keyword with xgrammar 0.2.7, the grammar back-end of SGLang 0.5.21. It takes oneOf
for anyOf, and a pattern for that of the whole text.
"""

import asyncio
import re
from collections.abc import Collection, Iterator, Mapping
from itertools import islice
from typing import Any

from common.errors import InvalidRequest

MAX_INTEGER = 2**53 - 1
MAX_SCHEMAS, MAX_VALUES = 1000, 1000  # in one, and in an enum: to make a grammar of more takes seconds

_NEVER = {
    *("not", "if", "then", "else", "dependentRequired", "dependentSchemas", "dependencies", "contains", "minContains"),
    *("maxContains", "uniqueItems", "multipleOf", "unevaluatedProperties", "$dynamicRef", "$recursiveRef"),
}
# Enforced only in a schema that names its type,
_OF_NUMBERS = {"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"}
_OF_TEXTS = {"minLength", "maxLength", "pattern", "format"}
_OF_OBJECTS = {"minProperties", "maxProperties", "patternProperties", "propertyNames"}
_TYPED = {*_OF_NUMBERS, *_OF_TEXTS, *_OF_OBJECTS, "minItems", "maxItems"}
_OTHERS = {"properties", "required", "additionalProperties", "items", "prefixItems", *_TYPED}
# and none of them in a schema that has one of these.
_ALONE = ("$ref", "allOf", "anyOf", "oneOf", "enum", "const")

# In a pattern, what is written as it is and makes no JSON, and what looks around.
_UNREAD = re.compile(r"""["]|\\[\\nrtfvxu0c]|\(\?(?:[=!]|<[=!])""")

_NAMES = {"properties", "patternProperties", "$defs", "definitions"}  # under which keys are no keywords
_VALUES = {"enum", "const", "default", "examples", "example"}  # under which nothing is a schema


async def checked(constraint: dict[str, Any] | None) -> dict[str, Any] | None:
    """What `check_constraint` gives, made beside the event loop: a schema takes it from 3 ms to 150."""
    return await asyncio.to_thread(check_constraint, constraint) if constraint else None


def check_constraint(constraint: dict[str, Any] | None) -> dict[str, Any] | None:
    """The form of an answer, if an engine can enforce it. Raises InvalidRequest, which names the keyword that it
    cannot."""
    if not constraint or "json" not in constraint:
        return constraint
    # Imported here, for the requests that need it: it takes a third of a second.
    from jsonschema import Draft202012Validator, SchemaError

    schema = constraint["json"]
    try:
        Draft202012Validator.check_schema(schema)
    except SchemaError as error:
        place = "/".join(map(str, error.absolute_path))
        raise InvalidRequest(f"the JSON schema is not valid at #/{place}: {error.message}") from error
    schemas = dict(islice(_schemas(schema, "#"), MAX_SCHEMAS))
    if len(schemas) == MAX_SCHEMAS or any(len(inner.get("enum", ())) > MAX_VALUES for inner in schemas.values()):
        raise InvalidRequest(
            f"the JSON schema is too large: {MAX_SCHEMAS} schemas and {MAX_VALUES} values are too many"
        )
    for path, inner in schemas.items():
        if fault := _fault(inner) or _endless(path, schemas):
            raise InvalidRequest(f"the JSON schema has {fault} at {path}, which no engine can enforce: leave it out")
    return {"json": _bounded(schema)}


def _schemas(schema: Any, path: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every schema in a schema, with its place."""
    if isinstance(schema, list):
        for place, item in enumerate(schema):
            yield from _schemas(item, f"{path}/{place}")
    if not isinstance(schema, dict):
        return
    yield path, schema
    for keyword, value in schema.items():
        if keyword in _NAMES and isinstance(value, dict):
            for name, inner in value.items():
                yield from _schemas(inner, f"{path}/{keyword}/{name}")
        elif keyword not in _VALUES:
            yield from _schemas(value, f"{path}/{keyword}")


def _fault(schema: dict[str, Any]) -> str | None:
    """What of a schema, without those in it, is not enforced."""
    keywords = schema.keys()
    if never := _first([keyword for keyword in keywords if schema[keyword] is not False], _NEVER):
        return never
    for alone in _ALONE:
        if alone in keywords and (other := _first(keywords, {*_OTHERS, *_ALONE} - {alone})):
            return f"{other} beside {alone}"
    if "type" not in keywords and (typed := _first(keywords, _TYPED)):
        return f"{typed} without type"
    if "pattern" in keywords and (other := _first(keywords, _OF_TEXTS - {"pattern"})):
        return f"{other} beside pattern"
    if len(keywords & {"properties", "patternProperties", "propertyNames"}) > 1:
        return f"{_first(keywords, {'patternProperties', 'propertyNames'})} beside properties or their like"
    if found := _UNREAD.search(str(schema.get("pattern", ""))):
        return f"a pattern with {found[0]}"
    if "type" in keywords and (clash := _clash(schema)):
        return f"{clash} with another type than beside it"
    if missing := set(schema.get("required", ())) - schema.get("properties", {}).keys():
        return f"required {min(missing)}, which is not among the properties,"
    if len(schema.get("allOf", ())) > 1:
        return "allOf with more than one schema"
    if not f"{schema.get('$ref', '#')}/".startswith("#/"):
        return f"$ref {schema['$ref']}, which does not begin with #/,"
    return None


def _endless(path: str, schemas: Mapping[str, dict[str, Any]]) -> str | None:
    """A reference that leads to itself and to nothing else. schemas: by their places."""
    seen = set[str]()
    while (schema := schemas.get(path)) and "$ref" in schema:
        if path in seen:
            return f"$ref {schema['$ref']}, which leads back to itself,"
        seen.add(path)
        path = schema["$ref"]
    return None


def _clash(schema: dict[str, Any]) -> str | None:
    """What of a schema is not of the type that it names."""
    from jsonschema import Draft202012Validator

    typed, kind = Draft202012Validator({"type": schema["type"]}), schema["type"]
    values = [*schema.get("enum", ()), *([schema["const"]] if "const" in schema else [])]
    if not all(map(typed.is_valid, values)):
        return "a value"
    branches = (branch for alone in ("allOf", "anyOf", "oneOf") for branch in schema.get(alone, ()))
    return None if all(branch is True or branch.get("type", kind) == kind for branch in branches) else "a schema"


def _first(keywords: Collection[str], of: set[str]) -> str | None:
    return next((keyword for keyword in keywords if keyword in of), None)


def _bounded(schema: Any) -> Any:
    """The schema with every integer in the range on which all readers of JSON agree (RFC 8259, section 6): where there
    is no end to its digits, a small model may find none."""
    if isinstance(schema, list):
        return [_bounded(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    bounded = {keyword: value if keyword in _VALUES else _bounded(value) for keyword, value in schema.items()}
    if schema.get("type") == "integer" and not _first(schema, set(_ALONE)):
        if not {"minimum", "exclusiveMinimum"} & schema.keys():
            bounded["minimum"] = -MAX_INTEGER
        if not {"maximum", "exclusiveMaximum"} & schema.keys():
            bounded["maximum"] = MAX_INTEGER
    return bounded
