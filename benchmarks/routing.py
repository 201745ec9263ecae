"""Compares routing policies: replays a trace through the real pipeline, with simulated engines, once for each policy.

Every policy gets the same requests at the same times and engines with empty caches. Prints Markdown tables to standard
output, and writes them to a file beside a picture and a JSON with everything.
"""

import argparse
import asyncio
import json
import os
import platform
import signal
import statistics
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NoReturn

from benchmarks import report
from benchmarks.measure import CpuMeter, Run, summarize
from benchmarks.picture import draw
from benchmarks.pipeline import REPOSITORY, Pipeline, Setting, running, simulated_model
from benchmarks.prompts import Prompts
from benchmarks.replay import Planned, WrongLength, ask, replay, session
from benchmarks.trace import TraceRequest, read, shareable
from benchmarks.work import Observer, Work
from common.model import resolve_model
from common.routing.policy import POLICIES
from common.text.chat_model import ChatModel

from tqdm import tqdm

# The reference last. A trace names no sessions, so session-affinity would be kv.
RUN = (*(name for name in reversed(POLICIES) if name != "session-affinity"), "dynamo")
BLIND = ("random", "round-robin")  # what they find in a cache is luck
TRACE = Path(__file__).parent / "traces" / "conversation.jsonl.gz"
WARM_UPS = 3  # for each engine, so that also a blind policy has shown the prompt to most of them
FULL = {
    "engines": 8,
    "requests": 850,
    "speedup": [6.5],
    "scale": 1.0,
    "answer_scale": 0.1,
    "policies": RUN,
}
SHORT = FULL | {"engines": 6, "requests": 400, "speedup": [10.0], "scale": 0.5, "policies": (*BLIND, "kv")}


@dataclass(slots=True, frozen=True)
class Workload:
    """The requests of a run: those of the trace, and one for the idle pipeline."""

    plan: Sequence[Planned]
    warm_up: Planned

    @classmethod
    def make(cls, prompts: Prompts, trace: Sequence[TraceRequest]) -> "Workload":
        median = round(statistics.median(request.input_tokens for request in trace))
        warm_up = TraceRequest(arrival=0.0, pieces=((-1, median),), output_tokens=1)
        return cls([_planned(prompts, request) for request in trace], _planned(prompts, warm_up))


def _planned(prompts: Prompts, request: TraceRequest) -> Planned:
    return Planned(request.arrival, prompts.body(request), prompts.tokens(request), request.output_tokens)


