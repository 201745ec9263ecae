"""Compares our pipeline with Dynamo's own frontend, in Rust, in front of the same engines.

NATS, etcd and the engines stay up. In turns, our three programs and `python -m dynamo.frontend` come up before them,
answer what a client sends over 1 to 1,000 connections, and go again, so that none is in the other's way. Prints
Markdown tables to standard output, and writes them to a file beside a picture and a JSON with everything. Ends with 1
if any answer was wrong.

Loads, each of which may be run with several numbers of connections:

  simulated  simulated engines at full speed: what the programs cost themselves
  long       the same with prompts of 8,000 tokens
  paced      simulated engines at the pace of a GPU
  sglang     SGLang with this repository's model; the texts that both give to the same prompts are compared
"""

import argparse
import http.client
import itertools
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import NoReturn

from benchmarks.arguments import count, factor
from benchmarks.comparison import BETWEEN, FIRST, OURS, RATES, THEIRS, Comparison, Point, Result, Turn
from benchmarks.load import BODY, Load, Measured
from benchmarks.measure import CpuMeter, machine
from benchmarks.parts import Parts
from benchmarks.picture import draw_pairs
from benchmarks.pipeline import (
    REPOSITORY,
    START_SECONDS,
    family,
    open_many_files,
    seconds_of,
    simulated_model,
)
from benchmarks.prompts import Prompts
from benchmarks.trace import TraceRequest
from common.engines.die_with_parent import die_with
from common.engines.mocker_engine import CARD_NAME
from common.engines.ports import free_ports
from common.messages import GENERATE
from common.model import BLOCK_SIZE, resolve_model
from common.text.chat_model import ChatModel
from scripts.part import etcd_command

import msgspec
import psutil
from tqdm import tqdm

BIN = Path(sys.executable).parent
DYNAMO = BIN.parent / "ai-dynamo"  # where scripts/install --dev puts the ai-dynamo package
ANSWER_TOKENS = 100
LONG_TOKENS = 8000
WARM_UP = (16, 2.0)  # connections, seconds
SEED = 8000
MOCKER = ("--backend", "mocker", "--mocker-blocks", "65536")  # a million tokens, more than 64 long prompts have
ENGINES = {
    "simulated": (*MOCKER, "--mocker-speedup", "10000"),
    "paced": (*MOCKER, "--mocker-speedup", "0.33"),
    "sglang": ("--backend", "sglang", "--register-model"),
}
ENGINES_OF = {"simulated": "simulated", "long": "simulated", "paced": "paced", "sglang": "sglang"}
EVERY = [("simulated", [1, 16, 64, 256, 1000]), ("long", [64]), ("paced", [64]), ("sglang", [16])]
FULL = {"alternations": 5, "seconds": 5.0, "loads": EVERY}
SHORT = {"alternations": 1, "seconds": 2.0, "loads": [("simulated", [1, 16]), ("sglang", [4])]}


@dataclass(slots=True, frozen=True)
class Side:
    """What takes turns before the engines."""

    name: str
    commands: Callable[[int, Path], dict[str, list[str]]]  # by program, for a port and a model
    environment: Mapping[str, str] = field(default_factory=dict)
    model: str | None = None  # what clients call simulated engines' model, if not by its folder
    beside: Callable[[int], AbstractContextManager[object]] = lambda port: nullcontext()  # what runs as long as it does


