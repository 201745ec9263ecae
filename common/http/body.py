"""The body of a request: JSON, whatever its content-type says, and only what a message of the pipeline can carry."""

import asyncio
import zlib
from collections.abc import AsyncGenerator, Callable, Coroutine
from typing import Any

from common.errors import Cancelled, InvalidRequest

import msgspec
from fastapi import HTTPException, Request, Response
from fastapi.routing import APIRoute
from starlette.requests import ClientDisconnect

MAX_BYTES = 32 * 2**20  # the largest message that launch.sh lets through NATS
MAX_DEPTH = 64  # of lists and objects: more than any conversation needs, less than any library minds
THREAD_BYTES = 2**18  # a body from this size on is decoded beside the event loop
_TOO_LARGE = f"the request body has more than {MAX_BYTES} bytes"
_TOO_DEEP = f"the request body is nested more than {MAX_DEPTH} levels deep"


class JsonRoute(APIRoute):
    """A route whose body is read by `decode`. FastAPI alone takes numbers and half characters that no message can
    carry, and refuses a body without the content-type that curl users forget."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handler = super().get_route_handler()

        async def handle(request: Request) -> Response:
            headers = [header for header in request.scope["headers"] if header[0] != b"content-type"]
            scope = {**request.scope, "headers": [*headers, (b"content-type", b"application/json")]}
            return await handler(_JsonRequest(scope, request.receive))

        return handle


class _JsonRequest(Request):
    async def stream(self) -> AsyncGenerator[bytes, None]:
        size = 0
        try:
            async for part in super().stream():
                size += len(part)
                if size > MAX_BYTES:
                    raise HTTPException(413, _TOO_LARGE)
                yield part
        except ClientDisconnect as error:
            raise Cancelled("the caller went away") from error

    async def json(self) -> Any:
        body, encoding = await self.body(), self.headers.get("content-encoding", "identity").lower()
        if len(body) < THREAD_BYTES:
            return decode(body, encoding)
        return await asyncio.to_thread(decode, body, encoding)


def decode(body: bytes, encoding: str = "identity") -> dict[str, Any]:
    """The JSON object in a body. Raises InvalidRequest if there is none, or no message can carry it."""
    try:
        decoded: dict[str, Any] = msgspec.json.decode(_unpacked(body, encoding), type=dict[str, Any])
    except msgspec.ValidationError as error:
        raise InvalidRequest(f"the request body must be a JSON object: {error}") from error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise InvalidRequest(f"the request body is not valid JSON: {error}") from error
    except RecursionError as error:
        raise InvalidRequest(_TOO_DEEP) from error
    check_portable(decoded)
    return decoded


def check_portable(value: object, depth: int = MAX_DEPTH) -> None:
    """Raises InvalidRequest for JSON that no message can carry."""
    if isinstance(value, dict | list):
        if not depth:
            raise InvalidRequest(_TOO_DEEP)
        for child in value.values() if isinstance(value, dict) else value:
            check_portable(child, depth - 1)
    elif isinstance(value, int) and not -(2**63) <= value < 2**64:
        raise InvalidRequest("the request body has an integer of more than 64 bits")


def _unpacked(body: bytes, encoding: str) -> bytes:
    """A body as it was before `encoding`. Raises InvalidRequest if it is not so encoded, HTTPException if it is too
    large."""
    if encoding == "identity":
        return body
    if encoding not in ("gzip", "deflate"):
        raise InvalidRequest(f"content-encoding {encoding} is not supported; there are gzip, deflate and none")
    try:
        decompressor = zlib.decompressobj(wbits=zlib.MAX_WBITS | 32)
        unpacked = decompressor.decompress(body, MAX_BYTES + 1)
    except zlib.error as error:
        raise InvalidRequest(f"the request body is not encoded as content-encoding says: {error}") from error
    if len(unpacked) > MAX_BYTES:
        raise HTTPException(413, _TOO_LARGE)
    if not decompressor.eof:
        raise InvalidRequest("the request body is not encoded as content-encoding says: it ends too early")
    return unpacked
