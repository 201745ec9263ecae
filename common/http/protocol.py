"""uvicorn's HTTP, with bounds on what a client may send before anything of ours sees it."""

import asyncio

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

HEADER_BYTES = 64 * 2**10  # of a request's first line and headers; nginx takes half of it
REQUEST_SECONDS = 120.0  # for a request to arrive


class BoundedProtocol(HttpToolsProtocol):
    """A connection that is closed if a request has too many headers, or takes too long to arrive."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._headers_read = 0  # bytes
        self._in_headers = True
        self._arriving: asyncio.TimerHandle | None = None
        self._begin()

    def connection_lost(self, exc: Exception | None) -> None:
        self._end()
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
