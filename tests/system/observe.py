"""Writes down every load report of every engine, as a line of JSON."""

import argparse
import asyncio
import json
import sys

from common.kv_events import load_stats
from common.messages import DESCRIBE_WORKER, DescribeRequest, WorkerInfo
from common.remote import Remote
from common.service import parser, run

from dynamo.runtime import DistributedRuntime, dynamo_worker


async def observe(info: WorkerInfo) -> None:
    async for stat in load_stats(info.load):
        report = {"worker": info.worker_id, "running": stat.running_requests, "waiting": stat.waiting_requests}
        print(json.dumps(report), flush=True)


@dynamo_worker()
async def main(runtime: DistributedRuntime, args: argparse.Namespace) -> None:
    engines = Remote(DESCRIBE_WORKER, await runtime.endpoint(DESCRIBE_WORKER.path).client())
    await engines.wait()
    infos = [await engines.call(DescribeRequest(), instance_id) for instance_id in engines.instance_ids()]
    await asyncio.gather(*map(observe, infos))


if __name__ == "__main__":
    sys.exit(run(main, parser(__doc__).parse_args([])))
