"""What the frontend refuses because no message can carry it."""

from common.errors import InvalidRequest
from frontend import MAX_DEPTH, check_portable

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
