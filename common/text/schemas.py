"""JSON schemas that an answer is to obey: what an engine's grammar cannot enforce is refused, not forgotten."""

from typing import Any

from common.errors import InvalidRequest

# Those that xgrammar 0.2 skips: its converter of JSON schemas (cpp/json_schema_converter.cc) warns of them, or does not
# know them.
_NOT_ENFORCED = {
    *("not", "if", "then", "else", "dependentRequired", "dependentSchemas", "dependencies", "contains", "minContains"),
    *("maxContains", "uniqueItems", "multipleOf", "contentEncoding", "contentMediaType", "contentSchema"),
    *("$dynamicRef", "$recursiveRef"),
}
MAX_INTEGER = 2**53 - 1
_NAMES = {"properties", "patternProperties", "$defs", "definitions"}  # under which keys are no keywords
_VALUES = {"enum", "const", "default", "examples", "example"}  # under which nothing is a schema


def check_constraint(constraint: dict[str, Any] | None) -> dict[str, Any] | None:
    """The form of an answer, if an engine can enforce it. Raises InvalidRequest, which names the keyword that it
    cannot."""
    if constraint and "json" in constraint:
        _check_schema(constraint["json"])
        return {"json": _bounded(constraint["json"])}
    return constraint


def _check_schema(schema: Any) -> None:
    # Imported here, for the requests that need it: it takes a third of a second.
    from jsonschema import Draft202012Validator, SchemaError

    try:
        Draft202012Validator.check_schema(schema)
    except SchemaError as error:
        place = _path(error.absolute_path)
        raise InvalidRequest(f"the JSON schema is not valid at {place}: {error.message}") from error
    _check_keywords(schema, ())


def _check_keywords(schema: Any, path: tuple[str, ...]) -> None:
    if isinstance(schema, list):
        for place, item in enumerate(schema):
            _check_keywords(item, (*path, str(place)))
    if not isinstance(schema, dict):
        return
    for keyword, value in schema.items():
        if keyword in _NOT_ENFORCED:
            raise InvalidRequest(
                f"the JSON schema has {keyword} at {_path(path)}, which no engine can enforce: leave it out"
            )
        if keyword in _NAMES and isinstance(value, dict):
            for name, inner in value.items():
                _check_keywords(inner, (*path, keyword, name))
        elif keyword not in _VALUES:
            _check_keywords(value, (*path, keyword))


def _bounded(schema: Any) -> Any:
    """The schema with every integer in the range on which all readers of JSON agree (RFC 8259, section 6): where there
    is no end to its digits, a small model may find none."""
    if isinstance(schema, list):
        return [_bounded(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    bounded = {keyword: value if keyword in _VALUES else _bounded(value) for keyword, value in schema.items()}
    if schema.get("type") == "integer" and "enum" not in schema and "const" not in schema:
        if not {"minimum", "exclusiveMinimum"} & schema.keys():
            bounded["minimum"] = -MAX_INTEGER
        if not {"maximum", "exclusiveMaximum"} & schema.keys():
            bounded["maximum"] = MAX_INTEGER
    return bounded


def _path(parts: Any) -> str:
    return "#/" + "/".join(map(str, parts))
