"""Kills, stops and restarts parts of a pipeline under load, and counts what is lost.

Starts the pipeline with two routers, processors and frontends (or as the options say), sends requests from many
clients at once, and lets one fault after the other happen to it. A request is lost if its answer does not come whole,
and wrong if its text is not the one that the same request got when nothing happened; simulated engines make their
tokens up, so of them only the number is compared. Prints a Markdown table, and writes a picture and a JSON beside each
other. Ends with 1 if anything was lost or wrong.

Faults: kill (SIGKILL), stop (SIGSTOP, and SIGCONT after a while) or restart (SIGTERM) of engine, scheduler (SGLang's
own process), router, processor, frontend, nats or etcd. What is killed or has ended, launch.sh starts again. "stop
machine" is all of them asleep at once, "restart each" one program after the other until all have been, under load.
"""

import argparse
import asyncio
import itertools
import json
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.arguments import add_parts, count, factor, parts
from benchmarks.measure import machine
from benchmarks.picture import draw_chaos
from benchmarks.pipeline import REPOSITORY, Pipeline, family, launched, open_many_files
from benchmarks.replay import session
from benchmarks.report import table

import aiohttp
import psutil
from tqdm import tqdm

PARTS = {
    "engine": "engine.py",
    "scheduler": "sglang::scheduler",
    "router": "router.py",
    "processor": "processor.py",
    "frontend": "frontend.py",
    "nats": "nats-server",
    "etcd": "etcd",
    "machine": "",
}
PROGRAMS = ("router", "engine", "processor", "frontend")
SIGNALS = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP, "restart": signal.SIGTERM}
FAULTS = [f"{what} {part}" for part in ("engine", "router", "processor", "nats", "etcd") for what in ("kill", "stop")]
FAULTS += ["stop scheduler", "stop machine", *(f"restart {part}" for part in (*PROGRAMS, "each"))]
SHORT = ["kill engine", "kill processor", "stop router", "stop engine", "stop nats", "restart each"]
CALM_SECONDS = 60.0  # for everything to be as before
SILENCE_SECONDS = 90.0  # after which a client gives up


@dataclass(slots=True)
class Outcome:
    """What became of a request. Times are in seconds since the fault's requests began."""

    prompt: str
    began: float
    first: float = 0.0  # from sending it to its first text
    pause: float = 0.0  # the longest between two pieces of text
    ended: float = 0.0
    tokens: int = 0
    text: str = ""
    error: str = ""


@dataclass(slots=True)
class Result:
    """What a fault did."""

    fault: str
    at: list[float] = field(default_factory=list)  # when it happened
    running: int = 0  # requests in progress when it happened first
    outcomes: list[Outcome] = field(default_factory=list)
    wrong: int = 0
    calm: float = 0.0  # seconds from the last fault until everything was as before

    @property
    def lost(self) -> list[Outcome]:
        return [outcome for outcome in self.outcomes if outcome.error]


