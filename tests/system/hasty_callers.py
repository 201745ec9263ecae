"""Asks the router for workers, and is gone at any moment between the question and the answer. Prints how many times."""

import argparse
import asyncio
import random
import sys
import uuid
from contextlib import aclosing

from common.errors import Cancelled
from common.messages import FIND_WORKER, WORKERS, FindWorkerRequest, WorkersRequest
from common.remote import Remote
from common.service import parser, run

from dynamo.runtime import Context, DistributedRuntime, dynamo_worker

CALLERS = 16
QUESTIONS = 200  # of each
SECONDS = 0.006  # after which the latest has left


@dynamo_worker()
async def main(runtime: DistributedRuntime, args: argparse.Namespace) -> None:
    router = Remote(FIND_WORKER, await runtime.endpoint(FIND_WORKER.path).client())
    status = Remote(WORKERS, await runtime.endpoint(WORKERS.path).client())
    await status.wait()
    model = (await status.call(WorkersRequest())).workers[0].model
    assert model

    async def ask() -> int:
        context = Context(uuid.uuid4().hex)
        asyncio.get_running_loop().call_later(random.uniform(0, SECONDS), context.stop_generating)
        try:
            request = FindWorkerRequest(model=model, local_hashes=[1, 2, 3], tokens=60)
            async with aclosing(router.stream(request, context)) as decisions:
                async for _ in decisions:
                    pass
        except Cancelled:
            return 1
        return 0

    async def ask_on() -> int:
        return sum([await ask() for _ in range(QUESTIONS)])

    print(sum(await asyncio.gather(*(ask_on() for _ in range(CALLERS)))), flush=True)
    runtime.shutdown()


if __name__ == "__main__":
    sys.exit(run(main, parser(__doc__).parse_args([])))
