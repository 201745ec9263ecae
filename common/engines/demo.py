"""Dying for a demo."""

import os
import signal
from collections.abc import AsyncIterator

from common.messages import Die, DieRequest

from dynamo.runtime import Context


async def die(request: DieRequest, context: Context) -> AsyncIterator[Die]:
    """End this process as if its machine had died."""
    os.kill(os.getpid(), signal.SIGKILL)
    yield Die()
