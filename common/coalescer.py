"""Tokens that come close together go on together: what costs on the way to a client is messages, not tokens.

SGLang's engine does so with its own, and the processor with those of engines that send each token alone.
"""

import argparse
import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing

from common.messages import EngineOutput

# For each message: three times what it takes of both sides, so that most of their time is left.
MESSAGE_SECONDS = 0.0002


class Coalescer:
    """Gathers the tokens of each stream for a while: for longer, the more streams there are, so that there is time for
    a message of each."""

    def __init__(self, milliseconds: float) -> None:
        """milliseconds: how long at least; 0 gathers nothing."""
        self._seconds = milliseconds / 1000
        self._streams = 0

    @staticmethod
    def add_option(options: argparse.ArgumentParser) -> None:
        """Add the option that says for how long."""
        options.add_argument(
            "--coalesce-ms", type=float, default=15.0, help="tokens that come within so long go on together; 0: at once"
        )

    async def coalesced(self, outputs: AsyncGenerator[EngineOutput]) -> AsyncGenerator[EngineOutput]:
        """Yield the first of `outputs` at once, and then from time to time what has come since. Nobody waits for the
        last one. Raises what `outputs` raises, after all that came before.

        They are read as they come, however slow the reader of this is.
        """
        self._streams += 1
        try:
            async with aclosing(self._gathered(outputs) if self._seconds else outputs) as stream:
                async for output in stream:
                    yield output
        finally:
            self._streams -= 1

    async def _gathered(self, outputs: AsyncGenerator[EngineOutput]) -> AsyncGenerator[EngineOutput]:
        loop = asyncio.get_running_loop()
        gathered: EngineOutput | None = None
        due = loop.time()  # when it may go on
        ready = asyncio.Event()
        timer: asyncio.TimerHandle | None = None

        async def read() -> None:
            nonlocal gathered, timer
            async with aclosing(outputs):
                async for output in outputs:
                    if gathered:
                        gathered.extend(output)
                    else:
                        gathered = output
                        timer = loop.call_at(due, ready.set) if loop.time() < due else None
                    if output.finish_reason or not timer:
                        ready.set()

        reading = asyncio.create_task(read())
        reading.add_done_callback(lambda _: ready.set())
        try:
            while gathered or not reading.done():
                await ready.wait()
                ready.clear()
                if gathered:
                    output, gathered = gathered, None
                    due = loop.time() + max(self._seconds, self._streams * MESSAGE_SECONDS)
                    yield output
            reading.result()
        finally:
            if timer:
                timer.cancel()
            reading.cancel()
            await asyncio.gather(reading, return_exceptions=True)
