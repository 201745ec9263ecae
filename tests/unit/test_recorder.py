"""Recorded traffic can be replayed, and has no text in it."""

import json
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

from benchmarks import trace
from common.errors import StartupError
from common.http.recorder import Recorder
from common.openai_api import ChatCompletionChunk, PromptBlocks, Routing
from common.openai_request import ChatCompletionRequest
from tests.unit.door import HELLO, Door, chunk, raises, usage_chunk

import pytest
from dynamo.runtime import Context

BLOCK = 16


def answers(tokens: int, hashes: list[int], *, usage: bool = True) -> Any:
    """A processor whose every prompt has so many tokens and these blocks."""

    async def play(request: ChatCompletionRequest, context: Context) -> AsyncGenerator[ChatCompletionChunk]:
        assert context.metadata["x-record"] == "1"
        prompt = PromptBlocks(tokens=tokens, block_size=BLOCK, local_hashes=hashes)
        yield chunk("one", routing=Routing(worker_id="w1", overlap_blocks=0, prompt=prompt))
        yield chunk(" two", "stop")
        if usage:
            yield usage_chunk()

    return play


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "traffic.jsonl"


def record(file: Path, *plays: Any, **options: Any) -> list[dict[str, Any]]:
    """The lines of a file that has these requests."""
    recorder = Recorder(str(file))
    for play in plays:
        Door(play, observers=[recorder]).post(**options)
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_a_request_is_a_line(file: Path) -> None:
    (line,) = record(file, answers(40, [1, 2]), headers={"x-session-id": "mine"})
    assert (line["input_length"], line["output_length"], line["block_size"]) == (40, 2, BLOCK)
    assert (line["session"], len(line["hash_ids"])) == ("mine", 3)
    assert "hello" not in file.read_text()


def test_equal_beginnings_have_equal_numbers_and_nothing_else_has(file: Path) -> None:
    first, second, third = record(file, answers(40, [1, 2]), answers(60, [1, 3, 2]), answers(32, [2, 1]))
    assert first["hash_ids"][0] == second["hash_ids"][0]
    numbers = [first["hash_ids"], second["hash_ids"][1:], third["hash_ids"]]
    assert len({number for one in numbers for number in one}) == sum(map(len, numbers))
    assert len(third["hash_ids"]) == 2  # its last block is full


def test_another_run_goes_on_with_the_same_numbers(file: Path) -> None:
    (before,) = record(file, answers(32, [1, 2]))
    _, after = record(file, answers(32, [1, 2]))
    assert before["hash_ids"] == after["hash_ids"]


def test_what_was_recorded_can_be_replayed(file: Path) -> None:
    record(file, answers(40, [1, 2]), answers(40, [1, 2]))
    first, second = trace.read(file)
    assert [tokens for _, tokens in first.pieces] == [16, 16, 8]
    assert (first.input_tokens, first.output_tokens, first.arrival) == (40, 2, 0.0)
    assert [a == b for a, b in zip(first.pieces, second.pieces, strict=True)] == [True, True, False]


def test_an_answer_that_was_broken_off_is_in_it(file: Path) -> None:
    (line,) = record(file, answers(40, [1, 2], usage=False), body={**HELLO, "stream": True})
    assert line["output_length"] == 2  # chunks


def test_a_request_that_came_to_nothing_is_not(file: Path) -> None:
    assert record(file, raises(ValueError("no"))) == []


def test_a_file_that_cannot_be_written_is_said_at_the_start(tmp_path: Path) -> None:
    with pytest.raises(StartupError, match=r"cannot record to .*nowhere.* \(--record\): No such file"):
        Recorder(str(tmp_path / "nowhere" / "traffic.jsonl"))


def test_a_disk_that_is_full_does_not_cost_the_answer(
    file: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: object) -> None:
        raise OSError("No space left on device")

    recorder = Recorder(str(file))
    monkeypatch.setattr("common.http.recorder.os.write", full)
    assert Door(answers(40, [1, 2]), observers=[recorder]).post().status_code == 200
    assert "could not be recorded: No space left" in caplog.text
