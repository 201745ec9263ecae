"""Asks our router and Dynamo's KvRouter for the overlap of a prompt, before and after an engine has computed it."""

import argparse
import asyncio
import json
import sys

from common.messages import (
    FIND_WORKER,
    GENERATE,
    FindWorkerRequest,
    GenerateRequest,
    ModelIdentity,
    SamplingOptions,
    StopConditions,
)
from common.remote import Remote
from common.service import parser, run

from dynamo.llm import KvRouter, KvRouterConfig, compute_block_hash_for_seq
from dynamo.runtime import Context, DistributedRuntime, dynamo_worker

MODEL = "pipeline-chat"
BLOCK_SIZE = 16


@dynamo_worker()
async def main(runtime: DistributedRuntime, args: argparse.Namespace) -> None:
    tokens = json.loads(sys.argv[1])
    router = Remote(FIND_WORKER, await runtime.endpoint(FIND_WORKER.path).client())
    engines = Remote(GENERATE, await runtime.endpoint(GENERATE.path).client())
    theirs = KvRouter(runtime.endpoint(GENERATE.path), BLOCK_SIZE, KvRouterConfig())
    wanted = FindWorkerRequest(
        model=ModelIdentity(name=MODEL, block_size=BLOCK_SIZE),
        local_hashes=compute_block_hash_for_seq(tokens, BLOCK_SIZE),
        tokens=len(tokens),
    )

    async def overlaps() -> tuple[tuple[int, int], tuple[int, int]]:
        ours = await router.call(wanted)
        instance_id, _rank, blocks = await theirs.best_worker(tokens)
        return (ours.instance_id, ours.overlap_blocks), (instance_id, blocks)

    await engines.wait()
    ours, dynamo = await overlaps()
    report = {"before": {"ours": ours[1], "dynamo": dynamo[1]}}
    request = GenerateRequest(
        token_ids=tokens[:-BLOCK_SIZE],
        model=MODEL,
        stop_conditions=StopConditions(max_tokens=1),
        sampling_options=SamplingOptions(temperature=0),
    )
    async for _ in engines.stream(request, Context(), [ours[0]]):
        pass
    for _ in range(100):
        ours, dynamo = await overlaps()
        if ours[1] and dynamo[1]:
            break
        await asyncio.sleep(0.1)
    report["after"] = {"ours": ours[1], "dynamo": dynamo[1]}
    report["instance"] = {"ours": ours[0], "dynamo": dynamo[0]}
    print(json.dumps(report), flush=True)


if __name__ == "__main__":
    sys.exit(run(main, parser(__doc__).parse_args([])))
