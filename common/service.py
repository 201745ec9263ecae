"""The life of a program: wait for NATS and etcd, serve endpoints, drain on a signal, leave.

Every program begins with `run` and serves inside `Service`:

    @dynamo_worker()
    async def main(runtime: DistributedRuntime, args: argparse.Namespace) -> None:
        async with Service(runtime, drain_seconds=args.drain_seconds) as service:
            service.add(runtime.endpoint(FIND_WORKER.path), FIND_WORKER, handler)
            await service.serve()
            await service.stopped()

    if __name__ == "__main__":
        sys.exit(run(main, parser(__doc__).parse_args()))

Endpoints and clients are made before `serve`. Made later, `runtime.endpoint` would hold Python's lock while it waits
for the runtime's threads, which wait for that lock with the requests that have arrived, and the process would stand
still.
"""

import argparse
import asyncio
import gc
import ipaddress
import logging
import os
import re
import signal
import sys
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any, NoReturn, cast
from urllib.parse import SplitResult, urlsplit

from common import metrics, tracing
from common.errors import Cancelled, Internal, PipelineError, StartupError
from common.log import add_options, log_request, names, set_up
from common.messages import ALIVE, Answer, EndpointSpec, Failure, Request, TokenMessage
from common.patience import Ticker
from common.remote import Remote

import uvloop
from dynamo.runtime import Context, DistributedRuntime, Endpoint

log = logging.getLogger(__name__)

ALIVE_SECONDS = 1.0  # of silence, after which callers hear that a handler still works
REGISTER_SECONDS = 0.02  # between looks at whether etcd knows us
GARBAGE_OBJECTS = 50_000  # allocated and not freed, before a collection of the young ones
LOOK_SECONDS = 0.05  # between looks at whether requests are still in progress
LAST_WORDS_SECONDS = 1.0  # for a request that is cut off to send its error
LEAVE_SECONDS = 5.0  # for the runtime to shut down its endpoints
GREETING_SECONDS = 2.0  # for a server to take a connection, and to say its first word
UNREGISTER_SECONDS = 2.0  # for etcd to take an endpoint out of discovery

# What Dynamo reads when its runtime is made.
_RUNTIME_DEFAULTS = {
    "DYN_REQUEST_PLANE": "nats",
    "DYN_DISCOVERY_BACKEND": "etcd",
    "DYN_EVENT_PLANE": "nats",
    "DYN_SYSTEM_HOST": "127.0.0.1",  # of the port for metrics: the runtime's own default is all addresses
    # Seconds that etcd may be silent or this machine asleep, at worst half as many, before a program loses its place
    # and with it all that it has loaded. That one is dead, its callers notice much sooner.
    "ETCD_LEASE_TTL": "90",
    # To a server that takes connections, but not ours. Without a word for two minutes, by the runtime's own default.
    "NATS_STARTUP_CONNECT_TIMEOUT_SECONDS": "10",
    "ETCD_STARTUP_CONNECT_TIMEOUT_SECONDS": "10",
}
_PEM = ("ETCD_AUTH_CA", "ETCD_AUTH_CLIENT_CERT", "ETCD_AUTH_CLIENT_KEY")
# What to look at when the runtime cannot use one of them.
_HINTS = {
    "NATS": "are NATS_SERVER, NATS_AUTH_USERNAME and NATS_AUTH_PASSWORD (or NATS_AUTH_TOKEN, NATS_AUTH_NKEY, "
    "NATS_AUTH_CREDENTIALS_FILE) right, and for tls:// NATS_TLS_CA_CERT_PATH?",
    "etcd": "are ETCD_ENDPOINTS, ETCD_AUTH_USERNAME and ETCD_AUTH_PASSWORD right? For https:// it takes all of "
    f"{', '.join(_PEM)}, and no user.",
}

Handler = Callable[[Request, Context], AsyncIterator[Answer]]


class Formatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows the docstring of the program as it stands, and the defaults that say something."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        says_nothing = action.default is None or action.default is False or action.default == []
        return action.help if says_nothing else super()._get_help_string(action)


def parser(description: str | None) -> argparse.ArgumentParser:
    """A command line with the options that all programs have."""
    arguments = argparse.ArgumentParser(description=description, formatter_class=Formatter)
    arguments.add_argument(
        "--drain-seconds", type=float, default=30.0, help="on SIGTERM, how long to wait for requests in progress"
    )
    add_options(arguments)
    return arguments


