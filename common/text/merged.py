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
        try:
            async with aclosing(stream):
                async for read_item in stream:
                    items.put_nowait(read_item)
        finally:
            items.put_nowait(None)

    reading = [asyncio.create_task(read(stream)) for stream in streams]
    try:
        ended = 0
        while ended < len(reading):
            item = await items.get()
            if item is not None:
                yield item
                continue
            ended += 1
            for task in reading:
                if task.done():
                    task.result()
    finally:
        for task in reading:
            task.cancel()
        await asyncio.gather(*reading, return_exceptions=True)
