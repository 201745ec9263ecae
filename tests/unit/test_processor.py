"""Tokens become an answer, whatever happens to the workers that make them."""

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any

from common.coalescer import Coalescer
from common.errors import (
    Cancelled,
    Internal,
    InvalidRequest,
    NotFound,
    Overloaded,
    PipelineError,
    Unavailable,
)
from common.messages import (
    FIND_WORKER,
    GENERATE,
    DescribeRequest,
    EngineOutput,
    Failure,
    FindWorkerRequest,
    GenerateRequest,
    PromptTokensDetails,
    RoutingDecision,
    SamplingOptions,
    Usage,
)
from common.openai_api import ChatCompletionChunk, ChatCompletionRequest, Routing
from common.remote import Remote
from processor import MIGRATIONS, Processor
from tests.unit.stand_ins import Handler, LocalClient, identity

import pytest
from dynamo.llm import compute_block_hash_for_seq
from dynamo.runtime import Context
from msgspec import UNSET
from tokenizers import Tokenizer, decoders, models

END = 0
A, B, C, D = 1, 2, 3, 4  # the tokens of these letters
PROMPT = [A] * 20
CONTEXT = 64

DEAD = Exception("Unavailable: Stream ended before generation completed")

Script = Sequence[Mapping[str, Any] | Exception]


class TinyModel:
    """A model of four letters, to which every conversation is the same prompt."""

    name = "m"
    context_length = CONTEXT
    eos_token_ids = (END,)

    def __init__(self) -> None:
        self.tokenizer = Tokenizer(models.WordLevel({"<end>": END, "a": A, "b": B, "c": C, "d": D}, unk_token="<end>"))
        self.tokenizer.decoder = decoders.Fuse()

    def encode(self, messages: object) -> list[int]:
        return PROMPT

    def sampling(self, **asked: Any) -> SamplingOptions:
        return SamplingOptions(**asked)


class Pipeline:
    """A processor, with a router and engines that play their parts.

    engines: by instance, what each yields for its first request, its second, …; an exception is raised.
    """

    def __init__(self, *engines: Script, context_length: int | None = None, coalesce_ms: float = 0.0) -> None:
        self._context_length = context_length
        self._workers = range(1, len(engines) + 1)
        self.router = LocalClient({0: self._find_worker})
        self.engines = LocalClient(dict(zip(self._workers, map(play, engines), strict=True)))
        router: Any = self.router
        engine: Any = self.engines
        model: Any = TinyModel()
        self.processor = Processor(
            model,
            identity(),
            router=Remote(FIND_WORKER, router),
            engines=Remote(GENERATE, engine),
            coalescer=Coalescer(coalesce_ms),
        )

    async def _find_worker(self, body: Any, context: Context) -> AsyncIterator[Any]:
        left = [number for number in self._workers if number not in FindWorkerRequest.decode(body).excluded]
        if not left:
            yield Failure.of(Unavailable("every engine has failed", code="no_worker")).encode()
            return
        decision = RoutingDecision(
            instance_id=left[0],
            worker_id=f"w{left[0]}",
            overlap_blocks=1,
            cost=0.0,
            context_length=self._context_length,
        )
        yield decision.encode()
        await context.async_killed_or_stopped()

    @property
    def wanted(self) -> list[FindWorkerRequest]:
        return [FindWorkerRequest.decode(body) for body in self.router.bodies]

    @property
    def generated(self) -> list[GenerateRequest]:
        return [GenerateRequest.decode(body) for body in self.engines.bodies]

    def ask(self, metadata: dict[str, str] | None = None, **fields: Any) -> list[ChatCompletionChunk]:
        return asyncio.run(self._ask(Context("id", metadata or {}), fields))

    async def _ask(self, context: Context, fields: dict[str, Any]) -> list[ChatCompletionChunk]:
        messages = [{"role": "user", "content": "hello"}]
        request = ChatCompletionRequest.decode({"model": "m", "messages": messages, **fields})
        return [chunk async for chunk in self.processor.process(request, context)]


def play(script: Script) -> Handler:
    async def generate(body: Any, context: Context) -> AsyncIterator[Any]:
        for item in script:
            if isinstance(item, Exception):
                raise item
            yield item

    return generate


