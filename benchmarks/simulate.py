"""Compares routing in virtual time: our router's code, and Dynamo's KvRouter, before the same simulated engines.

Replays parts of several traces at several speeds, in about a minute, and with the same figures every time for our part.
Prints Markdown tables, and writes them to a file beside a picture. See benchmarks/README.md for what they say.
"""

import argparse
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks import reference
from benchmarks.arguments import factor
from benchmarks.bounds import Bounds, bounds
from benchmarks.cluster import Conditions, Figures, simulate
from benchmarks.picture import draw_bars
from benchmarks.pipeline import REPOSITORY
from benchmarks.report import table
from benchmarks.trace import TraceRequest, read, window
from benchmarks.traces.generated import generated

from tqdm import tqdm

CONVERSATION = Path(__file__).parent / "traces" / "conversation.jsonl.gz"
ANSWER_SCALE = 0.1  # as benchmarks.routing: routing by cache is about prompts
AGREES = 0.1  # how far the simulation of Dynamo may be from its own
POLICIES = ("dynamo", "dynamo-tuned", "kv")


@dataclass(slots=True, frozen=True)
class Part:
    """Requests of a trace, and how much faster than recorded they come."""

    first: int
    requests: int
    speedup: float


# So that engines behind Dynamo's router, as it is by default, are busy for 80 to 90 % of the time.
PARTS: Mapping[str, Sequence[Part]] = {
    "conversation": (Part(0, 1200, 4.8), Part(1600, 1200, 5.0), Part(3200, 1200, 4.6)),
    "tool-agents": (Part(0, 1200, 5.0), Part(1400, 1200, 4.8), Part(2700, 1200, 4.4)),
    "coding-agents": (Part(0, 1000, 9.0), Part(1400, 1000, 8.5), Part(2900, 1000, 8.0)),
    "readers": (Part(0, 1200, 2.8), Part(1400, 1200, 2.8), Part(2700, 1200, 2.9)),
}
TROUBLES: Mapping[str, Conditions] = {
    "nothing": Conditions(),
    "one engine at half speed": Conditions(speedups=(0.2, *(0.4,) * 7)),
    "two routers": Conditions(routers=2),
    "an engine dies": Conditions(death=0.4),
    "events 50 ms late": Conditions(event_lag=0.05),
}


@dataclass(slots=True, frozen=True)
class Comparison:
    """What came out for a part of a trace."""

    trace: str
    part: Part
    figures: Mapping[str, Figures]  # by policy
    simulated: Figures  # what the simulation gives for `dynamo`
    bounds: Bounds

    @property
    def better(self) -> float:
        """The lower mean TTFT of Dynamo's two."""
        return min(self.figures["dynamo"].ttft_mean, self.figures["dynamo-tuned"].ttft_mean)

    def ratio(self, figure: Callable[[Figures], float]) -> float:
        """Ours over that of Dynamo's default."""
        return figure(self.figures["kv"]) / figure(self.figures["dynamo"])


def compare(name: str, trace: Sequence[TraceRequest], part: Part) -> Comparison:
    """Replay a part of a trace with each policy."""
    requests = window(trace, part.first, part.requests, part.speedup)
    conditions = Conditions()
    figures = {
        "dynamo": reference.replay(requests, conditions),
        "dynamo-tuned": reference.replay(requests, conditions, reference.TUNED),
        "kv": simulate("kv", requests, conditions),
    }
    return Comparison(name, part, figures, simulate("dynamo", requests, conditions), bounds(requests, conditions))


def trace_of(name: str, answer_scale: float) -> list[TraceRequest]:
    """One of PARTS, with answers of another length."""
    if name == "conversation":
        return read(CONVERSATION, answer_scale=answer_scale)
    return [
        replace(request, output_tokens=max(round(request.output_tokens * answer_scale), 1))
        for request in generated(name)
    ]


def main_table(comparisons: Sequence[Comparison]) -> str:
    """Seconds for each part."""
    header = (
        "trace, from request",
        "speedup",
        "busy",
        "TTFT mean: `dynamo`",
        "`dynamo-tuned`",
        "`kv`",
        "bound",
        "p99: `dynamo`",
        "`kv`",
        "own",
        "end to end mean: `dynamo`",
        "`kv`",
        "cached: `dynamo`",
        "`dynamo-tuned`",
        "`kv`",
        "bound",
    )

    def row(one: Comparison) -> Iterable[str]:
        each = [one.figures[name] for name in POLICIES]
        default, _, ours = each
        yield f"{one.trace}, {one.part.first:,}"
        yield f"{one.part.speedup:g}"
        yield f"{one.simulated.busy:.0%}"
        yield from (f"{figures.ttft_mean:.3f}" for figures in each)
        yield f"{one.bounds.ttft_mean:.3f}"
        yield from (f"{seconds:.2f}" for seconds in (default.ttft_p99, ours.ttft_p99, one.bounds.own_p99))
        yield from (f"{figures.total_mean:.2f}" for figures in (default, ours))
        yield from (f"{share:.1%}" for share in (*(figures.cached for figures in each), one.bounds.cached))

    return table(header, map(row, comparisons))


