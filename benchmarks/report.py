"""What a benchmark says: Markdown tables, and warnings where the figures are not to be trusted."""

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence

from benchmarks.measure import TRUSTED_OTHERS, Run

TRUSTED_CPU = 0.85  # of the cores; with more in use, the machine and not the engines may be what requests wait for
TRUSTED_LAG = 0.05  # seconds
TRUSTED_OWN = 0.25  # of the median TTFT

Figure = Callable[[Run], float]
FIGURES: Mapping[str, Figure] = {
    "TTFT mean": lambda run: run.ttft_mean,
    "TTFT p99": lambda run: run.ttft_p99,
    "end to end mean": lambda run: run.total_mean,
    "end to end p99": lambda run: run.total_p99,
    "cached": lambda run: run.cached_share,
}
# Which of them are compared with which policy.
RATIOS = (*((name, "dynamo") for name in FIGURES), ("TTFT mean", "round-robin"))


def by_policy(runs: Iterable[Run]) -> dict[str, list[Run]]:
    """The turns of each policy, in their order."""
    found: dict[str, list[Run]] = {}
    for run in runs:
        found.setdefault(run.policy, []).append(run)
    return found


def latency_table(runs: Sequence[Run]) -> str:
    """Medians of the turns, and their least and most."""
    figures: Sequence[tuple[str, Figure, Callable[[float], str]]] = (
        ("TTFT mean (s)", FIGURES["TTFT mean"], number),
        ("p50", lambda run: run.ttft_p50, number),
        ("p99", FIGURES["TTFT p99"], number),
        ("end to end mean (s)", FIGURES["end to end mean"], number),
        ("p99", FIGURES["end to end p99"], number),
        ("cached", FIGURES["cached"], "{:.1%}".format),
        ("requests, max/mean", lambda run: run.spread_requests, "{:.2f}".format),
        ("computed tokens, max/mean", lambda run: run.spread_computed, "{:.2f}".format),
    )

    def row(policy: str, turns: Sequence[Run]) -> Iterable[str]:
        yield f"`{policy}`"
        yield from (of_turns([figure(run) for run in turns], show) for _, figure, show in figures)
        yield from (str(sum(counts)) for counts in zip(*((run.rejected, run.failed) for run in turns), strict=True))

    header = ("policy", *(name for name, _, _ in figures), "rejected", "failed")
    return table(header, [row(*one) for one in by_policy(runs).items()])


def ratio_table(runs: Sequence[Run]) -> str:
    """Each policy against those of RATIOS that were run, turn by turn; empty if none was."""
    policies = by_policy(runs)
    wanted = [(FIGURES[name], name, base) for name, base in RATIOS if base in policies]

    def row(policy: str, turns: Sequence[Run]) -> Iterable[str]:
        yield f"`{policy}`"
        for figure, _, base in wanted:
            yield "1" if policy == base else ratios(list(map(figure, turns)), list(map(figure, policies[base])))

    header = ("policy", *(f"{name} / `{base}`" for _, name, base in wanted))
    return table(header, [row(*one) for one in policies.items()]) if wanted else ""


def run_table(runs: Sequence[Run]) -> str:
    """Each run by itself: whether the engines were what its requests waited for."""
    header = (
        "turn, policy",
        "TTFT mean (s)",
        "engines busy",
        "CPU: pipeline",
        "client",
        "others",
        "tries",
        "client's lag p99 (ms)",
        "TTFT idle and cached (ms)",
        "the pipeline's own part",
        "duration (s)",
    )
    rows = (
        (
            f"{run.turn}, `{run.policy}`",
            number(run.ttft_mean),
            *(f"{share:.0%}" for share in (run.engines_busy, run.cpu.pipeline, run.cpu.client, run.cpu.others)),
            str(run.tries),
            *(f"{seconds * 1000:.0f}" for seconds in (run.lag_p99, run.idle_ttft, run.own_ttft)),
            f"{run.seconds:.0f}",
        )
        for run in runs
    )
    return table(header, rows)


def warnings(runs: Sequence[Run]) -> list[str]:
    """Why some figures are not to be trusted."""
    return [f"turn {run.turn} of `{run.policy}` on {run.load}: {reason}" for run in runs for reason in _doubts(run)]


def _doubts(run: Run) -> Iterable[str]:
    cpu = run.cpu.pipeline + run.cpu.client + run.cpu.others
    if run.cpu.others > TRUSTED_OTHERS:
        yield f"others used {run.cpu.others:.0%} of the machine, in the quietest of {run.tries} tries"
    if cpu > TRUSTED_CPU:
        yield f"{cpu:.0%} of the CPU was in use, so requests may have waited for the machine and not for the engines"
    if run.lag_p99 > TRUSTED_LAG:
        yield f"the client was late: {run.lag_p99 * 1000:.0f} ms (p99)"
    if run.own_ttft > TRUSTED_OWN * run.ttft_p50:
        yield f"{run.own_ttft / run.ttft_p50:.0%} of the median TTFT is the pipeline's own part, and not the engines'"
    if run.lost_passes:
        yield f"{run.lost_passes} forward passes of the engines were not heard of, so more was computed than it says"
    yield from run.errors


def number(value: float) -> str:
    """Three digits, or all before the point."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def of_turns(values: Sequence[float], show: Callable[[float], str] = number) -> str:
    """The median, and the least and the most of them where there are several."""
    spread = f" ({show(min(values))} to {show(max(values))})" if len(values) > 1 else ""
    return f"{show(statistics.median(values))}{spread}"


def ratios(ours: Sequence[float], theirs: Sequence[float]) -> str:
    """The median of the ratios of turns that followed each other, and their range; "-" if there is none."""
    found = [mine / other for mine, other in zip(ours, theirs, strict=True) if other]
    return of_turns(found, "{:.2f}".format) if found else "-"


def table(header: Sequence[str], rows: Iterable[Iterable[str]]) -> str:
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *map(tuple, rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
