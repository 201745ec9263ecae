"""What no router can beat on a trace."""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.cluster import Conditions, requests_of
from benchmarks.measure import mean, percentile
from benchmarks.trace import TraceRequest
from benchmarks.virtual import PASS_TOKENS, prefill_seconds


@dataclass(slots=True, frozen=True)
class Bounds:
    """For any router, and any order in the engines. Times are in seconds."""

    cached: float  # at most: what one cache without limits would serve, of all prompt tokens
    ttft_mean: float  # at least
    own_p99: float  # 99th percentile of what prompts take by themselves, when all that can be cached is


@dataclass(slots=True, order=True)
class _Job:
    seconds: float
    number: int
    left: float
    moment: float = 0.0  # the mean of the times at which it is worked on


def bounds(trace: Sequence[TraceRequest], conditions: Conditions) -> Bounds:
    """Prompts need at least what is not cached even in one cache without limits; and then there are only so many
    engines."""
    seen: set[int] = set()
    cached, jobs = 0, list[tuple[float, float]]()
    requests = requests_of(trace, conditions.block_size)
    fastest = max(conditions.speedups)
    for one in requests:
        hashes = one.prompt.sequence_hashes
        known = next((number for number, block in enumerate(hashes) if block not in seen), len(hashes))
        tokens = min(known * conditions.block_size, one.tokens - 1)
        seen.update(hashes)
        cached += tokens
        jobs.append((one.arrival, own_seconds(one.tokens - tokens) / fastest))
    own = [seconds for _, seconds in jobs]
    return Bounds(
        cached=cached / sum(one.tokens for one in requests),
        ttft_mean=max(mean(own), mean_wait(jobs, len(conditions.speedups))),
        own_p99=percentile(sorted(own), 99),
    )


def own_seconds(tokens: int) -> float:
    """What the prefill of so many tokens takes an idle engine of the mocker's own speed, in passes."""
    whole, rest = divmod(tokens, PASS_TOKENS)
    return whole * prefill_seconds(PASS_TOKENS) + (prefill_seconds(rest) if rest else 0.0)


def mean_wait(jobs: Sequence[tuple[float, float]], machines: int) -> float:
    """A lower bound of the mean time from arrival to completion of jobs (arrival, seconds), on so many machines.

    On one machine as fast as all of them, that always works on the shortest job and may leave it at any time, take the
    mean of the times at which each job is worked on, and add half of what it takes on a machine of its own: no schedule
    has a lower sum (Schulz and Skutella, "Scheduling Unrelated Machines by Randomized Rounding", 2002). It is
    more than the jobs' own times only near saturation.
    """
    coming = sorted((arrival, number) for number, (arrival, _) in enumerate(jobs))
    due: list[_Job] = []
    total, now, place = 0.0, 0.0, 0
    while due or place < len(coming):
        now = now if due else max(now, coming[place][0])
        while place < len(coming) and coming[place][0] <= now:
            number = coming[place][1]
            heapq.heappush(due, _Job(jobs[number][1], number, jobs[number][1] / machines))
            place += 1
        job = due[0]
        until = min(now + job.left, coming[place][0] if place < len(coming) else float("inf"))
        job.moment += (until - now) * (now + until) / 2
        job.left -= until - now
        now = until
        if job.left <= 1e-12:
            heapq.heappop(due)
            arrival, seconds = jobs[job.number]
            total += job.moment / (seconds / machines) + seconds / 2 - arrival
    return total / len(jobs)
