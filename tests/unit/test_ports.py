"""Where the sockets of an engine listen."""

from common.engines.ports import bindable

import pytest


@pytest.mark.parametrize(
    ("reached_at", "listens_at"),
    [
        ("tcp://127.0.0.1:5557", "tcp://127.0.0.1:5557"),
        ("tcp://localhost:5557", "tcp://127.0.0.1:5557"),
        ("tcp://192.0.2.1:5557", "tcp://*:5557"),
        ("tcp://worker-3.example.org:5557", "tcp://*:5557"),
    ],
)
def test_an_engine_for_this_machine_alone_listens_to_no_other(reached_at: str, listens_at: str) -> None:
    assert bindable(reached_at) == listens_at
