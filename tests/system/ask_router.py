"""Asks the router where prompts would go and why. Prints a line of JSON for each: the decision, or its error.

Reads JSON [token ids, ...] from the command line.
"""

import json
import sys

from common.errors import PipelineError
from common.messages import FindWorkerRequest, RoutingDecision
from common.remote import Remote

import msgspec
import uvloop
from dynamo.llm import compute_block_hash_for_seq
from dynamo.runtime import DistributedRuntime, dynamo_worker

BLOCK_SIZE = 16


@dynamo_worker()
async def main(runtime: DistributedRuntime) -> None:
    router = await Remote.connect(runtime, "inference.router.find_worker", RoutingDecision)
    await router.wait()
    for tokens in json.loads(sys.argv[2]):
        request = FindWorkerRequest(
            block_hashes=compute_block_hash_for_seq(tokens, BLOCK_SIZE),
            tokens=len(tokens),
            block_size=BLOCK_SIZE,
            model=sys.argv[1],
            explain=True,
        )
        try:
            print(msgspec.json.encode(await router.call(request)).decode(), flush=True)
        except PipelineError as error:
            print(json.dumps(error.body), flush=True)


if __name__ == "__main__":
    uvloop.run(main())
