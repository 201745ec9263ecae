"""Calling an endpoint of another program."""

import asyncio
import logging
import random
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence
from contextlib import aclosing, asynccontextmanager, suppress
from functools import partial
from typing import Any, Generic

from common.errors import (
    Abandoned,
    Cancelled,
    Internal,
    InvalidRequest,
    Lost,
    PipelineError,
    Unavailable,
    Unreachable,
    from_exception,
)
from common.messages import ALIVE, Answer, EndpointSpec, Failure, Request
from common.patience import Hopeless, patient

from dynamo.runtime import Client, Context

log = logging.getLogger(__name__)

# From an instance to whether it was heard of just now; None: nobody can say, as when NATS carries no message.
IsHeard = Callable[[int], Awaitable[bool | None]]

ACK_SECONDS = 0.5  # for an instance to take a request, where there is another one: it needs milliseconds
TRIES = 5  # times as long for one that is heard of
SUSPECT_SECONDS = 2.0  # that one is asked last which did not


@asynccontextmanager
async def linked(context: Context, number: int) -> AsyncIterator[Context]:
    """A context for one more stream of a request, which the runtime would mix up with another one of the same id.
    0 is the request's own. It stops with that one, and at the end of the block."""
    if number == 0:
        yield context
        return
    other = context.detached(f"{context.id()}-{number}")

    async def stop_together() -> None:
        await context.async_killed_or_stopped()
        other.stop_generating()

    stopping = asyncio.create_task(stop_together())
    try:
        yield other
    finally:
        stopping.cancel()
        other.stop_generating()


async def _taken(
    taking: Awaitable[Any], seconds: float | None, is_heard: Callable[[], Awaitable[bool | None]] | None
) -> Any:
    """The stream of a request, once it was taken. Raises TimeoutError if it is not in time and whoever should take it
    is not heard of, or after TRIES times as long: one with much to do may only be slow."""
    task = asyncio.ensure_future(taking)
    try:
        tries = TRIES
        while not (await asyncio.wait([task], timeout=seconds))[0]:
            heard = is_heard is not None and await is_heard()
            tries -= heard is not None
            if heard is False or not tries:
                raise TimeoutError
        return task.result()
    finally:
        task.cancel()


