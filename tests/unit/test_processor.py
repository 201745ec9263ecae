"""Tokens become an answer, whatever happens to the workers that make them."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from types import SimpleNamespace
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
from common.events import Feed
from common.messages import (
    FIND_WORKER,
    GENERATE,
    WORKERS,
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
from common.openai_api import ChatCompletionChunk, ChunkChoice, Delta, Routing, TokenLogprob
from common.openai_request import ChatCompletionRequest, CompletionRequest, DetokenizeRequest, TokenizeRequest
from common.remote import Remote
from common.text.generation import Generation, best, generations_of
from common.text.limits import Limits
from common.text.routers import Routers
from common.text.sglang_parsers import ParserNames
from common.text.token_texts import TokenTexts
from processor import Processor
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
    parsers = ParserNames(None, None)

    def __init__(self) -> None:
        self.tokenizer = Tokenizer(models.WordLevel({"<end>": END, "a": A, "b": B, "c": C, "d": D}, unk_token="<end>"))
        self.tokenizer.decoder = decoders.Fuse()
        self.texts = TokenTexts(self.tokenizer)
        self.rendered: list[tuple[str, dict[str, Any], bool, bool]] = []

    def render(
        self, messages: Any, tools: Any = (), variables: Any = None, *, answer: bool = True, go_on: bool = False
    ) -> str:
        self.rendered.append((messages[-1].text, variables or {}, answer, go_on))
        return "a" * len(PROMPT)

    def encode(self, text: str, *, add_special_tokens: bool = False, param: str = "messages") -> list[int]:
        return [self.tokenizer.token_to_id(letter) for letter in text]

    def sampling(self, **asked: Any) -> SamplingOptions:
        return SamplingOptions(**asked)


MIGRATIONS = 3


class Pipeline:
    """A processor, with a router and engines that play their parts.

    engines: by instance, what each yields for its first request, its second, …; an exception is raised.
    """

    def __init__(
        self,
        *engines: Script,
        context_length: int | None = None,
        coalesce_ms: float = 0.0,
        simulated: bool = False,
        migration_limit: int = MIGRATIONS,
    ) -> None:
        self._context_length = context_length
        self._simulated = simulated
        self._workers = range(1, len(engines) + 1)
        self.nobody_at: int | None = None  # the question to the router, by number, at which it has no worker
        self.router = LocalClient({0: self._find_worker})
        self.engines = LocalClient(dict(zip(self._workers, map(play, engines), strict=True)))
        router: Any = self.router
        nobody: Any = LocalClient({})
        engine: Any = self.engines
        self.model = TinyModel()
        model: Any = self.model
        self.processor = Processor(
            model,
            identity(),
            routers=Routers(Remote(FIND_WORKER, router), Remote(WORKERS, nobody), self.engines.instance_ids, Limits()),
            engines=Remote(GENERATE, engine),
            coalescer=Coalescer(coalesce_ms),
            feed=Feed(9, asyncio.Event().wait),
            migration_limit=migration_limit,
        )

    async def _find_worker(self, body: Any, context: Context) -> AsyncIterator[Any]:
        left = [number for number in self._workers if number not in FindWorkerRequest.decode(body).excluded]
        if not left or len(self.router.bodies) == self.nobody_at:
            yield Failure.of(Unavailable("every engine has failed", code="no_worker")).encode()
            return
        decision = RoutingDecision(
            instance_id=left[0],
            worker_id=f"w{left[0]}",
            overlap_blocks=1,
            cost=0.0,
            context_length=self._context_length,
            simulated=self._simulated,
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

    def complete(self, **fields: Any) -> list[ChatCompletionChunk]:
        async def run() -> list[ChatCompletionChunk]:
            request = CompletionRequest.decode({"model": "m", "prompt": "ab", **fields})
            return [chunk async for chunk in self.processor.complete(request, Context("id"))]

        return asyncio.run(run())


def play(script: Script) -> Handler:
    """The same for every request."""

    async def generate(body: Any, context: Context) -> AsyncIterator[Any]:
        for item in script:
            if isinstance(item, Exception):
                raise item
            yield item

    return generate


def by_turns(*scripts: Script) -> Handler:
    """One for each request."""
    left = list(map(play, scripts))
    return lambda body, context: left.pop(0)(body, context)


def output(
    *token_ids: int,
    finish_reason: str | dict[str, str] | None = None,
    log_probs: list[float] | None = None,
    top_logprobs: list[list[dict[str, Any]]] | None = None,
) -> dict[str, Any]:
    item = EngineOutput(token_ids=list(token_ids), log_probs=log_probs, top_logprobs=top_logprobs)
    if finish_reason:
        item.finish_reason = finish_reason
    return item.encode()


def top(token_id: int, logprob: float) -> dict[str, Any]:
    return {"rank": 1, "token_id": token_id, "token": None, "logprob": logprob}


def failure(error: PipelineError) -> dict[str, Any]:
    return Failure.of(error).encode()


def text(chunks: list[ChatCompletionChunk]) -> str:
    return "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices)


def texts(chunks: list[ChatCompletionChunk]) -> dict[int, str]:
    """That of each answer."""
    found: dict[int, str] = {}
    for choice in (choice for chunk in chunks for choice in chunk.choices):
        found[choice.index] = found.get(choice.index, "") + (choice.delta.content or "")
    return found


def logprobs(chunks: list[ChatCompletionChunk]) -> list[TokenLogprob]:
    found = (choice.logprobs for chunk in chunks for choice in chunk.choices)
    return [entry for entries in found if entries for entry in entries.content]


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

    def test_the_first_chunk_says_who_answers_and_in_which_role_and_the_last_who_did(self) -> None:
        chunks = Pipeline([output(A), output(B, finish_reason="length")]).ask()
        assert [chunk.routing for chunk in chunks] == [
            Routing(worker_id="w1", overlap_blocks=1),
            UNSET,
            Routing(worker_id="w1", overlap_blocks=1, overlap_tokens=16),
        ]
        assert [chunk.choices[0].delta.role for chunk in chunks[:-1]] == ["assistant", None]

    def test_only_what_a_client_may_see_is_sent_and_what_a_frontend_must_know(self) -> None:
        first, last, counts = (chunk.encode() for chunk in Pipeline([output(A), output(B, finish_reason="eos")]).ask())
        assert first.keys() == {"id", "object", "created", "model", "system_fingerprint", "choices", "routing"}
        assert last.keys() == first.keys() - {"routing"}
        assert counts.keys() == {*first.keys(), "usage"}
        (choice,) = last["choices"]
        assert choice.pop("token_ids") == [B]
        assert choice == {"index": 0, "delta": {"content": "b"}, "logprobs": None, "finish_reason": "stop"}

    def test_all_chunks_have_one_fingerprint(self) -> None:
        (fingerprint,) = {chunk.system_fingerprint for chunk in Pipeline([output(A, finish_reason="stop")]).ask()}
        assert str(fingerprint).startswith("fp_")

    def test_an_answer_of_no_tokens_needs_no_worker(self) -> None:
        pipeline = Pipeline([output(A, finish_reason="stop")])
        chunks = pipeline.ask(max_tokens=0)
        assert (text(chunks), finish_reasons(chunks), chunks[0].choices[0].delta.role) == ("", ["length"], "assistant")
        assert (usage(chunks).prompt_tokens, usage(chunks).completion_tokens) == (20, 0)
        assert (pipeline.wanted, pipeline.generated) == ([], [])

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
        assert (options.logit_bias, options.guided_decoding, request.output_options.logprobs) == (None, None, None)

    def test_and_the_rarer_ones(self) -> None:
        pipeline = Pipeline(self.DONE)
        pipeline.ask(
            temperature=0,
            top_p=0,
            repetition_penalty=1.5,
            logit_bias={"1": -100},
            min_tokens=3,
            stop_token_ids=[D],
            logprobs=True,
            top_logprobs=2,
            guided_regex="a+",
        )
        (request,) = pipeline.generated
        assert (request.stop_conditions.min_tokens, request.stop_conditions.stop_token_ids) == (3, [D])
        options = request.sampling_options
        assert (options.temperature, options.top_p, options.repetition_penalty) == (0, None, 1.5)
        assert (options.logit_bias, options.guided_decoding) == ({"1": -100}, {"regex": "a+"})
        assert request.output_options.logprobs == 2

    def test_the_template_is_told_what_follows(self) -> None:
        pipeline = Pipeline(self.DONE)
        pipeline.ask()
        pipeline.ask(chat_template_kwargs={"x": 1}, reasoning_effort="low", add_generation_prompt=False)
        begun = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "Well"}]
        pipeline.ask(messages=begun, continue_final_message=True)
        assert pipeline.model.rendered == [
            ("hello", {}, True, False),
            ("hello", {"x": 1, "reasoning_effort": "low"}, False, False),
            ("Well", {}, True, True),
        ]

    @pytest.mark.parametrize(
        ("schema", "says"),
        [
            ({"type": "thing"}, "the JSON schema is not valid at #/type"),
            ({"properties": {"a": {"uniqueItems": True}}}, "has uniqueItems at #/properties/a"),
        ],
    )
    def test_a_schema_that_no_engine_can_enforce_is_refused(self, schema: dict[str, Any], says: str) -> None:
        pipeline = Pipeline(self.DONE)
        for ask in (pipeline.ask, pipeline.complete):
            with pytest.raises(InvalidRequest, match=says):
                ask(guided_json=schema)
        assert pipeline.wanted == []

    NEED_A_MODEL: Sequence[dict[str, Any]] = (
        {"logit_bias": {"1": 1}},
        {"guided_regex": "a"},
        {"response_format": {"type": "json_object"}},
    )

    @pytest.mark.parametrize("fields", [*NEED_A_MODEL, {"logprobs": True}])
    def test_a_simulated_worker_cannot_do_everything(self, fields: dict[str, Any]) -> None:
        pipeline = Pipeline(self.DONE, simulated=True)
        with pytest.raises(InvalidRequest, match="engine w1 is simulated: its tokens are made up"):
            pipeline.ask(**fields)
        assert pipeline.generated == []
        assert [context.is_stopped() for context in pipeline.router.contexts] == [True]

    @pytest.mark.parametrize("fields", [*NEED_A_MODEL, {"logprobs": 0}, {"best_of": 2}])
    def test_nor_for_completions(self, fields: dict[str, Any]) -> None:
        with pytest.raises(InvalidRequest, match="engine w1 is simulated"):
            Pipeline(self.DONE, simulated=True).complete(**fields)

    def test_but_all_else(self) -> None:
        pipeline = Pipeline(self.DONE, simulated=True)
        fields: dict[str, Any] = {
            "logit_bias": {},
            "logprobs": False,
            "response_format": {"type": "text"},
            "seed": 1,
            "n": 2,
        }
        assert texts(pipeline.ask(**fields)) == {0: "a", 1: "a"}

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

    def test_what_it_must_at_least_say_is_what_is_left_of_it(self) -> None:
        pipeline = Pipeline([output(A), output(B), DEAD], [output(C), DEAD], [output(D, finish_reason="length")])
        pipeline.ask(min_tokens=3)
        assert [request.stop_conditions.min_tokens for request in pipeline.generated] == [3, 1, None]

    def test_a_form_that_has_begun_is_not_begun_again(self) -> None:
        again: Script = [output(B, finish_reason="stop")]
        with pytest.raises(Unavailable, match="in the midst of a form"):
            Pipeline([output(A), DEAD], again).ask(response_format={"type": "json_object"})
        assert text(Pipeline([DEAD], again).ask(response_format={"type": "json_object"})) == "b"

    def test_each_decision_is_let_go_when_its_worker_has_failed(self) -> None:
        pipeline = Pipeline([DEAD], [output(A, finish_reason="stop")])
        pipeline.ask()
        assert [context.is_stopped() for context in pipeline.router.contexts] == [True, True]

    def test_but_not_for_ever(self) -> None:
        dies: Script = [output(A), DEAD]
        pipeline = Pipeline(*[dies] * (MIGRATIONS + 5), migration_limit=MIGRATIONS)
        with pytest.raises(Unavailable):
            pipeline.ask()
        assert len(pipeline.generated) == MIGRATIONS + 1

    def test_or_not_at_all_if_that_is_turned_off(self) -> None:
        pipeline = Pipeline([output(A), DEAD], [output(B, finish_reason="stop")], migration_limit=0)
        with pytest.raises(Unavailable):
            pipeline.ask()
        assert len(pipeline.generated) == 1

    def test_a_request_that_kills_workers_gets_no_third_one(self) -> None:
        pipeline = Pipeline([DEAD], [DEAD], [output(A, finish_reason="stop")])
        with pytest.raises(InvalidRequest, match="died of it") as refusal:
            pipeline.ask()
        assert (refusal.value.code, len(pipeline.generated)) == ("engines_lost", 2)

    def test_but_workers_that_had_made_tokens_of_it_died_of_something_else(self) -> None:
        dies: Script = [output(A), DEAD]
        pipeline = Pipeline(dies, dies, dies, [output(B, finish_reason="stop")])
        assert text(pipeline.ask()) == "aaab"

    def test_when_all_have_failed_another_one_is_waited_for(self) -> None:
        """A worker that was restarted is one as soon as it is back."""
        pipeline = Pipeline([output(A), DEAD], [output(B, finish_reason="stop")])
        pipeline.nobody_at = 2
        assert text(pipeline.ask()) == "ab"
        assert [wanted.excluded for wanted in pipeline.wanted] == [[], [1], [1]]

    def test_or_one_that_has_failed_is_asked_again(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """None of them may have been at fault."""
        monkeypatch.setattr("common.text.routers.FORGIVE_SECONDS", 0.2)
        pipeline = Pipeline([output(A), DEAD])
        pipeline.engines.handlers[1] = by_turns([output(A), DEAD], [output(B, finish_reason="stop")])
        assert text(pipeline.ask()) == "ab"

    def test_but_not_by_one_that_has_not_begun(self) -> None:
        pipeline = Pipeline([output(A, finish_reason="stop")])
        pipeline.nobody_at = 1
        with pytest.raises(Unavailable, match="every engine has failed"):
            pipeline.ask()

    def test_nor_for_ever_and_then_it_is_the_router_who_says_why(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("common.text.routers.REPLACE_SECONDS", 0.2)
        pipeline = Pipeline([output(A), DEAD], [output(A), DEAD])
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


class TestLogprobs:
    """How likely each token was."""

    SCRIPT = (
        output(A, B, log_probs=[-0.5, -0.25], top_logprobs=[[top(A, -0.5), top(B, -1.5)], [top(B, -0.25)]]),
        output(C, log_probs=[-0.125], top_logprobs=[[top(C, -0.125), top(D, -9.0)]]),
        output(END, finish_reason="stop", log_probs=[-1.0], top_logprobs=[[top(END, -1.0)]]),
    )

    def test_they_go_with_their_tokens_and_the_end_token_has_none(self) -> None:
        chunks = Pipeline(self.SCRIPT).ask(logprobs=True, top_logprobs=2)
        assert [[entry.token for entry in logprobs([chunk])] for chunk in chunks] == [["a", "b"], ["c"], [], []]
        first = logprobs(chunks)[0]
        assert (first.logprob, first.bytes) == (-0.5, [97])
        assert [(entry.token, entry.logprob) for entry in first.top_logprobs] == [("a", -0.5), ("b", -1.5)]

    def test_as_many_of_the_likeliest_as_were_wanted(self) -> None:
        """An engine may report more."""
        for wanted in (0, 1, 2):
            chunks = Pipeline(self.SCRIPT).ask(logprobs=True, top_logprobs=wanted)
            assert [len(entry.top_logprobs) for entry in logprobs(chunks)] == [wanted, min(wanted, 1), wanted]

    def test_they_are_not_sent_to_those_who_did_not_ask(self) -> None:
        assert logprobs(Pipeline(self.SCRIPT).ask()) == []

    def test_what_the_engine_made_beyond_a_stop_string_has_none(self) -> None:
        script = [output(A, log_probs=[-1.0]), output(B, C, D, log_probs=[-2.0, -3.0, -4.0])]
        chunks = Pipeline(script).ask(logprobs=True, stop="bc")
        assert (text(chunks), [entry.logprob for entry in logprobs(chunks)]) == ("a", [-1.0, -2.0, -3.0])

    def test_those_of_text_that_waits_come_with_it(self) -> None:
        script = [output(A, log_probs=[-1.0]), output(B, log_probs=[-2.0]), output(D, log_probs=[-3.0])]
        chunks = Pipeline([*script, output(finish_reason="length")]).ask(logprobs=True, stop="bc")
        assert [text([chunk]) for chunk in chunks] == ["a", "bd", "", ""]
        assert [[entry.token for entry in logprobs([chunk])] for chunk in chunks] == [["a"], ["b", "d"], [], []]

    def test_tokens_that_come_together_keep_theirs(self) -> None:
        chunks = Pipeline(self.SCRIPT, coalesce_ms=60_000).ask(logprobs=True)
        assert [entry.logprob for entry in logprobs(chunks)] == [-0.5, -0.25, -0.125]


class TestSeveralAnswers:
    """To one prompt."""

    LONG: Script = (output(A), output(B), output(C, finish_reason="length"))
    SHORT: Script = (output(D, finish_reason="stop"),)

    def test_each_is_generated_on_its_own_and_the_prompt_counts_once(self) -> None:
        pipeline = Pipeline([])
        pipeline.engines.handlers[1] = by_turns(self.LONG, self.SHORT)
        chunks = pipeline.ask(n=2)
        assert texts(chunks) == {0: "abc", 1: "d"}
        ends = {choice.index: choice.finish_reason for chunk in chunks for choice in chunk.choices}
        assert ends == {0: "length", 1: "stop"}
        counts = usage(chunks)
        assert (counts.prompt_tokens, counts.completion_tokens, counts.total_tokens) == (20, 4, 24)
        assert len({chunk.id for chunk in chunks}) == 1
        for index in (0, 1):
            own = [choice for chunk in chunks for choice in chunk.choices if choice.index == index]
            assert [choice.delta.role for choice in own] == ["assistant", *[None] * (len(own) - 1)]

    def test_they_come_as_they_are_made(self) -> None:
        pipeline = Pipeline([])

        async def waits_for_the_other(body: Any, context: Context) -> AsyncIterator[Any]:
            while len(pipeline.engines.bodies) < 2:
                await asyncio.sleep(0)
            yield output(A, finish_reason="stop")

        pipeline.engines.handlers[1] = waits_for_the_other
        assert texts(pipeline.ask(n=2)) == {0: "a", 1: "a"}

    def test_they_have_seeds_of_their_own_or_none(self) -> None:
        for seed, seeds in ((7, [7, 8, 9]), (2**63 - 2, [2**63 - 2, 2**63 - 1, -(2**63)]), (None, [None] * 3)):
            pipeline = Pipeline(self.SHORT)
            pipeline.ask(n=3, seed=seed)
            assert [request.sampling_options.seed for request in pipeline.generated] == seeds

    def test_all_want_the_worker_of_the_first(self) -> None:
        """It has their prompt in its cache."""
        pipeline = Pipeline(self.SHORT, self.SHORT)
        pipeline.ask(n=3)
        assert [wanted.beside for wanted in pipeline.wanted] == [None, 1, 1]

    def test_one_that_fails_fails_all(self) -> None:
        pipeline = Pipeline([])
        pipeline.engines.handlers[1] = by_turns(self.LONG, [failure(Overloaded("full"))])
        with pytest.raises(Overloaded):
            pipeline.ask(n=2)
        assert [context.is_stopped() for context in pipeline.router.contexts] == [True, True]

    def test_each_can_move_to_another_worker(self) -> None:
        pipeline = Pipeline([], self.SHORT)
        pipeline.engines.handlers[1] = by_turns(self.LONG, [output(A), DEAD])
        chunks = pipeline.ask(n=2)
        assert sorted(texts(chunks).values()) == ["abc", "ad"]
        assert usage(chunks).completion_tokens == 5

    def test_a_prompt_that_does_not_fit_is_refused_for_all(self) -> None:
        with pytest.raises(InvalidRequest, match="maximum context length"):
            Pipeline(self.SHORT).ask(n=3, max_tokens=CONTEXT)


class TestCompletions:
    DONE: Script = (output(C, finish_reason="stop"),)

    @pytest.mark.parametrize(
        ("prompt", "tokens"),
        [
            ("ab", [[A, B]]),
            (["ab", "d"], [[A, B], [D]]),
            ([A, B], [[A, B]]),
            ([[A, B], [D]], [[A, B], [D]]),
        ],
    )
    def test_each_prompt_has_its_answer(self, prompt: Any, tokens: list[list[int]]) -> None:
        pipeline = Pipeline(self.DONE)
        chunks = pipeline.complete(prompt=prompt)
        assert sorted(request.token_ids for request in pipeline.generated) == tokens
        assert texts(chunks) == dict.fromkeys(range(len(tokens)), "c")
        counts = usage(chunks)
        assert (counts.prompt_tokens, counts.completion_tokens) == (sum(map(len, tokens)), len(tokens))
        assert {chunk.id for chunk in chunks} == {"cmpl-id"}

    @pytest.mark.parametrize("prompt", [[], "", [[]], [-1], [2**40], [[A], [10**6]]])
    def test_what_is_no_prompt_is_refused(self, prompt: Any) -> None:
        with pytest.raises(InvalidRequest, match="prompt"):
            Pipeline(self.DONE).complete(prompt=prompt)

    def test_several_answers_to_several_prompts_are_in_the_prompts_order(self) -> None:
        pipeline = Pipeline([])

        async def echoes(body: Any, context: Context) -> AsyncIterator[Any]:
            request = GenerateRequest.decode(body)
            yield output(*request.token_ids, finish_reason="stop")

        pipeline.engines.handlers[1] = echoes
        chunks = pipeline.complete(prompt=["ab", "d"], n=2)
        assert texts(chunks) == {0: "ab", 1: "ab", 2: "d", 3: "d"}
        assert usage(chunks).prompt_tokens == 3

    def test_it_is_short_unless_something_else_is_said(self) -> None:
        pipeline = Pipeline(self.DONE)
        pipeline.complete()
        pipeline.complete(max_tokens=5)
        assert [request.stop_conditions.max_tokens for request in pipeline.generated] == [16, 5]

    def test_it_can_begin_with_the_prompt(self) -> None:
        chunks = Pipeline(self.DONE).complete(prompt=["ab", "d"], echo=True)
        assert texts(chunks) == {0: "abc", 1: "dc"}
        assert usage(chunks).completion_tokens == 2

    def test_and_be_nothing_but_the_prompt(self) -> None:
        pipeline = Pipeline(self.DONE)
        chunks = pipeline.complete(echo=True, max_tokens=0)
        assert (text(chunks), finish_reasons(chunks), usage(chunks).completion_tokens) == ("ab", ["length"], 0)
        assert pipeline.generated == []

    def test_a_stop_string_in_the_prompt_ends_nothing(self) -> None:
        assert text(Pipeline([output(C, B, finish_reason="length")]).complete(echo=True, stop="b")) == "abc"

    def test_what_does_not_fit_is_refused(self) -> None:
        with pytest.raises(InvalidRequest, match="in the prompt") as refusal:
            Pipeline(self.DONE).complete(max_tokens=CONTEXT)
        assert (refusal.value.code, refusal.value.param) == ("context_length_exceeded", "prompt")

    def test_another_model_is_not_here(self) -> None:
        with pytest.raises(NotFound, match="this processor serves 'm'"):
            Pipeline(self.DONE).complete(model="n")

    def test_of_several_the_best(self) -> None:
        """By what their tokens have on average; the engine is asked for that, and the client is not told."""
        pipeline = Pipeline([])
        pipeline.engines.handlers[1] = by_turns(
            [output(A, B, finish_reason="stop", log_probs=[-1.0, -3.0])],
            [output(B, finish_reason="stop", log_probs=[-1.5])],
            [output(C), output(C, finish_reason="stop", log_probs=[-0.5])],
        )
        chunks = pipeline.complete(n=2, best_of=3)
        assert texts(chunks) == {0: "cc", 1: "b"}
        assert [request.output_options.logprobs for request in pipeline.generated] == [0, 0, 0]
        assert logprobs(chunks) == []
        assert usage(chunks).completion_tokens == 5


class TestTokens:
    @staticmethod
    def tokenize(pipeline: Pipeline, **fields: Any) -> Any:
        async def run() -> list[Any]:
            request = TokenizeRequest.decode(fields)
            return [tokens async for tokens in pipeline.processor.tokenize(request, Context("x"))]

        (tokens,) = asyncio.run(run())
        return tokens

    def test_those_of_a_text(self) -> None:
        tokens = self.tokenize(Pipeline(), prompt="abd", return_token_strs=True)
        assert (tokens.tokens, tokens.count, tokens.max_model_len) == ([A, B, D], 3, CONTEXT)
        assert tokens.token_strs == ["a", "b", "d"]
        assert self.tokenize(Pipeline(), prompt="").tokens == []

    def test_those_of_a_conversation(self) -> None:
        pipeline = Pipeline()
        messages = [{"role": "user", "content": "hello"}]
        tokens = self.tokenize(pipeline, messages=messages, add_generation_prompt=False)
        assert (tokens.tokens, tokens.token_strs) == (PROMPT, None)
        assert pipeline.model.rendered == [("hello", {}, False, False)]

    def test_and_back(self) -> None:
        async def run() -> list[str]:
            request = DetokenizeRequest.decode({"tokens": [A, B, END]})
            return [text.prompt async for text in Pipeline().processor.detokenize(request, Context("x"))]

        assert asyncio.run(run()) == ["ab<end>"]


class TestGenerations:
    def test_each_of_a_prompt_is_beside_its_first(self) -> None:
        request = CompletionRequest.decode({"model": "m", "prompt": ["a", "b"], "n": 2, "seed": 5})
        first, second, third, fourth = generations_of(request, [[A], [B]], {"regex": "a"})
        assert [first.tokens, second.tokens, third.tokens, fourth.tokens] == [[A], [A], [B], [B]]
        assert (first.beside, second.beside, third.beside, fourth.beside) == (None, first, None, third)
        assert [one.seed for one in (first, second, third, fourth)] == [5, 6, 5, 6]
        assert second.constraint == {"regex": "a"}

    @pytest.mark.parametrize(
        ("fields", "each", "wanted"),
        [({}, 1, None), ({"logprobs": 2}, 1, 2), ({"best_of": 2}, 2, 0), ({"best_of": 2, "logprobs": 3}, 2, 3)],
    )
    def test_logprobs_are_for_those_who_want_them_and_to_know_the_best(
        self, fields: dict[str, Any], each: int, wanted: int | None
    ) -> None:
        request = CompletionRequest.decode({"model": "m", "prompt": "a", **fields})
        assert [one.logprobs for one in generations_of(request, [[A]], None)] == [wanted] * each

    @pytest.mark.parametrize(
        ("seed", "index", "own"),
        [(None, 3, None), (0, 0, 0), (0, 3, 3), (-1, 1, 0), (2**63 - 1, 1, -(2**63)), (-(2**63), 0, -(2**63))],
    )
    def test_a_seed_is_of_64_bits(self, seed: int | None, index: int, own: int | None) -> None:
        request = CompletionRequest.decode({"model": "m", "prompt": "a", "seed": seed})
        assert Generation(request, [A], index=index).seed == own

    def test_the_best_are_those_of_each_prompt(self) -> None:
        """The likeliest first, in the order in which their chunks came."""
        likelihoods = [-3.0, -1.0, -2.0, -1.0, -5.0, -4.0]
        answers: Any = [
            SimpleNamespace(index=index, logprob=logprob * 2, tokens=2) for index, logprob in enumerate(likelihoods)
        ]

        async def chunks() -> AsyncGenerator[ChatCompletionChunk]:
            for index in (0, 3, 1, 2, 4, 5, 1):
                choice = ChunkChoice(index=index, delta=Delta(content=str(index)))
                yield ChatCompletionChunk(id="x", created=1, model="m", choices=[choice])
            last = ChatCompletionChunk(id="x", created=1, model="m", choices=[])
            last.usage = {}
            yield last

        async def run() -> list[ChatCompletionChunk]:
            return [chunk async for chunk in best(chunks(), answers, 3, 2)]

        *came, last = asyncio.run(run())
        said = [(choice.index, choice.delta.content) for chunk in came for choice in chunk.choices]
        assert said == [(2, "3"), (0, "1"), (1, "2"), (3, "5"), (0, "1")]
        assert last.usage == {}


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
