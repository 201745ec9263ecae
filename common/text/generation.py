"""The tokens of an answer, from whichever workers they come."""

import asyncio
import hashlib
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Any

from common import tracing
from common.errors import InvalidRequest, Unavailable
from common.events import Teller
from common.log import request_id
from common.messages import (
    CompletionTokensDetails,
    EngineOutput,
    FindWorkerRequest,
    GenerateRequest,
    ModelIdentity,
    OutputOptions,
    RoutingDecision,
    StopConditions,
    Usage,
)
from common.openai_api import ChatCompletionChunk, PromptBlocks, Routing
from common.openai_request import AnswerSoFar, GenerationRequest
from common.text.answer import Answer
from common.text.chat_model import ChatModel

from dynamo.llm import compute_block_hash_for_seq
from dynamo.runtime import Context
from msgspec import UNSET

MAX_SESSION = 128  # characters of a session's name that routers keep; a longer one is hashed


class Generation:
    """The tokens of one answer: its prompt, what came so far, and the workers that failed it."""

    def __init__(
        self,
        request: GenerationRequest,
        prompt: list[int],
        *,
        index: int = 0,
        constraint: dict[str, Any] | None = None,
        logprobs: int | None = None,
        beside: "Generation | None" = None,
    ) -> None:
        """index: among the answers to this prompt; constraint: the form of the answer, as Dynamo's workers take it;
        logprobs: how many to report for each token; beside: the one for the same prompt whose worker this one wants."""
        self.request = request
        self.tokens = list(prompt)
        self.prompt_tokens = len(prompt)
        self.index = index
        self.constraint = constraint
        self.logprobs = logprobs
        self.beside = beside
        self.decision: RoutingDecision | None = None  # who answers now
        self.decided = asyncio.Event()
        self.failed: list[int] = []
        self.victims = 0  # of those, the ones that died, or began to hang, before they had made a token of it
        self.tell: Teller | None = None  # tells those who watch, if they are told of this one
        self.finished = False

    @property
    def generated(self) -> int:
        """Tokens of the answer so far."""
        return len(self.tokens) - self.prompt_tokens

    @property
    def seed(self) -> int | None:
        """Its own, or all answers to a prompt would be the same one; as a signed number of 64 bits."""
        if self.request.seed is None:
            return None
        return (self.request.seed + self.index + 2**63) % 2**64 - 2**63

    def resume(self, so_far: AnswerSoFar) -> None:
        """Go on after what another processor has sent. Raises Unavailable if that cannot be."""
        if self.constraint and so_far.token_ids and not so_far.finish_reason:
            raise Unavailable("a processor was lost in the midst of a form that no other can go on with; try again")
        self.tokens += so_far.token_ids
        self.finished = so_far.finish_reason is not None

    def add(self, output: EngineOutput) -> None:
        """Take in what a worker says."""
        self.tokens += output.token_ids
        self.finished = output.finish_reason is not None

    def traced(self, outputs: AsyncGenerator[EngineOutput], context: Context) -> AsyncGenerator[EngineOutput]:
        """The same outputs of a worker, as spans: its attempt, and in that what comes before and after the first."""
        return self._traced(outputs, context) if tracing.on() else outputs

    async def _traced(self, outputs: AsyncGenerator[EngineOutput], context: Context) -> AsyncGenerator[EngineOutput]:
        assert self.decision
        name, before = "migration" if self.failed else "generate", self.generated
        worker, overlap = self.decision.worker_id, self.decision.overlap_blocks
        with tracing.span(name, context, kind="client", worker=worker, overlap_blocks=overlap) as attempt:
            attempt.note(prompt_tokens=self.prompt_tokens, tokens_before=before)
            async with aclosing(outputs):
                # The request goes out with the first question, and is to hang below the attempt.
                with tracing.span("queue and prefill", context, leaf=True):
                    first = await anext(outputs, None)
                if first is None:
                    return
                with tracing.span("decode", context, leaf=True) as decode:
                    try:
                        yield first
                        async for output in outputs:
                            yield output
                    finally:
                        decode.note(tokens=self.generated - before)

    def limit(self, context_length: int) -> int:
        """How many tokens the answer may have. Raises InvalidRequest if the context does not hold them."""
        limit = self.request.token_limit
        wanted = 1 if limit is None else limit
        if self.prompt_tokens + wanted > context_length:
            raise InvalidRequest(
                f"This model's maximum context length is {context_length} tokens. However, you requested "
                f"{self.prompt_tokens + wanted} tokens ({self.prompt_tokens} in the {self.request.PROMPT}, {wanted} in "
                "the completion). Please reduce the length of either.",
                code="context_length_exceeded",
                param=self.request.PROMPT,
            )
        return context_length - self.prompt_tokens if limit is None else limit

    def find_worker_request(self, identity: ModelIdentity, context: Context) -> FindWorkerRequest:
        """What routers are to know. Raises InvalidRequest if the priority is none."""
        request, metadata = self.request, context.metadata
        return FindWorkerRequest(
            model=identity,
            local_hashes=compute_block_hash_for_seq(self.tokens, identity.block_size),
            tokens=len(self.tokens),
            request_id=request_id(context),
            session=_session(metadata.get("x-session-id") or request.prompt_cache_key or request.user),
            priority=_priority(metadata.get("x-priority") or "0"),
            excluded=self.failed,
            beside=self.beside.decision.instance_id if self.beside and self.beside.decision else None,
            begun=self.generated > 0 or self.beside is not None,
        )

    def blocks(self, block_size: int) -> PromptBlocks:
        """The prompt, for a frontend that records traffic."""
        hashes = compute_block_hash_for_seq(self.tokens[: self.prompt_tokens], block_size)
        return PromptBlocks(tokens=self.prompt_tokens, block_size=block_size, local_hashes=hashes)

    def generate_request(self, model: ChatModel, max_tokens: int) -> GenerateRequest:
        """What a worker is to do: go on after the tokens that are there, with at most so many more."""
        request = self.request
        return GenerateRequest(
            token_ids=self.tokens,
            model=model.name,
            stop_conditions=StopConditions(
                max_tokens=max_tokens,
                min_tokens=max(0, (request.min_tokens or 0) - self.generated) or None,
                stop_token_ids=request.stop_token_ids,
                ignore_eos=request.ignore_eos,
            ),
            sampling_options=model.sampling(
                temperature=request.temperature,
                top_p=request.top_p or None,
                top_k=request.top_k or None,
                min_p=request.min_p,
                seed=self.seed,
                presence_penalty=request.presence_penalty,
                frequency_penalty=request.frequency_penalty,
                repetition_penalty=request.repetition_penalty,
                logit_bias=request.logit_bias,
                guided_decoding=self.constraint,
            ),
            output_options=OutputOptions(logprobs=self.logprobs),
            eos_token_ids=model.eos_token_ids,
        )

    def check(self, decision: RoutingDecision) -> None:
        """Raises InvalidRequest if the worker cannot do what was asked for."""
        if decision.simulated and (self.constraint or self.logprobs is not None or self.request.logit_bias):
            raise InvalidRequest(
                f"engine {decision.worker_id} is simulated: its tokens are made up, so it has no logprobs and no "
                "logit_bias, forces no form on an answer and no tool call; start engines with --backend sglang for that"
            )