class Chaos:
    """A pipeline, and what happens to it."""

    def __init__(self, pipeline: Pipeline, args: argparse.Namespace, progress: "tqdm[Any]", log: Path) -> None:
        """log: of launch.sh, which says when a part is ready again."""
        self._pipeline = pipeline
        self._args = args
        self._progress = progress
        self._log = log
        self._rolling = False
        self._expected: dict[str, str] = {}

    async def run(self) -> list[Result]:
        """Every fault, after a run in which nothing happens."""
        async with session(self._pipeline.address, SILENCE_SECONDS) as self._session:
            self._instances = (await self._health())["instances"]
            calm = await self._fault("nothing")
            self._expected = {outcome.prompt: outcome.text for outcome in calm.outcomes}
            results = [calm] + [await self._fault(fault) for fault in self._args.faults]
        for result in results if self._args.backend == "sglang" else []:
            result.wrong = sum(self._expected[one.prompt] != one.text for one in result.outcomes if not one.error)
        return results

    async def _fault(self, fault: str) -> Result:
        self._progress.set_postfix_str(fault)
        result, began = Result(fault), time.monotonic()
        numbers = itertools.takewhile(lambda number: number < self._args.requests or self._rolling, itertools.count())
        clients = [asyncio.create_task(self._client(numbers, result, began)) for _ in range(self._args.clients)]
        if fault != "nothing":
            for _ in range(self._args.times):
                await asyncio.sleep(self._args.pause)
                if all(client.done() for client in clients):
                    break
                result.at.append(time.monotonic() - began)
                result.running = result.running or sum(not client.done() for client in clients)
                await self._happen(fault)
        await asyncio.gather(*clients)
        last = time.monotonic()
        if result.at and fault.startswith("stop"):  # what happens next is to meet a whole pipeline
            await asyncio.sleep(max(began + result.at[-1] + self._args.stopped - last, 0))
        await self._until_calm(result.fault)
        result.calm = time.monotonic() - last
        return result

    async def _happen(self, fault: str) -> None:
        what, part = fault.split()
        if part == "each":
            await self._roll()
            return
        processes = list(self._processes(part))
        for process in processes if part == "machine" else processes[:1]:
            process.send_signal(SIGNALS[what])
            if what == "stop":
                asyncio.get_running_loop().call_later(self._args.stopped, _go_on, process)

    async def _roll(self) -> None:
        """Restart each program, the next one once the one before is back. Raises SystemExit if one does not come."""
        self._rolling = True
        for process in [process for part in PROGRAMS for process in self._processes(part)]:
            ready, deadline = self._ready(), time.monotonic() + CALM_SECONDS
            process.send_signal(SIGNALS["restart"])
            while self._ready() == ready:
                if time.monotonic() > deadline:
                    raise SystemExit(f"{CALM_SECONDS:g} s later a part is not back:\n{self._log.read_text()[-3000:]}")
                await asyncio.sleep(0.1)
        self._rolling = False

    def _ready(self) -> int:
        """How often parts became ready."""
        return self._log.read_text(errors="replace").count(" is ready")

    def _processes(self, part: str) -> Iterator[psutil.Process]:
        """Those of a part. Raises SystemExit if there is none."""
        found = False
        for process in family(self._pipeline.process.pid):
            with suppress(psutil.Error):
                if any(PARTS[part] in word.split("/")[-1] for word in process.cmdline()[:2]):
                    found = True
                    yield process
        if not found:
            raise SystemExit(f"there is no {part} in this pipeline")

    async def _client(self, numbers: Iterator[int], result: Result, began: float) -> None:
        for number in numbers:
            outcome = Outcome(prompt_of(number % self._args.prompts), time.monotonic() - began)
            result.outcomes.append(outcome)
            try:
                await self._ask(outcome)
            except (aiohttp.ClientError, TimeoutError, ValueError) as error:
                outcome.error = f"{type(error).__name__}: {error}"
            outcome.ended = time.monotonic() - began
            self._progress.update()

    async def _ask(self, outcome: Outcome) -> None:
        body = {
            "model": "pipeline-chat",
            "messages": [{"role": "user", "content": outcome.prompt}],
            "max_tokens": self._args.tokens,
            "ignore_eos": True,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        last = sent = time.monotonic()
        async with self._session.post("/v1/chat/completions", json=body) as response:
            if response.status != 200:
                raise ValueError(f"{response.status}: {(await response.text())[:300]}")
            async for line in response.content:
                if not line.startswith(b"data: {"):
                    continue
                event = json.loads(line[6:])
                if "error" in event:
                    raise ValueError(event["error"]["message"])
                outcome.tokens = (event.get("usage") or {}).get("completion_tokens", 0)
                if piece := "".join(choice["delta"].get("content") or "" for choice in event["choices"]):
                    now = time.monotonic()
                    if outcome.text:
                        outcome.pause = max(outcome.pause, now - last)
                    else:
                        outcome.first = now - sent
                    outcome.text, last = outcome.text + piece, now
        if outcome.tokens != self._args.tokens:
            raise ValueError(f"{outcome.tokens} tokens came of {self._args.tokens}")

    async def _until_calm(self, fault: str) -> None:
        """Return once as many instances are there as in the beginning, and no router counts a request in progress.
        Raises SystemExit if that takes too long."""
        deadline = time.monotonic() + CALM_SECONDS
        while True:
            health = await self._health()
            busy = await self._busy() if health else None
            if health.get("status") == "healthy" and health["instances"] == self._instances and busy == 0:
                return
            if time.monotonic() > deadline:
                raise SystemExit(f"{CALM_SECONDS:g} s after {fault}: {json.dumps(health)}, {busy} requests in progress")
            await asyncio.sleep(0.1)

    async def _health(self) -> dict[str, Any]:
        with suppress(aiohttp.ClientError):  # the frontend is being started again
            async with self._session.get("/health") as response:
                health: dict[str, Any] = await response.json()
                return health
        return {}

    async def _busy(self) -> int | None:
        """Requests that routers count as in progress; None if they do not say."""
        async with self._session.get("/workers") as response:
            report = await response.json()
        if response.status != 200:
            return None
        busy: int = sum(worker["requests"] for router in report["routers"] for worker in router["workers"])
        return busy


def _go_on(process: psutil.Process) -> None:
    with suppress(psutil.NoSuchProcess):
        process.send_signal(signal.SIGCONT)


def prompt_of(number: int) -> str:
    return f"What does part {number} of the pipeline do, and what when part {number + 1} dies?"


def report(args: argparse.Namespace, results: Sequence[Result]) -> str:
    """The table, in Markdown."""
    header = ["fault", "times", "running", "requests", "lost", "wrong text", "first token, slowest (s)"]
    header += ["pause, longest (s)", "as before after (s)"]
    rows = []
    for result in results:
        answered = [outcome for outcome in result.outcomes if not outcome.error]
        slowest = max((outcome.first for outcome in answered), default=0.0)
        pause = max((outcome.pause for outcome in answered), default=0.0)
        wrong = str(result.wrong) if args.backend == "sglang" else "-"
        row = [result.fault, len(result.at), result.running, len(result.outcomes), len(result.lost), wrong]
        rows.append([*map(str, row), f"{slowest:.2f}", f"{pause:.2f}", f"{result.calm:.1f}"])
    return table(header, rows)


def run(args: argparse.Namespace) -> list[Result]:
    options = ["--backend", args.backend, *parts(args)]
    if args.backend == "mocker":
        options += ["--mocker-speedup", str(args.speedup)]
    total = args.requests * (1 + len(args.faults))
    with (
        tempfile.TemporaryDirectory(prefix="benchmark-") as folder,
        tqdm(total=total, disable=None) as progress,
        launched(options, log := Path(folder) / "launch.log") as pipeline,
    ):
        try:
            return asyncio.run(Chaos(pipeline, args, progress, log).run())
        finally:
            for process in family(pipeline.process.pid):
                _go_on(process)


def main() -> None:
    args = arguments()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    args.output.mkdir(parents=True, exist_ok=True)
    open_many_files()
    results = run(args)
    text = report(args, results)
    faults = [f"{result.fault}: {one.error}" for result in results for one in result.lost[:3]]
    print("\n".join([text, "", *faults]))
    (args.output / "chaos.md").write_text(text + "\n")
    settings = {name: str(value) for name, value in vars(args).items()}
    document = {"settings": settings, "machine": machine(), "results": [asdict(result) for result in results]}
    (args.output / "chaos.json").write_text(json.dumps(document, indent=1) + "\n")
    ends = {result.fault: [one.ended for one in result.outcomes if not one.error] for result in results}
    draw_chaos(ends, {result.fault: result.at for result in results}, args.output / "chaos.png")
    sys.exit(any(result.lost or result.wrong for result in results))


def fault(text: str) -> str:
    """For argparse: what happens to what."""
    what, _, part = text.partition(" ")
    if text not in FAULTS and (what not in SIGNALS or part not in PARTS or part == "machine"):
        raise argparse.ArgumentTypeError(f"no such fault: {text}; they are {', '.join(FAULTS)}")
    return text


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.chaos", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--backend", choices=["sglang", "mocker"], default="mocker")
    add("--faults", type=fault, nargs="+", metavar="FAULT", help="some of: " + ", ".join(f'"{one}"' for one in FAULTS))
    add("--short", action="store_true", help="six faults, of 8 s, and fewer requests: two minutes")
    add_parts(parser, engines=3)
    add("--clients", type=count, default=32, help="that ask at once")
    add("--requests", type=count, default=400, help="for each fault")
    add("--prompts", type=count, default=50, help="different ones among them")
    add("--tokens", type=count, default=80, help="of each answer")
    add("--times", type=count, default=1, help="that each fault happens")
    add("--pause", type=factor, default=3.0, help="seconds before each")
    add("--stopped", type=factor, default=20.0, help="seconds until what was stopped goes on")
    add("--speedup", type=factor, default=0.5, help="of simulated engines, over a GPU")
    add("--output", type=Path, default=REPOSITORY / "build" / "benchmarks", help="folder")
    args = parser.parse_args()
    if args.short:
        args.requests, args.pause, args.stopped = min(args.requests, 64), 0.5, 8.0
    if not args.faults:
        known = itertools.chain(SHORT if args.short else FAULTS)
        args.faults = [one for one in known if args.backend == "sglang" or "scheduler" not in one]
    return args


if __name__ == "__main__":
    main()
