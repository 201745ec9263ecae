"""The kinds of error that a caller can tell apart, over HTTP and on their way there.

Between our programs an error travels as the last message of a stream (`Failure` in messages.py). What the runtime
itself raises is text with a prefix for its kind; `from_exception` makes one of the kinds below of it.
"""

from typing import Any, ClassVar

_MAX_MESSAGE, _MAX_PARAM = 500, 100  # characters: a client's mistake can be as long as its request


class StartupError(Exception):
    """A program cannot start; the message says what to do about it. `run` prints it and ends with 1."""


class PipelineError(Exception):
    """Something that went wrong, said so that the caller can act on it.

    message: what happened and what to do about it; code: OpenAI's machine-readable code, if it has one;
    param: the field of the request that is at fault.
    """

    kind: ClassVar[str] = "internal"
    http_status: ClassVar[int] = 500
    openai_type: ClassVar[str] = "server_error"
    retry_seconds: int | None = None  # after which asking again may help

    def __init__(
        self, message: str, *, code: str | None = None, param: str | None = None, retry_seconds: int | None = None
    ) -> None:
        self.message = _bounded(message, _MAX_MESSAGE)
        super().__init__(self.message)
        self.code = code
        self.retry_seconds = retry_seconds or self.retry_seconds
        self.param = param and _bounded(param, _MAX_PARAM)

    @property
    def body(self) -> dict[str, Any]:
        """OpenAI's error body."""
        fields = {"message": self.message, "type": self.openai_type, "param": self.param, "code": self.code}
        return {"error": fields}

    @property
    def headers(self) -> dict[str, str]:
        """The HTTP headers that go with it."""
        return {} if self.retry_seconds is None else {"retry-after": str(self.retry_seconds)}


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
    http_status = 503
    openai_type = "rate_limit_error"
    retry_seconds = 1


class Unavailable(PipelineError):
    """Nobody serves this now, or whoever did has died."""

    kind = "unavailable"
    http_status = 503
    openai_type = "service_unavailable"
    retry_seconds = 1


class Unreachable(Unavailable):
    """Nobody took the request, or whoever did has died before it answered: asking another one may help at once."""


class Abandoned(Unreachable):
    """Whoever had taken the request leaves, or has gone, before it was done: another one can go on with it."""


class Lost(Abandoned):
    """Whoever had taken the request died, or hangs, before it was done."""


class Cancelled(PipelineError):
    """The caller went away."""

    kind = "cancelled"
    http_status = 499
    openai_type = "cancelled"


class Internal(PipelineError):
    """A fault of this pipeline."""


KINDS: dict[str, type[PipelineError]] = {
    kind.kind: kind for kind in (InvalidRequest, NotFound, Overloaded, Unavailable, Cancelled, Internal)
}

# How the text of the runtime's own errors begins, and of what a worker that is not ours raises.
_RUNTIME_PREFIXES: dict[str, type[PipelineError]] = {
    "InvalidRequest:": InvalidRequest,
    "invalid type:": InvalidRequest,  # a number that MessagePack has no room for
    "NotFound:": NotFound,
    "Unavailable:": Unreachable,
    "Cancelled:": Cancelled,
}


def from_exception(error: Exception) -> PipelineError:
    """The typed error behind whatever a call to another program raised."""
    if isinstance(error, PipelineError):
        return error
    text = str(error)
    for prefix, kind in _RUNTIME_PREFIXES.items():
        if text.startswith(prefix):
            return kind(text.removeprefix(prefix).strip())
    return Internal(text)


def _bounded(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[:most]}…"
