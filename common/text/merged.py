"""Several streams as one."""

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import TypeVar

Item = TypeVar("Item")


async def merged(streams: Sequence[AsyncGenerator[Item]]) -> AsyncGenerator[Item]:
    """Yield what comes from any of `streams`, as it comes. Raises what the first one raises that fails, and ends all.

    One alone costs nothing more.
    """
    if len(streams) == 1:
        async with aclosing(streams[0]) as only:
            async for one in only:
                yield one
        return
    items: asyncio.Queue[Item | None] = asyncio.Queue()

    async def read(stream: AsyncGenerator[Item]) -> None:
        async with aclosing(stream):
            async for read_item in stream:
                items.put_nowait(read_item)

    reading = [asyncio.create_task(read(stream)) for stream in streams]
    over = asyncio.gather(*reading)  # once all have ended, or one has failed
    over.add_done_callback(lambda _: items.put_nowait(None))
    try:
        while (item := await items.get()) is not None:
            yield item
        over.result()
    finally:
        for task in reading:
            task.cancel()
        await asyncio.gather(over, *reading, return_exceptions=True)
