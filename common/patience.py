"""Waiting for a stream for as long as there is hope that it goes on."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from typing import TypeVar

from common.errors import Lost

Item = TypeVar("Item")

LOOK_SECONDS = 0.25  # between looks at a stream that is waited for

# From seconds of silence, and whether anything has come before, to why it is no use to wait on; None: it is.
Hopeless = Callable[[float, bool], str | None]


async def patient(items: AsyncIterator[Item], hopeless: Hopeless | None = None) -> AsyncGenerator[Item]:
    """Yield `items` as they come. Raises Lost, with the reason, once it is hopeless to wait for the next one.

    What the reader of this does in between is not counted as silence.
    """
    loop = asyncio.get_running_loop()
    waiting: asyncio.Task[object] | None = None
    since, begun, cancelling = 0.0, False, 0
    reason: str | None = None
    timer: asyncio.TimerHandle | None = None

    def look() -> None:
        nonlocal timer, reason
        assert hopeless
        timer = loop.call_later(LOOK_SECONDS, look)
        if waiting and not reason and (reason := hopeless(loop.time() - since, begun)):
            waiting.cancel()

    if hopeless:
        timer = loop.call_later(LOOK_SECONDS, look)
    try:
        while True:
            task = waiting = asyncio.current_task()
            assert task
            since, cancelling = loop.time(), task.cancelling()
            try:
                item = await anext(items)
            except StopAsyncIteration:
                return
            except asyncio.CancelledError:
                if reason and task.uncancel() <= cancelling:  # it was us, and nobody else
                    raise Lost(reason) from None
                raise
            finally:
                waiting = None
            begun = True
            yield item
    finally:
        if timer:
            timer.cancel()
        del items  # or a traceback that somebody keeps would hold the stream
