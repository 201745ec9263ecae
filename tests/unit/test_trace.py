import gzip
import json
from pathlib import Path
from typing import Any

from benchmarks.measure import percentile, spread
from benchmarks.simulate import CONVERSATION
from benchmarks.trace import read, shareable
from benchmarks.work import Work

import pytest


def line(timestamp: int, length: int, hash_ids: list[int], output: int = 100) -> dict[str, Any]:
    return {"timestamp": timestamp, "input_length": length, "output_length": output, "hash_ids": hash_ids}


def write(file: Path, *lines: dict[str, Any]) -> Path:
    text = "".join(json.dumps(line) + "\n" for line in lines).encode()
    file.write_bytes(gzip.compress(text) if file.suffix == ".gz" else text)
    return file


@pytest.mark.parametrize("name", ["trace.jsonl", "trace.jsonl.gz"])
def test_lengths_and_times_are_scaled(tmp_path: Path, name: str) -> None:
    file = write(tmp_path / name, line(5000, 1100, [7, 8, 9]), line(9000, 512, [7]))
    first, second = read(file, speedup=2, scale=0.25)
    assert (first.arrival, second.arrival) == (0.0, 2.0)
    assert (first.input_tokens, first.output_tokens) == (275, 25)
    assert first.pieces == ((7, 128), (8, 128), (9, 19))


@pytest.mark.parametrize("scale", [1.0, 0.3, 0.01, 0.001])
def test_equal_pieces_stay_equal_at_any_scale(tmp_path: Path, scale: float) -> None:
    file = write(tmp_path / "trace", line(0, 512 * 4 + 10, [1, 2, 3, 4, 5]), line(1, 512 * 5 + 400, [1, 2, 3, 4, 6, 7]))
    first, second = read(file, scale=scale)
    shared = [piece for piece in first.pieces if piece[0] < 5]
    assert shared == [piece for piece in second.pieces if piece[0] < 5]
    assert first.input_tokens == max(round((512 * 4 + 10) * scale), 1)


def test_a_length_that_the_ids_do_not_fit_is_kept(tmp_path: Path) -> None:
    few, many = read(write(tmp_path / "trace", line(0, 2000, [1, 2]), line(0, 100, [1, 2, 3])))
    assert few.pieces == ((1, 512), (2, 1488))
    assert many.pieces == ((1, 100),)


def test_requests_are_limited_and_sorted(tmp_path: Path) -> None:
    file = write(tmp_path / "trace", line(300, 1, [1]), line(100, 2, [2]), line(200, 3, [3]))
    assert [request.input_tokens for request in read(file)] == [2, 3, 1]
    assert len(read(file, limit=2)) == 2


@pytest.mark.parametrize("bad", ["nonsense", "{}", '{"timestamp": 0, "input_length": 5}', json.dumps(line(0, 5, []))])
def test_a_bad_line_is_named(tmp_path: Path, bad: str) -> None:
    file = write(tmp_path / "trace", line(0, 5, [1]))
    file.write_text(file.read_text() + bad + "\n")
    with pytest.raises(SystemExit, match=r"trace:2: not a request of a trace"):
        read(file)


@pytest.mark.parametrize("content", [None, b"", b"this is not gzip"])
def test_a_bad_file_is_named(tmp_path: Path, content: bytes | None) -> None:
    file = tmp_path / "trace.gz"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(SystemExit, match=r"trace\.gz"):
        read(file)


def test_the_trace_that_comes_with_the_benchmark() -> None:
    trace = read(CONVERSATION)
    assert len(trace) == 5801
    assert shareable(trace) == pytest.approx(0.375, abs=0.005)  # as in the whole trace


def test_lost_forward_passes_are_counted() -> None:
    before = Work(computed_tokens=10, busy_seconds=1.0, passes=3, first_pass=4, last_pass=6)
    after = Work(computed_tokens=30, busy_seconds=2.5, passes=5, first_pass=4, last_pass=9)
    assert after.lost_passes == 1
    assert after.since(before) == Work(20, 1.5, passes=2, first_pass=7, last_pass=9)
    assert after.since(before).lost_passes == 1
    assert Work().lost_passes == 0


def test_figures() -> None:
    values = [float(value) for value in range(1, 101)]
    assert (percentile(values, 50), percentile(values, 99), percentile(values[:1], 99)) == (50, 99, 1)
    assert spread([5, 5, 5, 5], 4) == 1
    assert spread([8], 4) == 4