class Remote(Generic[Request, Answer]):
    """Dynamo's client of an endpoint, with messages and errors that have types:

    router = Remote(FIND_WORKER, await runtime.endpoint(FIND_WORKER.path).client())
    """

    def __init__(self, spec: EndpointSpec[Request, Answer], client: Client) -> None:
        self.spec = spec
        self._client = client
        self._code = "no_worker" if spec.component == "engine" else f"no_{spec.component}"  # if nobody can be reached
        self._turn = random.randrange(1000)  # so that those who start together do not ask the same ones
        self._suspected: dict[int, float] = {}  # by instance, until when, on the monotonic clock

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
        self,
        request: Request,
        context: Context,
        instance_ids: Sequence[int] | None = None,
        *,
        hopeless: Hopeless | None = None,
        ack_seconds: float | None = None,
        is_heard: IsHeard | None = None,
    ) -> AsyncGenerator[Answer]:
        """Send `request` to one of `instance_ids`, or of all instances, and yield what it answers.

        hopeless: when to give up waiting for the next message; ack_seconds: when to give up waiting for the last
        instance to take the request, by default when the runtime does so; is_heard: tells one that is slow to take it
        from one that will not.

        Stopping `context` ends the stream at both ends. Raises PipelineError: what the other side raised, Unavailable
        if it cannot be reached, dies or gives up, Cancelled if `context` was stopped first.
        """
        taken = False
        try:
            # The runtime tells the other side of a stop only while it is asked for items, or when their stream is
            # dropped. It has no name here, or a traceback that somebody keeps would hold it.
            sending = self._send(request.encode(), context, instance_ids, ack_seconds, is_heard)
            async with aclosing(patient(await sending, hopeless)) as items:
                taken = True
                async for item in items:
                    if item != ALIVE:
                        yield self._decode(item)
            if context.is_stopped():  # then the stream may end as if the answer were complete
                raise Cancelled("the caller went away")
        except Exception as error:
            if isinstance(error, PipelineError) and not isinstance(error, Cancelled | Lost):
                raise
            if context.is_stopped():
                raise Cancelled("the caller went away") from error
            known = from_exception(error)
            if isinstance(known, Cancelled):  # not by us: whoever answered was told to leave
                raise Abandoned(f"{self.spec.path} abandoned the request", code=self._code) from error
            if taken and isinstance(known, Unreachable):
                raise Lost(known.message, code=self._code) from error
            raise known from error

    async def _send(
        self,
        body: dict[str, Any],
        context: Context,
        instance_ids: Sequence[int] | None,
        ack_seconds: float | None,
        is_heard: IsHeard | None,
    ) -> Any:
        """The stream of answers. Raises Unavailable if nobody took the request."""
        choices = self.in_turn(self.instance_ids() if instance_ids is None else instance_ids)
        if not choices:
            message = f"nobody serves {self.spec.path}: no {self.spec.component} is running; try again in a moment"
            raise Unreachable(message, code=self._code)
        for instance_id in choices:
            try:
                # By its id, because what chooses among all leaves one out for seconds after a failure, also the only
                # one.
                taking = self._client.direct(body, instance_id, annotated=False, context=context)
                seconds = ack_seconds if instance_id == choices[-1] else ACK_SECONDS
                stream = await _taken(taking, seconds, partial(is_heard, instance_id) if is_heard else None)
                self._suspected.pop(instance_id, None)
                return stream
            except TimeoutError:
                known: PipelineError = Unreachable("it does not take requests")
            except Exception as error:
                known = from_exception(error)
                # One that is unavailable has died, which is no reason not to ask another.
                if not isinstance(known, Unavailable):
                    raise
            log.debug("instance %d of %s: %s", instance_id, self.spec.path, known)
            self.suspect(instance_id)
        raise Unreachable(known.message, code=self._code)

    def in_turn(self, instance_ids: Sequence[int]) -> list[int]:
        """The order in which to ask: each is first in its turn, and those under suspicion come last."""
        if len(instance_ids) < 2:
            return list(instance_ids)
        self._turn += 1
        first = self._turn % len(instance_ids)
        return sorted([*instance_ids[first:], *instance_ids[:first]], key=self.is_suspected)

    def suspect(self, instance_id: int) -> None:
        """An instance was asked and did not answer: it may hang, or be dead although etcd still lists it."""
        self._suspected[instance_id] = time.monotonic() + SUSPECT_SECONDS

    def is_suspected(self, instance_id: int) -> bool:
        """Whether that was a moment ago."""
        return self._suspected.get(instance_id, 0.0) > time.monotonic()

    async def call(self, request: Request, instance_id: int | None = None) -> Answer:
        """Send `request` and return the one message that answers it. Raises PipelineError as `stream` does."""
        context = Context()
        items = self.stream(request, context, None if instance_id is None else [instance_id])
        try:
            return await anext(items)
        except StopAsyncIteration:
            raise Internal(f"{self.spec.path} answered nothing") from None
        finally:
            context.stop_generating()
            await items.aclose()

    async def ask_all(self, request: Request, seconds: float) -> list[Answer]:
        """What the instances answer to `request`, all asked at once. One that does not in time, because it has died or
        hangs, is left out."""

        async def ask(instance_id: int) -> Answer | None:
            with suppress(PipelineError, TimeoutError):
                async with asyncio.timeout(seconds):
                    return await self.call(request, instance_id)
            return None

        return [answer for answer in await asyncio.gather(*map(ask, self.instance_ids())) if answer is not None]

    def _decode(self, item: Any) -> Answer:
        """Raises the error that `item` carries, or Internal if it is no message of this endpoint."""
        try:
            if not (isinstance(item, dict) and "error" in item):
                return self.spec.answer.decode(item)
            failure = Failure.decode(item)
        except InvalidRequest as error:
            raise Internal(f"{self.spec.path} answered with an {error}") from error
        raise failure.exception
