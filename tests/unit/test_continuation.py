"""Answers that outlive their processor: nothing doubled, nothing missing, not even half a character."""

import asyncio
from collections.abc import AsyncGenerator, Callable, Iterator
from itertools import count
from types import SimpleNamespace
from typing import Any

from common.coalescer import Coalescer
from common.errors import Abandoned, Internal, Lost, PipelineError, Unavailable, Unreachable
from common.events import Feed
from common.http import processors
from common.http.processors import Processors
from common.messages import FIND_WORKER, GENERATE, WORKERS, ModelIdentity
from common.model import resolve_model
from common.openai_api import DESCRIBE_MODEL, PROCESS, ChatCompletionChunk, ModelCard
from common.openai_request import ChatCompletionRequest, CompletionRequest, GenerationRequest
from common.remote import Remote
from common.text.chat_model import ChatModel
from common.text.limits import Limits
from common.text.routers import Routers
from processor import Processor
from tests.unit.stand_ins import LocalClient

import pytest
from dynamo.runtime import Context
from msgspec import UNSET

HELLO: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "hello"}]}
TEXT = "Größe: 日本語 🎉🎈 <think>because 1 < 2</think> the end, STOP and more"
Play = Callable[[GenerationRequest, Context], AsyncGenerator[ChatCompletionChunk]]


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processors, "LOOK_SECONDS", 0.01)


@pytest.fixture(scope="module")
def model() -> ChatModel:
    return ChatModel(resolve_model(None), "m")


class Pipeline:
    """Processors of a real model, whose engine says a text, some tokens at a time."""

    def __init__(self, model: ChatModel, text: str = TEXT, *, at_once: int = 1) -> None:
        self._tokens = model.encode(text)
        self._at_once = at_once
        self.requests: list[GenerationRequest] = []
        self.contexts: list[Context] = []
        nobody: Any = LocalClient({})
        find: Any = LocalClient({0: self._find})
        generate: Any = LocalClient({1: self._generate})
        self._processor = Processor(
            model,
            ModelIdentity(name="m", block_size=16),
            routers=Routers(Remote(FIND_WORKER, find), Remote(WORKERS, nobody), lambda: [1], Limits()),
            engines=Remote(GENERATE, generate),
            coalescer=Coalescer(0),
            feed=Feed(9, asyncio.Event().wait),
        )
        self._prompts: dict[str, int] = {}  # by the session, which is the request's, tokens of the prompt

    async def _find(self, body: Any, context: Context) -> AsyncGenerator[Any]:
        yield {"instance_id": 1, "worker_id": "w", "overlap_blocks": 1, "cost": 0.0}
        await context.async_killed_or_stopped()

    async def _generate(self, body: Any, context: Context) -> AsyncGenerator[Any]:
        """Goes on with the text after as many of its tokens as the prompt has in the end."""
        prompt = body["token_ids"]
        done = next(n for n in range(len(self._tokens), -1, -1) if prompt[len(prompt) - n :] == self._tokens[:n])
        end = min(done + body["stop_conditions"]["max_tokens"], len(self._tokens))
        usage: dict[str, Any] = {"prompt_tokens": len(prompt), "completion_tokens": 0, "total_tokens": len(prompt)}
        usage["prompt_tokens_details"] = {"cached_tokens": 16 if not done else 999}
        for begin in range(done, end, self._at_once):
            tokens = self._tokens[begin : min(begin + self._at_once, end)]
            yield {"token_ids": tokens, **({"completion_usage": usage} if begin == done else {})}
        yield {"token_ids": [], "finish_reason": "stop" if end == len(self._tokens) else "length"}

    def dies_after(self, *chunks: int) -> Play:
        """Processors of which each dies after so many chunks; the last one lives."""
        left = iter(chunks)

        async def play(request: Any, context: Context) -> AsyncGenerator[ChatCompletionChunk]:
            self.requests.append(request)
            self.contexts.append(context)
            numbers: Iterator[int] = iter(range(limit)) if (limit := next(left, None)) is not None else count()
            handler = self._processor.complete if isinstance(request, CompletionRequest) else self._processor.process
            wire = type(request).decode(request.encode())  # as it crosses
            async for chunk in handler(wire, context):
                if next(numbers, None) is None:
                    raise Lost("it died", code="no_processor")
                yield ChatCompletionChunk.decode(chunk.encode())

        return play


def ask(
    play: Play, body: dict[str, Any] = HELLO, *, moves: int = 99, seconds: float = 0.2
) -> list[ChatCompletionChunk]:
    kind: Any = CompletionRequest if "prompt" in body else ChatCompletionRequest

    async def describe(body: Any, context: Context) -> AsyncGenerator[Any]:
        yield ModelCard(id="m", created=1, context_length=64).encode()

    async def run() -> list[ChatCompletionChunk]:
        process: Any = SimpleNamespace(spec=PROCESS, stream=lambda request, own, *_, **__: play(request, own))
        client: Any = LocalClient({0: describe})
        serving = Processors(process, Remote(DESCRIBE_MODEL, client), moves=moves, seconds=seconds)
        stream = serving.stream(kind.decode(body), Context("x", {"x-request-id": "mine"}))
        return [chunk async for chunk in stream]

    return asyncio.run(run())


def texts(chunks: list[ChatCompletionChunk]) -> dict[int, str]:
    found: dict[int, str] = {}
    for chunk in chunks:
        for choice in chunk.choices:
            found[choice.index] = found.get(choice.index, "") + (choice.delta.content or "")
    return found


