"""Traces that are made, not recorded: agents and readers, with the statistics that README.md beside this file names.

    python -m benchmarks.traces.generated coding-agents > coding-agents.jsonl

writes one in Mooncake's format. The same name gives the same trace, always.
"""

import json
import math
import random
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import count

from benchmarks.trace import PIECE_TOKENS, TraceRequest

LONGEST = 120_000  # tokens of a prompt; a session ends there
REQUESTS = 4000
SEED = 2026
WARM_UP = 600.0  # seconds after which sessions come and go as they will go on to


@dataclass(slots=True)
class Text:
    """A prompt that grows. Two that were copied from one begin with the same pieces."""

    ids: Iterator[int]
    whole: tuple[int, ...] = ()  # pieces that are full, and stay what they are
    rest: int = 0  # tokens after them

    @property
    def tokens(self) -> int:
        return len(self.whole) * PIECE_TOKENS + self.rest

    def grown(self, tokens: float) -> "Text":
        """This text with more after it."""
        pieces, rest = divmod(self.rest + max(round(tokens), 1), PIECE_TOKENS)
        return Text(self.ids, self.whole + tuple(next(self.ids) for _ in range(pieces)), rest)

    def request(self, arrival: float, output_tokens: float) -> TraceRequest:
        """A request with this text as its prompt. Its last piece is nobody else's, unless it is full."""
        pieces = [(piece, PIECE_TOKENS) for piece in self.whole]
        if self.rest:
            pieces.append((next(self.ids), self.rest))
        return TraceRequest(arrival, tuple(pieces), max(round(output_tokens), 1))


@dataclass(slots=True)
class Chance:
    """The distributions that lengths and times are drawn from."""

    random: random.Random

    def around(self, median: float, mean: float) -> float:
        """Log-normal, with this median and mean."""
        return median * math.exp(self.random.gauss(0, math.sqrt(2 * math.log(mean / median))))

    def pause(self, mean: float, least: float = 0.0) -> float:
        """Exponential, from `least` on."""
        return least + self.random.expovariate(1 / (mean - least))

    def turns(self, mean: float) -> int:
        """Geometric, from 1 on."""
        return 1 + math.floor(math.log(1 - self.random.random()) / math.log(1 - 1 / mean))


@dataclass(slots=True, frozen=True)
class Session:
    """Requests that build on each other: a prompt, and then each time all of before, the answer and something new."""

    text: Text
    turns: int
    output: Callable[[], float]  # tokens of an answer
    grows: Callable[[], float]  # tokens that come after an answer
    pause: Callable[[], float]  # seconds between two requests

    def requests(self, start: float) -> Iterator[TraceRequest]:
        """Its requests, from a time on."""
        text = self.text
        for _ in range(self.turns):
            if text.tokens > LONGEST:
                return
            output = self.output()
            yield text.request(start, output)
            text = text.grown(output + self.grows())
            start += self.pause()


def tool_agents(chance: Chance, empty: Text) -> Iterator[Session]:
    """Calls of two tools, each with a long description that is the same every time, and conversations of people."""
    tools = [empty.grown(12 * PIECE_TOKENS), empty.grown(5 * PIECE_TOKENS)]
    while True:
        kind = chance.random.choices(("first tool", "second tool", "conversation"), (0.45, 0.14, 0.24))[0]
        if kind == "conversation":
            yield Session(
                empty.grown(chance.around(5500, 11000)),
                turns=chance.turns(1.7),
                output=lambda: chance.around(300, 350),
                grows=lambda: chance.around(700, 4000),
                pause=lambda: chance.pause(120, least=20),
            )
        else:
            first = kind == "first tool"
            text = tools[not first].grown(chance.pause(700 if first else 400))
            yield Session(text, 1, lambda: chance.pause(20), lambda: 0, lambda: 0)


def coding_agents(chance: Chance, empty: Text) -> Iterator[Session]:
    """Agents that read and change code: long prompts with a lot of turns, each a little longer than the one before."""
    systems = [empty.grown(20 * PIECE_TOKENS) for _ in range(12)]
    while True:
        system = chance.random.choices(systems, range(12, 0, -1))[0]
        yield Session(
            system.grown(chance.around(9000, 24000)),
            turns=1 if chance.random.random() < 0.25 else chance.turns(22),
            output=lambda: chance.around(222, 477),
            grows=lambda: chance.around(450, 1200),
            pause=lambda: min(chance.around(16, 28), 60),
        )


def readers(chance: Chance, empty: Text) -> Iterator[Session]:
    """People who ask one long document after another several things."""
    while True:
        yield Session(
            empty.grown(chance.around(10000, 14500)),
            turns=chance.turns(3.2),
            output=lambda: chance.around(110, 150),
            grows=lambda: chance.around(60, 120),
            pause=lambda: chance.pause(30, least=3),
        )


# By name: what makes the sessions, and seconds between the starts of two of them.
GENERATED = {"tool-agents": (tool_agents, 0.35), "coding-agents": (coding_agents, 20.0), "readers": (readers, 0.8)}


def generated(name: str) -> list[TraceRequest]:
    """A trace, by its name in GENERATED. What began before it did is in it from then on."""
    make, every = GENERATED[name]
    chance = Chance(random.Random(f"{SEED} {name}"))
    start, requests = 0.0, list[TraceRequest]()
    for session in make(chance, Text(count())):
        requests += session.requests(start)
        start += chance.pause(every)
        if len(requests) > 2 * REQUESTS:
            break
    requests = sorted((one for one in requests if one.arrival > WARM_UP), key=lambda one: one.arrival)[:REQUESTS]
    return [replace(one, arrival=one.arrival - requests[0].arrival) for one in requests]


def main() -> None:
    if sys.argv[1:2] not in [[name] for name in GENERATED]:
        raise SystemExit(f"which of {', '.join(GENERATED)}?")
    for request in generated(sys.argv[1]):
        line = {
            "timestamp": round(request.arrival * 1000),
            "input_length": request.input_tokens,
            "output_length": request.output_tokens,
            "hash_ids": [piece for piece, _ in request.pieces],
        }
        print(json.dumps(line))


if __name__ == "__main__":
    main()
