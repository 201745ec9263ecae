"""Who may use the HTTP server: those who have a key, if there is a file of keys, and nobody for too much at once."""

import hashlib
import logging
import os
import re
import stat
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path

from common.errors import InvalidRequest, Overloaded, PipelineError, StartupError
from common.http.exchange import error_response
from common.service import is_loopback

from starlette.types import ASGIApp, Receive, Scope, Send

log = logging.getLogger(__name__)

# What needs no key, as in vLLM: probes, metrics, and what is the same in every copy of this repository.
OPEN = re.compile(r"/(live|health(/ready)?|metrics|docs(/oauth2-redirect)?|redoc|openapi\.json|page/[^/]+)?")

_KEY = re.compile(r"[!-~]+")

Guard = Callable[[ASGIApp], ASGIApp]


class Unauthorized(InvalidRequest):
    """The caller has no key that is known here."""

    http_status = 401

    def __init__(self, message: str) -> None:
        super().__init__(message, code="invalid_api_key")

    @property
    def headers(self) -> dict[str, str]:
        """Says how a key is to be sent (RFC 6750)."""
        return {"www-authenticate": "Bearer"}


class TooMany(Overloaded):
    """The caller has enough requests in progress."""

    http_status = 429


def guard(file: str | None, host: str, most: int) -> Guard:
    """What lets those pass to an application who have a key of `file`, if there is one, and less than `most` requests
    in progress, unless that is 0. Without keys, a client is an address. host: where the application is reached.

    Raises StartupError, as `read_keys` does.
    """
    if not file and not is_loopback(host):
        log.warning("whoever reaches %s may use this server and read what it shows: see --api-keys-file", host)
    keys = _Keys(file) if file else None
    return partial(_Guarded, keys=keys, most=most)


def read_keys(file: str) -> list[str]:
    """The keys in a file, one a line; empty lines count for nothing, nor do those that begin with #.

    Raises StartupError if there are none, or one that no header can carry.
    """
    try:
        lines = [line.strip() for line in Path(file).read_bytes().decode("latin-1").split("\n")]
    except OSError as error:
        raise StartupError(f"cannot read the API keys in {file} (--api-keys-file): {error.strerror}") from error
    keys = {number: line for number, line in enumerate(lines, 1) if line and not line.startswith("#")}
    for number, key in keys.items():
        if not _KEY.fullmatch(key):
            raise StartupError(f"line {number} of {file} is no API key: those are printable ASCII without spaces")
    if not keys:
        raise StartupError(f"{file} has no API keys (--api-keys-file): write one into each line")
    return list(keys.values())


class _Keys:
    """The digests of the keys in a file: how long it takes to look for one tells nothing of a key."""

    def __init__(self, file: str) -> None:
        self._file = file
        self._state = self._look()
        self._digests = self._read()

    def __contains__(self, key: str) -> bool:
        if (state := self._look()) != self._state:
            self._state = state
            try:
                self._digests = self._read()
            except StartupError as error:
                log.error("the API keys stay as they were: %s", error)
        return _digest(key) in self._digests

    def _look(self) -> tuple[int, ...]:
        """What changes with the file."""
        try:
            status = os.stat(self._file)
        except OSError:
            return ()
        return status.st_mtime_ns, status.st_size, status.st_ino

    def _read(self) -> frozenset[bytes]:
        digests = frozenset(map(_digest, read_keys(self._file)))
        if stat.S_IMODE(os.stat(self._file).st_mode) & 0o077:
            log.warning("other users of this machine have access to the API keys: chmod 600 %s", self._file)
        log.info("clients need one of %d API keys", len(digests))
        return digests


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("latin-1")).digest()


class _Guarded:
    """Answers 401 to those who have no key, and 429 to those who want too much. Stands inside of `Exchanges`, which
    gives these answers an id too."""

    def __init__(self, app: ASGIApp, keys: _Keys | None, most: int) -> None:
        self._app = app
        self._keys = keys
        self._most = most
        self._requests = Counter[str]()  # in progress, by key or address

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or OPEN.fullmatch(scope["path"]):
            await self._app(scope, receive, send)
            return
        try:
            client = self._client(scope)
        except PipelineError as error:
            scope["exchange"].error = error
            await error_response(error)(scope, receive, send)
            return
        self._requests[client] += 1
        try:
            await self._app(scope, receive, send)
        finally:
            self._requests[client] -= 1
            if not self._requests[client]:
                del self._requests[client]

    def _client(self, scope: Scope) -> str:
        """Whose request this is. Raises Unauthorized if it has no key that is known, TooMany if others are enough."""
        client: str = scope["client"][0] if scope.get("client") else ""
        if self._keys:
            scheme, _, key = scope["exchange"].headers.get("authorization", "").partition(" ")
            client = key.strip()
            if scheme.lower() != "bearer":
                raise Unauthorized("an API key is needed, in the header authorization: Bearer KEY")
            if client not in self._keys:
                raise Unauthorized("this API key is not known here")
        if 0 < self._most <= self._requests[client]:
            raise TooMany(f"{self._most} requests of yours are in progress: send more as they end")
        return client
