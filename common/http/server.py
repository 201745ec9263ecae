"""The HTTP server, beside the endpoints of a service."""

import asyncio
import logging
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress

from common.errors import StartupError
from common.http.protocol import BoundedProtocol

import uvicorn
from starlette.types import ASGIApp

log = logging.getLogger(__name__)

ACCEPT_SECONDS = 0.05  # for connections that wait to be accepted, before the port is left
REQUEST_SECONDS = 1.0  # for a connection that was accepted at the last moment to send its request
CLOSE_SECONDS = 5  # for connections that are still busy once the requests have been answered or cut off
KEEP_ALIVE_SECONDS = 75  # idle keep-alive; longer than most clients' and proxies'
BACKLOG = 2048  # connections that may wait to be accepted


class _Server(uvicorn.Server):
    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Signals are the service's: uvicorn would take them over, and raise them again at its end."""
        yield


@asynccontextmanager
async def listening(
    app: ASGIApp, host: str, port: int, stopped: Callable[[], Awaitable[object]], *, reuse_port: bool = False
) -> AsyncIterator[None]:
    """Serve HTTP while the block runs. Raises StartupError if nothing can listen there.

    stopped: returns when the port is to be left to others. Connections that are open then are served until the block
    ends, and told to come back on a new one. reuse_port: share the port with other servers that do; the kernel gives
    each connection to one of them.
    """
    config = uvicorn.Config(
        app,
        http=BoundedProtocol,
        loop="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        proxy_headers=False,
        server_header=False,
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=CLOSE_SECONDS,
    )
    server = _Server(config)

    async def leave_port() -> None:
        await stopped()
        listener.listen(0)  # who comes now is not let in, and tries again a second later, when others have the port
        await asyncio.sleep(ACCEPT_SECONDS)
        for listening in server.servers:
            listening.close()
        listener.close()
        for headers in (config.encoded_headers, server.server_state.default_headers):
            headers.append((b"connection", b"close"))

    async def first_requests() -> None:
        """Return once all who have a connection have sent a request on it, or had the time to."""
        with suppress(TimeoutError):
            async with asyncio.timeout(REQUEST_SECONDS):
                while any(
                    isinstance(one, BoundedProtocol) and not one.cycle for one in server.server_state.connections
                ):
                    await asyncio.sleep(0.01)

    with _listener(host, port, reuse_port) as listener:
        serving = asyncio.create_task(server.serve(sockets=[listener]))
        leaving = asyncio.create_task(leave_port())
        log.info("listening on http://%s:%d", host, port)
        try:
            yield
        finally:
            leaving.cancel()
            await first_requests()
            for connection in list(server.server_state.connections):
                connection.shutdown()  # the server itself would look for its end only a moment later
            server.should_exit = True
            await serving


def _listener(host: str, port: int, reuse_port: bool) -> socket.socket:
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family, backlog=BACKLOG, reuse_port=reuse_port)
    except (OSError, OverflowError) as error:  # the latter is said of a port that no machine has
        raise StartupError(f"cannot listen on {host}:{port} (--host, --port): {error}") from error
