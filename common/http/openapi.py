"""What /docs and /openapi.json say of answers, besides what the types of the handlers say."""

from typing import Any

from common.openai_api import ChatCompletion, ErrorBody, TextCompletion

import msgspec
from fastapi import FastAPI

Responses = dict[int | str, dict[str, Any]]

_SCHEMAS = "#/components/schemas/"

_CHUNK = (
    '{"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1795629316, "model": "pipeline-chat", '
    '"choices": [{"index": 0, "delta": {"role": "assistant", "content": "It"}, "logprobs": null, '
    '"finish_reason": null}]}'
)


def answer(body: type[msgspec.Struct]) -> Responses:
    """The answer of a route: one body, or the events of a stream."""
    return {
        200: {
            "description": "The answer: one body, or with `stream` a chunk of it in each server-sent event.",
            "content": {
                "application/json": {"schema": {"$ref": _SCHEMAS + body.__name__}},
                "text/event-stream": {"schema": {"type": "string"}, "example": f"data: {_CHUNK}\n\ndata: [DONE]\n\n"},
            },
        }
    }


def describe_answers(app: FastAPI) -> None:
    """Add what FastAPI does not know to the application's description: the answers are no pydantic models."""
    described = app.openapi

    def openapi() -> dict[str, Any]:
        _, schemas = msgspec.json.schema_components([ChatCompletion, TextCompletion], ref_template=_SCHEMAS + "{name}")
        spec = described()
        spec["components"]["schemas"] |= schemas
        spec["components"]["securitySchemes"] = {"API key": {"type": "http", "scheme": "bearer"}}
        spec["security"] = [{}, {"API key": []}]  # with --api-keys-file
        return spec

    app.openapi = openapi  # type: ignore[method-assign]


HEADERS = {
    "x-request-id": "Request id, in every log line and in the answer; generated if absent.",
    "x-session-id": "Session id. The policy session-affinity keeps the requests of a session on one worker.",
    "x-priority": "An integer for routing policies, 0 if absent: higher is more urgent.",
}
# Described here and not in the handler's signature, where FastAPI would read them again for every request.
PARAMETERS = {
    "parameters": [
        {"name": name, "in": "header", "description": description, "schema": {"type": "string"}}
        for name, description in HEADERS.items()
    ]
}
_ERRORS = {
    400: "The request is not valid, or does not fit into the model's context.",
    404: "No processor serves this model.",
    413: "The body is larger than 32 MB.",
    500: "A fault of this pipeline, or of an engine.",
    503: "Nobody is running or fits, too many have died, or the engines have more to do than they can.",
}


def errors(*statuses: int) -> Responses:
    """The errors of a route. With a default among them, FastAPI does not add one of its own that never comes."""
    described: Responses = {status: {"model": ErrorBody, "description": _ERRORS[status]} for status in statuses}
    return described | {"default": {"model": ErrorBody, "description": "Any other error."}}
