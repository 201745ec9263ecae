"""Dynamo's own KvRouter before its own simulated engines, in virtual time."""

import json
import math
import tempfile
from collections.abc import Sequence
from itertools import count
from pathlib import Path

from benchmarks.cluster import Conditions, Figures, requests_of
from benchmarks.measure import mean, percentile
from benchmarks.trace import TraceRequest

import msgspec
from dynamo._core import run_mocker_trace_replay
from dynamo.llm import KvRouterConfig

# The best of its settings that we found: a block to compute costs 32 times as much as one to read, and prompts wait in
# the router, the shortest first, until an engine has none to compute.
TUNED = KvRouterConfig(prefill_load_scale=32.0, router_queue_threshold=0.0, router_queue_policy="wspt")
REPEATS = 3  # equal costs are drawn by lot there too, and with no seed that could be set


class _Request(msgspec.Struct):
    """What its report says of a request."""

    ttft_ms: float
    e2e_latency_ms: float
    input_length: int
    reused_input_tokens: int


def replay(trace: Sequence[TraceRequest], conditions: Conditions, config: KvRouterConfig | None = None) -> Figures:
    """The means of several runs. Engines are all as fast as the first, and there is one router."""
    with tempfile.TemporaryDirectory(prefix="replay-") as folder:
        file = Path(folder) / "trace.jsonl"
        file.write_text("".join(_lines(trace, conditions.block_size)))
        runs = [_replay(file, conditions, config or KvRouterConfig()) for _ in range(REPEATS)]
    return Figures(**{name: mean([run[name] for run in runs]) for name in runs[0]})


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


def _replay(trace: Path, conditions: Conditions, config: KvRouterConfig) -> dict[str, float]:
    """The figures of a run, by their names."""
    report = trace.with_suffix(".report")
    engine = {
        "backend": "sglang",
        "block_size": conditions.block_size,
        "num_gpu_blocks": conditions.blocks,
        "speedup_ratio": conditions.speedups[0],
    }
    run_mocker_trace_replay(
        [str(trace)],
        extra_engine_args={"engine": engine, "dynamo": {}},
        num_workers=len(conditions.speedups),
        router_mode="kv_router",
        router_config=config,
        trace_block_size=conditions.block_size,
        report_jsonl_path=str(report),
        kv_event_lag_ms=conditions.event_lag * 1000,
    )
    requests = msgspec.json.Decoder(_Request).decode_lines(report.read_bytes())
    ttfts = sorted(one.ttft_ms / 1000 for one in requests)
    totals = sorted(one.e2e_latency_ms / 1000 for one in requests)
    return {
        "ttft_mean": mean(ttfts),
        "ttft_p99": percentile(ttfts, 99),
        "total_mean": mean(totals),
        "total_p99": percentile(totals, 99),
        "cached": sum(one.reused_input_tokens for one in requests) / sum(one.input_length for one in requests),
        "busy": math.nan,  # it does not say
    }
