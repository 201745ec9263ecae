"""Answers that outlive the processor that makes them."""

import asyncio
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from typing import Generic, TypeVar

from common.errors import Abandoned, Unavailable
from common.log import request_id
from common.openai_api import ChatCompletionChunk
from common.openai_request import AnswerSoFar, GenerationRequest, Resume
from common.remote import linked

from dynamo.runtime import Context
from msgspec import UNSET

log = logging.getLogger(__name__)

RETRY_SECONDS = 0.1

Asked = TypeVar("Asked", bound=GenerationRequest)
Attempt = Callable[[Asked, Context], Awaitable[AsyncGenerator[ChatCompletionChunk]]]


class Progress(Generic[Asked]):
    """How far the answers to a request are: what another processor must know to go on with them."""

    def __init__(self, request: Asked) -> None:
        self._request = request
        self._first: ChatCompletionChunk | None = None
        before = request.resume or Resume(answers=[])  # of a stage that has this from a frontend that resumes
        self._answers = {answer.index: answer.model_copy(deep=True) for answer in before.answers}
        self._cached_tokens = before.cached_tokens
        self.resumable = True

    @property
    def request(self) -> Asked:
        """The request for the rest."""
        if not self._first:
            return self._request
        resume = Resume(answers=list(self._answers.values()), cached_tokens=self._cached_tokens)
        return self._request.model_copy(update={"resume": resume})

    def note(self, chunk: ChatCompletionChunk) -> None:
        """Remember a chunk that the client gets, and take from it what only we need."""
        if self._first is None:
            self._first = chunk
            if chunk.routing and chunk.routing.cached_tokens is not None:
                self._cached_tokens = chunk.routing.cached_tokens
        chunk.id, chunk.created = self._first.id, self._first.created
        for choice in chunk.choices:
            if choice.token_ids is UNSET:  # of the likeliest of several, of which all came at once
                self.resumable = False
                continue
            answer = self._answers.setdefault(choice.index, AnswerSoFar(index=choice.index, token_ids=[]))
            answer.token_ids += choice.token_ids
            answer.finish_reason = choice.finish_reason
            choice.token_ids = UNSET


async def continued(
    request: Asked, context: Context, attempt: Attempt[Asked], *, moves: int, seconds: Callable[[], float]
) -> AsyncGenerator[ChatCompletionChunk]:
    """Yield what `attempt` answers. If the processor that it goes to is lost on the way, yield what another attempt
    answers from there on, up to `moves` times. While there is no processor, wait for one for `seconds`,
    of which there may be fewer later.

    Raises PipelineError, as `attempt` does.
    """
    progress, moved = Progress(request), 0
    loop = asyncio.get_running_loop()
    since = loop.time()
    while True:
        try:
            async with linked(context, moved) as own, aclosing(await attempt(progress.request, own)) as chunks:
                async for chunk in chunks:
                    progress.note(chunk)
                    yield chunk
            return
        except Abandoned as error:
            if context.is_stopped() or not progress.resumable or moved >= moves:
                raise
            moved += 1
            since = loop.time()
            log.warning("request_id=%s moves to another processor: %s", request_id(context), error)
        except Unavailable as error:
            if error.code != "no_processor" or loop.time() > since + seconds() or context.is_stopped():
                raise
            await asyncio.sleep(RETRY_SECONDS)
