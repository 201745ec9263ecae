"""TCP ports for the sockets of a process that does not take "any free port" for an answer."""

import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from urllib.parse import urlsplit

LOCAL = ("127.0.0.1", "localhost")


def loopback(address: str) -> str:
    """How a process reaches its own socket, whatever address it tells others ("tcp://host:port")."""
    return f"tcp://127.0.0.1:{port_of(address)}"


def bindable(address: str) -> str:
    """Where a process listens that others reach at "tcp://host:port": for this machine alone if that is how only
    it calls itself, else on all addresses, because others may know it by a name that it does not have here."""
    return loopback(address) if urlsplit(address).hostname in LOCAL else f"tcp://*:{port_of(address)}"


def port_of(address: str) -> int:
    """The port of "tcp://host:port"."""
    return int(address.rpartition(":")[2])


@contextmanager
def reserved(count: int) -> Iterator[list[int]]:
    """`count` free ports, given to nobody else while the block runs.

    They are bound, not listened on, with SO_REUSEADDR: so a server that sets it too, as ZMQ does, can listen on them
    already, while the kernel hands them to no one who asks for any port.
    """
    with ExitStack() as stack:
        ports = []
        for _ in range(count):
            holder = stack.enter_context(socket.socket())
            holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            holder.bind(("", 0))
            ports.append(holder.getsockname()[1])
        yield ports


def free_ports(count: int) -> list[int]:
    """`count` ports that are free now, for servers that are about to start."""
    with reserved(count) as ports:
        return ports