# Names the core that a program has to itself. Its threads take turns at Python's lock: on one core they hand it over at
# no cost, across cores each hand-over wakes another one, which took three quarters of the CPU time on a machine of 16.
CORE = "PIPELINE_CORE"


def run(main: Callable[[argparse.Namespace], Awaitable[None]], args: argparse.Namespace) -> int:
    """Run a `@dynamo_worker` main to its end, once NATS and etcd can be reached. Returns the exit code."""
    set_up(args.log_level, args.log_format)
    _set_environment()
    for number in (signal.SIGTERM, signal.SIGINT):  # nothing is served yet, so nothing has to be finished
        signal.signal(number, lambda *_: sys.exit(0))

    everywhere = os.sched_getaffinity(0)
    if core := os.environ.get(CORE):
        os.sched_setaffinity(0, {int(core)})  # before the runtime starts its threads, which inherit it

    async def when_ready() -> None:
        if core:  # what is computed beside the event loop may use the others
            executor = ThreadPoolExecutor(initializer=os.sched_setaffinity, initargs=(0, everywhere))
            asyncio.get_running_loop().set_default_executor(executor)
        if os.environ["DYN_REQUEST_PLANE"] == "nats":
            await until_reachable("NATS", _nats_server())
        if os.environ["DYN_DISCOVERY_BACKEND"] == "etcd":
            await until_reachable("etcd", os.environ.get("ETCD_ENDPOINTS", "http://127.0.0.1:2379"))
        try:
            await main(args)
        except Exception as error:  # of the runtime, which names its servers in these words
            if type(error) is not Exception or not (named := re.search("etcd|nats|CA cert", str(error), re.IGNORECASE)):
                raise
            raise StartupError(f"{error}: {_HINTS['etcd' if named[0] == 'etcd' else 'NATS']}") from error

    try:
        with tracing.exporting():
            uvloop.run(when_ready())
    except StartupError as error:
        log.error("%s", error)
        return 1
    return 0


def _set_environment() -> None:
    """Say what the runtime reads there, but leave what is said already."""
    for name, value in _RUNTIME_DEFAULTS.items():
        os.environ.setdefault(name, value)
    if all(is_loopback(url.hostname or "") for url in _urls(_nats_server())):  # who asks us is on this machine
        os.environ.setdefault("DYN_TCP_RESPONSE_STREAM_HOST", "127.0.0.1")
    for name in _PEM:  # Dynamo's documentation wants a path there, its runtime what is in the file
        with suppress(OSError):
            os.environ[name] = Path(os.environ.get(name, "")).read_text()


def _nats_server() -> str:
    return os.environ.get("NATS_SERVER", "nats://127.0.0.1:4222")


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches an address."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _urls(addresses: str) -> list[SplitResult]:
    return [urlsplit(one if "//" in one else f"//{one}") for one in map(str.strip, addresses.split(","))]


async def until_reachable(name: str, addresses: str) -> None:
    """Return once one of the comma-separated URLs accepts connections. Without a port, they are those of `name`.

    Raises StartupError for what the runtime could not use.
    """
    default_port = {"NATS": 4222, "etcd": 2379}[name]
    if "@" in addresses:
        raise StartupError(f"the runtime takes no password from the address of {name}: {_HINTS[name]}")
    attempt = 0
    while True:
        for url in _urls(addresses):
            try:
                async with asyncio.timeout(GREETING_SECONDS):
                    reader, writer = await asyncio.open_connection(url.hostname, url.port or default_port)
                    # NATS speaks first. The runtime would not survive to be told that it must speak TLS.
                    greeting = await reader.readline() if name == "NATS" and url.scheme != "tls" else b""
                    writer.close()
            except OSError:
                continue
            if b'"tls_required":true' in greeting:
                raise StartupError(f"NATS at {url.netloc} wants TLS: write tls:// and not nats:// into NATS_SERVER")
            return
        if attempt % 20 == 0:
            log.info("waiting for %s at %s", name, addresses)
        attempt += 1
        await asyncio.sleep(0.5)