def _session(name: str | None) -> str | None:
    """A session's name as routers keep it."""
    if name is None or len(name) <= MAX_SESSION:
        return name
    return hashlib.sha256(name.encode()).hexdigest()


def _priority(text: str) -> int:
    """A request's priority. Raises InvalidRequest if it is none."""
    try:
        return int(text)
    except ValueError as error:
        raise InvalidRequest("x-priority must be an integer", param="x-priority") from error


def check_ids(prompt: Sequence[int], vocabulary: int) -> None:
    """Raises InvalidRequest if these token ids cannot be a prompt. vocabulary: how many tokens there are."""
    if not prompt:
        raise InvalidRequest("the prompt must not be empty", param="prompt")
    if not 0 <= min(prompt) <= max(prompt) < vocabulary:
        raise InvalidRequest(f"the prompt has token ids that are not from 0 to {vocabulary - 1}", param="prompt")


def generations_of(
    request: GenerationRequest, prompts: Sequence[list[int]], constraint: dict[str, Any] | None
) -> list[Generation]:
    """All answers to each of `prompts`, those to one prompt on one worker."""
    logprobs = request.wanted_logprobs
    if request.drafts > request.choices and logprobs is None:  # to know which are the best
        logprobs = 0
    generations = []
    for prompt in prompts:
        first = Generation(request, prompt, constraint=constraint, logprobs=logprobs)
        generations += [first]
        for index in range(1, request.drafts):
            more = Generation(request, prompt, index=index, constraint=constraint, logprobs=logprobs, beside=first)
            generations.append(more)
    return generations


def resume(generations: Sequence[Generation], answers: Sequence[Answer]) -> None:
    """Have all answers that another processor had begun go on. Raises Unavailable if one of them cannot."""
    if resumed := generations[0].request.resume:
        for so_far in resumed.answers:
            generations[so_far.index].resume(so_far)
            answers[so_far.index].resume(so_far, resumed.cached_tokens)


def usage_of(generations: Sequence[Generation], answers: Sequence[Answer]) -> Usage:
    """The tokens of all answers; those of a prompt count once, however many answers it has."""
    prompt = sum(generation.prompt_tokens for generation in generations if not generation.beside)
    tokens = sum(answer.tokens for answer in answers)
    reasoning = sum(answer.reasoning_tokens for answer in answers)
    usage = Usage(
        prompt_tokens=prompt,
        completion_tokens=tokens,
        total_tokens=prompt + tokens,
        prompt_tokens_details=answers[0].prompt_details,
    )
    if reasoning:
        usage.completion_tokens_details = CompletionTokensDetails(reasoning_tokens=reasoning)
    return usage


def routing_of(generations: Sequence[Generation], block_size: int) -> Routing | None:
    """Who has answered in the end; None if nobody had to. block_size: tokens in a KV block."""
    if not (decision := generations[0].decision):
        return None
    migrations = sum(len(generation.failed) for generation in generations)
    return Routing(
        worker_id=decision.worker_id,
        overlap_blocks=decision.overlap_blocks,
        overlap_tokens=decision.overlap_blocks * block_size,
        migrations=migrations,
    )


async def best(
    stream: AsyncGenerator[ChatCompletionChunk], answers: Sequence[Answer], of: int, most: int
) -> AsyncGenerator[ChatCompletionChunk]:
    """Yield the chunks of the `most` likeliest answers of each `of` for one prompt, once all are there."""
    async with aclosing(stream):
        chunks = [chunk async for chunk in stream]
    places: dict[int, int] = {}
    for begin in range(0, len(answers), of):
        likeliest = sorted(answers[begin : begin + of], key=lambda answer: -answer.logprob / max(1, answer.tokens))
        places |= {answer.index: len(places) + place for place, answer in enumerate(likeliest[:most])}
    for chunk in chunks:
        choices, chunk.choices = chunk.choices, []
        for choice in choices:
            choice.token_ids = UNSET  # it came too late to be resumed
            if choice.index in places:
                choice.index = places[choice.index]
                chunk.choices.append(choice)
        if chunk.choices or not choices:
            yield chunk
