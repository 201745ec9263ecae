"""A bad network between a worker's event sockets and a router: it drops, doubles, delays and reorders messages."""

import asyncio
import random
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from typing import Any

import zmq
import zmq.asyncio

Send = Callable[[Sequence[bytes]], Awaitable[object]]


class LossyProxy:
    """Stands between `events` and `replay` of a worker and whoever connects to its own ones instead.

    While `bad`, each message has the chance `rate` of each misfortune.
    """

    def __init__(self, events: str, replay: str, *, seed: int, rate: float = 0.15) -> None:
        self.bad = True
        self.dropped = 0
        self._chance = random.Random(seed)
        self._rate = rate
        self._tasks: set[asyncio.Task[None]] = set()
        context = zmq.asyncio.Context.instance()
        self._sub, self._pub = context.socket(zmq.SUB), context.socket(zmq.PUB)
        self._router, self._dealer = context.socket(zmq.ROUTER), context.socket(zmq.DEALER)
        self._sub.connect(events)
        self._sub.subscribe(b"")
        self._dealer.connect(replay)
        self.events, self.replay = (
            f"tcp://127.0.0.1:{socket.bind_to_random_port('tcp://127.0.0.1')}" for socket in (self._pub, self._router)
        )
        self._client = b""
        for pump in (self._events(), self._questions(), self._answers()):
            self._start(pump)

    async def _events(self) -> None:
        while True:
            await self._pass_on(await self._sub.recv_multipart(), self._pub.send_multipart)

    async def _questions(self) -> None:
        while True:
            self._client, *question = await self._router.recv_multipart()
            await self._dealer.send_multipart(question)

    async def _answers(self) -> None:
        while True:
            answer = await self._dealer.recv_multipart()
            await self._pass_on([self._client, *answer], self._router.send_multipart)

    async def _pass_on(self, message: Sequence[bytes], send: Send) -> None:
        misfortune = self.bad and self._chance.random() / self._rate
        if not self.bad or misfortune >= 3:
            await send(message)
        elif misfortune < 1:
            self.dropped += 1
        elif misfortune < 2:
            await send(message)
            await send(message)
        else:  # and so it comes after those that follow it
            self._start(self._later(message, send))

    async def _later(self, message: Sequence[bytes], send: Send) -> None:
        await asyncio.sleep(self._chance.random() * 0.05)
        await send(message)

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def close(self) -> None:
        for task in list(self._tasks):
            task.cancel()
        for socket in (self._sub, self._pub, self._router, self._dealer):
            socket.close(0)
