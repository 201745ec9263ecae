"""Streams an answer from `inference.frontend.chat_completions`, as another Dynamo component would."""

import json
import sys

import common  # noqa: F401  sets the request plane

import uvloop
from dynamo.runtime import Context, DistributedRuntime, dynamo_worker


@dynamo_worker()
async def main(runtime: DistributedRuntime) -> None:
    client = await runtime.endpoint("inference.frontend.chat_completions").client()
    await client.wait_for_instances()
    async for chunk in await client.round_robin(json.loads(sys.argv[1]), annotated=False, context=Context()):
        print(json.dumps(chunk))


if __name__ == "__main__":
    uvloop.run(main())
