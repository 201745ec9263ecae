"""Dynamo's own KvRouter before its own simulated engines, in virtual time."""

import json
import math
import tempfile
from collections.abc import Sequence
from itertools import count
from pathlib import Path

from benchmarks.cluster import Conditions, Figures, requests_of
from benchmarks.measure import mean
from benchmarks.trace import TraceRequest

from dynamo._core import run_mocker_trace_replay
from dynamo.llm import KvRouterConfig

# The best of its settings that we found: a block to compute costs 32 times as much as one to read, and prompts wait in
# the router, the shortest first, until an engine has none to compute.
TUNED = KvRouterConfig(prefill_load_scale=32.0, router_queue_threshold=0.0, router_queue_policy="wspt")
REPEATS = 3  # equal costs are drawn by lot there too, and with no seed that could be set


def replay(trace: Sequence[TraceRequest], conditions: Conditions, config: KvRouterConfig | None = None) -> Figures:
    """The means of several runs. Engines are all as fast as the first, and there is one router."""
    with tempfile.TemporaryDirectory(prefix="replay-") as folder:
        file = Path(folder) / "trace.jsonl"
        file.write_text("".join(_lines(trace, conditions.block_size)))
        runs = [_replay(file, conditions, config or KvRouterConfig()) for _ in range(REPEATS)]
    return Figures(*(mean(values) for values in zip(*runs, strict=True)))


def _lines(trace: Sequence[TraceRequest], block_size: int) -> list[str]:
    """A trace in Mooncake's format, with an id for each block."""
    ids: dict[int, int] = {}
    others = count(2**40)  # for last blocks that are not full
    lines = []
    for request in requests_of(trace, block_size):
        hash_ids = [ids.setdefault(block, len(ids)) for block in request.prompt.sequence_hashes]
        if request.tokens % block_size:
            hash_ids.append(next(others))
        line = {
            "timestamp": request.arrival * 1000,
            "input_length": request.tokens,
            "output_length": request.output_tokens,
            "hash_ids": hash_ids,
        }
        lines.append(json.dumps(line) + "\n")
    return lines


def _replay(file: Path, conditions: Conditions, config: KvRouterConfig) -> tuple[float, ...]:
    engine = {
        "backend": "sglang",
        "block_size": conditions.block_size,
        "num_gpu_blocks": conditions.blocks,
        "speedup_ratio": conditions.speedups[0],
    }
    summary = run_mocker_trace_replay(
        [str(file)],
        extra_engine_args={"engine": engine, "dynamo": {}},
        num_workers=len(conditions.speedups),
        router_mode="kv_router",
        router_config=config,
        trace_block_size=conditions.block_size,
        kv_event_lag_ms=conditions.event_lag * 1000,
    ).summary
    times = ("mean_ttft_ms", "p99_ttft_ms", "mean_e2e_latency_ms", "p99_e2e_latency_ms")
    return (*(summary[name] / 1000 for name in times), summary["prefix_cache_reused_ratio"], math.nan)
