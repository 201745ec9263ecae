"""Publishing on ZMQ what routers want to know of an engine: KV events, which can be asked for again, and load.

SGLang and Dynamo's simulated engine publish their own KV events; this is for an engine that you write yourself.
"""

import time
from collections import deque
from collections.abc import AsyncIterator, Sequence

from common.engines.ports import bindable
from common.kv_events import END_OF_REPLAY
from common.messages import BlockRemoved, BlockStored, KvEvent, KvEventBatch, LoadStat, WorkerInfo

import msgspec
import zmq
import zmq.asyncio

KEPT_BATCHES = 10_000  # batches kept for replay, as in SGLang
QUEUED_BATCHES = 100_000  # batches that wait for a slow reader before it loses some, as in SGLang


class KvEventPublisher:
    """Tells routers which blocks are in an engine's KV cache, with the frames of SGLang and vLLM."""

    def __init__(self, info: WorkerInfo) -> None:
        """Bind the sockets that `info` announces. Raises zmq.ZMQError if a port is taken."""
        self._block_size = info.model.block_size
        self._kept: deque[tuple[int, bytes]] = deque(maxlen=KEPT_BATCHES)
        self._next = 0
        context = zmq.asyncio.Context.instance()
        self._live, self._replay = context.socket(zmq.PUB), context.socket(zmq.ROUTER)
        for socket, address in ((self._live, info.kv_events), (self._replay, info.kv_replay)):
            socket.set(zmq.LINGER, 0)
            socket.set(zmq.SNDHWM, QUEUED_BATCHES)
            socket.bind(bindable(address))

    async def publish_stored(
        self, token_ids: Sequence[int], block_ids: Sequence[int], parent_id: int | None = None
    ) -> None:
        """A chain of blocks is now in the cache. token_ids: of all of them, so as many as the blocks hold; block_ids:
        the engine's own, one for each; parent_id: of the block before them, None if they begin a prompt."""
        await self.publish(
            BlockStored(
                block_hashes=list(block_ids),
                parent_block_hash=parent_id,
                token_ids=list(token_ids),
                block_size=self._block_size,
            )
        )

    async def publish_removed(self, block_ids: Sequence[int]) -> None:
        """Blocks are no longer in the cache."""
        await self.publish(BlockRemoved(block_hashes=list(block_ids)))

    async def publish(self, *events: KvEvent) -> None:
        """Send what changed in one step, and keep it for those who missed it."""
        encoded = [msgspec.Raw(msgspec.msgpack.encode(event)) for event in events]
        payload = msgspec.msgpack.encode(KvEventBatch(timestamp=time.time(), events=encoded))
        number, self._next = self._next, self._next + 1
        self._kept.append((number, payload))
        await self._live.send_multipart([b"kv-events", number.to_bytes(8, "big"), payload])

    async def answer_replays(self) -> None:
        """Send past events to who asks for them. Runs until cancelled."""
        while True:
            caller, *_, start = await self._replay.recv_multipart()
            for number, payload in list(self._kept):
                if number >= int.from_bytes(start, "big"):
                    await self._replay.send_multipart([caller, b"", number.to_bytes(8, "big"), payload])
            end = END_OF_REPLAY.to_bytes(8, "big", signed=True)
            await self._replay.send_multipart([caller, b"", end, b""])


async def publish_load(info: WorkerInfo, stats: AsyncIterator[LoadStat]) -> None:
    """Publish `stats` at the address that `info` announces, framed as SGLang does, until they end."""
    with zmq.asyncio.Context.instance().socket(zmq.PUB) as socket:
        socket.set(zmq.LINGER, 0)
        socket.bind(bindable(info.load))
        sequence = 0
        async for stat in stats:
            await socket.send_multipart([b"load", sequence.to_bytes(8, "big"), msgspec.msgpack.encode(stat)])
            sequence += 1
