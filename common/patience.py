"""Waiting for a stream for as long as there is hope that it goes on."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from typing import Generic, TypeVar

from common.errors import Lost

Item = TypeVar("Item")

LOOK_SECONDS = 0.25  # between looks at a stream that is waited for

# From seconds of silence, and whether anything has come before, to why it is no use to wait on; None: it is.
Hopeless = Callable[[float, bool], str | None]


class Question(Generic[Item]):
    """What many want to know: asked once for all of them, and again only if the answer is older than they like."""

    def __init__(self, ask: Callable[[], Awaitable[Item]]) -> None:
        self._ask = ask
        self._asking: asyncio.Task[Item] | None = None
        self._answered_at = 0.0  # on the loop's clock

    def within(self, seconds: float) -> asyncio.Task[Item]:
        """What is being asked, or was answered less than so long ago; else it is asked now. Wait for it with `shield`:
        others may do so too."""
        now = asyncio.get_running_loop().time()
        if self._asking is None or (self._asking.done() and now - self._answered_at >= seconds):
            self._asking = asyncio.create_task(self._answer())
        return self._asking

    async def _answer(self) -> Item:
        answer = await self._ask()
        self._answered_at = asyncio.get_running_loop().time()
        return answer


class Ticker:
    """Calls `do` again and again, until it is cancelled.

    A function that set its own timer would hold itself: for each request there would be one, and what it knows, that
    only the garbage collector could free.
    """

    def __init__(self, seconds: float, do: Callable[[], None]) -> None:
        self._seconds = seconds
        self._do = do
        self._timer = asyncio.get_running_loop().call_later(seconds, self._tick)

    def _tick(self) -> None:
        self._timer = asyncio.get_running_loop().call_later(self._seconds, self._tick)
        self._do()

    def cancel(self) -> None:
        self._timer.cancel()


async def patient(items: AsyncIterator[Item], hopeless: Hopeless | None = None) -> AsyncGenerator[Item]:
    """Yield `items` as they come. Raises Lost, with the reason, once it is hopeless to wait for the next one.

    What the reader of this does in between is not counted as silence.
    """
    loop = asyncio.get_running_loop()
    waiting: asyncio.Task[object] | None = None
    since, begun, cancelling = 0.0, False, 0
    reason: str | None = None

    def look() -> None:
        nonlocal reason
        assert hopeless
        if waiting and not reason and (reason := hopeless(loop.time() - since, begun)):
            waiting.cancel()

    ticker = Ticker(LOOK_SECONDS, look) if hopeless else None
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
        if ticker:
            ticker.cancel()
        del items  # or a traceback that somebody keeps would hold the stream