RATIOS: Mapping[str, Callable[[Comparison], float]] = {
    "TTFT mean / better of the two": lambda one: one.figures["kv"].ttft_mean / one.better,
    "TTFT mean / `dynamo`": lambda one: one.ratio(lambda figures: figures.ttft_mean),
    "TTFT p99": lambda one: one.ratio(lambda figures: figures.ttft_p99),
    "end to end mean": lambda one: one.ratio(lambda figures: figures.total_mean),
    "end to end p99": lambda one: one.ratio(lambda figures: figures.total_p99),
    "cached": lambda one: one.ratio(lambda figures: figures.cached),
    "bound / better of the two": lambda one: one.bounds.ttft_mean / one.better,
}


def ratio_table(comparisons: Sequence[Comparison]) -> str:
    """What `kv` takes of what Dynamo takes: means of the parts of each trace, and of all traces."""
    rows = {
        name: [statistics.mean(map(ratio, of_trace(comparisons, name))) for ratio in RATIOS.values()]
        for name in dict.fromkeys(one.trace for one in comparisons)
    }
    rows["mean"] = [statistics.mean(values) for values in zip(*rows.values(), strict=True)]
    return table(("`kv`", *RATIOS), ((name, *(f"{value:.2f}" for value in row)) for name, row in rows.items()))


def of_trace(comparisons: Sequence[Comparison], name: str) -> list[Comparison]:
    return [one for one in comparisons if one.trace == name]


def agreement(comparisons: Sequence[Comparison]) -> str:
    """Whether the simulation is right about Dynamo, of which both sides are known."""
    off = {
        f"{one.trace}, {one.part.first:,}": one.simulated.ttft_mean / one.figures["dynamo"].ttft_mean - 1
        for one in comparisons
    }
    worst = max(map(abs, off.values()))
    text = f"Simulated here, Dynamo's default router has a mean TTFT within {worst:.0%} of that in its own replay"
    beyond = [f"{name} ({value:+.0%})" for name, value in off.items() if abs(value) > AGREES]
    return text + (f"; beyond {AGREES:.0%}: {', '.join(beyond)}." if beyond else ".")


def trouble_table(answer_scale: float, progress: Callable[[str], None]) -> str:
    """Ours over Dynamo's default, both simulated, where not all is as it should be: means over the traces."""

    def row(name: str, conditions: Conditions, scale: float) -> Iterable[str]:
        pairs = []
        for trace, (part, *_) in PARTS.items():
            progress(f"{name}, {trace}")
            speedup = part.speedup * sum(conditions.speedups) / sum(Conditions().speedups)
            speedup *= 0.6 if scale > ANSWER_SCALE else 0.85 if conditions.death is not None else 1.0
            requests = window(trace_of(trace, scale), part.first, part.requests, speedup)
            pairs.append([simulate(policy, requests, conditions) for policy in ("kv", "dynamo")])
        yield name
        for figure in ("ttft_mean", "ttft_p99", "total_mean", "total_p99"):
            ratios = [getattr(ours, figure) / getattr(theirs, figure) for ours, theirs in pairs]
            yield f"{statistics.mean(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"

    header = ("trouble", "TTFT mean", "p99", "end to end mean", "p99")
    rows = [(name, conditions, answer_scale) for name, conditions in TROUBLES.items()]
    return table(header, [list(row(*one)) for one in [*rows, ("answers in full", Conditions(), 1.0)]])


def main() -> None:
    args = arguments()
    args.output.mkdir(parents=True, exist_ok=True)
    comparisons = []
    with tqdm(total=sum(map(len, PARTS.values())), unit="part", disable=None) as progress:
        for name, parts in PARTS.items():
            trace = trace_of(name, args.answer_scale)
            for part in parts:
                progress.set_postfix_str(name)
                comparisons.append(compare(name, trace, replace(part, speedup=part.speedup * args.speedup)))
                progress.update()
        paragraphs = [main_table(comparisons), ratio_table(comparisons), agreement(comparisons)]
        if args.troubles:
            paragraphs.append(trouble_table(args.answer_scale, progress.set_postfix_str))
    text = "\n\n".join(paragraphs)
    print(text)
    (args.output / "simulation.md").write_text(text + "\n")
    draw(comparisons, args.output / "simulation.png")


def draw(comparisons: Sequence[Comparison], file: Path) -> None:
    """The mean TTFT of each policy and the bound, means over the parts of each trace, over Dynamo's default."""
    owners: dict[str, list[float]] = {name: [] for name in (*POLICIES, "bound")}
    names = list(dict.fromkeys(one.trace for one in comparisons))
    for name in names:
        here = of_trace(comparisons, name)
        for policy in POLICIES:
            owners[policy].append(
                statistics.mean(one.figures[policy].ttft_mean / one.figures["dynamo"].ttft_mean for one in here)
            )
        owners["bound"].append(statistics.mean(one.bounds.ttft_mean / one.figures["dynamo"].ttft_mean for one in here))
    title = "mean time to the first token, over that of Dynamo's default router, in virtual time"
    draw_bars(names, owners, title, file)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.simulate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--answer-scale", type=factor, default=ANSWER_SCALE, help="of the lengths of answers")
    parser.add_argument("--speedup", type=factor, default=1.0, help="of arrivals, on top of each part's own")
    parser.add_argument("--troubles", action="store_true", help="also with slow, dead and badly known engines")
    parser.add_argument("--output", type=Path, default=REPOSITORY / "build" / "benchmarks", help="folder")
    return parser.parse_args()


if __name__ == "__main__":
    main()
