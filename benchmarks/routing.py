"""Compares routing policies: replays traces through the real pipeline, with simulated engines, by turns.

Every policy gets the same requests at the same times and engines with empty caches, several times, and they take turns.
Prints Markdown tables to standard output, and writes them to a file beside a picture and a JSON with everything.
"""

import argparse
import asyncio
import itertools
import json
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import NoReturn

from benchmarks import report
from benchmarks.agreement import agreement_table, cached_seconds, disagreements, simulated
from benchmarks.arguments import count, factor
from benchmarks.cluster import Figures
from benchmarks.measure import TRUSTED_OTHERS, CpuMeter, Load, Run, machine, summarize
from benchmarks.picture import draw
from benchmarks.pipeline import REPOSITORY, VARIANTS, Pipeline, Setting, running, simulated_model
from benchmarks.prompts import Prompts
from benchmarks.replay import Planned, WrongLength, ask, replay, session
from benchmarks.simulate import ANSWER_SCALE, PARTS, trace_of
from benchmarks.trace import TraceRequest, read, scaled, shareable
from benchmarks.work import Observer, Work
from common.model import resolve_model
from common.routing.policy import POLICIES
from common.text.chat_model import ChatModel

from tqdm import tqdm

# A trace names no sessions, so session-affinity would be kv.
NAMES = (*(name for name in POLICIES if name != "session-affinity"), "dynamo", *VARIANTS)
SECONDS = 70  # of a trace that are replayed, unless it is said how many requests
WARM_UPS = 3  # for each engine, so that also a blind policy has shown the prompt to most of them
FULL = {
    "trace": ["conversation", "tool-agents"],
    "engines": 8,
    "requests": None,
    "speedup": None,
    "scale": 1.0,
    "turns": 3,
    "repeats": 2,
    "policies": ("kv", "dynamo", "dynamo-tuned", "round-robin"),
}
SHORT = FULL | {
    "trace": ["coding-agents"],
    "engines": 4,
    "requests": 120,
    "speedup": [15.0],
    "scale": 0.25,
    "turns": 1,
    "repeats": 0,
    "policies": ("kv", "dynamo", "round-robin"),
}


@dataclass(slots=True, frozen=True)
class Workload:
    """The requests of a load, and one for the idle pipeline."""

    load: Load
    trace: Sequence[TraceRequest]
    plan: Sequence[Planned]
    warm_up: Planned
    figures: Mapping[str, Figures]  # by policy, what becomes of them in virtual time

    def __str__(self) -> str:
        rate = len(self.trace) / max(self.trace[-1].arrival, 1.0)
        return (
            f"{self.load}: {len(self.trace)} requests, {rate:.1f} a second, with a mean of "
            f"{statistics.mean(request.input_tokens for request in self.trace):,.0f} tokens in and "
            f"{statistics.mean(request.output_tokens for request in self.trace):,.0f} out; "
            f"{shareable(self.trace):.1%} of the prompt tokens are repetitions"
        )


