"""An answer as server-sent events."""

import asyncio
from collections.abc import AsyncIterator

from common.errors import Internal, PipelineError
from common.http.exchange import Exchange
from common.http.forms import Form
from common.openai_api import ChatCompletionChunk

import msgspec
from fastapi import Request, Response
from starlette.types import Message as ASGIMessage
from starlette.types import Receive, Scope, Send

COMMENT = b": the answer is being made\n\n"


class EventStream(Response):
    """Writes events as chunks come. Once it has begun, an error can only be one of them."""

    def __init__(
        self,
        chunks: AsyncIterator[ChatCompletionChunk],
        exchange: Exchange,
        form: Form,
        *,
        include_usage: bool,
        keepalive_seconds: float,
    ) -> None:
        """keepalive_seconds: after so long without an event comes a comment, so that no proxy takes the connection for
        dead; 0: never."""
        headers = {"content-type": "text/event-stream", "cache-control": "no-cache", "x-accel-buffering": "no"}
        super().__init__(headers=headers)
        del self.headers["content-length"]
        self._chunks = chunks
        self._exchange = exchange
        self._form = form
        self._include_usage = include_usage
        self._keepalive_seconds = keepalive_seconds
        self._quiet = False  # whether nothing was written since the last look

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Begin once it is clear who answers, or after some time even so. Raises PipelineError before that."""
        first = asyncio.create_task(self._next())
        try:
            async with self._exchange.stopped_on_disconnect(Request(scope, receive)):
                await asyncio.wait([first], timeout=self._keepalive_seconds or None)
                if first.done():
                    first.result()  # an error now has a status
                self.headers.update(self._exchange.answer_headers)
                await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
                await self._write_all(first)
        finally:
            first.cancel()

    async def _next(self) -> ChatCompletionChunk:
        return self._exchange.noted(await anext(self._chunks))

    async def _write_all(self, first: asyncio.Task[ChatCompletionChunk]) -> None:
        keeping_alive = asyncio.create_task(self._keep_alive())
        try:
            await self._write_events(first)
            await self._write(b"", more=False)
        finally:
            keeping_alive.cancel()

    async def _write_events(self, first: asyncio.Task[ChatCompletionChunk]) -> None:
        try:
            if not first.done():
                await self._write(COMMENT)
            await self._write_chunk(await first)
            async for chunk in self._chunks:
                await self._write_chunk(self._exchange.noted(chunk))
            self._exchange.check_finished()
            await self._write(b"data: [DONE]\n\n")
        except PipelineError as error:
            self._exchange.error = error
            await self._write(event(error.body))
        except Exception as error:  # a fault of this program, which the log will name
            await self._write(event(Internal(f"{type(error).__name__}: {error}").body))
            raise

    async def _write_chunk(self, chunk: ChatCompletionChunk) -> None:
        if self._include_usage:
            chunk.usage = chunk.usage or None
        elif not chunk.choices:
            return
        await self._write(b"".join(map(event, self._form.events(chunk))))

    async def _write(self, part: bytes, *, more: bool = True) -> None:
        """Send a part past the layers of the application, of which each would cost time per event."""
        self._quiet = False
        message: ASGIMessage = {"type": "http.response.body", "body": part, "more_body": more}
        await self._exchange.send(message)

    async def _keep_alive(self) -> None:
        while self._keepalive_seconds:
            self._quiet = True
            await asyncio.sleep(self._keepalive_seconds)
            if self._quiet:
                await self._write(COMMENT)


def event(data: object) -> bytes:
    """A server-sent event."""
    return b"data: " + msgspec.json.encode(data) + b"\n\n"
