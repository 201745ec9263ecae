"""The frontend learns from each processor which model it serves, and finds it by that."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from common.errors import Internal, NotFound, Unavailable
from common.http import processors as processors_module
from common.http.processors import Processors
from common.messages import Failure
from common.openai_api import DESCRIBE_MODEL, PROCESS, ModelCard
from common.openai_request import ChatCompletionRequest
from common.remote import Remote
from tests.unit.stand_ins import Handler, LocalClient

import pytest
from dynamo.runtime import Context


def serves(model: str) -> Handler:
    async def describe(body: Any, context: Context) -> AsyncIterator[Any]:
        yield ModelCard(id=model, created=1, context_length=64).encode()

    return describe


class Slow:
    """Says which model it serves when it is time."""

    def __init__(self, model: str) -> None:
        self.ready = asyncio.Event()
        self._describe = serves(model)

    async def __call__(self, body: Any, context: Context) -> AsyncIterator[Any]:
        await self.ready.wait()
        async for card in self._describe(body, context):
            yield card


class Loading:
    """Cannot say which model it serves until it has loaded."""

    def __init__(self, model: str) -> None:
        self.loaded = False
        self._describe = serves(model)

    async def __call__(self, body: Any, context: Context) -> AsyncIterator[Any]:
        if not self.loaded:
            yield Failure.of(Internal("not yet")).encode()
            return
        async for card in self._describe(body, context):
            yield card


def play(scenario: Callable[[Processors, LocalClient], Awaitable[None]], *handlers: Handler) -> None:
    async def run() -> None:
        describe = LocalClient(dict(enumerate(handlers)))
        client: Any = describe
        await scenario(Processors(Remote(PROCESS, client), Remote(DESCRIBE_MODEL, client)), describe)

    asyncio.run(run())


def test_it_knows_what_has_been_said_without_asking() -> None:
    async def scenario(processors: Processors, describe: LocalClient) -> None:
        assert not processors.serves("a")
        await processors.find("a")
        assert (processors.serves("a"), processors.serves("b")) == (True, False)

    play(scenario, serves("a"))


def test_each_is_asked_once() -> None:
    async def scenario(processors: Processors, describe: LocalClient) -> None:
        for _ in range(3):
            assert [*await processors.find("a")] == [0, 2]
            assert [*await processors.find("b")] == [1]
        assert len(describe.bodies) == 3
        describe.handlers[3] = serves("b")
        assert {card.id for card in await processors.models()} == {"a", "b"}
        assert [*await processors.find("b")] == [1, 3]
        assert len(describe.bodies) == 4

    play(scenario, serves("a"), serves("b"), serves("a"))


def test_a_model_is_listed_once_however_many_serve_it() -> None:
    async def scenario(processors: Processors, describe: LocalClient) -> None:
        assert [card.id for card in await processors.models()] == ["a", "b"]

    play(scenario, serves("a"), serves("b"), serves("a"))


def test_an_unknown_model_gets_the_names_that_there_are() -> None:
    async def scenario(processors: Processors, describe: LocalClient) -> None:
        with pytest.raises(NotFound, match="the model 'c' does not exist; this pipeline serves 'a', 'b'") as refusal:
            await processors.find("c")
        assert (refusal.value.code, refusal.value.param) == ("model_not_found", "model")

    play(scenario, serves("b"), serves("a"))


def test_without_a_processor_it_is_not_the_model_that_is_missing() -> None:
    async def scenario(processors: Processors, describe: LocalClient) -> None:
        assert await processors.models() == []
        with pytest.raises(Unavailable) as refusal:
            await processors.find("a")
        assert refusal.value.code == "no_processor"

    play(scenario)


def test_a_model_whose_last_processor_has_just_left_is_still_known() -> None:
    async def scenario(processors: Processors, describe: LocalClient) -> None:
        await processors.find("b")
        del describe.handlers[1]
        with pytest.raises(Unavailable, match="no processor of b is running") as refusal:
            await processors.find("b")
        assert refusal.value.code == "no_processor"  # which is waited for
        describe.handlers[2] = serves("b")
        assert [*await processors.find("b")] == [2]

    play(scenario, serves("a"), serves("b"))


def test_those_that_left_are_forgotten() -> None:
    async def scenario(processors: Processors, describe: LocalClient) -> None:
        processors.seconds = 0.0
        assert [*await processors.find("b")] == [1]
        del describe.handlers[1]
        with pytest.raises(NotFound, match=r"serves 'a'$"):
            await processors.find("b")
        describe.handlers[1] = serves("c")  # the runtime never gives an id again, but who knows
        assert [*await processors.find("c")] == [1]

    play(scenario, serves("a"), serves("b"))


def test_one_that_could_not_say_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processors_module, "DESCRIBE_SECONDS", 0.05)
    monkeypatch.setattr(processors_module, "RETRY_SECONDS", 0.01)
    loading = Loading("b")

    async def scenario(processors: Processors, describe: LocalClient) -> None:
        with pytest.raises(NotFound, match=r"serves 'a'$"):
            await processors.find("b")
        loading.loaded = True
        await asyncio.sleep(0.1)
        assert [*await processors.find("b")] == [1]

    play(scenario, serves("a"), loading)


def test_one_that_is_just_being_asked_is_waited_for() -> None:
    async def scenario(processors: Processors, describe: LocalClient) -> None:
        assert [*await processors.find("a")] == [0]
        describe.handlers[1] = slow = Slow("b")
        found = asyncio.create_task(processors.find("b"))
        await asyncio.sleep(0.01)
        assert [*await processors.find("a")] == [0]
        assert not found.done()
        slow.ready.set()
        assert [*await found] == [1]
        assert len(describe.bodies) == 2

    play(scenario, serves("a"))


def test_but_not_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processors_module, "DESCRIBE_SECONDS", 0.01)

    async def scenario(processors: Processors, describe: LocalClient) -> None:
        describe.handlers[1] = Slow("b")
        with pytest.raises(NotFound, match=r"serves 'a'$"):
            await processors.find("b")

    play(scenario, serves("a"))


def test_a_request_goes_to_those_that_serve_its_model() -> None:
    async def run() -> None:
        def answers(number: int) -> Handler:
            async def process(body: Any, context: Context) -> AsyncIterator[Any]:
                yield {"id": str(number), "created": 1, "model": body["model"], "choices": []}

            return process

        describe: Any = LocalClient({0: serves("a"), 1: serves("b"), 2: serves("a")})
        process: Any = LocalClient({number: answers(number) for number in range(3)})
        processors = Processors(Remote(PROCESS, process), Remote(DESCRIBE_MODEL, describe))
        went = list[str]()
        for _ in range(100):
            request = ChatCompletionRequest.decode({"model": "a", "messages": [{"role": "user", "content": "x"}]})
            went += [chunk.id async for chunk in processors.stream(request, Context("x"))]
        assert set(went) == {"0", "2"}
        assert min(went.count("0"), went.count("2")) > 20

    asyncio.run(run())
