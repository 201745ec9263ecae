"""Sends many short requests to one pipeline, and looks whether its programs grow or keep what is over.

Many clients ask simulated engines, some of them hang up before or in the middle of the answer, and now and then an
engine is killed. Prints a Markdown table of each program's memory, open files and threads. Ends with 1 if memory grew
by more than 5 % after the warm-up, which is a fifth of the requests at least, if a request was lost, or if anything is
counted as in progress at the end.

What may grow is full after the warm-up: there are fewer prompts than requests, and the engines' caches are small. The
memory is what a program has for itself alone (its unique set size), as the median of what it was in a tenth of the
requests: up to so many objects wait for the garbage collection that single looks differ.
"""

import argparse
import asyncio
import json
import re
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from random import Random
from typing import Any

from benchmarks.arguments import add_parts, count, factor, parts
from benchmarks.measure import machine
from benchmarks.pipeline import REPOSITORY, Pipeline, family, launched, open_many_files
from benchmarks.replay import session
from benchmarks.report import table

import aiohttp
import psutil
from prometheus_client.parser import text_string_to_metric_families
from tqdm import tqdm

WARM_UP, LATEST = 0.2, 0.7  # of the requests: the warm-up, at least and at most
REPLAY = 10_000  # batches that a simulated engine keeps
PART = 0.1  # of the requests, whose looks make one figure
GROWTH = 0.05  # that is allowed
LOOKS = 500  # at each program
PROMPTS = 2000  # different ones
TOKENS, LONG = 8, 200  # of an answer; of one in the middle of which the client hangs up
CALM_SECONDS = 60.0  # for nothing to be in progress
SILENCE_SECONDS = 90.0  # after which a client gives up
IN_PROGRESS = re.compile(r"dynamo_(frontend|component)_(inflight|active|queued)_requests")
PORTS = re.compile(r"metrics, at \S+: (.*)")  # in what launch.py says once it is up


@dataclass(slots=True, frozen=True)
class Look:
    """At a program: how many requests were over, and what it had."""

    requests: int
    memory: int  # bytes
    files: int
    threads: int


@dataclass(slots=True)
class Program:
    """One that is watched."""

    name: str
    port: int  # where its metrics are
    process: psutil.Process
    looks: list[Look] = field(default_factory=list)

    def look(self, requests: int) -> None:
        with suppress(psutil.NoSuchProcess), self.process.oneshot():
            memory = self.process.memory_full_info().uss
            self.looks.append(Look(requests, memory, self.process.num_fds(), self.process.num_threads()))

    def during(self, begin: float, end: float) -> Look:
        """The medians of what it had from the one number of requests to the other."""
        looks = [look for look in self.looks if begin <= look.requests <= end]
        figures = ([getattr(look, name) for look in looks] for name in ("memory", "files", "threads"))
        return Look(int(end), *(statistics.median_low(values) for values in figures))


