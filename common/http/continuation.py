"""Answers that outlive the processor that makes them."""

from typing import Generic, TypeVar

from common.openai_api import ChatCompletionChunk
from common.openai_request import AnswerSoFar, GenerationRequest, Resume

from msgspec import UNSET

Asked = TypeVar("Asked", bound=GenerationRequest)


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
