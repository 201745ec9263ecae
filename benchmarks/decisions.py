"""Compares what routing decisions cost: our router in Python against Dynamo's KvRouter in Rust.

For trees of several sizes and fleets of several workers: one decision for a prompt of 3,200 tokens, with the lease that
follows; long KV events applied; memory. Then short KV events from a publisher in another process, read from ZMQ: with
Dynamo's SelectionService, for KvRouter does not read ZMQ itself. Then decisions in the real router.py, asked over NATS.
Each measurement has a process of its own, and both routers are measured in one run. Prints Markdown tables.
"""

import argparse
import asyncio
import json
import multiprocessing
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any

from benchmarks.pipeline import REPOSITORY, Pipeline, Setting, running
from common.engines.ports import free_ports
from common.kv_events import KvEventStream
from common.messages import (
    FIND_WORKER,
    BlockStored,
    FindWorkerRequest,
    KvEventBatch,
    ModelIdentity,
    StoredBlocks,
    WorkerInfo,
)
from common.model import identify, resolve_model
from common.remote import Remote
from common.routing.fleet import Fleet
from common.routing.policy import Weights, choose, kv
from common.routing.prefix_index import sequence_hashes
from common.routing.worker import Prompt, Worker
from common.service import run

import msgspec
import psutil
import zmq
from dynamo.llm import (
    KvEventPublisher,
    KvRouter,
    KvRouterConfig,
    ModelInput,
    ModelRuntimeConfig,
    ModelType,
    SelectionService,
    WorkerType,
    compute_block_hash_for_seq,
    register_model,
)
from dynamo.runtime import Context, DistributedRuntime, Endpoint, dynamo_worker
from tqdm import tqdm

BLOCK_SIZE = 16
PROMPT_BLOCKS = 200  # 3,200 tokens
SAMPLES = 200  # different prompts that decisions are asked for; each is cached on one worker
DECISIONS = 2000
BUSY = 4  # requests in progress on each worker meanwhile
STREAMED_BLOCKS = 64_000  # in short events, as decoding makes them
DECODING = 32  # requests that make them by turns
EVENT_BLOCKS = (1, 16)  # in one short event
MEASURE_SECONDS = 180  # that one measurement may take
TREES = (1_000, 100_000, 1_000_000)  # blocks
FLEETS = (2, 8, 64, 256)  # workers; each has a prompt at least


@dataclass(slots=True, frozen=True)
class Cost:
    """What a router needs."""

    p50: float  # microseconds of a decision with its lease
    p99: float
    blocks_per_second: float  # in events of PROMPT_BLOCKS blocks
    memory: float  # bytes for a block


