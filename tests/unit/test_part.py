"""What a part says while it starts."""

from pathlib import Path
from typing import Any, cast

from scripts.part import Part

import pytest


def part(log: Path, *, started: bool = True) -> Part:
    made = Part("engine 0", [], "ready", log, {})
    if started:
        made.process = cast(Any, object())
    return made


@pytest.mark.parametrize(
    ("written", "said"),
    [
        ("", ""),
        ("2026-11-26 03:45:02,486 INFO engine: loading Qwen/Qwen3-0.6B\n", "loading Qwen/Qwen3-0.6B"),
        ("[2026-11-26 03:45:02 TP0] Load weight begin.\n", "Load weight begin."),
        ("shards:  0% | 0/4\rshards: 25% | 1/4", "shards: 25% | 1/4"),
        ("\x1b[32mdone\x1b[0m\n\n", "done"),
        ("loading\n/a/b.py:53: UserWarning: no GPU here\n  warnings.warn(\n", "loading"),
    ],
)
def test_it_is_the_last_line_that_says_something(tmp_path: Path, written: str, said: str) -> None:
    log = tmp_path / "log"
    log.write_text(written)
    assert part(log).last_words() == said


def test_of_a_long_log_only_the_end_is_read(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("a line\n" * 100_000 + "the last\n")
    assert part(log).last_words() == "the last"


def test_one_that_has_not_started_says_nothing(tmp_path: Path) -> None:
    silent = part(tmp_path / "none", started=False)
    assert (silent.last_words(), silent.wrote_at()) == ("", 0.0)
