"""Calling an endpoint of another program."""

import asyncio
import logging
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable
from contextlib import asynccontextmanager, suppress
from typing import Any, Generic, TypeVar

from common.errors import Cancelled, Internal, PipelineError, Unavailable, from_exception

import msgspec
from dynamo.runtime import Client, Context, DistributedRuntime

log = logging.getLogger(__name__)

Item = TypeVar("Item")

RETRY_SECONDS = 0.1
ATTEMPTS = 4  # that nobody answers use up the patience


class Remote(Generic[Item]):
    """An endpoint of another program, whose stream is of one type of message."""

    def __init__(self, path: str, client: Client, item: type[Item]) -> None:
        self.path = path
        self._client = client
        self._item = item

    @classmethod
    async def connect(cls, runtime: DistributedRuntime, path: str, item: type[Item]) -> "Remote[Item]":
        """Follow the instances of `path` ("namespace.component.endpoint"), of which there may be none yet."""
        return cls(path, await runtime.endpoint(path).client(), item)

    def instance_ids(self) -> list[int]:
        """The instances that are registered now."""
        return self._client.instance_ids()

    async def wait(self) -> None:
        """Return once an instance is there, saying what is being waited for."""
        while not self.instance_ids():
            log.info("waiting for %s", self.path)
            with suppress(TimeoutError):
                await asyncio.wait_for(self._client.wait_for_instances(), timeout=10)

    async def stream(self, request: object, context: Context, instance_id: int | None = None) -> AsyncGenerator[Item]:
        """Send `request` to one instance, or to the next in turn, and yield what it answers.

        Stopping `context` ends the stream at both ends. Raises PipelineError: what the other side raised, Unavailable
        if it cannot be reached, dies or gives up, Cancelled if `context` was stopped first.
        """
        try:
            # The runtime tells the other side of a stop only while it is asked for items, or when their stream is
            # dropped. It has no name here, or a traceback that somebody keeps would hold it.
            async for item in await self._send(msgspec.to_builtins(request), context, instance_id):
                yield self._decode(item)
            if context.is_stopped():  # then the stream may end as if the answer were complete
                raise Cancelled("the caller went away")
        except PipelineError:
            raise
        except Exception as error:  # the runtime raises ValueError and Exception with the kind in the text
            if context.is_stopped():
                raise Cancelled("the caller went away") from error
            known = from_exception(error)
            if isinstance(known, Cancelled):  # not by us: who answered was told to leave
                raise Unavailable(f"{self.path} gave the request up") from error
            raise known from error

    async def _send(self, body: object, context: Context, instance_id: int | None) -> Any:
        """The stream of answers. Fails if nobody took the request."""
        if instance_id is not None:
            return await self._client.direct(body, instance_id, annotated=False, context=context)
        # Each one that fails has died, and the runtime leaves it out of the next turns.
        for _ in self.instance_ids()[1:]:
            try:
                return await self._client.round_robin(body, annotated=False, context=context)
            except Exception as error:
                if not isinstance(from_exception(error), Unavailable):
                    raise
        return await self._client.round_robin(body, annotated=False, context=context)

    async def call(self, request: object, instance_id: int | None = None) -> Item:
        """Send `request` and return the one message that answers it."""
        async with self.open(request, instance_id) as first:
            return first

    @asynccontextmanager
    async def open(
        self, request: object, instance_id: int | None = None, *, patience: float = 0.0
    ) -> AsyncIterator[Item]:
        """Send `request`, hand out the first message of the answer, and keep the stream open for as long as the block
        runs: the other side sees when it ends, however it ends.

        patience: seconds to go on asking while nobody answers: a program that was restarted is back by then. One that
        was killed with our request in its hands never answers, so each attempt gets a part of it.
        """
        now = asyncio.get_running_loop().time
        deadline = now() + patience
        while True:
            began = now()
            context = Context(uuid.uuid4().hex)
            items = self.stream(request, context, instance_id)
            try:
                try:
                    first = await self._within(patience / ATTEMPTS, anext(items))
                except StopAsyncIteration:
                    raise Internal(f"{self.path} answered nothing") from None
                except Unavailable as error:
                    if error.code or began >= deadline:  # with a code, somebody was reached and said so
                        raise
                    await asyncio.sleep(RETRY_SECONDS)
                    continue
                yield first
                return
            finally:
                context.stop_generating()
                await items.aclose()

    async def _within(self, seconds: float, answer: Awaitable[Item]) -> Item:
        """Wait for an answer for so long; 0 is for ever. Raises Unavailable if it does not come."""
        try:
            async with asyncio.timeout(seconds or None):
                return await answer
        except TimeoutError:
            raise Unavailable(f"{self.path} does not answer") from None

    def _decode(self, item: object) -> Item:
        try:
            return msgspec.convert(item, self._item)
        except msgspec.ValidationError as error:
            raise Internal(f"{self.path} sent a message that is not a {self._item.__name__}: {error}") from error
