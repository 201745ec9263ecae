"""What it costs to be seen: our three programs with nobody watching, and with more and more that does.

NATS, etcd and the engines stay up. In turns, the programs come up before them, answer what a client sends, and go:

  alone     nobody watches
  seen      somebody has the page open, Prometheus asks every part each second, and traffic is recorded
  sampled   besides, one request of a hundred is traced
  traced    besides, every request is traced

Prints a Markdown table to standard output: CPU time of the three programs for 1,000 tokens, and the time to the first
token, each also over that of `alone` in the turn before. What reads the events and the traces is a process of its own.
"""

import argparse
import http.client
import itertools
import signal
import socket
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from benchmarks.arguments import count, factor
from benchmarks.comparison import FRONTS, Point, Result
from benchmarks.parts import Parts
from benchmarks.report import number, ratios, table
from benchmarks.throughput import ENGINES, ENGINES_OF, Benchmark, Side, load, ours
from common.engines.ports import free_ports

from tqdm import tqdm

ALONE = "alone"
SCRAPE_SECONDS = 1.0
SYSTEM_PORTS = range(18500, 2**15)  # the runtime takes none that is higher


class Watchers:
    """What watches the three programs, and the options and variables that let it."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        (self._collector,) = free_ports(1)
        self._system_ports = list(itertools.islice(filter(_is_free, SYSTEM_PORTS), 3))

    def side(self, name: str, *, traced: float = 0.0) -> Side:
        """The programs with somebody who watches. traced: the share of requests that are."""
        environment = {
            "OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{self._collector}",
            "OTEL_TRACES_SAMPLER": "parentbased_traceidratio",
            "OTEL_TRACES_SAMPLER_ARG": str(traced),
        }
        return Side(name, self._commands, environment if traced else {}, beside=self._watching)

    def _commands(self, port: int, model: Path) -> dict[str, list[str]]:
        commands = ours(port, model)
        commands["frontend"] += ["--record", str(self._folder / "traffic.jsonl")]
        ports = zip(commands.items(), self._system_ports, strict=True)
        return {name: ["env", f"DYN_SYSTEM_PORT={own}", *command] for (name, command), own in ports}

    @contextmanager
    def _watching(self, port: int) -> Iterator[None]:
        """Take traces, ask for metrics and read events while the block runs."""
        over = threading.Event()
        threads = [
            threading.Thread(target=_again_and_again, args=(over, work))
            for work in (lambda: self._scrape(over), lambda: _read_events(port, over))
        ]
        parts = Parts(self._folder)
        with parts.running({"collector": [sys.executable, "-m", "tests.otlp", str(self._collector)]}, {}):
            for thread in threads:
                thread.start()
            try:
                yield
            finally:
                over.set()
                for thread in threads:
                    thread.join()

    def _scrape(self, over: threading.Event) -> None:
        while not over.wait(SCRAPE_SECONDS):
            for port in self._system_ports:
                connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
                connection.request("GET", "/metrics")
                connection.getresponse().read()
                connection.close()


def _again_and_again(over: threading.Event, work: Callable[[], None]) -> None:
    """Do it until it is over, whether or not the programs are there."""
    while not over.is_set():
        with suppress(OSError, http.client.HTTPException):
            work()
        time.sleep(0.1)


def _read_events(port: int, over: threading.Event) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    connection.request("GET", "/events")
    events = connection.getresponse()
    while events.read1(65536) and not over.is_set():
        pass
    connection.close()


def _is_free(port: int) -> bool:
    with socket.socket() as claim:
        return claim.connect_ex(("127.0.0.1", port)) != 0


def run(args: argparse.Namespace) -> list[Result]:
    points = [Point(name, connections) for name, several in args.loads for connections in several]
    results: list[Result] = []
    with tempfile.TemporaryDirectory(prefix="benchmark-") as name:
        folder = Path(name)
        watchers = Watchers(folder)
        sides = [Side(ALONE, ours), watchers.side("seen")]
        sides += [watchers.side("sampled", traced=0.01), watchers.side("traced", traced=1.0)]
        with tqdm(total=len(sides) * args.alternations * len(points), disable=None) as progress:
            benchmark = Benchmark(args, folder, progress)
            for engines in ENGINES:
                if here := [point for point in points if ENGINES_OF[point.load] == engines]:
                    results += [result for turn in benchmark.run(engines, here, sides) for result in turn.results]
    return results


def report(results: Sequence[Result]) -> str:
    """The table, in Markdown."""

    def values(point: Point, side: str, figure: Callable[[Result], float]) -> list[float]:
        return [figure(result) for result in results if (result.point, result.side) == (point, side)]

    header = ["load, connections", "", "CPU for 1,000 tokens (ms)", "over alone", "first token p50 (ms)", "over alone"]
    rows = []
    for point in dict.fromkeys(result.point for result in results):
        for side in dict.fromkeys(result.side for result in results):
            row = [str(point), side]
            for figure in (_cpu, _first):
                own, alone = values(point, side, figure), values(point, ALONE, figure)
                row += [number(statistics.median(own)), "" if side == ALONE else ratios(own, alone)]
            rows.append(row)
    return table(header, rows)


def _cpu(result: Result) -> float:
    return 1000 * sum(result.cpu.get(name, 0.0) for name in FRONTS)


def _first(result: Result) -> float:
    return 1000 * result.measured.ttft_p50


def main() -> None:
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    args = arguments()
    results = run(args)
    others = [result.others for result in results]
    print(f"{args.engines} engines, {args.alternations} turns each. Others used {statistics.median(others):.1%} of the")
    print(f"machine, at most {max(others):.1%}.\n\n{report(results)}")
    wrong = [error for result in results for error in result.measured.errors]
    if wrong:
        print(f"\nError: {wrong[0]}")
    sys.exit(bool(wrong))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.watching",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    default = [("simulated", [64]), ("paced", [64])]
    parser.add_argument("--loads", type=load, nargs="+", default=default, metavar="LOAD:CONNECTIONS,…")
    parser.add_argument("--alternations", type=count, default=7, help="how often each has its turn")
    parser.add_argument("--seconds", type=factor, default=4.0, help="that are measured at least")
    parser.add_argument("--engines", type=count, default=2)
    return parser.parse_args()


if __name__ == "__main__":
    main()
