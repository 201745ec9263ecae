"""Has the runtime hang its spans below one of ours.

The runtime takes a parent from nothing but the NATS headers of a request that it receives; a Context that is made in
Python has none, and no call gives it one. So the frontend sends a request to an endpoint of its own, with the header
that it wants, and goes on with the Context that arrives there: from then on the runtime passes the trace on itself.

This speaks the runtime's wire format, as it is in version 1.6.1. Where that fails, the runtime's spans are missing from
the trace, and nothing else.
"""

import asyncio
import json
import logging
import os
import struct
import uuid
from collections.abc import AsyncIterator
from urllib.parse import urlsplit

from common import tracing
from common.messages import EndpointSpec, Message
from common.service import Service

from dynamo.runtime import Context, DistributedRuntime, Endpoint

log = logging.getLogger(__name__)

SECONDS = 0.5  # that a request may wait for its parent
PAUSE_SECONDS = 30.0  # before the next one waits, once that was in vain


class Nothing(Message):
    """What the request says, and its answer."""


TRACE = EndpointSpec("frontend", "trace", Nothing, Nothing)


class RuntimeParent:
    """Gives the Context of a request a parent that the runtime knows."""

    def __init__(self, runtime: DistributedRuntime, service: Service) -> None:
        """To be made before `service` serves. Without traces it does nothing."""
        self._expected: dict[str, asyncio.Future[Context]] = {}
        self._nats: asyncio.StreamWriter | None = None
        self._pings: asyncio.Task[None] | None = None
        self._sink: asyncio.Server | None = None
        self._connecting = asyncio.Lock()
        self._not_before = 0.0
        self._endpoint: Endpoint | None = None
        if tracing.on():
            endpoint = self._endpoint = runtime.endpoint(TRACE.path)
            service.add_served(endpoint, TRACE, lambda: endpoint.serve_endpoint(self._arrived))
            service.background(self._closed_at_the_end())

    async def given(self, context: Context, stage: tracing.Stage) -> Context:
        """The same request as a Context whose parent is `stage`, as far as that can be had."""
        now = asyncio.get_running_loop().time
        if self._endpoint is None or not stage.sampled or now() < self._not_before:
            return context
        name = uuid.uuid4().hex
        arrival = self._expected[name] = asyncio.get_running_loop().create_future()
        try:
            async with asyncio.timeout(SECONDS):
                await self._send(name, self._endpoint, stage.traceparent)
                child: Context = (await arrival).detached(context.id())
        except (OSError, TimeoutError) as error:
            log.warning("traces are without the runtime's spans for now: NATS does not hand on their parent: %r", error)
            self._not_before = now() + PAUSE_SECONDS
            return context
        finally:
            del self._expected[name]
        for key, value in context.metadata.items():
            child.metadata[key] = value
        return child

    async def _closed_at_the_end(self) -> None:
        """Runs until cancelled, then closes the connections."""
        try:
            await asyncio.Event().wait()
        finally:
            if self._sink:
                self._sink.close()
            if self._nats and self._pings:
                self._pings.cancel()
                self._nats.close()

    async def _arrived(self, request: object, context: Context) -> AsyncIterator[object]:
        if (arrival := self._expected.get(context.id())) and not arrival.done():
            arrival.set_result(context)
        return
        yield  # never

    async def _send(self, name: str, endpoint: Endpoint, traceparent: str) -> None:
        """Publish a request as the runtime does: two parts, what it is and what it says, each after its length."""
        async with self._connecting:
            if self._nats is None or self._nats.is_closing():
                await self._connect()
        assert self._nats and self._sink
        host, port = self._sink.sockets[0].getsockname()
        answers = {"address": f"{host}:{port}", "subject": name, "context": name, "stream_type": "response"}
        control = {
            "id": name,
            "request_type": "single_in",
            "response_type": "many_out",
            "payload_codec": "msgpack",
            "connection_info": {"transport": "tcp_server", "info": json.dumps(answers)},
        }
        what, says = json.dumps(control).encode(), b"\x80"  # an empty map
        body = struct.pack(">QQQ", len(what), len(says), 0) + what + says
        headers = f"NATS/1.0\r\ntraceparent: {traceparent}\r\n\r\n".encode()
        namespace, component, endpoint_name = TRACE.path.split(".")
        subject = f"{namespace}_{component}.{endpoint_name}-{endpoint.connection_id():x}"
        sizes = f"{len(headers)} {len(headers) + len(body)}"
        self._nats.write(f"HPUB {subject} _INBOX.{name} {sizes}\r\n".encode() + headers + body + b"\r\n")

    async def _connect(self) -> None:
        """A connection to NATS, and a port that takes the answers, which are empty."""
        if self._sink is None:
            self._sink = await asyncio.get_running_loop().create_server(asyncio.Protocol, "127.0.0.1", 0)
        server = os.environ.get("NATS_SERVER", "nats://127.0.0.1:4222").split(",")[0].strip()
        url = urlsplit(server if "//" in server else f"//{server}")
        reader, self._nats = await asyncio.open_connection(url.hostname, url.port or 4222)
        login = {
            "user": url.username or os.environ.get("NATS_AUTH_USERNAME"),
            "pass": url.password or os.environ.get("NATS_AUTH_PASSWORD"),
            "auth_token": os.environ.get("NATS_AUTH_TOKEN"),
        }
        options = {"verbose": False, "headers": True, **{key: value for key, value in login.items() if value}}
        self._nats.write(f"CONNECT {json.dumps(options)}\r\n".encode())
        self._pings = asyncio.create_task(_answer_pings(reader, self._nats))


async def _answer_pings(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    async for line in reader:
        if line.startswith(b"PING"):
            writer.write(b"PONG\r\n")
    writer.close()
