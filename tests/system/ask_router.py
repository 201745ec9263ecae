"""Asks the router where prompts would go and why. Prints a line of JSON for each: the decision, or its error.

Arguments: the model's name, and JSON [token ids, ...].
"""

import argparse
import json
import sys

from common.errors import PipelineError
from common.messages import FIND_WORKER, FindWorkerRequest, ModelIdentity
from common.remote import Remote
from common.service import parser, run

from dynamo.llm import compute_block_hash_for_seq
from dynamo.runtime import DistributedRuntime, dynamo_worker

BLOCK_SIZE = 16


@dynamo_worker()
async def main(runtime: DistributedRuntime, args: argparse.Namespace) -> None:
    router = Remote(FIND_WORKER, await runtime.endpoint(FIND_WORKER.path).client())
    await router.wait()
    for tokens in json.loads(sys.argv[2]):
        request = FindWorkerRequest(
            model=ModelIdentity(name=sys.argv[1], block_size=BLOCK_SIZE),
            local_hashes=compute_block_hash_for_seq(tokens, BLOCK_SIZE),
            tokens=len(tokens),
            explain=True,
        )
        try:
            print(json.dumps((await router.call(request)).encode()), flush=True)
        except PipelineError as error:
            print(json.dumps(error.body), flush=True)


if __name__ == "__main__":
    sys.exit(run(main, parser(__doc__).parse_args([])))
