"""uvicorn's HTTP, with bounds on what a client may send before anything of ours sees it, and what it may not read."""

import asyncio
import logging

from common.patience import Ticker

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

log = logging.getLogger(__name__)

HEADER_BYTES = 64 * 2**10  # of a request's first line and headers; nginx takes half of it
REQUEST_SECONDS = 120.0  # for a request to arrive
UNREAD_BYTES = 4 * 2**20  # of an answer that goes on, which its client has not read yet
UNREAD_SECONDS = 60.0  # for a client to read more of an answer that is complete
LOOK_SECONDS = 0.25  # between looks at how much is unread


class BoundedProtocol(HttpToolsProtocol):
    """A connection that is closed if a request has too many headers or takes too long to arrive, or an answer to leave.

    Nobody waits for a client to read. Whoever did would not read from the processor that makes the answer either, and
    that one could then send nothing to anybody.
    """

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._headers_read = 0  # bytes
        self._in_headers = True
        self._arriving: asyncio.TimerHandle | None = None
        self._leaving: Ticker | None = None
        self._begin()

    def connection_lost(self, exc: Exception | None) -> None:
        self._end()
        self.resume_writing()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        self._begin()
        if self._in_headers:
            self._headers_read += len(data)
        super().data_received(data)
        if self._in_headers and self._headers_read > HEADER_BYTES:
            self._refuse(b"431 Request Header Fields Too Large")

    def on_headers_complete(self) -> None:
        self._in_headers = False
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        self._in_headers, self._headers_read = True, 0
        self._end()
        super().on_message_complete()

    def pause_writing(self) -> None:
        """Much is unread."""
        self._unread, self._read_at = 0, self.loop.time()
        self._leaving = Ticker(LOOK_SECONDS, self._check_unread)

    def resume_writing(self) -> None:
        """It is read, or will never be."""
        if self._leaving:
            self._leaving.cancel()

    def _check_unread(self) -> None:
        unread, before = self.transport.get_write_buffer_size(), self._unread
        self._unread = unread
        goes_on = self.cycle and not self.cycle.response_complete
        if goes_on or unread < before:
            self._read_at = self.loop.time()
        if (goes_on and unread > UNREAD_BYTES) or self.loop.time() > self._read_at + UNREAD_SECONDS:
            log.info("a client that leaves %d bytes unread is hung up on", unread)
            self.transport.abort()

    def _begin(self) -> None:
        if not self._arriving:
            self._arriving = self.loop.call_later(REQUEST_SECONDS, self._refuse, b"408 Request Timeout")

    def _end(self) -> None:
        if self._arriving:
            self._arriving.cancel()
            self._arriving = None

    def _refuse(self, status: bytes) -> None:
        if self._in_headers:  # else there is a handler, which hears that its client is gone
            self.transport.write(b"HTTP/1.1 " + status + b"\r\nconnection: close\r\ncontent-length: 0\r\n\r\n")
        self.transport.close()
