"""Streams what an endpoint answers to a request, as another Dynamo component would. Arguments: its path, and JSON."""

import json
import sys

import common  # noqa: F401  sets the request plane

import uvloop
from dynamo.runtime import Context, DistributedRuntime, dynamo_worker


@dynamo_worker()
async def main(runtime: DistributedRuntime) -> None:
    client = await runtime.endpoint(sys.argv[1]).client()
    await client.wait_for_instances()
    async for chunk in await client.round_robin(json.loads(sys.argv[2]), annotated=False, context=Context()):
        print(json.dumps(chunk), flush=True)


if __name__ == "__main__":
    uvloop.run(main())
