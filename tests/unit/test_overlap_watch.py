"""Prompts that come again and are in no cache are worth a warning, which names the likeliest cause."""

import logging

from common.kv_events import Update
from common.routing.overlap_watch import REPEATS, OverlapWatch
from common.routing.prefix_index import sequence_hashes
from common.routing.worker import Prompt, Worker
from tests.unit.stand_ins import worker_info

import pytest

PROMPT = Prompt(sequence_hashes([1, 2, 3]), 3.5)


def worker(*, events: int) -> Worker:
    worker = Worker(1, worker_info())
    for sequence in range(events):
        worker.on_update(Update(sequence, [], lag=0.0, batches=1))
    return worker


def ask(watch: OverlapWatch, workers: list[Worker], *, times: int, found: bool = False) -> None:
    for _ in range(times):
        watch.on_asked(PROMPT, found, workers)
        watch.on_finished(PROMPT)


@pytest.mark.parametrize(
    ("workers", "cause"),
    [
        ([Worker(1, None)], "no worker announces its KV events"),
        ([worker(events=3), worker(events=0)], "no KV event has come from worker w1: is tcp://somewhere:1 reachable"),
        ([worker(events=3)], "a different tokenizer"),
    ],
)
def test_the_cause_is_named(workers: list[Worker], cause: str, caplog: pytest.LogCaptureFixture) -> None:
    watch = OverlapWatch()
    ask(watch, workers, times=REPEATS)
    assert caplog.text == ""
    ask(watch, workers, times=1)
    assert cause in caplog.text


def test_it_does_not_go_on_about_it(caplog: pytest.LogCaptureFixture) -> None:
    ask(OverlapWatch(), [worker(events=3)], times=REPEATS * 16)
    assert [record.levelno for record in caplog.records] == [logging.WARNING] * 4


def test_one_that_is_found_is_reason_enough_for_trust(caplog: pytest.LogCaptureFixture) -> None:
    watch = OverlapWatch()
    for _ in range(10):
        ask(watch, [worker(events=3)], times=REPEATS // 2)
        ask(watch, [worker(events=3)], times=1, found=True)
    assert caplog.text == ""


def test_new_prompts_are_no_reason_for_doubt(caplog: pytest.LogCaptureFixture) -> None:
    watch = OverlapWatch()
    for number in range(10 * REPEATS):
        new = Prompt(sequence_hashes([number]), 1)
        watch.on_asked(new, False, [worker(events=3)])
        watch.on_finished(new)
    assert caplog.text == ""
