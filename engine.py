"""Engine: runs the model.

    inference.engine.generate    token ids and sampling options -> token ids, as they are made
    inference.engine.describe    what this worker is: model, block size, capacity, addresses
    inference.engine.cache       every block in its KV cache, for routers that come late

It speaks Dynamo's own worker protocol, so that any Dynamo worker can stand in for it and it can serve Dynamo's own
frontend. On ZMQ it publishes what enters and leaves its KV cache, and its load; `describe` says where.

It knows nothing about text, conversations or the other engines.

In production Dynamo this is `python -m dynamo.sglang` (components/src/dynamo/sglang), which adds disaggregated prefill,
LoRA, images and much more to the same calls.
"""

import argparse
from collections.abc import AsyncIterator

from common import (
    parent,  # noqa: F401  SGLang's own processes import this file: here they learn to end with this one,
    sglang_cpu,  # noqa: F401  and that there is no GPU
)
from common.messages import DescribeRequest, GenerateRequest, SnapshotRequest, WorkerInfo
from common.model import add_options
from common.own_cache import OwnCache
from common.ports import here
from common.program import Program, parser, run

from dynamo.runtime import Context, DistributedRuntime, dynamo_worker

GENERATE = "inference.engine.generate"


@dynamo_worker()
async def main(runtime: DistributedRuntime, args: argparse.Namespace) -> None:
    serve = serve_mocker if args.backend == "mocker" else serve_sglang
    await serve(runtime, args)


async def serve_sglang(runtime: DistributedRuntime, args: argparse.Namespace) -> None:
    from common.sglang_engine import SglangEngine

    program = Program(runtime, args)
    endpoint = runtime.endpoint(GENERATE)
    engine = SglangEngine.start(args, endpoint.connection_id(), on_sigterm=program.stop)
    try:
        async with program:
            announce(program, engine.info)
            program.add(GENERATE, engine.generate, GenerateRequest)
            await program.serve()
            program.background(engine.publish(endpoint, args.register_model))
            await program.stopped()
    finally:
        engine.close()


async def serve_mocker(runtime: DistributedRuntime, args: argparse.Namespace) -> None:
    from common.mocker_engine import MockerEngine

    engine = await MockerEngine.start(args, runtime)
    async with Program(runtime, args) as program:
        announce(program, engine.info)
        program.add_served(GENERATE, lambda: engine.run(runtime))
        await program.serve()
        program.background(engine.publish())
        await program.stopped()


def announce(program: Program, info: WorkerInfo) -> None:
    """Tell routers what this worker is, and what is in its cache."""

    async def describe(request: DescribeRequest, context: Context) -> AsyncIterator[WorkerInfo]:
        yield info

    cache = OwnCache(here(info.kv_events), here(info.kv_replay))
    program.background(cache.follow())
    program.add("inference.engine.cache", cache.snapshot, SnapshotRequest)
    program.add("inference.engine.describe", describe, DescribeRequest)


def arguments() -> argparse.ArgumentParser:
    options = parser(__doc__)
    add_options(options)
    options.add_argument("--worker-id", help="its name in logs and response headers; default: its instance id")
    options.add_argument("--backend", choices=["sglang", "mocker"], default="sglang", help="mocker: a simulated engine")
    options.add_argument("--host", default="127.0.0.1", help="address at which routers reach this machine")
    sglang = options.add_argument_group("sglang")
    sglang.add_argument(
        "--register-model", action="store_true", help="let Dynamo's own frontend and router use this worker too"
    )
    sglang.add_argument("--stream-interval", type=int, default=1, help="tokens in a message: more is faster")
    sglang.add_argument("--gpu-memory-fraction", type=float, help="share of the GPU to take; default: SGLang decides")
    sglang.add_argument(
        "--deterministic", action="store_true", help="same seed, same answer: slower on a GPU, always so on a CPU"
    )
    mocker = options.add_argument_group("mocker")
    mocker.add_argument("--mocker-blocks", type=int, default=16384, help="KV blocks that fit")
    mocker.add_argument("--mocker-speedup", type=float, default=1.0, help="times faster than the simulated GPU")
    return options


if __name__ == "__main__":
    run(main, arguments().parse_args())