class Soak:
    """A pipeline, its clients and those who watch it."""

    def __init__(self, pipeline: Pipeline, args: argparse.Namespace, log: Path, progress: "tqdm[Any]") -> None:
        self._args = args
        self._address = pipeline.address
        self._launch = pipeline.process.pid
        self._progress = progress
        self._random = Random(args.seed)
        self._numbers = iter(range(args.requests))
        found = PORTS.search(log.read_text())
        assert found
        self._ports = {int(port): name for name, port in (one.rsplit(" ", 1) for one in found[1].split(", "))}
        self.programs = list(self._running())
        self.outcomes = Counter[str]()
        self.killed = 0
        self.seconds = 0.0
        self.warm: int | None = None  # how many requests were over when the warm-up was

    def _running(self) -> Iterator[Program]:
        for process in family(self._launch):
            with suppress(psutil.Error):
                if name := self._ports.get(int(process.environ().get("DYN_SYSTEM_PORT", 0))):
                    yield Program(name, int(process.environ()["DYN_SYSTEM_PORT"]), process)

    async def run(self) -> list[str]:
        """Ask everything. Returns what is left over at the end."""
        async with session(self._address, SILENCE_SECONDS) as self._session:
            began = time.monotonic()
            watching = asyncio.create_task(self._watch())
            await asyncio.gather(*(self._client() for _ in range(self._args.clients)))
            watching.cancel()
            self.seconds = time.monotonic() - began
            return await self._left_over()

    @property
    def _over(self) -> int:
        return self.outcomes.total()

    async def _watch(self) -> None:
        kills = [self._args.requests * (number + 0.5) / self._args.kills for number in range(self._args.kills)]
        next_look = 0.0
        while True:
            if self._over >= next_look:
                next_look = self._over + self._args.requests / LOOKS
                for program in self.programs:
                    await asyncio.sleep(0)
                    program.look(self._over)
                if self.warm is None and self._over >= WARM_UP * self._args.requests and await self._replays_are_full():
                    self.warm = self._over
            if kills and self._over >= kills[0]:
                kills.pop(0)
                self._kill()
            await asyncio.sleep(0.05)

    async def _replays_are_full(self) -> bool:
        """Of the engines that have lived so far."""
        lived = {one.name for one in self.programs if one.process.is_running()}
        events = [worker["events"] for worker in await self._workers() if f"engine {worker['worker_id']}" in lived]
        return bool(events) and min(events) >= REPLAY

    async def _workers(self) -> list[dict[str, Any]]:
        """What all routers know of them; nothing if none answers."""
        async with self._session.get("/workers") as response:
            report = await response.json()
        return [
            {**worker, "router": router["router"], "waiting": router["waiting"]}
            for router in report.get("routers", ())
            for worker in router["workers"]
        ]

    def _kill(self) -> None:
        """The last engine. Like all that did not live through, it is not in the table."""
        last = max((one for one in self._running() if one.name.startswith("engine")), key=lambda one: one.name)
        last.process.kill()
        self.killed += 1

    async def _client(self) -> None:
        for _ in self._numbers:
            hangs_up = self._random.random() < self._args.hang_ups
            before = hangs_up and self._random.random() < 0.5
            try:
                async with asyncio.timeout(self._random.uniform(0, 0.05) if before else None):
                    outcome = await self._ask(in_the_middle=hangs_up and not before)
            except TimeoutError as error:
                outcome = "hung up before the answer" if before else f"lost: {error!r}"
            except (aiohttp.ClientError, ValueError) as error:
                outcome = f"lost: {error!r}"
            self.outcomes[outcome] += 1
            self._progress.update()

    async def _ask(self, in_the_middle: bool) -> str:
        """What became of a request."""
        stream = in_the_middle or self._random.random() < 0.5
        body = {
            "model": "pipeline-chat",
            "messages": [{"role": "user", "content": prompt_of(self._random.randrange(PROMPTS))}],
            "max_tokens": LONG if in_the_middle else TOKENS,
            "ignore_eos": True,
            "stream": stream,
        }
        async with self._session.post("/v1/chat/completions", json=body) as response:
            if response.status != 200:
                raise ValueError(f"{response.status}: {(await response.text())[:300]}")
            if in_the_middle:
                await response.content.readline()
                response.close()
                return "hung up in the middle"
            answer = await response.text()
        if not (answer.endswith("data: [DONE]\n\n") if stream else json.loads(answer)["usage"]):
            raise ValueError(f"not a whole answer: {answer[-300:]}")
        return "answered"

    async def _left_over(self) -> list[str]:
        """What is in progress, though nobody asks any more, after some time."""
        deadline = time.monotonic() + CALM_SECONDS
        while (left := [*await self._leases(), *await self._in_progress()]) and time.monotonic() < deadline:
            await asyncio.sleep(0.5)
        return left

    async def _leases(self) -> list[str]:
        workers = await self._workers()
        if len(workers) != self._args.routers * self._args.engines:
            return [f"the routers know {len(workers)} workers together"]
        names = ("waiting", "requests", "prefill_blocks", "decode_blocks")
        return [
            f"router {worker['router']}: {worker[name]} {name} of worker {worker['worker_id']}"
            for worker in workers
            for name in names
            if worker[name]
        ]

    async def _in_progress(self) -> list[str]:
        left = []
        for program in self._running():
            async with self._session.get(f"http://127.0.0.1:{program.port}/metrics") as response:
                text = await response.text()
            for metric in text_string_to_metric_families(text):
                for sample in metric.samples:
                    if IN_PROGRESS.fullmatch(sample.name) and sample.value:
                        left.append(f"{program.name}: {sample.name} {sample.labels} is {sample.value:g}")
        return left