def output(*token_ids: int, finish_reason: str | dict[str, str] | None = None) -> dict[str, Any]:
    item = EngineOutput(token_ids=list(token_ids))
    if finish_reason:
        item.finish_reason = finish_reason
    return item.encode()


def failure(error: PipelineError) -> dict[str, Any]:
    return Failure.of(error).encode()


def text(chunks: list[ChatCompletionChunk]) -> str:
    return "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices)


def finish_reasons(chunks: list[ChatCompletionChunk]) -> list[str | None]:
    return [choice.finish_reason for chunk in chunks for choice in chunk.choices]


def usage(chunks: list[ChatCompletionChunk]) -> Usage:
    *before, last = chunks
    assert [chunk for chunk in before if chunk.usage] == []
    assert not last.choices
    return Usage.decode(last.usage)


class TestAnswer:
    def test_outputs_become_chunks_and_a_last_one_has_the_usage(self) -> None:
        counts = Usage(
            prompt_tokens=20,
            completion_tokens=1,
            total_tokens=21,
            prompt_tokens_details=PromptTokensDetails(cached_tokens=16),
        )
        first = EngineOutput(token_ids=[A], completion_usage=counts.encode()).encode()
        chunks = Pipeline([first, output(B, C), output(END, finish_reason="stop")]).ask()
        assert [chunk.choices[0].delta.content for chunk in chunks[:-1]] == ["a", "bc", ""]
        assert finish_reasons(chunks) == [None, None, "stop"]
        assert usage(chunks).encode() == {**counts.encode(), "completion_tokens": 4, "total_tokens": 24}
        assert {chunk.id for chunk in chunks} == {"chatcmpl-id"}

    def test_the_first_chunk_says_who_answers_and_in_which_role(self) -> None:
        chunks = Pipeline([output(A), output(B, finish_reason="length")]).ask()
        assert [chunk.routing for chunk in chunks] == [Routing(worker_id="w1", overlap_blocks=1), UNSET, UNSET]
        assert [chunk.choices[0].delta.role for chunk in chunks[:-1]] == ["assistant", None]

    def test_only_what_a_client_may_see_is_sent(self) -> None:
        first, last, counts = (chunk.encode() for chunk in Pipeline([output(A), output(B, finish_reason="eos")]).ask())
        assert first.keys() == {"id", "object", "created", "model", "choices", "routing"}
        assert last.keys() == first.keys() - {"routing"}
        assert counts.keys() == {*last.keys(), "usage"}
        assert last["choices"] == [{"index": 0, "delta": {"content": "b"}, "logprobs": None, "finish_reason": "stop"}]

    def test_a_stop_string_ends_it_and_what_the_engine_made_beyond_does_not_count(self) -> None:
        pipeline = Pipeline([output(A), output(B), output(C, D, A), output(A, finish_reason="length")])
        chunks = pipeline.ask(stop="bc")
        assert (text(chunks), finish_reasons(chunks)[-1]) == ("a", "stop")
        assert usage(chunks).completion_tokens == 3

    def test_tokens_that_come_together_go_on_together(self) -> None:
        script = [output(A), output(B), output(C), output(A), output(END, finish_reason="stop")]
        chunks = Pipeline(script, coalesce_ms=60_000).ask()
        assert len(chunks) < len(script)
        assert (text(chunks), usage(chunks).completion_tokens) == ("abca", 5)

    def test_a_stop_string_in_the_midst_of_them_is_found(self) -> None:
        chunks = Pipeline([output(A, B, C, A), output(A)], coalesce_ms=60_000).ask(stop="c")
        assert (text(chunks), usage(chunks).completion_tokens) == ("ab", 3)

    def test_a_worker_that_is_like_others_of_dynamo_s_is_understood(self) -> None:
        items = [{"token_ids": [A], "text": None, "log_probs": None, "index": 0}, output(finish_reason="eos")]
        assert text(Pipeline(items).ask()) == "a"

    def test_the_card(self) -> None:
        async def describe() -> list[Any]:
            cards = Pipeline().processor.describe(DescribeRequest(), Context("x"))
            return [(card.id, card.context_length) async for card in cards]

        assert asyncio.run(describe()) == [("m", CONTEXT)]


