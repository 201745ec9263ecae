"""What a benchmark says: Markdown tables, and warnings where the figures are not to be trusted."""

from collections.abc import Callable, Iterable, Sequence

from benchmarks.measure import Run

BASELINES = ("dynamo", "round-robin")
SAME = 0.8  # of round-robin's mean TTFT: with nobody waiting, only the prefill that a cache saves is left
TRUSTED_CPU = 0.85  # of the cores; with more in use, the machine and not the engines may be what requests wait for
TRUSTED_LAG = 0.05  # seconds
TRUSTED_IDLE = 0.5  # of the median TTFT


def latency_table(runs: Sequence[Run]) -> str:
    header = (
        "policy",
        "TTFT mean (s)",
        "p50",
        "p99",
        "end to end mean (s)",
        "p99",
        "cached",
        "requests, max/mean",
        "computed tokens, max/mean",
        "rejected",
        "failed",
    )
    rows = (
        (
            f"`{run.policy}`",
            *(f"{value:.2f}" for value in (run.ttft_mean, run.ttft_p50, run.ttft_p99, run.total_mean, run.total_p99)),
            f"{run.cached_share:.1%}",
            f"{run.spread_requests:.2f}",
            f"{run.spread_computed:.2f}",
            str(run.rejected),
            str(run.failed),
        )
        for run in runs
    )
    return table(header, rows)


def ratio_table(runs: Sequence[Run]) -> str:
    """Each policy against those of BASELINES that were run."""
    by_policy = {run.policy: run for run in runs}
    baselines = [by_policy[name] for name in BASELINES if name in by_policy]
    figures: dict[str, Callable[[Run], float]] = {
        "TTFT mean": lambda run: run.ttft_mean,
        "TTFT p99": lambda run: run.ttft_p99,
        "cached": lambda run: run.cached_share,
    }
    header = ["policy", *(f"{figure} / `{baseline.policy}`" for baseline in baselines for figure in figures)]
    rows = (
        [
            f"`{run.policy}`",
            *(ratio(figure(run), figure(baseline)) for baseline in baselines for figure in figures.values()),
        ]
        for run in runs
    )
    return table(header, rows) if baselines else ""


def machine_table(runs: Sequence[Run]) -> str:
    """Whether the engines were what the requests waited for."""
    header = (
        "policy",
        "engines busy",
        "CPU: pipeline",
        "client",
        "others",
        "client's lag p99 (ms)",
        "TTFT idle and cached (ms)",
        "duration (s)",
    )
    rows = (
        (
            f"`{run.policy}`",
            *(f"{share:.0%}" for share in (run.engines_busy, run.cpu.pipeline, run.cpu.client, run.cpu.others)),
            f"{run.lag_p99 * 1000:.0f}",
            f"{run.idle_ttft * 1000:.0f}",
            f"{run.seconds:.0f}",
        )
        for run in runs
    )
    return table(header, rows)


def load_table(runs: Sequence[Run]) -> str:
    """Mean TTFT at each load, and its ratio to round-robin's."""
    speedups = sorted({run.speedup for run in runs})
    policies = list(dict.fromkeys(run.policy for run in runs))
    found = {(run.speedup, run.policy): run for run in runs}
    header = ["speedup", "requests/s", "engines busy", *(f"`{policy}` (s)" for policy in policies)]
    header += [f"`{policy}` / `round-robin`" for policy in policies if policy != "round-robin"]

    def row(speedup: float) -> Iterable[str]:
        means = {policy: found[speedup, policy].ttft_mean for policy in policies}
        yield f"{speedup:g}"
        yield f"{found[speedup, 'round-robin'].rate:.1f}"
        yield f"{found[speedup, 'round-robin'].engines_busy:.0%}"
        yield from (f"{mean:.2f}" for mean in means.values())
        yield from (ratio(mean, means["round-robin"]) for policy, mean in means.items() if policy != "round-robin")

    return table(header, map(row, speedups))


def vanishing_load(runs: Sequence[Run], policy: str = "kv") -> str:
    """At which load routing stops to matter."""
    means = {(run.policy, run.speedup): run.ttft_mean for run in runs}
    speedups = sorted({run.speedup for run in runs})
    same = [speedup for speedup in speedups if means[policy, speedup] > SAME * means["round-robin", speedup]]
    if not same:
        return f"`{policy}` is faster than `round-robin` at every load that was tried."
    loads = ", ".join(f"{speedup:g}" for speedup in same)
    return f"The difference between `{policy}` and `round-robin` vanishes (mean TTFT within 20 %) at speedup {loads}."


def warnings(runs: Sequence[Run]) -> list[str]:
    """Why some figures are not to be trusted."""
    return [f"{run.policy} at speedup {run.speedup:g}: {reason}" for run in runs for reason in _doubts(run)]


def _doubts(run: Run) -> Iterable[str]:
    cpu = run.cpu.pipeline + run.cpu.client + run.cpu.others
    if cpu > TRUSTED_CPU:
        yield f"{cpu:.0%} of the CPU was in use, so requests may have waited for the machine and not for the engines"
    if run.lag_p99 > TRUSTED_LAG:
        yield f"the client was late: {run.lag_p99 * 1000:.0f} ms (p99)"
    if run.idle_ttft > TRUSTED_IDLE * run.ttft_p50:
        yield "the pipeline itself, not the engines, makes most of the median TTFT"
    if run.lost_passes:
        yield f"{run.lost_passes} forward passes of the engines were not heard of, so more was computed than it says"
    yield from run.errors


def ratio(value: float, base: float) -> str:
    return f"{value / base:.2f}" if base else "-"


def table(header: Sequence[str], rows: Iterable[Iterable[str]]) -> str:
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *map(tuple, rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