def prompts(blocks: int, workers: int) -> Iterator[tuple[int, list[int], list[int]]]:
    """What fills a tree: worker, token ids and block ids of prompts that have nothing in common."""
    chance = random.Random(1)
    for number in range(blocks // PROMPT_BLOCKS):
        tokens = chance.choices(range(30_000), k=PROMPT_BLOCKS * BLOCK_SIZE)
        yield number % workers, tokens, [chance.getrandbits(63) for _ in range(PROMPT_BLOCKS)]


def samples(blocks: int, workers: int) -> list[list[int]]:
    """The prompts that decisions are asked for."""
    return [tokens for (_, tokens, _), _ in zip(prompts(blocks, workers), range(SAMPLES), strict=False)]


def measure_ours(blocks: int, workers: int) -> Cost:
    memory, fleet, weights = resident(), Fleet(), Weights()
    filled = seconds(lambda: fill(fleet, blocks, workers))
    memory = resident() - memory
    identity = ModelIdentity(name="benchmark", block_size=BLOCK_SIZE)
    asked = [
        FindWorkerRequest(
            model=identity, local_hashes=compute_block_hash_for_seq(tokens, BLOCK_SIZE), tokens=len(tokens)
        )
        for tokens in samples(blocks, workers)
    ]

    def decide(request: FindWorkerRequest) -> None:
        prompt = Prompt(sequence_hashes(request.local_hashes), len(request.local_hashes))
        best = choose(fleet.candidates(request, prompt), kv, weights)
        with best.worker.lease(prompt, best.overlap_blocks):
            pass

    with ExitStack() as busy:
        for number in range(workers):
            fleet.add(Worker(number, announced(number, identity)))
            for _ in range(BUSY):
                other = Prompt([random.getrandbits(60) for _ in range(PROMPT_BLOCKS)], PROMPT_BLOCKS)
                busy.enter_context(fleet.workers[number].lease(other, 0))
        times = [seconds(partial(decide, asked[number % len(asked)])) for number in range(DECISIONS)]
    return cost(times, blocks / filled, memory / blocks)


def announced(number: int, identity: ModelIdentity) -> WorkerInfo:
    return WorkerInfo(
        instance_id=number,
        worker_id=str(number),
        model=identity,
        total_blocks=max(TREES),
        context_length=PROMPT_BLOCKS * BLOCK_SIZE,
        kv_events="",
        kv_replay="",
        load="",
    )


def fill(fleet: Fleet, blocks: int, workers: int) -> None:
    for worker, tokens, block_ids in prompts(blocks, workers):
        hashes = compute_block_hash_for_seq(tokens, BLOCK_SIZE)
        fleet.index.apply(worker, StoredBlocks(parent_id=None, block_ids=block_ids, local_hashes=hashes))


async def measure_dynamo(runtime: DistributedRuntime, blocks: int, workers: int) -> Cost:
    """KvRouter, with the ranks of one worker as its workers: it chooses among ranks as it does among workers."""
    endpoint = runtime.endpoint(f"benchmark.w{uuid.uuid4().hex[:8]}.generate")
    # Made before anything is served: their constructors hold Python's lock while they wait for the runtime.
    publishers = [KvEventPublisher(endpoint, kv_block_size=BLOCK_SIZE, dp_rank=rank) for rank in range(workers)]
    router = KvRouter(endpoint, BLOCK_SIZE, KvRouterConfig())
    serving = await register_ranks(endpoint, workers)
    await until_it_listens(router, publishers)
    memory = resident()
    began = time.perf_counter()
    for worker, tokens, block_ids in prompts(blocks, workers):
        publishers[worker].publish_stored(tokens, [BLOCK_SIZE] * len(block_ids), block_ids)
        await asyncio.sleep(0)
    await until_cached(router, tokens)
    filled = time.perf_counter() - began
    memory = resident() - memory
    for number in range(workers * BUSY):
        await router.best_worker([number] * PROMPT_BLOCKS * BLOCK_SIZE, request_id=f"busy-{number}")
    asked = samples(blocks, workers)
    times = []
    for number in range(DECISIONS):
        began = time.perf_counter()
        await router.best_worker(asked[number % len(asked)], request_id=f"decision-{number}")
        await router.free(f"decision-{number}")
        times.append(time.perf_counter() - began)
    serving.cancel()
    return cost(times, blocks / filled, memory / blocks)


async def register_ranks(endpoint: Endpoint, workers: int) -> asyncio.Future[Any]:
    """Let routers know of one worker with that many ranks."""

    async def nothing(request: object, context: Context) -> AsyncIterator[object]:
        yield {}

    serving = asyncio.ensure_future(endpoint.serve_endpoint(nothing))
    config = ModelRuntimeConfig()
    config.data_parallel_size = workers
    config.total_kv_blocks = max(TREES)
    config.max_num_seqs = 1000
    await register_model(
        ModelInput.Tokens,
        ModelType.Chat,
        endpoint,
        resolve_model(None),
        model_name="benchmark",
        kv_cache_block_size=BLOCK_SIZE,
        runtime_config=config,
        worker_type=WorkerType.Aggregated,
    )
    return serving


async def cached(router: KvRouter, tokens: list[int]) -> bool:
    """Whether a prompt is in the tree, whole."""
    try:
        _, _, blocks = await router.best_worker(tokens)
    except Exception as error:  # the router has not heard of the worker yet
        if "no endpoints" not in str(error).lower():
            raise
        return False
    return blocks == len(tokens) // BLOCK_SIZE


async def until_cached(router: KvRouter, tokens: list[int]) -> None:
    while not await cached(router, tokens):
        await asyncio.sleep(0.002)


async def until_it_listens(router: KvRouter, publishers: Sequence[KvEventPublisher]) -> None:
    """Return once the events of every rank reach the router."""
    for rank, publisher in enumerate(publishers):
        tokens = [40_000 + rank] * BLOCK_SIZE
        while not await cached(router, tokens):
            publisher.publish_stored(tokens, [BLOCK_SIZE], [2 * 10**9 + rank])
            await asyncio.sleep(0.1)


def cost(times: Sequence[float], blocks_per_second: float, memory: float) -> Cost:
    micros = sorted(1e6 * one for one in times)
    return Cost(
        p50=statistics.median(micros),
        p99=micros[len(micros) * 99 // 100],
        blocks_per_second=blocks_per_second,
        memory=memory,
    )


def seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def resident() -> int:
    """Bytes of memory that this process has."""
    size: int = psutil.Process().memory_info().rss
    return size


def stream(port: int, blocks: int, go: Event) -> None:
    """In a process of its own: send one KV event to who subscribes, and when told to, events of so many blocks as fast
    as it goes, and a last one."""
    chance, ends, payloads = random.Random(1), list[int | None]([None] * DECODING), list[bytes]()
    for number in range(STREAMED_BLOCKS // blocks):
        block_ids = [chance.getrandbits(63) for _ in range(blocks)]
        tokens = chance.choices(range(30_000), k=blocks * BLOCK_SIZE)
        payloads.append(payload(block_ids, ends[number % DECODING], tokens))
        ends[number % DECODING] = block_ids[-1]
    payloads = [payload([1], None, BLOCK_SIZE * [1]), *payloads, payload([2], None, BLOCK_SIZE * [2])]
    with zmq.Context() as context, context.socket(zmq.XPUB) as socket:
        socket.set_hwm(0)
        socket.bind(f"tcp://127.0.0.1:{port}")
        socket.recv()
        for number, one in enumerate(payloads):
            socket.send_multipart([b"", number.to_bytes(8, "big"), one])
            if not number:
                go.wait()


def payload(block_ids: list[int], parent_id: int | None, tokens: list[int]) -> bytes:
    event = BlockStored(block_hashes=[*block_ids], parent_block_hash=parent_id, token_ids=tokens, block_size=BLOCK_SIZE)
    encoded = msgspec.Raw(msgspec.msgpack.encode(event))
    return msgspec.msgpack.encode(KvEventBatch(timestamp=time.time(), events=[encoded], dp_rank=0))


async def measure_events(what: str, blocks: int) -> float:
    """KV events of so many blocks a second, from a publisher's socket into the tree."""
    [port] = free_ports(1)
    go = multiprocessing.get_context("spawn").Event()
    publisher = multiprocessing.get_context("spawn").Process(target=stream, args=(port, blocks, go), daemon=True)
    publisher.start()
    has = await (follow_ours if what == "ours" else follow_dynamo)(f"tcp://127.0.0.1:{port}")
    while not await has(BLOCK_SIZE * [1]):
        await asyncio.sleep(0.01)
    began = time.perf_counter()
    go.set()
    while not await has(BLOCK_SIZE * [2]):
        await asyncio.sleep(0.005)
    return STREAMED_BLOCKS // blocks / (time.perf_counter() - began)


async def follow_ours(address: str) -> Callable[[list[int]], Awaitable[bool]]:
    """Follow a publisher's events; return what tells whether a prompt of one block is in the tree."""
    fleet, worker = Fleet(), Worker(0, None)

    async def follow() -> None:
        async for item, stored in fleet.index.follow(0, KvEventStream(address, address)):
            worker.on_update(item)
            worker.on_stored(stored)

    following = asyncio.ensure_future(follow())

    async def has(tokens: list[int]) -> bool:
        assert not following.done()
        return bool(fleet.index.overlaps(compute_block_hash_for_seq(tokens, BLOCK_SIZE)))

    return has


async def follow_dynamo(address: str) -> Callable[[list[int]], Awaitable[bool]]:
    service = SelectionService()
    worker = {"worker_id": 0, "model_name": "benchmark", "endpoint": "any", "kv_events_endpoint": address}
    await service.upsert_worker({**worker, "block_size": BLOCK_SIZE, "total_kv_blocks": max(TREES)})

    async def has(tokens: list[int]) -> bool:
        hashes = [number - 2**64 if number >= 2**63 else number for number in compute_block_hash_for_seq(tokens, 16)]
        asked = {"model_name": "benchmark", "block_hashes": hashes, "sequence_hashes": hashes, "isl_tokens": BLOCK_SIZE}
        scores: Any = await service.overlap_scores(asked)
        return bool(scores["workers"][0]["device_blocks"])

    return has


async def measure_asked(runtime: DistributedRuntime, pid: int) -> float:
    """Microseconds of CPU time that the program router.py spends on a decision, everything included."""
    identity = identify(resolve_model(None), block_size=BLOCK_SIZE)
    router = Remote(FIND_WORKER, await runtime.endpoint(FIND_WORKER.path).client())
    requests = [
        FindWorkerRequest(
            model=identity, local_hashes=compute_block_hash_for_seq(tokens, BLOCK_SIZE), tokens=len(tokens)
        )
        for tokens in samples(SAMPLES * PROMPT_BLOCKS, 1)
    ]
    await router.wait()
    process = psutil.Process(pid)
    before = process.cpu_times()
    for start in range(0, DECISIONS, BUSY):
        numbers = range(start, start + BUSY)
        await asyncio.gather(*(router.call(requests[number % len(requests)]) for number in numbers))
    after = process.cpu_times()
    return 1e6 * (after.user + after.system - before.user - before.system) / DECISIONS


@dynamo_worker()
async def measure(runtime: DistributedRuntime, args: argparse.Namespace) -> None:
    """In a process of its own: print one measurement."""
    what, first, second = args.measure
    match what:
        case "ours":
            print(json.dumps(asdict(measure_ours(int(first), int(second)))))
        case "dynamo":
            print(json.dumps(asdict(await measure_dynamo(runtime, int(first), int(second)))))
        case "asked":
            print(json.dumps(await measure_asked(runtime, int(first))))
        case "events":
            print(json.dumps(await measure_events(first, int(second))))
    sys.stdout.flush()
    os._exit(0)  # KvRouter's threads have nothing to finish


def measured(pipeline: Pipeline, *what: object) -> Any:
    """Run a measurement in a process that finds the pipeline's servers."""
    command = [sys.executable, "-m", "benchmarks.decisions", "--measure", *map(str, what)]
    child = subprocess.run(
        command,
        cwd=REPOSITORY,
        env={**os.environ, **pipeline.servers},
        capture_output=True,
        text=True,
        timeout=MEASURE_SECONDS,
    )
    if child.returncode:
        raise SystemExit(f"{' '.join(command[1:])} failed:\n{child.stderr[-3000:]}")
    return json.loads(child.stdout.splitlines()[-1])


def tables(
    sizes: Sequence[tuple[int, int]],
    ours: Sequence[Cost],
    dynamo: Sequence[Cost],
    events: dict[int, dict[str, list[float]]],
    asked: dict[str, float],
) -> str:
    rows = [
        "| blocks | workers | p50 µs: ours | KvRouter | ratio | p99 µs: ours | KvRouter | ratio |",
        "|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for (blocks, workers), mine, theirs in zip(sizes, ours, dynamo, strict=True):
        rows.append(
            f"| {blocks:,} | {workers} | {mine.p50:.0f} | {theirs.p50:.0f} | {mine.p50 / theirs.p50:.2f} "
            f"| {mine.p99:.0f} | {theirs.p99:.0f} | {mine.p99 / theirs.p99:.2f} |"
        )
    mine, theirs = ours[-1], dynamo[-1]
    rows += [
        "",
        f"| with {sizes[-1][0]:,} blocks on {sizes[-1][1]} workers | ours | Dynamo | ratio |",
        "|---|---:|---:|---:|",
        row("decisions a second, one after the other", 1e6 / mine.p50, 1e6 / theirs.p50),
        row("MB for a million blocks", mine.memory, theirs.memory),
        row(f"blocks stored a second, in events of {PROMPT_BLOCKS}", mine.blocks_per_second, theirs.blocks_per_second),
    ]
    for size, rates in events.items():
        medians = (statistics.median(rates[what]) for what in ("ours", "dynamo"))
        rows.append(row(f"events a second over ZMQ, of {counted(size)}", *medians))
    rows.append(row("CPU time of router.py for a decision asked over NATS, µs", asked["kv"], asked["dynamo"]))
    return "\n".join(rows)


def counted(blocks: int) -> str:
    return "one block" if blocks == 1 else f"{blocks} blocks"


def row(what: str, ours: float, theirs: float) -> str:
    return f"| {what} | {ours:,.0f} | {theirs:,.0f} | {ours / theirs:.2f} |"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.decisions", description=__doc__)
    parser.add_argument("--trees", type=int, nargs="+", default=TREES, help="blocks in the tree")
    parser.add_argument("--fleets", type=int, nargs="+", default=FLEETS, help="workers")
    parser.add_argument("--rounds", type=int, default=5, help="how often both read short events, by turns")
    parser.add_argument("--measure", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        sys.exit(run(measure, argparse.Namespace(measure=args.measure, log_level="warning", log_format="text")))
    sizes = [(blocks, workers) for blocks in args.trees for workers in args.fleets if blocks >= workers * PROMPT_BLOCKS]
    ours, dynamo, asked = list[Cost](), list[Cost](), dict[str, float]()
    events: dict[int, dict[str, list[float]]] = {blocks: {"ours": [], "dynamo": []} for blocks in EVENT_BLOCKS}
    setting = Setting(engines=4, block_size=BLOCK_SIZE, blocks=4096, engine_speedup=1.0)
    model = Path(resolve_model(None))
    with tempfile.TemporaryDirectory(prefix="benchmark-") as folder:
        for policy in ("kv", "dynamo"):
            with running(setting, policy, model, Path(folder)) as pipeline:
                children = pipeline.process.children(recursive=True)
                pid = next(child.pid for child in children if any(arg.endswith("router.py") for arg in child.cmdline()))
                asked[policy] = measured(pipeline, "asked", pid, "")
                for size in tqdm(sizes if policy == "kv" else [], unit="size", disable=None):
                    ours.append(Cost(**measured(pipeline, "ours", *size)))
                    dynamo.append(Cost(**measured(pipeline, "dynamo", *size)))
                for blocks in EVENT_BLOCKS * args.rounds if policy == "kv" else ():
                    for what, rates in events[blocks].items():
                        rates.append(measured(pipeline, "events", what, blocks))
    print(tables(sizes, ours, dynamo, events, asked))


if __name__ == "__main__":
    main()
