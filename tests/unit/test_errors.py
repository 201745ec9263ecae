"""Errors keep their kind, message and code on their way through the runtime."""

from common.errors import Internal, InvalidRequest, NotFound, PipelineError, Unavailable, from_exception

import pytest


@pytest.mark.parametrize(
    "error",
    [
        InvalidRequest('no {such} "thing": \n\\', param="messages[0]", code="c"),
        NotFound("x"),
        Unavailable("Ünïcode"),
        Internal(""),
        InvalidRequest("x" * 500, param="y" * 100),
    ],
)
def test_a_pipeline_error_survives_any_number_of_hops(error: PipelineError) -> None:
    text = str(error)
    for _ in range(3):
        text = f"Internal: ValueError: {text}"
    again = from_exception(ValueError(text))
    assert type(again) is type(error)
    assert (again.message, again.param, again.code) == (error.message, error.param, error.code)


@pytest.mark.parametrize("letter", ["x", "\x01", "日", "😀"])
def test_a_long_one_is_shortened_to_what_the_runtime_carries(letter: str) -> None:
    error = InvalidRequest(letter * 100_000, param=letter * 100_000)
    assert len(str(error).encode()) < 4096 - 200
    again = from_exception(ValueError(f"Internal: ValueError: {error}"))
    assert (type(again), again.message, again.param) == (InvalidRequest, error.message, error.param)


def test_one_that_was_cut_on_the_way_is_still_an_error() -> None:
    assert type(from_exception(ValueError(str(NotFound("x" * 100))[:60]))) is Internal


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("Unavailable: Stream ended before generation completed", Unavailable),
        ("InvalidRequest: Request payload is too large for this deployment", InvalidRequest),
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
