"""Follows the caches of all engines over a bad network while they work, and says whether the index became what each
engine has.

Prints a line of JSON for each engine: messages dropped, blocks in its cache, blocks that it evicted, and whether the
index is equal.
"""

import argparse
import asyncio
import json
import random
import sys
import uuid
from collections.abc import AsyncIterator

from common.kv_events import KvEventStream, RemovedBlocks, Update
from common.messages import (
    CACHE,
    DESCRIBE_WORKER,
    GENERATE,
    CacheSnapshot,
    DescribeRequest,
    EngineOutput,
    GenerateRequest,
    SamplingOptions,
    SnapshotRequest,
    StopConditions,
    WorkerInfo,
)
from common.remote import Remote
from common.routing.prefix_index import PrefixIndex
from common.service import parser, run
from tests.lossy import LossyProxy
from tests.unit.stand_ins import tree_blocks

from dynamo.runtime import Context, DistributedRuntime, dynamo_worker

PATIENCE = 60.0
PROMPTS = 240
PARTS = 3  # of a prompt; each prompt begins like others


class Follower:
    """One engine, seen through a bad network."""

    def __init__(
        self,
        info: WorkerInfo,
        engines: Remote[GenerateRequest, EngineOutput],
        caches: Remote[SnapshotRequest, CacheSnapshot],
    ) -> None:
        self.info = info
        self._engines = engines
        self._caches = caches
        self._proxy = LossyProxy(info.kv_events, info.kv_replay, seed=7, rate=0.25)
        self._index = PrefixIndex()
        self._removed = 0

    async def follow(self) -> None:
        stream = KvEventStream(self._proxy.events, self._proxy.replay, self._snapshot)
        async for item, _ in self._index.follow(0, stream):
            if isinstance(item, Update):
                removed = (change for change in item.changes if isinstance(change, RemovedBlocks))
                self._removed += sum(len(change.block_ids) for change in removed)

    async def work(self, model: str, part_tokens: int) -> None:
        """Give the engine prompts that share beginnings, more than its cache can hold."""
        chance = random.Random(1)

        def part() -> list[int]:
            number = chance.randrange(6)
            return random.Random(number).choices(range(300, 1800), k=part_tokens)

        async def ask() -> None:
            tokens = [token for _ in range(PARTS - 1) for token in part()]
            tokens += chance.choices(range(300, 1800), k=part_tokens)
            request = GenerateRequest(
                token_ids=tokens,
                model=model,
                stop_conditions=StopConditions(max_tokens=4, ignore_eos=True),
                sampling_options=SamplingOptions(temperature=0),
            )
            async for _ in self._engines.stream(request, Context(uuid.uuid4().hex), [self.info.instance_id]):
                pass

        for _ in range(PROMPTS // 8):
            await asyncio.gather(*(ask() for _ in range(8)))

    async def report(self) -> dict[str, object]:
        """Whether the index becomes what the engine has, once the network is good again."""
        self._proxy.bad = False
        equal, own = False, set[int]()
        deadline = asyncio.get_running_loop().time() + PATIENCE
        while not equal and asyncio.get_running_loop().time() < deadline:
            await asyncio.sleep(0.2)
            own = {block_id async for part in self._snapshot() for chain in part.chains for block_id in chain.block_ids}
            equal = own == tree_blocks(self._index, 0)
        self._proxy.close()
        return {"dropped": self._proxy.dropped, "blocks": len(own), "removed": self._removed, "equal": equal}

    def _snapshot(self) -> AsyncIterator[CacheSnapshot]:
        return self._caches.stream(SnapshotRequest(), Context(uuid.uuid4().hex), [self.info.instance_id])


@dynamo_worker()
async def main(runtime: DistributedRuntime, args: argparse.Namespace) -> None:
    model, part_tokens = sys.argv[1], int(sys.argv[2])
    engines = Remote(GENERATE, await runtime.endpoint(GENERATE.path).client())
    describe = Remote(DESCRIBE_WORKER, await runtime.endpoint(DESCRIBE_WORKER.path).client())
    caches = Remote(CACHE, await runtime.endpoint(CACHE.path).client())
    for remote in (engines, describe, caches):
        await remote.wait()
    for instance_id in engines.instance_ids():
        follower = Follower(await describe.call(DescribeRequest(), instance_id), engines, caches)
        following = asyncio.create_task(follower.follow())
        await follower.work(model, part_tokens)
        print(json.dumps(await follower.report()), flush=True)
        following.cancel()


if __name__ == "__main__":
    sys.exit(run(main, parser(__doc__).parse_args([])))