class Benchmark:
    """Runs the turns."""

    def __init__(self, args: argparse.Namespace, folder: Path, progress: "tqdm[NoReturn]") -> None:
        self._args = args
        self._folder = folder
        self._progress = progress
        self._parts = Parts(folder)
        self._seeds = itertools.count(SEED)
        self._source = Path(resolve_model(None))
        self._simulated = simulated_model(self._source, folder)
        prompts = Prompts(ChatModel(str(self._simulated), self._source.name))
        self._filler = prompts.text(TraceRequest(arrival=0.0, pieces=((0, LONG_TOKENS),), output_tokens=ANSWER_TOKENS))

    def run(self, engines: str, points: Sequence[Point], sides: Sequence["Side"]) -> list[Turn]:
        """All sides' turns with one kind of engines."""
        self._model = self._source if engines == "sglang" else self._simulated
        nats, client, peer = free_ports(3)
        self._servers = {"NATS_SERVER": f"nats://127.0.0.1:{nats}", "ETCD_ENDPOINTS": f"http://127.0.0.1:{client}"}
        command = [*program("engine"), "--model", str(self._model), *ENGINES[engines]]
        names = [f"engine {number}" for number in range(self._args.engines)]
        base = {name: [*command, "--worker-id", name] for name in names}
        base |= servers(self._folder / engines, nats, client, peer)
        self._progress.set_postfix_str(f"{engines}: starting")
        with self._parts.running(base, self._servers):
            for name in names:
                self._parts.wait_for(name, f"serving {GENERATE.path} ")
            return [self._turn(engines, side, points) for _ in range(self._args.alternations) for side in sides]

    def _turn(self, engines: str, side: "Side", points: Sequence[Point]) -> Turn:
        (port,) = free_ports(1)
        # SGLang's engines register their own name.
        model = (None if engines == "sglang" else side.model) or self._model.name
        commands = side.commands(port, self._model)
        with self._parts.running(commands, {**self._servers, **side.environment}), side.beside(port):
            self._until_it_answers(side.name, port, model)
            make = partial(Load, port=port, model=model, tokens=ANSWER_TOKENS)
            connections, seconds = WARM_UP
            self._measure(make(connections=connections, seconds=seconds, seed=next(self._seeds)))
            results, memory = [], Counter[str]()
            for point in points:
                self._progress.set_postfix_str(f"{point}: {side.name}")
                load = make(connections=point.connections, seconds=self._args.seconds, seed=next(self._seeds))
                load.filler = self._filler if point.load == "long" else ""
                if engines == "sglang":  # the same prompts for both
                    load.seed, load.keep_texts = point.connections, True
                results.append(self._result(point, side.name, load))
                memory |= {name: used for name, used in self._parts.memory().items() if name in commands}
                self._progress.update()
        return Turn(engines, side.name, dict(memory), results)

    def _until_it_answers(self, side: str, port: int, model: str) -> None:
        """Return once a request gets as many tokens as it asks for. Raises SystemExit if that takes too long."""
        body = json.loads(BODY % (model, ANSWER_TOKENS, f"Hello, {side}!")) | {"stream": False, "stream_options": None}
        deadline = time.monotonic() + START_SECONDS
        while not (answer := ask(port, body)).endswith(f"{ANSWER_TOKENS} tokens"):
            self._parts.check()
            if time.monotonic() > deadline:
                raise SystemExit(f"{side} does not answer: {answer}")
            time.sleep(0.1)

    def _result(self, point: Point, side: str, load: Load) -> Result:
        measured, cpu, others = self._measure(load)
        thousands = max(measured.tokens, 1.0) / 1000
        return Result(
            point=point,
            side=side,
            requests=measured.answers / measured.seconds,
            tokens=measured.tokens / measured.seconds,
            cpu={name: seconds / thousands for name, seconds in cpu.items()},
            client=cpu["client"] / measured.seconds,
            others=others,
            measured=measured,
        )

    def _measure(self, load: Load) -> tuple[Measured, dict[str, float], float]:
        """Run the client. Returns besides what CPU time each program used, and what share of the machine others had."""
        command = [sys.executable, "-m", "benchmarks.load"]
        pipe, die = subprocess.PIPE, partial(die_with, psutil.Process().pid)
        with subprocess.Popen(
            command, cwd=REPOSITORY, stdin=pipe, stdout=pipe, start_new_session=True, preexec_fn=die
        ) as client:
            assert client.stdin and client.stdout
            try:
                client.stdin.write(msgspec.json.encode(load))
                client.stdin.close()
                client.stdout.readline()  # began
                meter, before = CpuMeter(lambda: sum(map(seconds_of, family(os.getpid())))), self._cpu(client.pid)
                client.stdout.readline()  # ended
                others, after = meter.shares().others, self._cpu(client.pid)
                measured = msgspec.json.decode(client.stdout.read(), type=Measured)
            finally:
                client.kill()
        self._parts.check()
        return measured, {name: seconds - before[name] for name, seconds in after.items()}, others

    def _cpu(self, client: int) -> dict[str, float]:
        """CPU seconds of each program so far."""
        return {**self._parts.cpu_seconds(), "client": seconds_of(psutil.Process(client))}


def program(name: str, *options: str) -> list[str]:
    """One of our four programs."""
    return [sys.executable, str(REPOSITORY / f"{name}.py"), *options]


def ours(port: int, model: Path) -> dict[str, list[str]]:
    """The programs of our front part."""
    return {
        "frontend": program("frontend", "--port", str(port)),
        "processor": program("processor", "--model", str(model)),
        "router": program("router"),
    }


def dynamo(port: int) -> dict[str, list[str]]:
    """Dynamo's, which is one program."""
    options = ["--http-port", str(port), "--router-mode", "kv", "--kv-cache-block-size", str(BLOCK_SIZE)]
    options += ["--discovery-backend", "etcd", "--request-plane", "nats", "--event-plane", "nats"]
    return {"dynamo.frontend": [sys.executable, "-m", "dynamo.frontend", *options]}


SIDES = [
    Side(OURS, ours),
    Side(THEIRS, lambda port, _: dynamo(port), {"PYTHONPATH": str(DYNAMO), "DYN_LOG": "warn"}, CARD_NAME),
]


def servers(data: Path, nats: int, client: int, peer: int) -> dict[str, list[str]]:
    """etcd and NATS on these ports, with their data in a folder."""
    return {
        "etcd": etcd_command(str(BIN / "etcd"), data, client, peer),
        "nats": [str(BIN / "nats-server"), "-js", "-a", "127.0.0.1", "-p", str(nats), "-sd", f"{data}/nats"],
    }


