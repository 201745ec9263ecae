"""Several streams as one."""

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing

from common.text.merged import merged

import pytest

Words = AsyncGenerator[str]


class Stream:
    """Yields words as they are said."""

    def __init__(self) -> None:
        self._said: asyncio.Queue[str | Exception | None] = asyncio.Queue()
        self.begun = False
        self.closed = False

    def say(self, *words: str | Exception | None) -> None:
        """None is the end, and an exception is raised."""
        for word in words:
            self._said.put_nowait(word)

    async def words(self) -> Words:
        self.begun = True
        try:
            while (word := await self._said.get()) is not None:
                if isinstance(word, Exception):
                    raise word
                yield word
        finally:
            await asyncio.sleep(0)
            self.closed = True


Scenario = Callable[[list[Stream], Words], Awaitable[None]]


def play(number: int, scenario: Scenario) -> list[Stream]:
    async def run() -> list[Stream]:
        streams = [Stream() for _ in range(number)]
        async with aclosing(merged([stream.words() for stream in streams])) as words:
            await asyncio.wait_for(scenario(streams, words), 30)
        assert len(asyncio.all_tasks()) == 1, "somebody still reads"
        return streams

    return asyncio.run(run())


@pytest.mark.parametrize("number", [1, 2, 5])
def test_all_that_any_of_them_says_comes(number: int) -> None:
    async def scenario(streams: list[Stream], words: Words) -> None:
        for index, stream in enumerate(streams):
            stream.say(f"a{index}", f"b{index}", None)
        came = [word async for word in words]
        for index in range(number):
            assert [word for word in came if word.endswith(str(index))] == [f"a{index}", f"b{index}"]
        assert len(came) == 2 * number

    assert all(stream.closed for stream in play(number, scenario))


def test_as_it_comes() -> None:
    async def scenario(streams: list[Stream], words: Words) -> None:
        first, second = streams
        for stream, word in ((second, "a"), (first, "b"), (second, "c"), (second, "d"), (first, "e")):
            stream.say(word)
            assert await anext(words) == word

    play(2, scenario)


def test_one_that_ends_does_not_end_the_others() -> None:
    async def scenario(streams: list[Stream], words: Words) -> None:
        first, second = streams
        first.say(None)
        second.say("a")
        assert await anext(words) == "a"
        assert first.closed
        second.say("b", None)
        assert [word async for word in words] == ["b"]

    play(2, scenario)


@pytest.mark.parametrize("number", [1, 3])
def test_one_that_fails_ends_all(number: int) -> None:
    async def scenario(streams: list[Stream], words: Words) -> None:
        streams[-1].say("a")
        assert await anext(words) == "a"
        streams[-1].say("b", ZeroDivisionError("by nothing"))
        assert await anext(words) == "b"
        with pytest.raises(ZeroDivisionError, match="by nothing"):
            await anext(words)
        assert all(stream.closed for stream in streams)

    play(number, scenario)


@pytest.mark.parametrize("number", [1, 3])
def test_closing_it_closes_all(number: int) -> None:
    async def scenario(streams: list[Stream], words: Words) -> None:
        for stream in streams:
            stream.say("a", "b")
        assert await anext(words) == "a"
        await words.aclose()
        assert all(stream.closed for stream in streams)

    play(number, scenario)


@pytest.mark.parametrize("number", [1, 3])
def test_so_does_its_reader_s_end(number: int) -> None:
    async def scenario(streams: list[Stream], words: Words) -> None:
        reading = asyncio.ensure_future(anext(words))
        while not all(stream.begun for stream in streams):
            await asyncio.sleep(0)
        reading.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reading
        assert all(stream.closed for stream in streams)

    play(number, scenario)


def test_of_none_comes_nothing() -> None:
    async def scenario(streams: list[Stream], words: Words) -> None:
        assert [word async for word in words] == []

    play(0, scenario)
