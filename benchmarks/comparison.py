"""What two pipelines did in turns, and the tables that compare them."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from benchmarks.load import Measured
from benchmarks.measure import TRUSTED_OTHERS
from benchmarks.report import number, ratios, table

OURS, THEIRS = "ours", "Dynamo's"
PROGRAMS = ("frontend", "processor", "router", "dynamo.frontend", "engine", "nats", "etcd", "client")
FRONTS = PROGRAMS[:4]  # the front parts; the other programs serve both
TRUSTED_CLIENT = 0.8  # of a core; with more, the client may be what answers wait for


@dataclass(slots=True, frozen=True)
class Point:
    """What is measured."""

    load: str
    connections: int

    def __str__(self) -> str:
        return f"{self.load}, {self.connections:,}"


@dataclass(slots=True, frozen=True)
class Result:
    """What one side did at a point, once."""

    point: Point
    side: str
    requests: float  # a second
    tokens: float  # a second
    cpu: dict[str, float]  # seconds of each program, for 1,000 tokens
    client: float  # share of a core that the client used
    others: float  # share of the machine that went to what is no part of this
    measured: Measured


@dataclass(slots=True, frozen=True)
class Turn:
    """What one side did while its programs were up."""

    engines: str
    side: str
    memory: dict[str, int]  # bytes that each program had at most
    results: list[Result]


Figure = Callable[[Result], float]
RATES: dict[str, Figure] = {"requests/s": lambda result: result.requests, "tokens/s": lambda result: result.tokens}
FIRST: dict[str, Figure] = {
    "TTFT p50 (ms)": lambda result: 1000 * result.measured.ttft_p50,
    "TTFT p99 (ms)": lambda result: 1000 * result.measured.ttft_p99,
}
BETWEEN: dict[str, Figure] = {
    "between events p50 (ms)": lambda result: 1000 * result.measured.between_p50,
    "p99 (ms)": lambda result: 1000 * result.measured.between_p99,
    "events an answer": lambda result: result.measured.events,
}


class Comparison:
    """The turns of a run: ours and Dynamo's by turns."""

    def __init__(self, turns: Sequence[Turn]) -> None:
        self.turns = turns
        self.results = [result for turn in turns for result in turn.results]
        self.points = list(dict.fromkeys(result.point for result in self.results))

    def of(self, point: Point, side: str) -> list[Result]:
        """In the order of the alternations."""
        return [result for result in self.results if (result.point, result.side) == (point, side)]

    def values(self, point: Point, figure: Figure) -> tuple[list[float], list[float]]:
        """Ours and Dynamo's."""
        ours, theirs = ([figure(result) for result in self.of(point, side)] for side in (OURS, THEIRS))
        return ours, theirs

    def figures(self, figures: Mapping[str, Figure]) -> str:
        """A table of medians and ratios."""
        header = ["load", "connections"]
        for name in figures:
            header += [f"{name}: ours", "Dynamo's", "ratio (least to most)"]
        rows = []
        for point in self.points:
            cells = [point.load, f"{point.connections:,}"]
            for figure in figures.values():
                ours, theirs = self.values(point, figure)
                cells += [number(statistics.median(ours)), number(statistics.median(theirs)), ratios(ours, theirs)]
            rows.append(cells)
        return table(header, rows)

    def cpu(self) -> str:
        """A table of the CPU time that each program used."""
        header = ["load, connections", "side", *PROGRAMS, "front part", "client, of a core", "others"]
        rows = []
        for point in self.points:
            for side in (OURS, THEIRS):
                results = self.of(point, side)
                times = {name: median([1000 * r.cpu.get(name, 0.0) for r in results]) for name in PROGRAMS}
                cells = [number(time) if time or name not in FRONTS else "" for name, time in times.items()]
                total = number(sum(times[name] for name in FRONTS))
                shares = [f"{median([getattr(r, name) for r in results]):.0%}" for name in ("client", "others")]
                rows.append([str(point), side, *cells, total, *shares])
        return table(header, rows)

    def memory(self) -> str:
        """A table of the most memory that each program had."""
        header = ["engines", *FRONTS[:3], "sum of the three", FRONTS[3], "ratio"]
        rows = []
        for engines in dict.fromkeys(turn.engines for turn in self.turns):
            turns = [turn for turn in self.turns if turn.engines == engines]
            peaks = [median([t.memory[name] / 2**20 for t in turns if name in t.memory]) for name in FRONTS]
            ours, theirs = sum(peaks[:3]), peaks[3]
            rows.append([engines, *map(number, (*peaks[:3], ours, theirs)), number(ours / theirs)])
        return table(header, rows)

    def different_texts(self) -> tuple[int, int]:
        """How many texts there are to prompts that were answered before, and how many of them differ from the first."""
        first: dict[str, str] = {}
        compared = different = 0
        for result in self.results:
            for prompt, text in result.measured.texts.items():
                compared += prompt in first
                different += first.setdefault(prompt, text) != text
        return compared, different

    def faults(self) -> list[str]:
        """What was wrong with the answers."""
        found = [
            f"{result.point}, {result.side}: {result.measured.wrong} wrong answers: {'; '.join(result.measured.errors)}"
            for result in self.results
            if result.measured.wrong
        ]
        compared, different = self.different_texts()
        return found + [f"{different} of {compared} texts differ from the first for the same prompt"] * bool(different)

    def doubts(self) -> list[str]:
        """Why some figures are not to be trusted."""
        clients, others = ([getattr(one, name) for one in self.results] for name in ("client", "others"))
        found = []
        if max(clients) > TRUSTED_CLIENT:
            found.append(f"the client used up to {max(clients):.0%} of a core; answers may have waited for it")
        if busy := sum(share > TRUSTED_OTHERS for share in others):
            found.append(
                f"others used up to {max(others):.0%} of the machine, and much in {busy} of {len(others)} turns"
            )
        return found


median = statistics.median