def told(chunks: list[ChatCompletionChunk]) -> Any:
    """All that clients are told but in which portions: text, thoughts, roles, reasons to end, usage."""
    deltas = [choice for chunk in chunks for choice in chunk.choices]
    thoughts = "".join(choice.delta.reasoning_content or "" for choice in deltas)
    roles = [choice.delta.role for choice in deltas if choice.delta.role]
    reasons = [(choice.index, choice.finish_reason) for choice in deltas if choice.finish_reason]
    return texts(chunks), thoughts, roles, reasons, chunks[-1].usage


@pytest.mark.parametrize(
    "body",
    [HELLO, {**HELLO, "stop": ["STOP"]}, {**HELLO, "max_tokens": 11}, {"model": "m", "prompt": "once", "echo": True}],
    ids=["plain", "stop string", "limit", "echo"],
)
@pytest.mark.parametrize("at_once", [1, 3])
def test_wherever_it_dies_the_client_gets_the_same(model: ChatModel, body: dict[str, Any], at_once: int) -> None:
    body = body if "max_tokens" in body or "messages" in body else {**body, "max_tokens": 60}
    whole = ask(Pipeline(model, at_once=at_once).dies_after(), body)
    for number in range(len(whole)):
        pipeline = Pipeline(model, at_once=at_once)
        chunks = ask(pipeline.dies_after(number), body)
        assert told(chunks) == told(whole), number
        assert len({(chunk.id, chunk.created, chunk.model) for chunk in chunks}) == 1
        assert len(pipeline.requests) == 2


def test_it_may_die_again_and_again(model: ChatModel) -> None:
    whole = ask(Pipeline(model).dies_after())
    for number in range(1, 6):
        assert told(ask(Pipeline(model).dies_after(*[number] * 5))) == told(whole), number


def test_each_of_several_answers_goes_on_where_it_was(model: ChatModel) -> None:
    body = {"model": "m", "prompt": ["one", "two"], "n": 2, "max_tokens": 20}
    whole = ask(Pipeline(model).dies_after(), body)
    for number in range(0, len(whole), 5):
        assert told(ask(Pipeline(model).dies_after(number), body))[0] == told(whole)[0], number


def test_what_is_only_ours_does_not_reach_the_client(model: ChatModel) -> None:
    for chunk in ask(Pipeline(model).dies_after(3)):
        assert all(choice.token_ids is UNSET for choice in chunk.choices)


def test_each_attempt_has_a_context_of_its_own_that_ends_with_it(model: ChatModel) -> None:
    ask((pipeline := Pipeline(model)).dies_after(2, 2))
    assert len({context.id() for context in pipeline.contexts}) == 3
    assert {context.metadata["x-request-id"] for context in pipeline.contexts} == {"mine"}
    assert all(context.is_stopped() for context in pipeline.contexts[1:])


class TestWhatIsNotContinued:
    def test_what_was_lost_too_often(self, model: ChatModel) -> None:
        with pytest.raises(Lost):
            ask((pipeline := Pipeline(model)).dies_after(1, 1, 1), moves=2)
        assert len(pipeline.requests) == 3

    @pytest.mark.parametrize("error", [Internal("oh"), Unavailable("no", code="no_worker")])
    def test_what_a_processor_says(self, error: PipelineError) -> None:
        asked = 0

        async def play(request: Any, context: Context) -> AsyncGenerator[ChatCompletionChunk]:
            nonlocal asked
            asked += 1
            raise error
            yield

        with pytest.raises(type(error)):
            ask(play)
        assert asked == 1

    def test_the_likeliest_of_several_once_one_of_them_is_there(self, model: ChatModel) -> None:
        body = {"model": "m", "prompt": "once", "n": 1, "best_of": 2, "max_tokens": 5}
        with pytest.raises(Lost):
            ask(Pipeline(model).dies_after(1), body)

    def test_a_form_that_has_begun(self, model: ChatModel) -> None:
        body = {**HELLO, "guided_regex": ".*"}
        assert texts(ask(Pipeline(model).dies_after(0), body))[0] == TEXT
        with pytest.raises(Unavailable, match="midst of a form"):
            ask(Pipeline(model).dies_after(3), body)


def test_while_there_is_no_processor_one_is_waited_for(model: ChatModel) -> None:
    refusals = iter([Unavailable("none", code="no_processor"), Unreachable("dead", code="no_processor")])
    alive = Pipeline(model).dies_after()

    async def play(request: GenerationRequest, context: Context) -> AsyncGenerator[ChatCompletionChunk]:
        if error := next(refusals, None):
            raise error
        async for chunk in alive(request, context):
            yield chunk

    assert texts(ask(play))[0] == TEXT


def test_an_answer_goes_on_where_a_processor_that_leaves_has_abandoned_it(model: ChatModel) -> None:
    whole, begun = Pipeline(model).dies_after(), Pipeline(model).dies_after(2)

    async def play(request: GenerationRequest, context: Context) -> AsyncGenerator[ChatCompletionChunk]:
        try:
            async for chunk in (whole if request.resume else begun)(request, context):
                yield chunk
        except Lost as error:
            raise Abandoned("it leaves", code="no_processor") from error

    assert texts(ask(play))[0] == TEXT


def test_but_not_for_ever() -> None:
    async def play(request: Any, context: Context) -> AsyncGenerator[ChatCompletionChunk]:
        raise Unavailable("none", code="no_processor")
        yield

    with pytest.raises(Unavailable):
        ask(play, seconds=0.05)
