"""The life of a program: wait for NATS and etcd, serve endpoints, drain on a signal, leave.

Every program begins with `run` and serves inside `Program`:

    @dynamo_worker()
    async def main(runtime: DistributedRuntime, args: argparse.Namespace) -> None:
        async with Program(runtime, args) as program:
            program.add("inference.stage.work", handler, WorkRequest)
            await program.serve()
            await program.stopped()

All endpoints are made before the first is served. `runtime.endpoint` holds Python's lock while it waits for the
runtime's threads; once requests arrive, those wait for that lock in turn, and the process would stand still for good.
"""

import argparse
import asyncio
import logging
import os
import signal
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar
from urllib.parse import urlsplit

from common.errors import Cancelled, Internal, InvalidRequest, PipelineError
from common.remote import Remote

import msgspec
import uvloop
from dynamo.runtime import Context, DistributedRuntime, Endpoint

log = logging.getLogger(__name__)

REGISTER_SECONDS = 0.02  # between looks at whether etcd knows us
LAST_WORDS_SECONDS = 1.0  # that a request which is cut off has to tell its caller

Request = TypeVar("Request")
Handler = Callable[[Request, Context], AsyncIterator[object]]


class Formatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows the docstring of the program as it stands, and every default."""


def parser(description: str | None) -> argparse.ArgumentParser:
    """A command line with the options that all programs have."""
    arguments = argparse.ArgumentParser(description=description, formatter_class=Formatter)
    arguments.add_argument(
        "--drain-seconds", type=float, default=30.0, help="on SIGTERM, how long to wait for requests in progress"
    )
    arguments.add_argument("--log-level", default="info", choices=["debug", "info", "warning", "error"])
    return arguments


def run(main: Callable[[argparse.Namespace], Awaitable[None]], args: argparse.Namespace) -> None:
    """Run a `@dynamo_worker` main to its end, once NATS and etcd can be reached."""
    _log_to_stderr(args.log_level.upper())
    for number in (signal.SIGTERM, signal.SIGINT):  # nothing is served yet, so nothing has to be finished
        signal.signal(number, lambda *_: sys.exit(0))

    async def when_ready() -> None:
        if os.environ["DYN_REQUEST_PLANE"] == "nats":
            await _reachable("NATS", os.environ.get("NATS_SERVER", "nats://127.0.0.1:4222"))
        if os.environ["DYN_DISCOVERY_BACKEND"] == "etcd":
            await _reachable("etcd", os.environ.get("ETCD_ENDPOINTS", "http://127.0.0.1:2379"))
        await main(args)

    uvloop.run(when_ready())


def _log_to_stderr(level: str) -> None:
    """Our own loggers get a handler of their own: SGLang resets the root's."""
    program = os.path.basename(sys.argv[0]).removesuffix(".py")
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter(f"%(asctime)s %(levelname)s {program}: %(message)s"))
    for name in ("__main__", "common"):
        logger = logging.getLogger(name)
        logger.setLevel(level)
        logger.addHandler(handler)
        logger.propagate = False


async def _reachable(name: str, addresses: str) -> None:
    """Return once one of the comma-separated URLs accepts connections."""
    attempt = 0
    while True:
        for address in addresses.split(","):
            url = urlsplit(address.strip() if "//" in address else f"//{address.strip()}")
            try:
                _, writer = await asyncio.open_connection(url.hostname, url.port)
            except OSError:
                continue
            writer.close()
            return
        if attempt % 20 == 0:
            log.info("waiting for %s at %s", name, addresses)
        attempt += 1
        await asyncio.sleep(0.5)


