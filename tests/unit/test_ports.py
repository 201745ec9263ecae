"""Where the sockets of an engine listen."""

import socket
from pathlib import Path

from common.engines.ports import PORTS, bindable, free_ports, reserved

import pytest
import zmq


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


def test_reserved_ports_are_for_servers_that_reuse_addresses_and_nobody_else() -> None:
    with reserved(3) as ports, socket.socket() as other, zmq.Context() as context, context.socket(zmq.PUB) as publisher:
        assert len(set(ports)) == 3
        with pytest.raises(OSError, match="in use"):
            other.bind(("127.0.0.1", ports[0]))
        publisher.bind(f"tcp://127.0.0.1:{ports[0]}")
        with socket.create_server(("127.0.0.1", ports[1])) as server:
            assert server.getsockname()[1] == ports[1]


def test_whoever_reserves_at_the_same_time_gets_others(monkeypatch: pytest.MonkeyPatch) -> None:
    (port,) = free_ports(1)
    monkeypatch.setattr("common.engines.ports.PORTS", range(port, port + 3))
    with reserved(1) as first, reserved(1) as second:
        assert first != second


def test_with_none_left_it_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    (port,) = free_ports(1)
    monkeypatch.setattr("common.engines.ports.PORTS", range(port, port + 1))
    none_left = pytest.raises(OSError, match=f"no port of {port} to {port} is free")
    with socket.create_server(("127.0.0.1", port)), none_left:
        free_ports(1)


def test_no_client_can_have_taken_a_free_port_before_its_server_comes() -> None:
    """Connections get their own ports from a range of the kernel's, which may hold one that was free a moment ago."""
    kernel = Path("/proc/sys/net/ipv4/ip_local_port_range")
    first = int(kernel.read_text().split()[0]) if kernel.exists() else 49_152  # as IANA has it
    assert PORTS.stop <= first
    assert set(free_ports(50)) <= set(PORTS)
