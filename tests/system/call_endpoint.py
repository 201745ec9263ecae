"""Streams what an endpoint answers to a request, as another Dynamo component would. Arguments: its path, and JSON."""

import argparse
import json
import sys

from common.service import parser, run

from dynamo.runtime import Context, DistributedRuntime, dynamo_worker


@dynamo_worker()
async def main(runtime: DistributedRuntime, args: argparse.Namespace) -> None:
    client = await runtime.endpoint(sys.argv[1]).client()
    await client.wait_for_instances()
    async for chunk in await client.round_robin(json.loads(sys.argv[2]), annotated=False, context=Context()):
        print(json.dumps(chunk), flush=True)


if __name__ == "__main__":
    sys.exit(run(main, parser(__doc__).parse_args([])))
