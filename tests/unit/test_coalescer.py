"""Tokens that come close together go on together, and none waits for longer than it must."""

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing

from common import coalescer
from common.coalescer import Coalescer
from common.errors import Unavailable
from common.messages import EngineOutput, PromptTokensDetails, Usage

import pytest

LONG = 3600.0  # seconds that no test waits
SHORT = 0.001


def token(number: int, finish_reason: str | None = None) -> EngineOutput:
    return EngineOutput(token_ids=[number], finish_reason=finish_reason)


async def nothing() -> None:
    """Time for whatever is ready to run."""
    for _ in range(5):
        await asyncio.sleep(0)


class Source:
    """Yields what a test puts into it, and raises the errors among it."""

    def __init__(self) -> None:
        self.items = asyncio.Queue[EngineOutput | Exception | None]()
        self.closed = False

    def put(self, *items: EngineOutput | Exception | None) -> None:
        for item in items:
            self.items.put_nowait(item)

    async def stream(self) -> AsyncGenerator[EngineOutput]:
        try:
            while item := await self.items.get():
                if isinstance(item, Exception):
                    raise item
                yield item
        finally:
            self.closed = True


def play(scenario: Callable[[Source, AsyncGenerator[EngineOutput]], Awaitable[None]], seconds: float = LONG) -> None:
    async def run() -> None:
        source = Source()
        async with aclosing(Coalescer(1000 * seconds).coalesced(source.stream())) as outputs, asyncio.timeout(10):
            await scenario(source, outputs)
        assert source.closed

    asyncio.run(run())


def test_the_first_token_goes_on_at_once() -> None:
    async def scenario(source: Source, outputs: AsyncGenerator[EngineOutput]) -> None:
        source.put(token(1))
        assert await anext(outputs) == token(1)

    play(scenario)


def test_those_after_it_are_gathered_and_the_last_one_ends_that() -> None:
    async def scenario(source: Source, outputs: AsyncGenerator[EngineOutput]) -> None:
        source.put(token(1))
        await anext(outputs)
        following = asyncio.ensure_future(anext(outputs))
        source.put(token(2), token(3))
        await nothing()
        assert not following.done()
        source.put(token(4, "length"), None)
        assert await following == EngineOutput(token_ids=[2, 3, 4], finish_reason="length")
        assert [output async for output in outputs] == []

    play(scenario)


def test_they_go_on_when_the_time_is_over() -> None:
    async def scenario(source: Source, outputs: AsyncGenerator[EngineOutput]) -> None:
        for number in range(5):
            source.put(token(number))
            assert await anext(outputs) == token(number)

    play(scenario, SHORT)


def test_a_slow_reader_gets_all_that_came_meanwhile() -> None:
    async def scenario(source: Source, outputs: AsyncGenerator[EngineOutput]) -> None:
        source.put(token(0))
        await anext(outputs)
        source.put(*map(token, range(1, 100)))
        await asyncio.sleep(10 * SHORT)
        assert (await anext(outputs)).token_ids == list(range(1, 100))

    play(scenario, SHORT)


def test_what_came_before_an_error_is_given_out_before_it() -> None:
    async def scenario(source: Source, outputs: AsyncGenerator[EngineOutput]) -> None:
        source.put(token(1))
        await anext(outputs)
        source.put(token(2), token(3), Unavailable("it died"))
        assert (await anext(outputs)).token_ids == [2, 3]
        with pytest.raises(Unavailable, match="it died"):
            await anext(outputs)

    play(scenario)


def test_an_empty_stream_is_one() -> None:
    async def scenario(source: Source, outputs: AsyncGenerator[EngineOutput]) -> None:
        source.put(None)
        assert [output async for output in outputs] == []

    play(scenario)


def test_the_usage_of_the_first_output_stays_until_there_is_another() -> None:
    def usage(completion_tokens: int) -> dict[str, object]:
        details = PromptTokensDetails(cached_tokens=8)
        return Usage(
            prompt_tokens=9,
            completion_tokens=completion_tokens,
            total_tokens=9 + completion_tokens,
            prompt_tokens_details=details,
        ).encode()

    output = EngineOutput(token_ids=[1], completion_usage=usage(1))
    output.extend(token(2))
    assert output.completion_usage == usage(1)
    output.extend(EngineOutput(token_ids=[3], finish_reason="stop", completion_usage=usage(3)))
    assert output == EngineOutput(token_ids=[1, 2, 3], finish_reason="stop", completion_usage=usage(3))


def test_without_time_to_gather_each_goes_on_alone() -> None:
    async def scenario(source: Source, outputs: AsyncGenerator[EngineOutput]) -> None:
        source.put(token(1), token(2), token(3, "stop"), None)
        assert [output.token_ids async for output in outputs] == [[1], [2], [3]]

    play(scenario, 0.0)


def test_the_more_streams_the_longer_they_gather(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coalescer, "MESSAGE_SECONDS", LONG / 2)

    async def run() -> None:
        gatherer, one, other = Coalescer(1000 * SHORT), Source(), Source()
        async with aclosing(gatherer.coalesced(one.stream())) as outputs:
            async with aclosing(gatherer.coalesced(other.stream())) as others:
                for source, stream in ((other, others), (one, outputs)):
                    source.put(token(1))
                    assert await anext(stream) == token(1)
                following = asyncio.ensure_future(anext(outputs))
                one.put(token(2))
                await asyncio.sleep(10 * SHORT)
                assert not following.done()
            one.put(token(3, "stop"))
            assert (await following).token_ids == [2, 3]

    asyncio.run(run())


def test_who_leaves_early_ends_the_stream() -> None:
    async def scenario(source: Source, outputs: AsyncGenerator[EngineOutput]) -> None:
        source.put(token(1), token(2))
        await anext(outputs)

    play(scenario)