class TestRequest:
    """What the router and the engine are asked."""

    DONE = (output(A, finish_reason="stop"),)

    def test_the_router_gets_hashes_and_the_identity_of_the_model(self) -> None:
        pipeline = Pipeline(self.DONE)
        pipeline.ask()
        (wanted,) = pipeline.wanted
        assert wanted.model == identity()
        assert wanted.local_hashes == compute_block_hash_for_seq(PROMPT, 16)
        assert (wanted.tokens, wanted.excluded, wanted.explain) == (20, [], False)

    @pytest.mark.parametrize(
        ("metadata", "fields", "session"),
        [
            ({"x-session-id": "s"}, {"prompt_cache_key": "k", "user": "u"}, "s"),
            ({"x-session-id": ""}, {"prompt_cache_key": "k", "user": "u"}, "k"),
            ({}, {"prompt_cache_key": "k", "user": "u"}, "k"),
            ({}, {"user": "u"}, "u"),
            ({}, {}, None),
        ],
    )
    def test_the_session(self, metadata: dict[str, str], fields: dict[str, str], session: str | None) -> None:
        pipeline = Pipeline(self.DONE)
        pipeline.ask(metadata, **fields)
        assert pipeline.wanted[0].session == session

    @pytest.mark.parametrize(("metadata", "priority"), [({}, 0), ({"x-priority": "-3"}, -3), ({"x-priority": ""}, 0)])
    def test_the_priority(self, metadata: dict[str, str], priority: int) -> None:
        pipeline = Pipeline(self.DONE)
        pipeline.ask(metadata)
        assert pipeline.wanted[0].priority == priority

    def test_the_request_s_id_goes_to_the_router_and_the_engine(self) -> None:
        pipeline = Pipeline(self.DONE)
        pipeline.ask({"x-request-id": "mine"})
        assert pipeline.wanted[0].request_id == "mine"
        for context in (*pipeline.router.contexts, *pipeline.engines.contexts):
            assert context.metadata["x-request-id"] == "mine"

    def test_the_engine_gets_tokens_and_options(self) -> None:
        pipeline = Pipeline(self.DONE)
        pipeline.ask(max_tokens=5, temperature=0.5, seed=7, top_k=0, ignore_eos=True)
        (request,) = pipeline.generated
        assert (request.token_ids, request.model, request.eos_token_ids) == (PROMPT, "m", [END])
        assert (request.stop_conditions.max_tokens, request.stop_conditions.ignore_eos) == (5, True)
        options = request.sampling_options
        assert (options.temperature, options.seed, options.top_k) == (0.5, 7, None)

    @pytest.mark.parametrize(("worker_holds", "limit"), [(None, CONTEXT - 20), (100, CONTEXT - 20), (30, 10)])
    def test_without_a_limit_the_answer_may_fill_the_context(self, worker_holds: int | None, limit: int) -> None:
        pipeline = Pipeline(self.DONE, context_length=worker_holds)
        pipeline.ask()
        assert pipeline.generated[0].stop_conditions.max_tokens == limit

    @pytest.mark.parametrize(("worker_holds", "max_tokens"), [(None, 45), (30, 11), (20, None)])
    def test_what_does_not_fit_is_refused(self, worker_holds: int | None, max_tokens: int | None) -> None:
        pipeline = Pipeline(self.DONE, context_length=worker_holds)
        with pytest.raises(InvalidRequest, match="maximum context length") as refusal:
            pipeline.ask(max_tokens=max_tokens)
        assert (refusal.value.code, refusal.value.param) == ("context_length_exceeded", "messages")
        assert pipeline.engines.bodies == []

    def test_another_model_is_not_here(self) -> None:
        with pytest.raises(NotFound, match="this processor serves 'm'") as refusal:
            Pipeline(self.DONE).ask(model="n")
        assert refusal.value.code == "model_not_found"