class Benchmark:
    """Runs policies one after the other, under the same conditions."""

    def __init__(self, setting: Setting, folder: Path) -> None:
        self._setting = setting
        self._folder = folder
        source = Path(resolve_model(None))
        self._model = simulated_model(source, folder)
        self._prompts = Prompts(ChatModel(str(self._model), source.name))

    def workload(self, load: Load, trace: Sequence[TraceRequest]) -> Workload:
        """Requests from a trace. Raises SystemExit if one of them does not fit into an engine."""
        capacity = self._setting.blocks * self._setting.block_size
        longest = max(self._prompts.tokens(request) + request.output_tokens for request in trace)
        if longest > capacity:
            raise SystemExit(f"a request has {longest} tokens and an engine room for {capacity}: --blocks, --scale")
        median = round(statistics.median(request.input_tokens for request in trace))
        warm_up = TraceRequest(arrival=0.0, pieces=((-1, median),), output_tokens=1)
        return Workload(
            load=load,
            trace=trace,
            plan=list(map(self._prompts.planned, trace)),
            warm_up=self._prompts.planned(warm_up),
            figures=simulated([self._prompts.wrapped(request) for request in trace], self._setting),
        )

    def run(self, policy: str, turn: int, workload: Workload, progress: "tqdm[NoReturn]") -> Run:
        progress.reset()
        progress.set_postfix_str("starting")
        with running(self._setting, policy, self._model, self._folder) as pipeline:
            run = asyncio.run(self._measure(pipeline, policy, turn, workload, progress))
            progress.set_postfix_str("ending")
            return run

    async def _measure(
        self, pipeline: Pipeline, policy: str, turn: int, workload: Workload, progress: "tqdm[NoReturn]"
    ) -> Run:
        async with Observer.running(pipeline.servers) as observer:
            idle_ttft = await self._idle_ttft(pipeline, workload.warm_up)
            cpu = CpuMeter(pipeline.cpu_seconds)
            before = await observer.work()
            began = time.perf_counter()
            outcomes = await replay(pipeline.address, workload.plan, progress)
            seconds = time.perf_counter() - began
            shares = cpu.shares()
            work = await observer.work()
        return summarize(
            policy,
            workload.load,
            turn,
            outcomes,
            {engine: work[engine].since(before.get(engine, Work())) for engine in work},
            engines=self._setting.engines,
            idle_ttft=idle_ttft,
            own_ttft=idle_ttft - cached_seconds(workload.warm_up.prompt_tokens, self._setting),
            seconds=seconds,
            cpu=shares,
        )

    async def _idle_ttft(self, pipeline: Pipeline, warm_up: Planned) -> float:
        """The median time to the first token of a prompt that is cached, with nothing else to do."""
        async with session() as client:
            answers = [
                await ask(client, pipeline.address, warm_up, time.perf_counter())
                for _ in range(self._setting.engines * WARM_UPS)
            ]
        half = warm_up.prompt_tokens / self._setting.block_size / 2
        cached = [answer.ttft for answer in answers if answer.overlap_blocks > half]
        if not cached:
            raise SystemExit(f"no engine ever had a prompt cached that it had seen before: {answers[-1]}")
        return statistics.median(cached)


def main() -> None:
    args = arguments()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    args.output.mkdir(parents=True, exist_ok=True)
    setting = Setting(args.engines, args.block_size, args.blocks, args.engine_speedup)
    done: list[tuple[Workload, list[Run]]] = []
    text = ""
    try:
        with tempfile.TemporaryDirectory(prefix="benchmark-") as folder:
            for one in run_all(args, Benchmark(setting, Path(folder))):
                done.append(one)
                text = describe(args, done)
                write(args, done, text)
    except WrongLength as error:
        raise SystemExit(f"this would measure something else: {error}") from error
    except KeyboardInterrupt:
        raise SystemExit("interrupted") from None
    print(text)


def run_all(args: argparse.Namespace, benchmark: Benchmark) -> Iterator[tuple[Workload, list[Run]]]:
    """Yield all turns of each load, in the order in which they ran."""
    workloads = [benchmark.workload(*one) for one in loads(args)]
    numbers, total = itertools.count(1), len(workloads) * args.turns * len(args.policies)
    for workload in workloads:
        runs: list[Run] = []
        for turn, policy in in_turns(args.policies, args.turns):
            title = f"{workload.load.trace}, turn {turn}, {policy} ({next(numbers)} of {total})"
            with tqdm(total=len(workload.plan), desc=title, unit="request", disable=None) as progress:
                runs.append(quietest(partial(benchmark.run, policy, turn, workload, progress), args.repeats))
        yield workload, runs


def quietest(run: Callable[[], Run], repeats: int) -> Run:
    """Run, and again while others are busy on this machine, so many times at most. The quietest run counts."""
    tries = [run()]
    while tries[-1].cpu.others > TRUSTED_OTHERS and len(tries) <= repeats:
        tries.append(run())
    return replace(min(tries, key=lambda one: one.cpu.others), tries=len(tries))


def in_turns(policies: Sequence[str], turns: int) -> Iterator[tuple[int, str]]:
    """Each policy in each turn, from 1 on. Every second turn is the other way round, so that nobody is always first."""
    for turn in range(1, turns + 1):
        yield from ((turn, policy) for policy in (policies if turn % 2 else reversed(policies)))


