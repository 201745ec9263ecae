"""Lines of text or JSON, of which a request has one for each stage, and under load not all have one."""

import io
import json
import logging
import sys
from collections.abc import Iterator
from datetime import datetime
from typing import Any

from common import log as logs

import pytest
from dynamo.runtime import Context
from hypothesis import example, given
from hypothesis import strategies as st

MINE = Context("x", {"x-request-id": "mine"})


@pytest.fixture
def logger() -> Iterator[logging.Logger]:
    """The loggers of our own code, set up as a program does it, and afterwards as they were."""
    names = ("__main__", "common", "uvicorn.error", "asyncio")
    before = {name: (one.level, one.propagate, one.handlers[:]) for name in names if (one := logging.getLogger(name))}
    yield logging.getLogger("common.somewhere")
    for name, (level, propagate, handlers) in before.items():
        one = logging.getLogger(name)
        one.setLevel(level)
        one.propagate = propagate
        one.handlers[:] = handlers


def written(monkeypatch: pytest.MonkeyPatch, level: str = "info", form: str = "text") -> io.StringIO:
    stream = io.StringIO()
    monkeypatch.setattr("sys.stderr", stream)
    monkeypatch.setattr("sys.argv", ["/somewhere/router.py"])
    logs.set_up(level, form)
    return stream


def test_a_line_says_when_how_bad_and_who(logger: logging.Logger, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = written(monkeypatch)
    logger.warning("oh %s", "dear")
    assert stream.getvalue().endswith(" WARNING router: oh dear\n")


def test_a_request_is_pairs_of_names_and_values(logger: logging.Logger, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = written(monkeypatch)
    logs.log_request(logger, MINE, "GET /x", worker="0", overlap=3, none=None)
    logs.log_request(logger, MINE, worker="my own", error="no")
    first, second = stream.getvalue().splitlines()
    assert first.endswith(" router: GET /x request_id=mine worker=0 overlap=3")
    assert second.endswith(' router: request_id=mine worker="my own" error="no"')


@pytest.mark.parametrize("value", ["a\nb", "a\rb", 'a"b', "a b=c", "", "\x1b[31m", "\u2028x"])
def test_no_value_can_look_like_a_line_or_field_of_its_own(
    value: str, logger: logging.Logger, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = written(monkeypatch)
    logs.log_request(logger, MINE, worker=value)
    (line,) = stream.getvalue().splitlines()
    assert json.loads(line.partition("worker=")[2]) == value
    assert line.isascii()


@given(st.text(st.characters(codec="utf-16") | st.sampled_from("\n\r\x00\x1b\x7f\x85\x9b\u2028\u2029\u202e\ud800")))
@example("x" * 10**6)
def test_nothing_that_a_client_sends_begins_another_line_or_reaches_the_terminal(text: str) -> None:
    for form, formatter in (("text", logs._Text("router")), ("json", logs._Json("router"))):
        try:
            raise ValueError(text)
        except ValueError:
            record = logging.makeLogRecord({"msg": "a %s", "args": (text,), "exc_info": sys.exc_info()})
        first, *rest = formatter.format(record).split("\n")
        assert len(first) < 20 * logs.MAX_LINE
        assert all(line.isprintable() for line in (first, *rest))
        assert (form == "text") or (not rest and json.loads(first)["message"] == f"a {text}"[: logs.MAX_LINE])
        assert all(line.startswith("    ") for line in rest)


def test_json_has_an_object_a_line(logger: logging.Logger, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = written(monkeypatch, form="json")
    logs.log_request(logger, MINE, "GET /x", overlap=3)
    logger.info("worker %s left", "0")
    try:
        raise ValueError("no")
    except ValueError:
        logger.exception("failed")
    first, second, third = map(json.loads, stream.getvalue().splitlines())
    known: dict[str, Any] = {"level": "info", "program": "router", "message": "GET /x"}
    assert first == {"time": first["time"], **known, "request_id": "mine", "overlap": 3}
    assert datetime.fromisoformat(first["time"]).tzinfo
    assert (second["message"], "request_id" in second) == ("worker 0 left", False)
    assert third["traceback"].endswith("ValueError: no")


class TestUnderLoad:
    def test_some_requests_have_a_line_and_the_next_one_says_how_many_had_none(
        self, logger: logging.Logger, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        kept = [passes(at=100.0 + number / 1000) for number in range(50)]
        assert kept == [None] * 50  # each of its own filter
        thinned = logs.Thinned(20)
        lines = [passes(thinned, at=100.0 + number / 1000) for number in range(50)]
        assert lines == [None] * 20 + [False] * 30
        assert passes(thinned, at=101.0) == 30
        assert passes(thinned, at=101.1) is None

    def test_those_that_failed_are_not_lost_among_the_others(self) -> None:
        thinned = logs.Thinned(2)
        assert [passes(thinned, at=1.0) for _ in range(3)] == [None, None, False]
        assert [passes(thinned, at=1.0, error="no") for _ in range(3)] == [None, None, False]

    def test_what_is_no_line_of_a_request_or_worse_than_info_passes(self) -> None:
        thinned = logs.Thinned(0)
        assert thinned.filter(logging.makeLogRecord({"levelno": logging.INFO}))
        assert thinned.filter(logging.makeLogRecord({"levelno": logging.ERROR, "fields": {}}))

    def test_debug_has_them_all(self, logger: logging.Logger, monkeypatch: pytest.MonkeyPatch) -> None:
        stream = written(monkeypatch, level="debug")
        for _ in range(100):
            logs.log_request(logger, MINE)
        assert len(stream.getvalue().splitlines()) == 100


def passes(thinned: logs.Thinned | None = None, *, at: float, **fields: object) -> int | bool | None:
    """Whether a line about a request at this time passes: False, or how many it says were left out."""
    record = logging.makeLogRecord({"levelno": logging.INFO, "created": at, "msg": "x", "fields": dict(fields)})
    if not (thinned or logs.Thinned()).filter(record):
        return False
    left_out: int | None = record.__dict__["fields"].get("left_out")
    assert record.getMessage() == ("x" if left_out is None else f"x left_out={left_out}")
    return left_out
