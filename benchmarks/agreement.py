"""Whether the pipeline does what the simulation in virtual time says of the same requests."""

import statistics
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress

from benchmarks.bounds import own_seconds
from benchmarks.cluster import Conditions, Figures, simulate
from benchmarks.measure import Run
from benchmarks.pipeline import Setting
from benchmarks.report import by_policy, number, of_turns, ratios, table
from benchmarks.trace import TraceRequest
from common.errors import Overloaded

SIMULATED = ("kv", "dynamo")
AGREES = 0.1  # how far the mean time to the first token may be from the simulated one


def simulated(trace: Sequence[TraceRequest], setting: Setting) -> dict[str, Figures]:
    """What becomes of requests in virtual time, by policy. One that would refuse some is left out."""
    speedups = (setting.engine_speedup,) * setting.engines
    conditions = Conditions(speedups=speedups, blocks=setting.blocks, block_size=setting.block_size)
    found = {}
    for policy in SIMULATED:
        with suppress(Overloaded):
            found[policy] = simulate(policy, trace, conditions)
    return found


def cached_seconds(tokens: int, setting: Setting) -> float:
    """What an idle engine takes to the first token of a prompt, all of whose blocks it has."""
    cached = min(tokens // setting.block_size * setting.block_size, tokens - 1)
    return own_seconds(tokens - cached) / setting.engine_speedup


def agreement_table(runs: Sequence[Run], figures: Mapping[str, Figures]) -> str:
    """The pipeline beside the simulation, for each policy and as a ratio; empty if neither policy was run."""
    policies = {policy: turns for policy, turns in by_policy(runs).items() if policy in figures}

    def row(policy: str, turns: Sequence[Run]) -> Iterable[str]:
        yield f"`{policy}`"
        yield of_turns([run.ttft_mean for run in turns])
        yield of_turns([engines_ttft(run) for run in turns])
        yield number(figures[policy].ttft_mean)
        yield f"{_off(turns, figures):+.0%}"
        yield of_turns([run.cached_share for run in turns], "{:.1%}".format)
        yield f"{figures[policy].cached:.1%}"

    def ratio() -> Iterable[str]:
        ours, theirs = (policies[policy] for policy in SIMULATED)
        mine, others = (figures[policy] for policy in SIMULATED)
        yield " / ".join(f"`{policy}`" for policy in SIMULATED)
        yield ratios([run.ttft_mean for run in ours], [run.ttft_mean for run in theirs])
        yield ratios([engines_ttft(run) for run in ours], [engines_ttft(run) for run in theirs])
        yield f"{mine.ttft_mean / others.ttft_mean:.2f}"
        yield ""
        yield ratios([run.cached_share for run in ours], [run.cached_share for run in theirs])
        yield f"{mine.cached / others.cached:.2f}" if others.cached else "-"

    header = (
        "pipeline against simulation",
        "TTFT mean (s)",
        "without the pipeline's own part",
        "simulated",
        "off",
        "cached",
        "simulated",
    )
    rows = [row(*one) for one in policies.items()]
    if len(policies) == len(SIMULATED):
        rows.append(ratio())
    return table(header, rows) if rows else ""


def engines_ttft(run: Run) -> float:
    """The mean time to the first token without what the pipeline itself takes."""
    return run.ttft_mean - run.own_ttft


def disagreements(runs: Sequence[Run], figures: Mapping[str, Figures]) -> list[str]:
    """Where pipeline and simulation are too far from each other."""
    return [
        f"`{policy}` on {turns[0].load}: the mean TTFT is {off:+.0%} off the simulated one"
        for policy, turns in by_policy(runs).items()
        if policy in figures and abs(off := _off(turns, figures)) > AGREES
    ]


def _off(turns: Sequence[Run], figures: Mapping[str, Figures]) -> float:
    return statistics.median(map(engines_ttft, turns)) / figures[turns[0].policy].ttft_mean - 1
