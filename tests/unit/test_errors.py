"""Errors keep their kind, message and code on their way from program to program."""

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

from common.errors import (
    KINDS,
    Abandoned,
    Cancelled,
    Internal,
    InvalidRequest,
    NotFound,
    Overloaded,
    PipelineError,
    Unavailable,
    Unreachable,
    from_exception,
)
from common.messages import GENERATE, EngineOutput, Failure, GenerateRequest, SamplingOptions, StopConditions
from common.remote import Remote

import pytest
from dynamo.runtime import Context


def hop(error: PipelineError) -> PipelineError:
    """The error that a caller gets when the handler that it called raised `error`."""
    sent = json.loads(json.dumps(Failure.of(error).encode()))

    class Instance:
        def instance_ids(self) -> list[int]:
            return [1]

        async def direct(self, *_: object, **__: object) -> AsyncIterator[Any]:
            async def answer() -> AsyncIterator[Any]:
                yield sent

            return answer()

    instance: Any = Instance()

    async def call() -> None:
        request = GenerateRequest(
            token_ids=[], model="m", stop_conditions=StopConditions(), sampling_options=SamplingOptions()
        )
        async for _ in Remote(GENERATE, instance).stream(request, Context("x")):
            pass

    with pytest.raises(PipelineError) as raised:
        asyncio.run(call())
    return raised.value


@pytest.mark.parametrize(
    "error",
    [
        InvalidRequest('no {such} "thing": \n\\', param="messages[0]", code="c"),
        NotFound("x"),
        Overloaded("full"),
        Unavailable("Ünïcode"),
        Internal(""),
        InvalidRequest("x" * 500, param="y" * 100),
    ],
)
def test_a_pipeline_error_survives_any_number_of_hops(error: PipelineError) -> None:
    again = error
    for _ in range(3):
        again = hop(again)
    assert type(again) is type(error)
    assert (again.message, again.param, again.code) == (error.message, error.param, error.code)


def test_one_that_asked_nobody_is_unavailable_to_whoever_asked_for_it() -> None:
    """To ask another instance at once would not help: it is not this one that nobody took the request of."""
    assert type(hop(Unreachable("nobody serves it", code="no_worker"))) is Unavailable


def test_one_that_somebody_else_cancelled_is_abandoned() -> None:
    assert type(hop(Cancelled("told to leave"))) is Abandoned


@pytest.mark.parametrize("letter", ["x", "\x01", "日", "😀"])
def test_a_long_one_is_shortened(letter: str) -> None:
    error = InvalidRequest(letter * 100_000, param=letter * 100_000)
    assert len(str(error).encode()) < 4096 - 200
    again = hop(error)
    assert (type(again), again.message, again.param) == (InvalidRequest, error.message, error.param)


def test_one_of_a_kind_that_is_not_known_here_is_still_an_error() -> None:
    failure = Failure.decode({"error": {"kind": "from the future", "message": "x", "more": 1}})
    assert type(failure.exception) is PipelineError
    assert (failure.exception.http_status, failure.exception.message) == (500, "x")


def test_a_worker_s_failure_is_one_to_dynamo_s_own_frontend_too() -> None:
    sent = Failure.of(Internal("out of memory")).encode()
    assert sent["token_ids"] == []
    assert sent["finish_reason"] == {"error": "out of memory"}
    output = {name: value for name, value in sent.items() if name != "error"}
    assert EngineOutput.decode(output).finish_reason == {"error": "out of memory"}


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("Unavailable: Stream ended before generation completed", Unreachable),
        ("InvalidRequest: Request payload is too large for this deployment", InvalidRequest),
        ("NotFound: instance_id=5 not found for endpoint", NotFound),
        ("Cancelled: the caller went away", Cancelled),
        ("Internal: RuntimeError: x", Internal),
        ("something else", Internal),
    ],
)
def test_the_runtime_s_own_errors_are_told_apart(text: str, kind: type[PipelineError]) -> None:
    assert type(from_exception(ValueError(text))) is kind


def test_body_is_openai_s() -> None:
    body = NotFound("no such model", code="model_not_found", param="model").body
    fields = {"message": "no such model", "type": "invalid_request_error", "param": "model", "code": "model_not_found"}
    assert body == {"error": fields}


def test_each_kind_says_how_http_sees_it() -> None:
    seen = {kind.kind: (kind.http_status, kind.openai_type, kind("x").headers) for kind in KINDS.values()}
    again = {"retry-after": "1"}
    assert seen == {
        "invalid_request": (400, "invalid_request_error", {}),
        "not_found": (404, "invalid_request_error", {}),
        "overloaded": (503, "rate_limit_error", again),
        "unavailable": (503, "service_unavailable", again),
        "cancelled": (499, "cancelled", {}),
        "internal": (500, "server_error", {}),
    }