class Service:
    """The endpoints that one process serves, from registration to the last answer."""

    def __init__(self, runtime: DistributedRuntime, *, drain_seconds: float) -> None:
        self._runtime = runtime
        self._drain_seconds = drain_seconds
        self._stop = asyncio.Event()
        self._hurry = asyncio.Event()
        self._in_progress: set[Context] = set()
        self._failure: str | None = None
        self._added: list[tuple[str, Endpoint, Callable[[], Awaitable[Any]]]] = []
        self._registered: list[Endpoint] = []
        self._served: list[asyncio.Future[Any]] = []
        self._background: list[asyncio.Task[None]] = []
        self.registry = metrics.registry()  # what this program tells Prometheus, besides what the runtime does
        self.model: str | None = None  # a label of what the runtime tells of its endpoints, as Dynamo's workers have it

    async def __aenter__(self) -> "Service":
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, self.stop)
        return self

    def add(
        self,
        endpoint: Endpoint,
        spec: EndpointSpec[Request, Answer],
        handler: Handler[Request, Answer],
    ) -> None:
        """Serve `endpoint` with `handler`, an asynchronous generator that gets a request and yields messages, both of
        the types that `spec` names. It begins with `serve`."""

        many = issubclass(spec.answer, TokenMessage)

        # The runtime looks for parameters of these very names.
        async def answer(body: object, context: Context) -> AsyncGenerator[object]:
            with self.in_progress(context):
                try:
                    with tracing.span(spec.path, context, kind="server") as span:
                        generator = cast(AsyncGenerator[Answer], handler(spec.request.decode(body), context))
                        async with aclosing(generator if many else span.until_first(generator)) as messages:
                            async for message in messages:
                                yield message.encode()
                except PipelineError as error:
                    level = logging.ERROR if isinstance(error, Internal) else logging.INFO
                    log_request(log, context, level=level, kind=error.kind, error=error.message)
                    # One that was cancelled by us must not look like the end of the answer.
                    if self.stopping or not isinstance(error, Cancelled):
                        yield Failure.of(error).encode()
                except Exception as error:
                    log.exception("%s failed", names(context))
                    yield Failure.of(Internal(f"{spec.path} failed: {type(error).__name__}: {error}")).encode()

        async def push(body: object, context: Context, response_sender: Any) -> AsyncIterator[object]:
            send = response_sender.send
            with _alive(send) if spec.alive else nullcontext(send) as send:
                async with aclosing(answer(body, context)) as messages:
                    async for message in messages:
                        try:
                            send(message)
                        except RuntimeError:  # the caller is gone
                            return
            return
            yield  # never: what the runtime wants is a generator all the same

        # To be asked for each message costs twice as much as to send it. But `send` waits, and with it this whole
        # program, once a caller is some megabytes behind, so it is for what comes slowly and in small messages.
        handle = push if many else answer
        self._added.append((spec.path, endpoint, lambda: self._register(endpoint, handle)))

    def _register(self, endpoint: Endpoint, answer: Any) -> Awaitable[Any]:
        self._registered.append(endpoint)
        return endpoint.serve_endpoint(answer, metrics_labels=[("model", self.model)] if self.model else None)

    def add_served(self, endpoint: Endpoint, spec: EndpointSpec[Any, Any], serve: Callable[[], Awaitable[Any]]) -> None:
        """Have `endpoint` served by `serve`, which registers it and answers its requests in its own way."""
        self._added.append((spec.path, endpoint, serve))

    async def serve(self) -> None:
        """Return once everything that was added is registered, in that order. If serving ends before it was asked to,
        this program stops with an error."""
        DistributedRuntime.endpoint = _too_late  # type: ignore[method-assign]
        self._show_metrics()
        for path, endpoint, serve in self._added:
            if self.stopping:
                return
            future = asyncio.ensure_future(serve())
            future.add_done_callback(self._on_end)
            self._served.append(future)
            client = await endpoint.client()
            while endpoint.connection_id() not in client.instance_ids() and not self.stopping:
                await asyncio.sleep(REGISTER_SECONDS)
            log.info("serving %s as instance %d", path, endpoint.connection_id())
        self._runtime.set_health_status(True)  # which the system port says
        # What is there now stays. To look through it for garbage takes 0.2 s on a free core, and seconds on a busy one,
        # in which Python's lock is held, so that no thread of the runtime can hand over a message.
        gc.collect()
        gc.freeze()
        # Requests in progress are thousands of objects, and few of them are in cycles: by default, looking through them
        # takes a tenth of the time.
        gc.set_threshold(GARBAGE_OBJECTS)

    def _show_metrics(self) -> None:
        """Show them on the system port, if there is one (DYN_SYSTEM_PORT)."""
        if self._added and (address := self._runtime.system_status_server_url()):  # type: ignore[attr-defined]
            _, endpoint, _ = self._added[0]  # whose name is not on them
            endpoint.metrics.register_prometheus_expfmt_callback(lambda: metrics.text(self.registry))
            log.info("metrics at %s/metrics", address)

    def background(self, work: Coroutine[Any, Any, None]) -> None:
        """Run `work` beside the endpoints until this program leaves. It must not end before."""
        task = asyncio.create_task(work)
        task.add_done_callback(self._on_end)
        self._background.append(task)

    def _on_end(self, future: asyncio.Future[Any]) -> None:
        error = None if future.cancelled() else future.exception()
        if not self.stopping:
            self._failure = repr(error) if error else "no longer served; was the connection to etcd lost?"
            log.error("stopping: %s", self._failure)
            self.stop()

    @contextmanager
    def in_progress(self, context: Context) -> Iterator[None]:
        """Marks a request that a stopping program waits for; when it has waited enough, it stops `context`."""
        self._in_progress.add(context)
        try:
            yield
        finally:
            self._in_progress.discard(context)

    def stop(self) -> None:
        """Begin to leave. A second call leaves without waiting for requests in progress."""
        if self._stop.is_set():
            self._hurry.set()
        self._stop.set()

    async def wait_for(self, *remotes: Remote[Any, Any]) -> None:
        """Say what this program is waiting for, until it is there or it is time to leave."""
        for remote in remotes:
            await first_of(remote.wait(), self.stopped())

    @property
    def stopping(self) -> bool:
        return self._stop.is_set()

    @property
    def lost(self) -> bool:
        """Whether this program can no longer call others, because its place in etcd is lost."""
        return self._failure is not None

    async def stopped(self) -> None:
        """Return when it is time to leave: a signal came, or serving failed. A handler that holds its stream open for
        the caller's sake ends it then."""
        await self._stop.wait()

    async def __aexit__(self, *_: object) -> None:
        self._stop.set()
        await self.drain()
        for task in self._background:
            task.cancel()
        await asyncio.gather(*self._background, return_exceptions=True)
        self._runtime.shutdown()
        if self._served:
            await asyncio.wait(self._served, timeout=LEAVE_SECONDS)
        log.info("stopped")
        if self._failure:
            raise StartupError(f"ended before it was asked to: {self._failure}")

    async def drain(self) -> None:
        """Take this process out of discovery, then wait for the requests in progress, and cut off what is left."""
        self._runtime.set_health_status(False)
        registered, self._registered = self._registered, []
        for endpoint in registered if not self.lost else ():
            try:
                await asyncio.wait_for(endpoint.unregister_endpoint_instance(), UNREGISTER_SECONDS)
            except Exception as error:  # etcd may be gone; it forgets us when our lease ends
                log.warning("could not leave discovery: %r", error)
        if self._in_progress:
            log.info("left discovery; finishing %d requests", len(self._in_progress))
        await first_of(self._until(self._over), self._hurry.wait(), seconds=self._drain_seconds)
        if not self._over():
            log.warning("cutting off %d requests", sum(not context.is_stopped() for context in self._in_progress))
            for context in list(self._in_progress):
                context.stop_generating()
            await first_of(self._until(lambda: not self._in_progress), seconds=LAST_WORDS_SECONDS)

    def _over(self) -> bool:
        """Whether no request is in progress. One whose caller went away is over, whatever its handler does."""
        return all(context.is_stopped() for context in self._in_progress)

    async def _until(self, condition: Callable[[], bool]) -> None:
        while not condition():
            await asyncio.sleep(LOOK_SECONDS)


async def first_of(*events: Awaitable[object], seconds: float | None = None) -> bool:
    """Return when the first of `events` has happened, or after `seconds`; whether one has."""
    tasks = [asyncio.ensure_future(event) for event in events]
    try:
        return bool((await asyncio.wait(tasks, timeout=seconds, return_when=asyncio.FIRST_COMPLETED))[0])
    finally:
        for task in tasks:
            task.cancel()


@contextmanager
def _alive(send: Callable[[object], None]) -> Iterator[Callable[[object], None]]:
    """Send an empty message whenever nothing else was sent for a while."""
    loop = asyncio.get_running_loop()
    sent_at = loop.time()

    def send_and_note(message: object) -> None:
        nonlocal sent_at
        sent_at = loop.time()
        send(message)

    def beat() -> None:
        if loop.time() - sent_at >= ALIVE_SECONDS:
            with suppress(RuntimeError):  # the caller is gone
                send(ALIVE)

    ticker = Ticker(ALIVE_SECONDS, beat)
    try:
        yield send_and_note
    finally:
        ticker.cancel()


def _too_late(*_: object, **__: object) -> NoReturn:
    raise RuntimeError("make every endpoint and client before Service.serve(): made now, it could hang this process")
