"""The kinds of error that a caller can tell apart, on the wire and over HTTP.

Dynamo carries an exception to the caller as text, with a prefix for each hop. So a PipelineError's text is JSON behind
a marker, and `from_exception` makes the same error of it again, however many hops it came.
"""

import json
from contextlib import suppress
from typing import Any, ClassVar

_MARKER = "PipelineError:"
# Characters of a text: the runtime cuts what it carries at some 4,000 bytes, and JSON takes up to six for one of them.
_MAX_MESSAGE, _MAX_PARAM = 500, 100


class PipelineError(Exception):
    """Something that went wrong, said so that the caller can act on it.

    message: what happened and what to do about it; code: OpenAI's machine-readable code, if it has one;
    param: the field of the request that is at fault.
    """

    kind: ClassVar[str] = "internal"
    http_status: ClassVar[int] = 500
    openai_type: ClassVar[str] = "server_error"

    def __init__(self, message: str, *, code: str | None = None, param: str | None = None) -> None:
        super().__init__(message)
        self.message = _bounded(message, _MAX_MESSAGE)
        self.code = code
        self.param = param and _bounded(param, _MAX_PARAM)

    def __str__(self) -> str:
        fields = {"kind": self.kind, "message": self.message, "code": self.code, "param": self.param}
        return f"{_MARKER} {json.dumps(fields, ensure_ascii=False)}"

    @property
    def body(self) -> dict[str, Any]:
        """OpenAI's error body."""
        fields = {"message": self.message, "type": self.openai_type, "param": self.param, "code": self.code}
        return {"error": fields}


class InvalidRequest(PipelineError):
    """The caller asked for something that cannot be done; asking again will not help."""

    kind = "invalid_request"
    http_status = 400
    openai_type = "invalid_request_error"


class NotFound(InvalidRequest):
    """The caller asked for something that is not here."""

    kind = "not_found"
    http_status = 404


class Overloaded(PipelineError):
    """There is no room for this request now."""

    kind = "overloaded"
    http_status = 429
    openai_type = "rate_limit_error"


class Unavailable(PipelineError):
    """Nobody serves this now, or who did has died."""

    kind = "unavailable"
    http_status = 503
    openai_type = "service_unavailable"


class Cancelled(PipelineError):
    """The caller went away."""

    kind = "cancelled"
    http_status = 499
    openai_type = "cancelled"


class Internal(PipelineError):
    """A fault of this pipeline."""


_KINDS: dict[str, type[PipelineError]] = {
    kind.kind: kind for kind in (InvalidRequest, NotFound, Overloaded, Unavailable, Cancelled, Internal)
}

# How Dynamo's runtime begins the text of its own errors and of those that other workers raise.
_RUNTIME_PREFIXES: dict[str, type[PipelineError]] = {
    "InvalidRequest:": InvalidRequest,
    "invalid type:": InvalidRequest,  # a number that MessagePack has no room for
    "NotFound:": NotFound,
    "Unavailable:": Unavailable,
    "Cancelled:": Cancelled,
}


def from_exception(error: Exception) -> PipelineError:
    """The typed error behind whatever a call to another program raised."""
    if isinstance(error, PipelineError):
        return error
    text = str(error)
    with suppress(ValueError, KeyError):  # no such marker, or something on the way has cut what is behind it
        fields, _ = json.JSONDecoder().raw_decode(text, text.index(_MARKER) + len(_MARKER) + 1)
        return _KINDS[fields["kind"]](fields["message"], code=fields["code"], param=fields["param"])
    for prefix, kind in _RUNTIME_PREFIXES.items():
        if text.startswith(prefix):
            return kind(text.removeprefix(prefix).strip())
    return Internal(text)


def _bounded(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[:most]}…"
