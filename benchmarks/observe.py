"""Adds up what the engines do, from the metrics that they publish of each forward pass (Dynamo's ForwardPassMetrics).

Only the engines know what they computed: what a router believed to be cached may be gone when the prompt's turn comes,
or have come since. Run as a program it answers each line of its input with the sums so far, as a line of JSON, until
its input ends. The benchmark runs it so because a process can meet only one pipeline.
"""

import argparse
import asyncio
import sys
import threading
from collections import defaultdict

from benchmarks.work import Work
from common.messages import GENERATE
from common.service import run

import msgspec
from dynamo.llm import FpmEventSubscriber
from dynamo.runtime import DistributedRuntime, dynamo_worker


class _Scheduled(msgspec.Struct):
    sum_prefill_tokens: int  # computed in this pass; cached ones are not in it


class _ForwardPass(msgspec.Struct):
    worker_id: str
    counter_id: int
    wall_time: float  # seconds
    scheduled_requests: _Scheduled


def follow(subscriber: FpmEventSubscriber, work: dict[str, Work]) -> None:
    decoder = msgspec.msgpack.Decoder(_ForwardPass)
    while (data := subscriber.recv()) is not None:
        forward_pass = decoder.decode(data)
        done = work[forward_pass.worker_id]
        done.computed_tokens += forward_pass.scheduled_requests.sum_prefill_tokens
        done.busy_seconds += forward_pass.wall_time
        done.passes += 1
        done.first_pass = done.first_pass or forward_pass.counter_id
        done.last_pass = forward_pass.counter_id


@dynamo_worker()
async def main(runtime: DistributedRuntime, args: argparse.Namespace) -> None:
    work: dict[str, Work] = defaultdict(Work)
    subscriber = FpmEventSubscriber(runtime.endpoint(GENERATE.path))
    threading.Thread(target=follow, args=(subscriber, work), daemon=True).start()
    while await asyncio.to_thread(sys.stdin.readline):
        sys.stdout.buffer.write(msgspec.json.encode(work) + b"\n")
        sys.stdout.buffer.flush()
    subscriber.shutdown()


if __name__ == "__main__":
    sys.exit(run(main, argparse.Namespace(log_level="warning", log_format="text")))
