"""Calling an endpoint of another program."""

import asyncio
import logging
import random
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Any, Generic

from common import tracing
from common.errors import Cancelled, Internal, InvalidRequest, PipelineError, Unavailable, Unreachable, from_exception
from common.messages import Answer, EndpointSpec, Failure, Request

from dynamo.runtime import Client, Context

log = logging.getLogger(__name__)

RETRY_SECONDS = 0.1
ATTEMPTS = 4  # attempts that share the retry time


class Remote(Generic[Request, Answer]):
    """Dynamo's client of an endpoint, with messages and errors that have types:

    router = Remote(FIND_WORKER, await runtime.endpoint(FIND_WORKER.path).client())
    """

    def __init__(self, spec: EndpointSpec[Request, Answer], client: Client) -> None:
        self.spec = spec
        self._client = client

    def instance_ids(self) -> list[int]:
        """The instances that are registered now."""
        return self._client.instance_ids()

    async def wait(self) -> None:
        """Return once an instance is there, saying what is being waited for."""
        while not self.instance_ids():
            log.info("waiting for %s", self.spec.path)
            with suppress(TimeoutError):
                await asyncio.wait_for(self._client.wait_for_instances(), timeout=10)

    async def stream(
        self, request: Request, context: Context, instance_ids: Sequence[int] | None = None
    ) -> AsyncGenerator[Answer]:
        """Send `request` to one of `instance_ids`, or of all instances, and yield what it answers.

        Stopping `context` ends the stream at both ends. Raises PipelineError: what the other side raised, Unavailable
        if it cannot be reached, dies or gives up, Cancelled if `context` was stopped first.
        """
        try:
            # The runtime tells the other side of a stop only while it is asked for items, or when their stream is
            # dropped. It has no name here, or a traceback that somebody keeps would hold it.
            async for item in await self._send(request.encode(), context, instance_ids):
                yield self._decode(item)
            if context.is_stopped():  # then the stream may end as if the answer were complete
                raise Cancelled("the caller went away")
        except Exception as error:
            if isinstance(error, PipelineError) and not isinstance(error, Cancelled):
                raise
            if context.is_stopped():
                raise Cancelled("the caller went away") from error
            known = from_exception(error)
            if isinstance(known, Cancelled):  # not by us: whoever answered was told to leave
                raise Unavailable(f"{self.spec.path} abandoned the request") from error
            raise known from error

    async def _send(self, body: dict[str, Any], context: Context, instance_ids: Sequence[int] | None) -> Any:
        """The stream of answers. Raises Unavailable if nobody took the request."""
        choices = self.instance_ids() if instance_ids is None else instance_ids
        if not choices:
            name = self.spec.component
            raise self._unreachable(f"nobody serves {self.spec.path}: no {name} is running; try again in a moment")
        first = random.randrange(len(choices))
        for instance_id in (*choices[first:], *choices[:first]):
            try:
                if instance_ids is None:
                    return await self._client.round_robin(body, annotated=False, context=context)
                return await self._client.direct(body, instance_id, annotated=False, context=context)
            except Exception as error:
                known = from_exception(error)
                # One that is unavailable has died, which is no reason not to ask another.
                if not isinstance(known, Unavailable):
                    raise
        raise self._unreachable(known.message)

    def _unreachable(self, message: str) -> Unreachable:
        component = self.spec.component
        return Unreachable(message, code="no_worker" if component == "engine" else f"no_{component}")

    async def call(self, request: Request, instance_id: int | None = None) -> Answer:
        """Send `request` and return the one message that answers it. Raises PipelineError as `stream` does."""
        async with self.open(request, instance_id=instance_id) as first:
            return first

    @asynccontextmanager
    async def open(
        self,
        request: Request,
        parent: Context | None = None,
        *,
        instance_id: int | None = None,
        retry_seconds: float = 0.0,
    ) -> AsyncIterator[Answer]:
        """Send `request`, hand out the first message of the answer, and keep the stream open for as long as the block
        runs: the other side sees when it ends, however it ends. Raises PipelineError as `stream` does.

        parent: the request on whose behalf this is; its metadata and its trace go along.
        retry_seconds: how long to go on asking while nobody answers: a program that was restarted is back by then. One
        that was killed with our request in its hands never answers, so each attempt gets a part of it.
        """
        now = asyncio.get_running_loop().time
        deadline = now() + retry_seconds
        while True:
            if parent and parent.is_stopped():
                raise Cancelled("the caller went away")
            began = now()
            context = parent.detached(uuid.uuid4().hex) if parent else Context()
            items = self.stream(request, context, None if instance_id is None else [instance_id])
            try:
                try:
                    with tracing.span(self.spec.name, context, kind="client"):
                        first = await self._within(retry_seconds / ATTEMPTS, anext(items))
                except StopAsyncIteration:
                    raise Internal(f"{self.spec.path} answered nothing") from None
                except Unreachable:
                    if began >= deadline:
                        raise
                    await asyncio.sleep(RETRY_SECONDS)
                    continue
                yield first
                return
            finally:
                context.stop_generating()
                await items.aclose()

    async def _within(self, seconds: float, answer: Awaitable[Answer]) -> Answer:
        """Wait for an answer for so long; 0 is for ever. Raises Unreachable if it does not come."""
        try:
            async with asyncio.timeout(seconds or None):
                return await answer
        except TimeoutError:
            raise self._unreachable(f"{self.spec.path} does not answer") from None

    def _decode(self, item: Any) -> Answer:
        """Raises the error that `item` carries, or Internal if it is no message of this endpoint."""
        try:
            if not (isinstance(item, dict) and "error" in item):
                return self.spec.answer.decode(item)
            failure = Failure.decode(item)
        except InvalidRequest as error:
            raise Internal(f"{self.spec.path} answered with an {error}") from error
        raise failure.exception