class Program:
    """The endpoints that one process serves, from registration to the last answer."""

    def __init__(self, runtime: DistributedRuntime, args: argparse.Namespace) -> None:
        self.runtime = runtime
        self._drain_seconds: float = args.drain_seconds
        self._stop = asyncio.Event()
        self._hurry = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()
        self._in_progress: set[Context] = set()
        self._failed = False
        self._added: list[tuple[str, Endpoint, Callable[[], Awaitable[Any]]]] = []
        self._endpoints: list[Endpoint] = []
        self._served: list[asyncio.Future[Any]] = []
        self._background: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> "Program":
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, self.stop)
        return self

    def add(self, path: str, handler: Handler[Request], request: type[Request]) -> None:
        """Serve `path` ("namespace.component.endpoint") with `handler`, an asynchronous generator that gets a decoded
        `request` and yields messages. It begins with `serve`."""

        async def answer(body: object, context: Context) -> AsyncIterator[object]:
            with self.in_progress(context):
                try:
                    async for message in handler(_decode(body, request), context):
                        yield msgspec.to_builtins(message)
                except Cancelled:
                    if self.stopping:  # it was us, so the caller must not take it for the end of the answer
                        raise
                except PipelineError as error:
                    # Expected; yet the runtime prints it, so without what led to it.
                    raise error.with_traceback(None) from None
                except Exception as error:
                    log.exception("request %s failed", request_id(context))
                    raise Internal(f"{path} failed: {type(error).__name__}: {error}") from error

        endpoint = self.runtime.endpoint(path)
        self._added.append((path, endpoint, lambda: self._register(endpoint, answer)))

    def add_served(self, path: str, serve: Callable[[], Awaitable[Any]]) -> None:
        """Have `path` served by `serve`, which registers it and answers its requests in its own way."""
        self._added.append((path, self.runtime.endpoint(path), serve))

    async def serve(self) -> None:
        """Return once everything that was added is registered, in that order. If serving ends before it was asked to,
        this program stops with an error."""
        for path, endpoint, serve in self._added:
            future = asyncio.ensure_future(serve())
            future.add_done_callback(self._served_ended)
            self._served.append(future)
            client = await endpoint.client()
            while endpoint.connection_id() not in client.instance_ids() and not self.stopping:
                await asyncio.sleep(REGISTER_SECONDS)
            log.info("serving %s as instance %d", path, endpoint.connection_id())

    def _register(self, endpoint: Endpoint, answer: Any) -> Awaitable[Any]:
        self._endpoints.append(endpoint)
        return endpoint.serve_endpoint(answer)

    def background(self, work: Coroutine[Any, Any, None]) -> None:
        """Run `work` beside the endpoints until this program leaves. It must not end before."""
        task = asyncio.create_task(work)
        task.add_done_callback(self._served_ended)
        self._background.append(task)

    def _served_ended(self, future: asyncio.Future[Any]) -> None:
        error = None if future.cancelled() else future.exception()
        if not self.stopping:
            log.error("stopping: %r", error or "no longer served; was the connection to etcd lost?")
            self._failed = True
            self.stop()

    @contextmanager
    def in_progress(self, context: Context) -> Iterator[None]:
        """Marks a request that a stopping program waits for; when it has waited enough, it stops `context`."""
        self._in_progress.add(context)
        self._idle.clear()
        try:
            yield
        finally:
            self._in_progress.remove(context)
            if not self._in_progress:
                self._idle.set()

    def stop(self) -> None:
        """Begin to leave. A second call leaves without waiting for requests in progress."""
        if self._stop.is_set():
            self._hurry.set()
        self._stop.set()

    async def needs(self, *remotes: Remote[Any]) -> None:
        """Say what this program is waiting for, until it is there or it is time to leave."""
        for remote in remotes:
            await _first(None, remote.wait(), self.stopped())

    @property
    def stopping(self) -> bool:
        return self._stop.is_set()

    async def stopped(self) -> None:
        """Return when it is time to leave: a signal came, or serving failed."""
        await self._stop.wait()

    async def __aexit__(self, *_: object) -> None:
        self._stop.set()
        await self._drain()
        for task in self._background:
            task.cancel()
        self.runtime.shutdown()
        if self._served:
            await asyncio.wait(self._served, timeout=5)
        log.info("left")
        if self._failed:
            sys.exit(1)

    async def _drain(self) -> None:
        """Take this process out of discovery, then wait for the requests in progress, and cut off what is left."""
        for endpoint in self._endpoints:
            await endpoint.unregister_endpoint_instance()
        if self._in_progress:
            log.info("left discovery; finishing %d requests", len(self._in_progress))
        await _first(self._drain_seconds, self._idle.wait(), self._hurry.wait())
        if self._in_progress:
            log.warning("%d requests are cut off", len(self._in_progress))
            for context in self._in_progress:
                context.stop_generating()
            await _first(LAST_WORDS_SECONDS, self._idle.wait())


async def _first(seconds: float | None, *events: Coroutine[Any, Any, object]) -> None:
    """Return when the first of `events` has happened, or after `seconds`."""
    tasks = [asyncio.create_task(event) for event in events]
    await asyncio.wait(tasks, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
    for task in tasks:
        task.cancel()


def request_id(context: Context) -> str:
    """The id that the caller knows the request by."""
    return context.metadata.get("x-request-id") or context.id()


def _decode(body: object, request: type[Request]) -> Request:
    try:
        return msgspec.convert(body, request)
    except msgspec.ValidationError as error:
        raise InvalidRequest(f"not a {request.__name__}: {error}") from error