def ask(port: int, body: Mapping[str, object]) -> str:
    """What becomes of a request: "100 tokens", or why not."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    try:
        connection.request("POST", "/v1/chat/completions", json.dumps(body), {"content-type": "application/json"})
        answer = json.load(connection.getresponse())
        return f"{answer['usage']['completion_tokens']} tokens" if "usage" in answer else json.dumps(answer)
    except (OSError, ValueError, http.client.HTTPException) as error:
        return str(error)
    finally:
        connection.close()


def main() -> None:
    args = arguments()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    args.output.mkdir(parents=True, exist_ok=True)
    open_many_files()
    try:
        comparison = Comparison(run_all(args))
    except KeyboardInterrupt:
        raise SystemExit("interrupted") from None
    text = describe(args, comparison)
    print(text)
    write(args, comparison, text)
    sys.exit(bool(comparison.faults()))


def run_all(args: argparse.Namespace) -> list[Turn]:
    points = [Point(name, connections) for name, several in args.loads for connections in several]
    turns: list[Turn] = []
    total = 2 * args.alternations * len(points)
    with tempfile.TemporaryDirectory(prefix="benchmark-") as folder, tqdm(total=total, disable=None) as progress:
        benchmark = Benchmark(args, Path(folder), progress)
        for engines in ENGINES:
            if here := [point for point in points if ENGINES_OF[point.load] == engines]:
                turns += benchmark.run(engines, here, SIDES)
    return turns


def describe(args: argparse.Namespace, comparison: Comparison) -> str:
    """The report, in Markdown."""
    parts = [conditions(args, comparison)]
    parts += [comparison.figures(figures) for figures in (RATES, FIRST, BETWEEN)]
    parts += ["CPU time for 1,000 tokens (ms):", comparison.cpu(), "The most memory (MB):", comparison.memory()]
    parts += [f"Warning: {doubt}." for doubt in comparison.doubts()]
    parts += [f"Error: {fault}." for fault in comparison.faults()]
    return "\n\n".join(parts)


def conditions(args: argparse.Namespace, comparison: Comparison) -> str:
    compared, different = comparison.different_texts()
    others = [result.others for result in comparison.results]
    text = (
        f"{args.engines} engines; answers of {ANSWER_TOKENS} tokens; {args.seconds:g} s or more for each number of "
        f"connections, {args.alternations} times, ours and Dynamo's by turns. Medians; a ratio is ours over Dynamo's. "
        f"Others used {statistics.median(others):.1%} of the machine, at most {max(others):.1%}."
    )
    for point in comparison.points:
        if point.load == "paced":
            paces = [
                statistics.median(values) / point.connections for values in comparison.values(point, RATES["tokens/s"])
            ]
            text += f" {point}: a stream got {paces[0]:.0f} tokens a second from ours and {paces[1]:.0f} from Dynamo's."
    return text + f" {compared - different} of {compared} texts were the same for the same prompt." * bool(compared)


def write(args: argparse.Namespace, comparison: Comparison, text: str) -> None:
    """Write the report, the JSON and the picture."""
    (args.output / "throughput.md").write_text(text + "\n")
    settings = {name: value for name, value in vars(args).items() if name not in ("output", "short")}
    compared, different = comparison.different_texts()
    document = {
        "settings": settings,
        "machine": machine(),
        "texts": {"compared": compared, "different": different},
        "turns": comparison.turns,
    }
    (args.output / "throughput.json").write_bytes(msgspec.json.format(msgspec.json.encode(document), indent=1) + b"\n")
    shown = {"tokens a second": RATES["tokens/s"], "time to the first token, median (ms)": FIRST["TTFT p50 (ms)"]}
    figures = {
        what: {
            OURS: [comparison.values(point, figure)[0] for point in comparison.points],
            THEIRS: [comparison.values(point, figure)[1] for point in comparison.points],
        }
        for what, figure in shown.items()
    }
    title = f"answers of {ANSWER_TOKENS} tokens: load, connections"
    draw_pairs([str(point) for point in comparison.points], figures, title, args.output / "throughput.png")


def load(text: str) -> tuple[str, list[int]]:
    """For argparse: a load and its numbers of connections, "simulated:1,16"."""
    name, _, numbers = text.partition(":")
    if name not in ENGINES_OF:
        raise argparse.ArgumentTypeError(f"no such load: {name}; there are {', '.join(ENGINES_OF)}")
    return name, [count(one) for one in numbers.split(",")]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.throughput",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--short", action="store_true", help="fewer loads, once, and for less time: two minutes")
    parser.add_argument(
        "--loads", type=load, nargs="+", metavar="LOAD:CONNECTIONS,…", help="what to measure: simulated:1,64 paced:64"
    )
    parser.add_argument("--alternations", type=count, help="how often each side has its turn")
    parser.add_argument("--seconds", type=factor, help="that are measured at least, for each number of connections")
    parser.add_argument("--engines", type=count, default=2)
    parser.add_argument("--output", type=Path, default=REPOSITORY / "build" / "benchmarks", help="folder")
    early, _ = parser.parse_known_args()
    parser.set_defaults(**(SHORT if early.short else FULL))
    return parser.parse_args()


if __name__ == "__main__":
    main()