def loads(args: argparse.Namespace) -> Iterator[tuple[Load, list[TraceRequest]]]:
    """The loads that were asked for, and their requests."""
    for name in args.trace:
        recorded = trace_of(name, 1.0) if name in PARTS else read(Path(name))
        for speedup in args.speedup or [PARTS[name][0].speedup if name in PARTS else 1.0]:
            trace = [scaled(one, speedup, args.scale, args.answer_scale) for one in recorded[: args.requests]]
            if args.requests is None:
                trace = [one for one in trace if one.arrival < SECONDS]
            yield Load(Path(name).name, speedup), trace


def describe(args: argparse.Namespace, done: Sequence[tuple[Workload, Sequence[Run]]]) -> str:
    """The report, in Markdown."""
    parts = [
        f"{args.engines} engines with {args.blocks:,} blocks of {args.block_size} tokens each. Turns: "
        f"{args.turns}. Medians, with the least and the most in brackets; ratios are those of runs in the same turn."
    ]
    for workload, runs in done:
        tables = report.latency_table(runs), report.ratio_table(runs), report.run_table(runs)
        doubts = report.warnings(runs) + disagreements(runs, workload.figures)
        parts += [f"{workload}.", *tables, agreement_table(runs, workload.figures)]
        parts += [f"Warning: {doubt}." for doubt in doubts]
    return "\n\n".join(part for part in parts if part)


def write(args: argparse.Namespace, done: Sequence[tuple[Workload, Sequence[Run]]], text: str) -> None:
    """Write the report, the JSON, and the picture."""
    (args.output / "routing.md").write_text(text + "\n")
    settings = vars(args) | {"trace": [Path(name).name for name in args.trace]}
    del settings["output"]
    document = {
        "settings": settings,
        "machine": machine(),
        "runs": [asdict(run) for _, runs in done for run in runs],
        "simulated": [
            {"load": asdict(workload.load), "policy": policy, **asdict(figures)}
            for workload, _ in done
            for policy, figures in workload.figures.items()
        ],
    }
    (args.output / "routing.json").write_text(json.dumps(document, indent=1) + "\n")
    titles = {f"{workload.load}, {args.engines} engines".replace("`", ""): runs for workload, runs in done}
    draw({title: report.by_policy(runs) for title, runs in titles.items()}, args.output / "routing.png")


def policies(text: str) -> tuple[str, ...]:
    names = tuple(text.split(","))
    if unknown := set(names) - set(NAMES):
        raise argparse.ArgumentTypeError(f"no such policy: {', '.join(unknown)}; there are {', '.join(NAMES)}")
    return names


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.routing",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--short", action="store_true", help="whether all of it works: a minute, and no figures")
    parser.add_argument(
        "--trace",
        nargs="+",
        metavar="TRACE",
        help=f"one of {', '.join(PARTS)}, or a file in Mooncake's format, plain or .gz; several one after the other",
    )
    parser.add_argument("--turns", type=count, help="that each policy has (default: %(default)s)")
    parser.add_argument("--policies", type=policies, help=f"with commas between them, of {', '.join(NAMES)}")
    parser.add_argument("--requests", type=count, help=f"of each trace (default: those that come in {SECONDS} s)")
    parser.add_argument(
        "--speedup",
        type=factor,
        nargs="+",
        help="of arrivals; several for a sweep of loads (default: each trace's own, a file's is 1)",
    )
    parser.add_argument("--scale", type=factor, help="of the lengths of prompts and answers")
    parser.add_argument(
        "--answer-scale", type=factor, default=ANSWER_SCALE, help="of the lengths of answers, on top of --scale"
    )
    parser.add_argument(
        "--repeats",
        type=int,
        help="at most, of a run in which others took more than a tenth of the machine (default: %(default)s)",
    )
    parser.add_argument("--engines", type=count)
    parser.add_argument("--block-size", type=count, default=64, help="tokens in a KV block")
    parser.add_argument("--blocks", type=count, default=12288, help="KV blocks of an engine")
    parser.add_argument("--engine-speedup", type=factor, default=0.4, help="of engines over the simulated GPU")
    parser.add_argument("--output", type=Path, default=REPOSITORY / "build" / "benchmarks", help="folder")
    parser.set_defaults(**(SHORT if "--short" in sys.argv else FULL))
    return parser.parse_args()


if __name__ == "__main__":
    main()