class Benchmark:
    """Runs policies one after the other, under the same conditions."""

    def __init__(self, setting: Setting, folder: Path) -> None:
        self._setting = setting
        self._folder = folder
        source = Path(resolve_model(None))
        self._model = simulated_model(source, folder)
        self._prompts = Prompts(ChatModel(str(self._model), source.name))

    def workload(self, trace: Sequence[TraceRequest]) -> Workload:
        """Requests from a trace. Raises SystemExit if one of them does not fit into an engine."""
        capacity = self._setting.blocks * self._setting.block_size
        longest = max(self._prompts.tokens(request) + request.output_tokens for request in trace)
        if longest > capacity:
            raise SystemExit(f"a request has {longest} tokens and an engine room for {capacity}: --blocks, --scale")
        return Workload.make(self._prompts, trace)

    def run(self, policy: str, speedup: float, workload: Workload, progress: "tqdm[NoReturn]") -> Run:
        progress.set_postfix_str("starting")
        with running(self._setting, policy, self._model, self._folder) as pipeline:
            run = asyncio.run(self._measure(pipeline, policy, speedup, workload, progress))
            progress.set_postfix_str("ending")
            return run

    async def _measure(
        self, pipeline: Pipeline, policy: str, speedup: float, workload: Workload, progress: "tqdm[NoReturn]"
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
            speedup,
            outcomes,
            {engine: work[engine].since(before.get(engine, Work())) for engine in work},
            engines=self._setting.engines,
            idle_ttft=idle_ttft,
            rate=len(outcomes) / max(workload.plan[-1].due, 1.0),
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
    try:
        with tempfile.TemporaryDirectory(prefix="benchmark-") as folder:
            runs = run_all(args, Benchmark(setting, Path(folder)))
    except WrongLength as error:
        raise SystemExit(f"this would measure something else: {error}") from error
    except KeyboardInterrupt:
        raise SystemExit("interrupted") from None
    text = describe(args, runs)
    print(text)
    write(args, runs, text)


def run_all(args: argparse.Namespace, benchmark: Benchmark) -> list[Run]:
    runs: list[Run] = []
    count = len(args.speedup) * len(args.policies)
    for speedup in args.speedup:
        trace = read(args.trace, limit=args.requests, speedup=speedup, scale=args.scale, answer_scale=args.answer_scale)
        workload = benchmark.workload(trace)
        for policy in args.policies:
            title = f"{policy} at speedup {speedup:g} ({len(runs) + 1} of {count})"
            with tqdm(total=len(trace), desc=title, unit="request", disable=None) as progress:
                runs.append(benchmark.run(policy, speedup, workload, progress))
    return runs


def describe(args: argparse.Namespace, runs: Sequence[Run]) -> str:
    """The report, in Markdown."""
    parts = [_conditions(args)]
    for speedup in args.speedup:
        here = [run for run in runs if run.speedup == speedup]
        parts.append(f"Speedup {speedup:g}: {here[0].rate:.1f} requests a second.")
        parts += [report.latency_table(here), report.ratio_table(here), report.machine_table(here)]
    if len(args.speedup) > 1 and "round-robin" in args.policies:
        parts.append(report.load_table(runs))
        if "kv" in args.policies:
            parts.append(report.vanishing_load(runs))
    parts += [f"Warning: {warning}." for warning in report.warnings(runs)]
    return "\n\n".join(part for part in parts if part)


def _conditions(args: argparse.Namespace) -> str:
    trace = read(args.trace, limit=args.requests, scale=args.scale, answer_scale=args.answer_scale)
    return (
        f"{len(trace)} requests of `{args.trace.name}`, lengths times {args.scale:g}: a mean of "
        f"{statistics.mean(request.input_tokens for request in trace):,.0f} tokens in and "
        f"{statistics.mean(request.output_tokens for request in trace):,.0f} out; {shareable(trace):.1%} of the prompt "
        f"tokens are repetitions. {args.engines} engines with {args.blocks:,} blocks of {args.block_size} tokens each."
    )


def write(args: argparse.Namespace, runs: Sequence[Run], text: str) -> None:
    """Write the report, the JSON, and a picture for each speed."""
    (args.output / "routing.md").write_text(text + "\n")
    settings = {name: str(value.name) if isinstance(value, Path) else value for name, value in vars(args).items()}
    del settings["output"]
    document = {"settings": settings, "machine": machine(), "runs": [asdict(run) for run in runs]}
    (args.output / "routing.json").write_text(json.dumps(document, indent=1) + "\n")
    for speedup in args.speedup:
        here = [run for run in runs if run.speedup == speedup]
        name = "routing.png" if len(args.speedup) == 1 else f"routing-{speedup:g}.png"
        title = f"{args.trace.name}, {args.engines} engines, {here[0].rate:.1f} requests a second"
        draw(here, title, args.output / name)


def count(text: str) -> int:
    if (value := int(text)) < 1:
        raise ValueError
    return value


def factor(text: str) -> float:
    if not 0 < (value := float(text)) < float("inf"):
        raise ValueError
    return value


def policies(text: str) -> tuple[str, ...]:
    names = tuple(text.split(","))
    if unknown := set(names) - set(RUN):
        raise argparse.ArgumentTypeError(f"no such policy: {', '.join(unknown)}; there are {', '.join(RUN)}")
    return names


def machine() -> dict[str, object]:
    """What the benchmark ran on."""
    model = platform.processor() or platform.machine()
    with suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next((line.partition(": ")[2] for line in lines if line.startswith("model name")), model)
    return {"cores": os.cpu_count(), "cpu": model, "system": platform.system(), "python": platform.python_version()}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.routing", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--short", action="store_true", help="three policies and fewer, shorter requests: two minutes")
    parser.add_argument("--trace", type=Path, default=TRACE, help="in Mooncake's format, plain or .gz")
    parser.add_argument("--requests", type=count, help="how many of the trace's requests (default: %(default)s)")
    parser.add_argument("--policies", type=policies, help="with commas between them")
    parser.add_argument("--speedup", type=factor, nargs="+", help="of arrivals; several for a sweep of loads")
    parser.add_argument("--scale", type=factor, help="of the lengths of prompts and answers")
    parser.add_argument("--answer-scale", type=factor, help="of the lengths of answers, on top of --scale")
    parser.add_argument("--engines", type=count)
    parser.add_argument("--block-size", type=count, default=64, help="tokens in a KV block")
    parser.add_argument("--blocks", type=count, default=12288, help="KV blocks of an engine")
    parser.add_argument("--engine-speedup", type=factor, default=0.4, help="of engines over the simulated GPU")
    parser.add_argument("--output", type=Path, default=REPOSITORY / "build" / "benchmarks", help="folder")
    early, _ = parser.parse_known_args()
    parser.set_defaults(**(SHORT if early.short else FULL))
    return parser.parse_args()


if __name__ == "__main__":
    main()
