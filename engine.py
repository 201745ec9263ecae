"""Engine: runs the model.

    inference.engine.generate    token ids and sampling options -> token ids, as they are made
    inference.engine.describe    what this worker is: model, block size, capacity, addresses
    inference.engine.cache       every block in its KV cache, for routers that come late
    inference.engine.die         nothing, in a demo

It speaks Dynamo's own worker protocol, so that any Dynamo worker can stand in for it and it can serve Dynamo's own
frontend. On ZMQ it publishes what enters and leaves its KV cache, and its load; `describe` says where.

It knows nothing about text, conversations or the other engines.

In production Dynamo this is `python -m dynamo.sglang` (components/src/dynamo/sglang), which adds disaggregated prefill,
LoRA, images and much more to the same calls.
"""

import argparse
import sys

from common.coalescer import Coalescer
from common.engines.announcement import Announcement
from common.engines.demo import die
from common.messages import CACHE, DESCRIBE_WORKER, DIE, GENERATE, WorkerInfo
from common.model import add_options, identify, resolve_model
from common.service import Service, parser, run

from dynamo.runtime import DistributedRuntime, dynamo_worker


@dynamo_worker()
async def main(runtime: DistributedRuntime, args: argparse.Namespace) -> None:
    serve = serve_mocker if args.backend == "mocker" else serve_sglang
    await serve(runtime, args)


async def serve_sglang(runtime: DistributedRuntime, args: argparse.Namespace) -> None:
    from common.engines.sglang_engine import SglangEngine

    coalescer = Coalescer(args.coalesce_ms)
    generate = runtime.endpoint(GENERATE.path)
    model_path = resolve_model(args.model)
    engine = SglangEngine.start(
        generate.connection_id(),
        model_path=model_path,
        identity=identify(model_path, name=args.model_name, block_size=args.block_size),
        worker_id=args.worker_id,
        host=args.host,
        stream_interval=args.stream_interval,
        gpu_memory_fraction=args.gpu_memory_fraction,
        deterministic=args.deterministic,
    )
    try:
        await engine.connect(generate)
        async with Service(runtime, drain_seconds=args.drain_seconds) as service:
            announce(service, runtime, engine.info, demo=args.demo)
            service.model = engine.info.model.name
            service.add(generate, GENERATE, lambda *request: coalescer.coalesced(engine.generate(*request)))
            await engine.warm_up()
            await service.serve()
            service.background(engine.publish(generate, register=args.register_model))
            await service.stopped()
    finally:
        engine.close()


async def serve_mocker(runtime: DistributedRuntime, args: argparse.Namespace) -> None:
    from common.engines.mocker_engine import MockerEngine

    generate = runtime.endpoint(GENERATE.path)
    model_path = resolve_model(args.model)
    engine = await MockerEngine.start(
        runtime,
        generate,
        model_path=model_path,
        identity=identify(model_path, name=args.model_name, block_size=args.block_size),
        worker_id=args.worker_id,
        host=args.host,
        total_blocks=args.mocker_blocks,
        speedup=args.mocker_speedup,
    )
    async with Service(runtime, drain_seconds=args.drain_seconds) as service:
        announce(service, runtime, engine.info, demo=args.demo)
        service.add_served(generate, GENERATE, lambda: engine.run(runtime))
        await service.serve()
        service.background(engine.publish())
        await service.stopped()


def announce(service: Service, runtime: DistributedRuntime, info: WorkerInfo, *, demo: bool) -> None:
    """Tell routers what this worker is, and what is in its cache. demo: also die for those who ask for it."""
    announcement = Announcement(info)
    service.background(announcement.follow())
    service.add(runtime.endpoint(CACHE.path), CACHE, announcement.snapshot)
    service.add(runtime.endpoint(DESCRIBE_WORKER.path), DESCRIBE_WORKER, announcement.describe)
    if demo:
        service.add(runtime.endpoint(DIE.path), DIE, die)


def arguments() -> argparse.ArgumentParser:
    """The command line."""
    options = parser(__doc__)
    add_options(options)
    options.add_argument("--worker-id", help="its name in logs and response headers; default: its instance id")
    options.add_argument("--backend", choices=["sglang", "mocker"], default="sglang", help="mocker: a simulated engine")
    options.add_argument("--host", default="127.0.0.1", help="address at which routers reach this machine")
    options.add_argument("--demo", action="store_true", help="let this engine be killed from the page")
    Coalescer.add_option(options)
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
    sys.exit(run(main, arguments().parse_args()))
elif __name__ == "__mp_main__":  # a process that SGLang spawned: it imports this file before anything of SGLang
    from common.engines.sglang_child import prepare

    prepare()