def prompt_of(number: int) -> str:
    return f"{number} is the number of a part of the pipeline. " + f"What does part {number} do? " * (1 + number % 8)


@dataclass(slots=True, frozen=True)
class Row:
    """A program that lived through all."""

    name: str
    before: Look
    after: Look

    @property
    def growth(self) -> float:
        return self.after.memory / self.before.memory - 1


def rows(args: argparse.Namespace, warm: int, programs: Sequence[Program]) -> list[Row]:
    part, end = PART * args.requests, args.requests
    lived = [one for one in programs if one.process.is_running() and one.process.status() != psutil.STATUS_ZOMBIE]
    return [Row(one.name, one.during(warm, warm + part), one.during(end - part, end)) for one in lived]


def report(rows: Sequence[Row]) -> str:
    """The table, in Markdown."""
    header = ["program", "memory after warm-up (MB)", "at the end", "growth"]
    header += ["open files after warm-up", "at the end", "threads after warm-up", "at the end"]
    lines = []
    for row in rows:
        before, after = row.before, row.after
        memory = [f"{before.memory / 1e6:.1f}", f"{after.memory / 1e6:.1f}", f"{row.growth:+.1%}"]
        lines.append([row.name, *memory, *map(str, (before.files, after.files, before.threads, after.threads))])
    return table(header, lines)


def main() -> None:
    args = arguments()
    args.output.mkdir(parents=True, exist_ok=True)
    open_many_files()
    options = ["--backend", "mocker", "--mocker-speedup", str(args.speedup), "--mocker-blocks", str(args.blocks)]
    options += parts(args)
    with (
        tempfile.TemporaryDirectory(prefix="benchmark-") as folder,
        launched(options, log := Path(folder) / "launch.log") as pipeline,
        tqdm(total=args.requests, unit="request", disable=None) as progress,
    ):
        soak = Soak(pipeline, args, log, progress)
        left = asyncio.run(soak.run())
        if soak.warm is None or soak.warm > LATEST * args.requests:
            raise SystemExit("too few requests: the engines' buffers are not full, or nothing is left to measure")
        found = rows(args, soak.warm, soak.programs)
    text = report(found)
    said = [f"{number} {outcome}" for outcome, number in soak.outcomes.most_common()]
    rate = f"{args.requests / soak.seconds:.0f} requests a second, warm after {soak.warm}, {soak.killed} engines killed"
    print("\n".join([text, "", rate, *said, *left]))
    (args.output / "soak.md").write_text(text + "\n")
    looks = {one.name: [asdict(look) for look in one.looks] for one in soak.programs}
    document = {"settings": {name: str(value) for name, value in vars(args).items()}, "machine": machine()}
    document |= {"outcomes": soak.outcomes, "left": left, "looks": looks}
    (args.output / "soak.json").write_text(json.dumps(document, indent=1) + "\n")
    grown = any(row.growth > GROWTH for row in found)
    sys.exit(bool(grown or left or any(outcome.startswith("lost") for outcome in soak.outcomes)))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.soak", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--requests", type=count, default=100_000)
    add("--clients", type=count, default=32, help="that ask at once")
    add("--hang-ups", type=float, default=0.04, help="share of the requests whose client does not wait for the end")
    add("--kills", type=int, default=3, help="times that an engine is killed")
    add_parts(parser, engines=2)
    add("--blocks", type=count, default=1024, help="of KV cache, for each engine")
    add("--speedup", type=factor, default=20.0, help="of simulated engines, over a GPU")
    add("--seed", type=int, default=0)
    add("--output", type=Path, default=REPOSITORY / "build" / "benchmarks", help="folder")
    return parser.parse_args()


if __name__ == "__main__":
    main()
