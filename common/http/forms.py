"""What clients get of the chunks that a processor makes: events as they come, or one body."""

from collections.abc import Iterator, Sequence
from itertools import accumulate

from common.openai_api import (
    AssistantMessage,
    ChatCompletion,
    ChatCompletionChunk,
    Choice,
    ChunkChoice,
    Delta,
    FunctionDelta,
    Logprobs,
    TextChoice,
    TextCompletion,
    TextLogprobs,
    ToolCallDelta,
)

from msgspec import UNSET
from msgspec.structs import replace


class ChatForm:
    """As POST /v1/chat/completions answers."""

    def events(self, chunk: ChatCompletionChunk) -> Iterator[ChatCompletionChunk]:
        """As OpenAI sends them: the role comes before anything else, and `finish_reason` after it, for which clients
        wait who then read nothing more."""
        if not chunk.choices:
            yield chunk
        for choice in chunk.choices:
            delta = choice.delta
            if delta.role:
                begin = ChunkChoice(index=choice.index, delta=Delta(role=delta.role, content=""))
                yield replace(chunk, choices=[begin])
                choice.delta = delta = replace(delta, role=None)
            if delta.content or choice.logprobs or delta.reasoning_content or delta.tool_calls or delta.function_call:
                yield replace(chunk, choices=[replace(choice, finish_reason=None)])
            if choice.finish_reason:
                end = ChunkChoice(index=choice.index, delta=Delta(), finish_reason=choice.finish_reason)
                yield replace(chunk, choices=[end])

    def whole(self, chunks: Sequence[ChatCompletionChunk]) -> ChatCompletion:
        """The message of each answer, put together."""
        first = chunks[0]
        return ChatCompletion(
            id=first.id,
            created=first.created,
            model=first.model,
            system_fingerprint=first.system_fingerprint,
            choices=[_choice(parts) for parts in _by_index(chunks)],
            usage=chunks[-1].usage or None,
        )


class TextForm:
    """As POST /v1/completions answers."""

    def __init__(self) -> None:
        self._lengths: dict[int, int] = {}  # characters of each answer so far

    def events(self, chunk: ChatCompletionChunk) -> Iterator[TextCompletion]:
        """One for each chunk."""
        yield self._completion(chunk, [self._text_choice(choice) for choice in chunk.choices])

    def whole(self, chunks: Sequence[ChatCompletionChunk]) -> TextCompletion:
        """The text of each answer, put together."""
        choices = [self._text_choice(_joined(parts)) for parts in _by_index(chunks)]
        return replace(self._completion(chunks[0], choices), usage=chunks[-1].usage or None)

    def _completion(self, chunk: ChatCompletionChunk, choices: list[TextChoice]) -> TextCompletion:
        return TextCompletion(
            id=chunk.id,
            created=chunk.created,
            model=chunk.model,
            system_fingerprint=chunk.system_fingerprint,
            choices=choices,
            usage=chunk.usage,
        )

    def _text_choice(self, choice: ChunkChoice) -> TextChoice:
        text, begin = choice.delta.content or "", self._lengths.get(choice.index, 0)
        self._lengths[choice.index] = begin + len(text)
        logprobs = _text_logprobs(choice.logprobs, begin) if choice.logprobs else None
        return TextChoice(index=choice.index, text=text, logprobs=logprobs, finish_reason=choice.finish_reason)


Form = ChatForm | TextForm  # how the answers to one request are written


def _by_index(chunks: Sequence[ChatCompletionChunk]) -> list[list[ChunkChoice]]:
    """The parts of each answer."""
    answers: dict[int, list[ChunkChoice]] = {}
    for chunk in chunks:
        for choice in chunk.choices:
            answers.setdefault(choice.index, []).append(choice)
    return [answers[index] for index in sorted(answers)]


def _joined(parts: Sequence[ChunkChoice]) -> ChunkChoice:
    """The parts of an answer as if they had come at once."""
    deltas = [part.delta for part in parts]
    functions = [delta.function_call for delta in deltas if delta.function_call]
    entries = [entry for part in parts if part.logprobs for entry in part.logprobs.content]
    return ChunkChoice(
        index=parts[0].index,
        delta=Delta(
            content="".join(delta.content or "" for delta in deltas),
            reasoning_content="".join(delta.reasoning_content or "" for delta in deltas) or None,
            tool_calls=_tool_calls([call for delta in deltas for call in delta.tool_calls or ()]) or None,
            function_call=_function(functions) if functions else None,
        ),
        logprobs=Logprobs(content=entries) if entries else None,
        finish_reason=parts[-1].finish_reason,
    )


def _tool_calls(deltas: Sequence[ToolCallDelta]) -> list[ToolCallDelta]:
    calls: dict[int | None, list[ToolCallDelta]] = {}
    for delta in deltas:
        calls.setdefault(delta.index, []).append(delta)
    return [
        ToolCallDelta(id=parts[0].id, type="function", function=_function([part.function for part in parts]))
        for parts in calls.values()
    ]


def _function(parts: Sequence[FunctionDelta]) -> FunctionDelta:
    return FunctionDelta(name=parts[0].name, arguments="".join(part.arguments or "" for part in parts))


def _choice(parts: Sequence[ChunkChoice]) -> Choice:
    joined = _joined(parts)
    delta = joined.delta
    called = delta.tool_calls or delta.function_call
    message = AssistantMessage(
        content=delta.content or (None if called else ""),
        reasoning_content=delta.reasoning_content or UNSET,
        tool_calls=delta.tool_calls or UNSET,
        function_call=delta.function_call or UNSET,
    )
    return Choice(index=joined.index, message=message, logprobs=joined.logprobs, finish_reason=joined.finish_reason)


def _text_logprobs(logprobs: Logprobs, offset: int) -> TextLogprobs:
    *offsets, _ = accumulate((len(entry.token) for entry in logprobs.content), initial=offset)
    return TextLogprobs(
        tokens=[entry.token for entry in logprobs.content],
        token_logprobs=[entry.logprob for entry in logprobs.content],
        top_logprobs=[{top.token: top.logprob for top in entry.top_logprobs} for entry in logprobs.content],
        text_offset=offsets,
    )
