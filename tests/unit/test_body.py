"""What the frontend takes as the body of a request, and what it refuses because no message can carry it."""

import gzip
import json
import zlib
from collections.abc import AsyncIterator, Callable

from common.errors import InvalidRequest
from common.http.body import MAX_BYTES, MAX_DEPTH, check_portable
from tests.unit.door import CHAT, HELLO, Door

import httpx
import pytest


def nested(depth: int) -> object:
    value: object = 1
    for level in range(depth):
        value = [value] if level % 2 else {"x": value}
    return value


@pytest.mark.parametrize("body", [{}, {"x": [2**64 - 1, -(2**63), True, None, 1.5, "x"]}, nested(MAX_DEPTH)])
def test_portable(body: object) -> None:
    check_portable(body)


@pytest.mark.parametrize("number", [2**64, -(2**63) - 1, 10**100, 10**400])
def test_a_number_of_more_than_64_bits(number: int) -> None:
    with pytest.raises(InvalidRequest, match="64 bits"):
        check_portable({"x": [{"y": number}]})


def test_a_body_that_is_nested_too_deeply() -> None:
    with pytest.raises(InvalidRequest, match="levels deep"):
        check_portable(nested(MAX_DEPTH + 1))


class TestOverHttp:
    """What a body may be is the business of a request, whatever its headers say."""

    def test_it_may_have_any_content_type_or_none(self) -> None:
        for content_type in (None, "application/json", "application/x-www-form-urlencoded", "text/plain; charset=x"):
            headers = {"content-type": content_type} if content_type else {}
            assert Door().post(headers=headers).status_code == 200

    @pytest.mark.parametrize(
        ("encoding", "encode"),
        [("gzip", gzip.compress), ("deflate", zlib.compress), ("identity", bytes)],
    )
    def test_it_may_be_compressed(self, encoding: str, encode: Callable[[bytes], bytes]) -> None:
        door = Door()
        answer = door.post(encode(json.dumps(HELLO).encode()), headers={"content-encoding": encoding})
        assert answer.status_code == 200
        assert door.processors.requests[0].model == "m"

    @pytest.mark.parametrize(
        ("encoding", "body", "says"),
        [
            ("gzip", b"{}", "not encoded as content-encoding says"),
            ("gzip", gzip.compress(b"{}")[:5], "it ends too early"),
            ("gzip", gzip.compress(b"{}")[:-4], "it ends too early"),
            ("br", b"{}", "content-encoding br is not supported"),
        ],
    )
    def test_a_wrong_encoding(self, encoding: str, body: bytes, says: str) -> None:
        assert_refused(Door().post(body, headers={"content-encoding": encoding}), says)

    @pytest.mark.parametrize(
        ("body", "says"),
        [
            (b"", "not valid JSON"),
            (b"   ", "not valid JSON"),
            (b"{", "not valid JSON"),
            (b"[]", "must be a JSON object"),
            (b'"x"', "must be a JSON object"),
            (b"null", "must be a JSON object"),
            (b'{"seed": NaN}', "not valid JSON"),
            (b'{"seed": 1e999}', "out of range"),
            (b'{"model": "\xff"}', "not valid JSON"),
            (b'{"model": "\\ud800"}', "not valid JSON"),
            (b'{"metadata": {"x": 18446744073709551616}}', "64 bits"),
            (b'{"metadata": ' + b"[" * MAX_DEPTH + b"]" * MAX_DEPTH + b"}", "levels deep"),
            (b'{"metadata": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "levels deep"),
        ],
    )
    def test_what_no_message_can_carry(self, body: bytes, says: str) -> None:
        assert_refused(Door().post(body), says)

    def test_the_largest_one(self) -> None:
        body = json.dumps(HELLO).encode()
        assert Door().post(body + b" " * (MAX_BYTES - len(body))).status_code == 200
        assert_refused(Door().post(body + b" " * (MAX_BYTES - len(body) + 1)), "", status=413)

    def test_one_that_is_larger_than_it_says(self) -> None:
        async def parts() -> AsyncIterator[bytes]:
            yield json.dumps(HELLO).encode()
            for _ in range(33):
                yield b" " * 2**20

        assert_refused(Door().request("POST", CHAT, content=parts()), "", status=413)

    def test_one_that_is_larger_than_it_looks(self) -> None:
        bomb = gzip.compress(json.dumps(HELLO).encode() + bytes(MAX_BYTES))
        assert_refused(Door().post(bomb, headers={"content-encoding": "gzip"}), "33554432 bytes", status=413)


def assert_refused(answer: httpx.Response, says: str, *, status: int = 400) -> None:
    assert answer.status_code == status
    error = answer.json()["error"]
    assert error["type"] == "invalid_request_error"
    assert says in error["message"]
    assert answer.headers["x-request-id"]
