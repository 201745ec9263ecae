"""A stream is waited for while there is hope, and not a moment longer."""

import asyncio
import weakref
from collections.abc import AsyncGenerator, AsyncIterator

from common import patience
from common.errors import Lost
from common.patience import patient
from tests.unit.stand_ins import without_garbage_collection

import pytest


@pytest.fixture(autouse=True)
def looks_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patience, "LOOK_SECONDS", 0.01)


async def numbers(*pauses: float) -> AsyncIterator[int]:
    """One number after each pause."""
    for number, pause in enumerate(pauses):
        await asyncio.sleep(pause)
        yield number


def after(seconds: float, *, at_first: float = 60.0) -> patience.Hopeless:
    def hopeless(silence: float, begun: bool) -> str | None:
        return f"silent for {silence:.2f} s" if silence > (seconds if begun else at_first) else None

    return hopeless


def read(stream: AsyncGenerator[int], pause: float = 0.0) -> list[int]:
    async def run() -> list[int]:
        found = []
        async for number in stream:
            found.append(number)
            await asyncio.sleep(pause)
        return found

    return asyncio.run(run())


def test_what_comes_is_passed_on() -> None:
    assert read(patient(numbers(0, 0, 0))) == [0, 1, 2]
    assert read(patient(numbers(0.05, 0.05), after(60.0))) == [0, 1]


def test_silence_beyond_hope_is_a_loss() -> None:
    with pytest.raises(Lost, match="silent for "):
        read(patient(numbers(0, 60), after(0.05)))


def test_the_first_item_may_take_its_own_time() -> None:
    assert read(patient(numbers(0.2, 0), after(0.05))) == [0, 1]
    with pytest.raises(Lost):
        read(patient(numbers(60), after(60.0, at_first=0.05)))


def test_what_the_reader_does_in_between_is_no_silence() -> None:
    assert read(patient(numbers(0, 0, 0), after(0.05)), pause=0.2) == [0, 1, 2]


def test_each_item_may_be_waited_for_by_another_task() -> None:
    async def run() -> None:
        stream = patient(numbers(0, 0, 60), after(0.05))
        assert [await asyncio.create_task(anext(stream)) for _ in range(2)] == [0, 1]
        with pytest.raises(Lost):
            await asyncio.create_task(anext(stream))

    asyncio.run(run())


def test_a_cancellation_by_others_is_one() -> None:
    async def run() -> None:
        reading = asyncio.ensure_future(anext(patient(numbers(60), after(60.0))))
        await asyncio.sleep(0.05)
        reading.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reading
        assert reading.cancelled()

    asyncio.run(run())


def test_a_task_that_lost_its_stream_goes_on_undisturbed() -> None:
    async def run() -> None:
        with pytest.raises(Lost):
            await anext(patient(numbers(60), after(0.0, at_first=0.02)))
        await asyncio.sleep(0.05)
        task = asyncio.current_task()
        assert task and task.cancelling() == 0

    asyncio.run(run())


def test_nobody_looks_at_a_stream_that_has_ended() -> None:
    async def run() -> None:
        looks = 0

        def hopeless(silence: float, begun: bool) -> str | None:
            nonlocal looks
            looks += 1
            return None

        assert [number async for number in patient(numbers(0.1), hopeless)] == [0]
        before = looks
        await asyncio.sleep(0.1)
        assert before == looks > 0

    asyncio.run(run())


def test_what_is_over_does_not_wait_for_the_garbage_collector() -> None:
    hopeless = after(60.0)
    kept = weakref.ref(hopeless)
    with without_garbage_collection():
        assert read(patient(numbers(0, 0.05), hopeless)) == [0, 1]
        del hopeless
        assert kept() is None
