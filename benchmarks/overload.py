"""Shows what becomes of more load than the engines can take: with the router's queue and its limit, and without.

Asks simulated engines, so slow that nothing else takes time, for answers at several times the rate that they can keep
up with. Prints a Markdown table.
"""

import argparse
import asyncio
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from random import Random

from benchmarks.arguments import factor
from benchmarks.measure import percentile
from benchmarks.pipeline import REPOSITORY, launched, open_many_files, simulated_model
from benchmarks.prompts import Prompts
from benchmarks.replay import Outcome, Planned, replay
from benchmarks.report import table
from benchmarks.trace import TraceRequest
from benchmarks.virtual import PASS_TOKENS, prefill_seconds
from common.model import resolve_model
from common.text.chat_model import ChatModel

from tqdm import tqdm

ENGINES = 2
SPEED = 0.1  # of the simulated GPU
TOKENS = (200, 3000)  # of a prompt, at least and at most
ANSWER_TOKENS = 10
GOOD_SECONDS = 5.0  # within which an answer is of use
WAYS = {"with the queue": ["--max-waiting", str(GOOD_SECONDS)], "without": ["--queue-tokens", "0"]}
PIECE = count()


@dataclass(slots=True, frozen=True)
class Result:
    """What became of the requests at one rate."""

    rate: float  # requests a second
    good: float  # answers a second whose first token came in time
    answered: float  # share of the requests
    ttfts: Sequence[float]  # of those, in order
    refusals: Sequence[float]  # seconds until those that were refused knew, in order
    errors: Sequence[str]


def planned(prompts: Prompts, rate: float, seconds: float, random: Random) -> list[Planned]:
    """Requests that come at random times, with prompts that have nothing in common."""
    plan, due = list[Planned](), 0.0
    while (due := due + random.expovariate(rate)) < seconds:
        plan.append(prompts.planned(TraceRequest(due, ((next(PIECE), random.randint(*TOKENS)),), ANSWER_TOKENS)))
    return plan


def result(rate: float, seconds: float, plan: Sequence[Planned], outcomes: Sequence[Outcome]) -> Result:
    answered = [outcome for outcome in outcomes if not outcome.error]
    return Result(
        rate,
        sum(outcome.ttft <= GOOD_SECONDS for outcome in answered) / seconds,
        len(answered) / max(len(plan), 1),
        sorted(outcome.ttft for outcome in answered),
        sorted(outcome.total for outcome in outcomes if outcome.rejected),
        [outcome.error for outcome in outcomes if outcome.error and not outcome.rejected],
    )


def capacity() -> float:
    """Requests a second that the engines can begin with if they do nothing else."""
    tokens = PASS_TOKENS / prefill_seconds(PASS_TOKENS) * SPEED * ENGINES
    return tokens / statistics.mean(TOKENS)


def run(name: str, options: Sequence[str], model: Path, folder: Path, args: argparse.Namespace) -> list[Result]:
    """Ask at every rate, of one pipeline, which is given time to recover in between."""
    prompts = Prompts(ChatModel(str(model), model.name))
    results = []
    fixed = [
        "--keepalive-seconds",
        "0",
        "--backend",
        "mocker",
        "--mocker-speedup",
        str(SPEED),
        "--engines",
        str(ENGINES),
        "--block-size",
        "64",
    ]
    with launched([*fixed, "--model", str(model), *options], folder / f"{name}.log") as pipeline:
        for times in args.times:
            rate = times * capacity()
            plan = planned(prompts, rate, args.seconds, Random(times))
            with tqdm(total=len(plan), desc=f"{name}, {times:g} times", unit="request", disable=None) as progress:
                outcomes = asyncio.run(replay(pipeline.address, plan, progress))
            results.append(result(rate, args.seconds, plan, outcomes))
    return results


def report(args: argparse.Namespace, results: Sequence[tuple[str, Sequence[Result]]]) -> str:
    header = [
        *("load / capacity", "", "requests/s", "good answers/s", "over the best", "answered", "first token p50 (s)"),
        *("p99", "refused after p50 (ms)", "p99", "lost"),
    ]
    rows = []
    for name, each in results:
        best = max(one.good for one in each)
        for times, one in zip(args.times, each, strict=True):
            refusals = (f"{1000 * percentile(one.refusals, p):.0f}" if one.refusals else "" for p in (50, 99))
            first = (f"{percentile(one.ttfts, p):.2f}" for p in (50, 99))
            cells = (f"{times:g}", name, f"{one.rate:.1f}", f"{one.good:.1f}", f"{one.good / best:.0%}")
            rows.append((*cells, f"{one.answered:.0%}", *first, *refusals, str(len(one.errors))))
    return table(header, rows)


def main() -> None:
    args = arguments()
    args.output.mkdir(parents=True, exist_ok=True)
    open_many_files()
    with tempfile.TemporaryDirectory(prefix="benchmark-") as temporary:
        folder = Path(temporary)
        model = simulated_model(Path(resolve_model(None)), folder)
        results = [(name, run(name, options, model, folder, args)) for name, options in WAYS.items()]
    text = report(args, results)
    print(text)
    (args.output / "overload.md").write_text(text + "\n")
    if errors := sorted({error for one in results[0][1] for error in one.errors})[:5]:  # without, clients give up
        raise SystemExit("\n".join(errors))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.overload", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--times", type=factor, nargs="+", default=[0.5, 0.9, 3, 10], help="the engines' capacity")
    parser.add_argument("--seconds", type=factor, default=12.0, help="that requests come at each rate")
    parser.add_argument("--output", type=Path, default=REPOSITORY / "build" / "benchmarks", help="folder")
    return parser.parse_args()


if __name__ == "__main__":
    main()
