"""A trace of requests in Mooncake's format: when each came, how long it was, and what it had in common with others.

JSON lines, one a request:

    {"timestamp": 27482, "input_length": 6955, "output_length": 52, "hash_ids": [46, 47, 48, …]}

`timestamp` is in milliseconds; the lengths are in tokens; `hash_ids` has one id for every 512 tokens of the prompt, the
last of which may be fewer. Two prompts that begin with the same k ids begin with the same tokens. (Qin et al.,
"Mooncake", FAST '25; github.com/kvcache-ai/Mooncake, FAST25-release/traces.) What `frontend.py --record` writes has ids
for fewer tokens, and says so in `block_size`.
"""

import gzip
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, islice, pairwise
from pathlib import Path
from typing import Annotated

import msgspec

PIECE_TOKENS = 512  # tokens that a hash id stands for, unless a line says how many


class _Line(msgspec.Struct):
    timestamp: float
    input_length: Annotated[int, msgspec.Meta(ge=0)]
    output_length: Annotated[int, msgspec.Meta(ge=0)]
    hash_ids: Annotated[list[int], msgspec.Meta(min_length=1)]
    block_size: Annotated[int, msgspec.Meta(ge=1)] = PIECE_TOKENS


@dataclass(slots=True, frozen=True)
class TraceRequest:
    """A request of a trace, as it is to be replayed."""

    arrival: float  # seconds after the first one
    pieces: tuple[tuple[int, int], ...]  # of the prompt: hash id and tokens
    output_tokens: int

    @property
    def input_tokens(self) -> int:
        return sum(tokens for _, tokens in self.pieces)


def read(
    file: Path, *, limit: int | None = None, speedup: float = 1.0, scale: float = 1.0, answer_scale: float = 1.0
) -> list[TraceRequest]:
    """The first `limit` requests of a trace, `speedup` times faster, with lengths times `scale`, and those of answers
    times `answer_scale` besides.

    Reads plain files and those that end in .gz. Raises SystemExit, with file and line, if it is no such trace.
    """
    lines = sorted(islice(_lines(file), limit), key=lambda line: line.timestamp)
    if not lines:
        raise SystemExit(f"{file}: no requests in it")
    start = lines[0].timestamp
    recorded = [TraceRequest((line.timestamp - start) / 1000, _pieces(line), line.output_length) for line in lines]
    return [scaled(request, speedup, scale, answer_scale) for request in recorded]


def scaled(request: TraceRequest, speedup: float, scale: float, answer_scale: float) -> TraceRequest:
    """A request that comes `speedup` times sooner, with lengths times `scale`, and that of its answer times
    `answer_scale` besides. Pieces end where they end in every prompt, so that equal ones stay equal."""
    ends = [round(end * scale) for end in accumulate(tokens for _, tokens in request.pieces)]
    ends[-1] = max(ends[-1], 1)
    lengths = [end - begin for begin, end in pairwise([0, *ends])]
    return TraceRequest(
        arrival=request.arrival / speedup,
        pieces=tuple((piece, length) for (piece, _), length in zip(request.pieces, lengths, strict=True) if length),
        output_tokens=max(round(request.output_tokens * scale * answer_scale), 1),
    )


def window(trace: Sequence[TraceRequest], first: int, requests: int, speedup: float = 1.0) -> list[TraceRequest]:
    """So many requests of a trace from the `first` on, `speedup` times faster."""
    part = trace[first : first + requests]
    return [replace(one, arrival=(one.arrival - part[0].arrival) / speedup) for one in part]


def shareable(requests: Sequence[TraceRequest]) -> float:
    """The share of prompt tokens that one cache without limits would serve."""
    seen: set[int] = set()
    shared = 0
    for request in requests:
        for hash_id, tokens in request.pieces:
            if hash_id not in seen:
                break
            shared += tokens
        seen.update(hash_id for hash_id, _ in request.pieces)
    return shared / sum(request.input_tokens for request in requests)


def _lines(file: Path) -> Iterator[_Line]:
    decoder = msgspec.json.Decoder(_Line)
    try:
        with gzip.open(file) if file.suffix == ".gz" else file.open("rb") as lines:
            for number, line in enumerate(lines, 1):
                try:
                    yield decoder.decode(line)
                except msgspec.DecodeError as error:
                    raise SystemExit(f"{file}:{number}: not a request of a trace: {error}") from error
    except (OSError, EOFError) as error:
        raise SystemExit(f"cannot read the trace {file}: {error}") from error


def _pieces(line: _Line) -> tuple[tuple[int, int], ...]:
    length = max(line.input_length, 1)
    ends = [min(number * line.block_size, length) for number in range(1, len(line.hash_ids) + 1)]
    ends[-1] = length
    tokens = (end - begin for begin, end in pairwise([0, *ends]))
    return tuple((hash_id, count) for hash_id, count in zip(line.hash_ids, tokens, strict=True) if count)
