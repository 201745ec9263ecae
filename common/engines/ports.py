"""TCP ports for the sockets of a process that does not take "any free port" for an answer."""

import errno
import random
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from urllib.parse import urlsplit

LOCAL = ("127.0.0.1", "localhost")
# Below those that kernels give to whoever asks for any port, as every client does that connects to somewhere: a port
# from among these is still free when a server comes to it seconds later.
PORTS = range(20_000, 32_000)
TRIES = 1000


def loopback(address: str) -> str:
    """How a process reaches its own socket, whatever address it tells others ("tcp://host:port")."""
    return f"tcp://127.0.0.1:{urlsplit(address).port}"


def bindable(address: str) -> str:
    """Where a process listens that others reach at "tcp://host:port": for this machine alone if that is how only
    it calls itself, else on all addresses, because others may know it by a name that it does not have here."""
    url = urlsplit(address)
    return loopback(address) if url.hostname in LOCAL else f"tcp://*:{url.port}"


@contextmanager
def reserved(count: int) -> Iterator[list[int]]:
    """`count` free ports, which nobody else can reserve while the block runs. Raises OSError if there are none.

    They are bound, not listened on, and have SO_REUSEADDR since then: so a server that sets it too, as ZMQ does, can
    listen on them already.
    """
    with ExitStack() as stack:
        yield [_bind_any(stack.enter_context(socket.socket())) for _ in range(count)]


def _bind_any(holder: socket.socket) -> int:
    for port in random.SystemRandom().choices(PORTS, k=TRIES):
        try:
            holder.bind(("", port))
        except OSError as error:
            if error.errno not in (errno.EADDRINUSE, errno.EACCES):
                raise
        else:
            holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            return port
    raise OSError(errno.EADDRINUSE, f"no port of {PORTS.start} to {PORTS.stop - 1} is free")


def free_ports(count: int) -> list[int]:
    """`count` ports that are free now, for servers that are about to start."""
    with reserved(count) as ports:
        return ports