class TestMigration:
    CANCELLED = output(finish_reason="cancelled")

    @pytest.mark.parametrize("end", [DEAD, CANCELLED, failure(Unavailable("leaving")), failure(Cancelled("leaving"))])
    def test_another_worker_goes_on_from_the_last_token(self, end: Any) -> None:
        pipeline = Pipeline([output(A), output(B), end], [output(C), output(D, finish_reason="length")])
        chunks = pipeline.ask(max_tokens=4)
        assert (text(chunks), finish_reasons(chunks)[-1], usage(chunks).completion_tokens) == ("abcd", "length", 4)
        first, second = pipeline.generated
        assert (first.token_ids, first.stop_conditions.max_tokens) == (PROMPT, 4)
        assert (second.token_ids, second.stop_conditions.max_tokens) == ([*PROMPT, A, B], 2)
        first_wanted, second_wanted = pipeline.wanted
        assert (first_wanted.excluded, second_wanted.excluded, second_wanted.tokens) == ([], [1], 22)
        assert len(second_wanted.local_hashes) == len(compute_block_hash_for_seq([*PROMPT, A, B], 16))

    def test_each_decision_is_let_go_when_its_worker_has_failed(self) -> None:
        pipeline = Pipeline([DEAD], [output(A, finish_reason="stop")])
        pipeline.ask()
        assert [context.is_stopped() for context in pipeline.router.contexts] == [True, True]

    def test_but_not_for_ever(self) -> None:
        dies: Script = [output(A), DEAD]
        pipeline = Pipeline(*[dies] * (MIGRATIONS + 5))
        with pytest.raises(Unavailable):
            pipeline.ask()
        assert len(pipeline.generated) == MIGRATIONS + 1

    def test_when_all_have_failed_it_is_the_router_who_says_so(self) -> None:
        pipeline = Pipeline([DEAD], [DEAD])
        with pytest.raises(Unavailable, match="every engine has failed") as refusal:
            pipeline.ask()
        assert refusal.value.code == "no_worker"

    def test_if_only_the_word_that_it_is_finished_was_lost_that_is_all_that_is_supplied(self) -> None:
        pipeline = Pipeline([output(A), output(B), DEAD], [output(C, finish_reason="length")])
        chunks = pipeline.ask(max_tokens=2)
        assert (text(chunks), finish_reasons(chunks)[-1], usage(chunks).completion_tokens) == ("ab", "length", 2)
        assert len(pipeline.generated) == 1

    @pytest.mark.parametrize(
        "error", [InvalidRequest("no such option", param="min_p"), Overloaded("full", code="c"), NotFound("gone")]
    )
    def test_what_another_worker_would_say_too_is_passed_on(self, error: PipelineError) -> None:
        pipeline = Pipeline([failure(error)], [output(A, finish_reason="stop")])
        with pytest.raises(type(error)) as refusal:
            pipeline.ask()
        assert refusal.value.body == error.body
        assert len(pipeline.generated) == 1


class TestFaults:
    """An engine that does not keep to the protocol is named."""

    @pytest.mark.parametrize(
        ("script", "says"),
        [
            ([output(A)], "it ended its stream without a finish_reason"),
            ([], "it ended its stream without a finish_reason"),
            (
                [{"token_idz": [A]}],
                "inference.engine.generate answered with an invalid EngineOutput: there are no fields token_idz",
            ),
            (
                [output(A), {"token_ids": "x"}],
                "inference.engine.generate answered with an invalid EngineOutput: Expected",
            ),
            ([failure(Internal("out of memory"))], "out of memory"),
            ([Exception("Internal: ValueError: x")], "Internal: ValueError: x"),
            ([output(A), output(finish_reason={"error": "out of memory"})], "out of memory"),
            ([output(A, finish_reason="bored")], "bored"),
        ],
    )
    def test_it_is_named(self, script: Script, says: str) -> None:
        pipeline = Pipeline([output(A, finish_reason="stop")])
        pipeline.engines.handlers[1] = play(script)
        with pytest.raises(Internal) as fault:
            pipeline.ask()
        assert fault.value.message.startswith("worker w1 failed: ")
        assert says in fault.value.message
        assert len(pipeline.generated) == 1


class TestCancellation:
    @pytest.mark.parametrize("end", [[], [output(finish_reason="cancelled")], [DEAD], [output(B)]])
    def test_a_caller_that_went_away_gets_no_other_worker(self, end: Script) -> None:
        pipeline = Pipeline([], [output(A, finish_reason="stop")])
        context = Context("id")

        async def stopped_half_way(body: Any, _: Context) -> AsyncIterator[Any]:
            yield output(A)
            context.stop_generating()
            async for item in play(end)(body, context):
                yield item

        pipeline.engines.handlers[1] = stopped_half_way
        with pytest.raises(Cancelled):
            asyncio.run(pipeline._ask(context, {}))
        assert len(pipeline.generated) == 1
        assert [context.is_stopped() for context in pipeline.router.contexts] == [True]
