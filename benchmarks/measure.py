"""From what became of the requests to the figures of a run."""

import math
import os
import platform
import time
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from benchmarks.replay import Outcome
from benchmarks.work import Work

import psutil

TRUSTED_OTHERS = 0.1  # of the machine; with more for what is no part of a benchmark, its figures are not trusted


@dataclass(slots=True, frozen=True)
class Load:
    """What a pipeline is asked."""

    trace: str
    speedup: float  # of arrivals

    def __str__(self) -> str:
        return f"`{self.trace}` at {self.speedup:g} times its speed"


@dataclass(slots=True, frozen=True)
class Run:
    """One policy under one load, once. Times are in seconds."""

    policy: str
    load: Load
    turn: int  # from 1 on
    tries: int  # of which this is the one where others used the machine least
    requests: int
    rejected: int
    failed: int
    ttft_mean: float
    ttft_p50: float
    ttft_p99: float
    total_mean: float
    total_p99: float
    cached_share: float  # of all prompt tokens, those that the engines did not compute
    spread_requests: float  # requests of the worker with the most of them, over the mean
    spread_computed: float  # the same for prompt tokens that were not cached
    engines_busy: float  # share of the time that engines were in a forward pass
    lost_passes: int  # forward passes that the two figures above do not know of
    idle_ttft: float  # of a cached prompt of median length, before the trace began
    own_ttft: float  # of that, what is not the engine's: what the pipeline itself takes
    lag_p99: float  # how late the client sent
    seconds: float  # from the first request to the end of the last answer
    cpu: "CpuShares"
    errors: list[str]  # different ones, at most three
    ttfts: list[float]


@dataclass(slots=True, frozen=True)
class CpuShares:
    """Who used the machine, as shares of all its cores."""

    pipeline: float
    client: float
    others: float  # whatever else ran


class CpuMeter:
    """Measures CPU shares from here on."""

    def __init__(self, cpu_seconds: Callable[[], float]) -> None:
        """cpu_seconds: what the pipeline has used so far."""
        self._cpu_seconds = cpu_seconds
        self._start = self._now()

    def shares(self) -> CpuShares:
        wall, pipeline, client, busy = (now - start for now, start in zip(self._now(), self._start, strict=True))
        cores = wall * (os.cpu_count() or 1)
        return CpuShares(pipeline / cores, client / cores, max(busy - pipeline - client, 0.0) / cores)

    def _now(self) -> tuple[float, float, float, float]:
        times = psutil.cpu_times()
        idle = times.idle + getattr(times, "iowait", 0.0) + getattr(times, "guest", 0.0)
        return time.perf_counter(), self._cpu_seconds(), time.process_time(), sum(times) - idle


def machine() -> dict[str, object]:
    """What the benchmark ran on."""
    model = platform.processor() or platform.machine()
    with suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next((line.partition(": ")[2] for line in lines if line.startswith("model name")), model)
    return {"cores": os.cpu_count(), "cpu": model, "system": platform.system(), "python": platform.python_version()}


def summarize(
    policy: str,
    load: Load,
    turn: int,
    outcomes: Sequence[Outcome],
    work: Mapping[str, Work],
    *,
    engines: int,
    idle_ttft: float,
    own_ttft: float,
    seconds: float,
    cpu: CpuShares,
) -> Run:
    """The figures of a run. Latencies are those of the requests that were answered."""
    answered = [outcome for outcome in outcomes if not outcome.error]
    rejected = sum(outcome.rejected for outcome in outcomes)
    ttfts = sorted(outcome.ttft for outcome in answered)
    totals = sorted(outcome.total for outcome in answered)
    computed = [engine.computed_tokens for engine in work.values()]
    prompt_tokens = sum(outcome.prompt_tokens for outcome in answered)
    return Run(
        policy=policy,
        load=load,
        turn=turn,
        tries=1,
        requests=len(outcomes),
        rejected=rejected,
        failed=len(outcomes) - len(answered) - rejected,
        ttft_mean=mean(ttfts),
        ttft_p50=percentile(ttfts, 50),
        ttft_p99=percentile(ttfts, 99),
        total_mean=mean(totals),
        total_p99=percentile(totals, 99),
        cached_share=1 - sum(computed) / max(prompt_tokens, 1),
        spread_requests=spread(Counter(outcome.worker for outcome in answered).values(), engines),
        spread_computed=spread(computed, engines),
        engines_busy=sum(engine.busy_seconds for engine in work.values()) / engines / seconds,
        lost_passes=sum(engine.lost_passes for engine in work.values()),
        idle_ttft=idle_ttft,
        own_ttft=own_ttft,
        lag_p99=percentile(sorted(outcome.lag for outcome in outcomes), 99),
        seconds=seconds,
        cpu=cpu,
        errors=sorted({outcome.error for outcome in outcomes if outcome.error})[:3],
        ttfts=[round(ttft, 4) for ttft in ttfts],
    )


def median_run(runs: Sequence[Run]) -> Run:
    """The one with the median of mean times to the first token, or the one below it."""
    return sorted(runs, key=lambda run: run.ttft_mean)[(len(runs) - 1) // 2]


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else math.nan


def percentile(ordered: Sequence[float], percent: float) -> float:
    """The smallest value that is not exceeded by `percent` of all."""
    return ordered[max(math.ceil(len(ordered) * percent / 100), 1) - 1] if ordered else math.nan


def spread(loads: Collection[int], workers: int) -> float:
    """The largest load over the mean one: 1 is even, `workers` is all on one."""
    return max(loads, default=0) * workers / max(sum(loads), 1)
