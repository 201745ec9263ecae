"""One answer on its way from tokens to chunks."""

from collections.abc import Sequence

from common.messages import EngineOutput, PromptTokensDetails, RoutingDecision, Usage
from common.openai_api import (
    ChatCompletionChunk,
    ChunkChoice,
    Delta,
    Logprobs,
    Routing,
    TokenLogprob,
    ToolCallDelta,
)
from common.openai_request import AnswerSoFar, GenerationRequest
from common.text.chat_model import ChatModel
from common.text.detokenizer import Detokenizer
from common.text.reasoning import Reasoning
from common.text.stop_strings import StopStrings
from common.text.tool_calls import NamedCall, ToolCalls, together

from msgspec.structs import replace


class Answer:
    """Turns what an engine says into chunks: its tokens into text, up to a stop string, and where that was asked for,
    text into thoughts and tool calls."""

    def __init__(
        self,
        model: ChatModel,
        request: GenerationRequest,
        completion: ChatCompletionChunk,
        *,
        index: int = 0,
        reasoning: Reasoning | None = None,
        tool_calls: ToolCalls | NamedCall | None = None,
        old_calls: bool = False,
        begin: str = "",
    ) -> None:
        """completion: what all chunks have in common; index: among the answers to the request; old_calls: write tool
        calls in their old form, `function_call`; begin: text that comes before what the engine says."""
        self._model = model
        # Which are no part of the text.
        self._ends = {*(request.stop_token_ids or ()), *(() if request.ignore_eos else model.eos_token_ids)}
        # Calls and thoughts can be marked by special tokens, which are no part of the text around them either.
        marked = bool(reasoning or tool_calls)
        keep_special = request.skip_special_tokens is False
        self._detokenizer = Detokenizer(model.tokenizer, skip_special_tokens=not (marked or keep_special))
        self._hidden = model.special_tokens if marked and not keep_special else None
        self._stops = StopStrings(request.stop_strings)
        self._reasoning = reasoning
        self._tool_calls = tool_calls
        self._wanted_logprobs = request.wanted_logprobs
        self._old_calls = old_calls
        # Then each has its own text: only so is it known which one completed a stop string, and which are thoughts.
        self._one_by_one = bool(request.stop_strings or reasoning or tool_calls)
        self._completion = completion
        self._begun = False
        self.index = index
        self.tokens = 0
        self.logprob = 0.0  # of all tokens together
        self.prompt_details: PromptTokensDetails | None = None  # some workers say nothing of it
        self.finish_reason: str | None = None
        # What the next chunk adds.
        self._token_ids: list[int] = []
        self._text, self._thoughts = begin, ""
        self._calls: list[ToolCallDelta] = []
        self._logprobs: list[TokenLogprob] = []

    @property
    def reasoning_tokens(self) -> int:
        return self._reasoning.tokens if self._reasoning and self._reasoning.found else 0

    def add(self, output: EngineOutput, decision: RoutingDecision | None) -> ChatCompletionChunk | None:
        """The chunk for an engine's output; None if no character is complete yet. Sets `finish_reason` at the end.

        decision: who answers, which the first chunk says.
        """
        if not self._begun and output.completion_usage:
            self.prompt_details = Usage.received(output.completion_usage).prompt_tokens_details
        self._token_ids += output.token_ids
        before = self.tokens
        for token_ids in [[token] for token in output.token_ids] if self._one_by_one else [output.token_ids]:
            if self._stops.found:  # the engine was faster than we
                break
            self._add_tokens(token_ids)
        if output.log_probs is not None:
            self._note_logprobs(output, self.tokens - before)
        if self._stops.found:
            self._end("stop", "")
        elif output.finish_reason:
            self._end(str(output.finish_reason), self._stops.add(self._detokenizer.flush()) + self._stops.flush())
        return self._chunk(decision)

    def _add_tokens(self, token_ids: Sequence[int]) -> None:
        self.tokens += len(token_ids)
        self._write(self._stops.add(self._detokenizer.add([token for token in token_ids if token not in self._ends])))
        if self._reasoning and not self._reasoning.over:
            self._reasoning.tokens += len(token_ids)

    def _write(self, text: str, *, last: bool = False) -> None:
        if self._reasoning:
            thoughts, text = self._reasoning.add(text, last=last)
            self._thoughts += thoughts
        if self._tool_calls:
            text, calls = self._tool_calls.add(text, last=last)
            self._calls += calls
        self._text += self._hidden.sub("", text) if self._hidden else text

    def _end(self, reason: str, text: str) -> None:
        self._write(text, last=True)
        if reason == "stop" and self._tool_calls and self._tool_calls.found:
            reason = "function_call" if self._old_calls else "tool_calls"
        self.finish_reason = reason

    def _note_logprobs(self, output: EngineOutput, counted: int) -> None:
        self.logprob += sum((output.log_probs or [])[:counted])
        if self._wanted_logprobs is not None:
            entries = zip(output.token_ids, self._model.texts.logprobs(output, self._wanted_logprobs), strict=False)
            self._logprobs += [entry for token_id, entry in [*entries][:counted] if token_id not in self._ends]

    def _chunk(self, decision: RoutingDecision | None) -> ChatCompletionChunk | None:
        """The chunk with what has gathered."""
        text, thoughts, calls = self._text, self._thoughts, together(self._calls)
        if self._begun and not (text or thoughts or calls or self.finish_reason):
            return None
        delta = Delta(content=text or (None if thoughts or calls else ""), reasoning_content=thoughts or None)
        if self._old_calls:  # there can be one only
            delta.function_call = next((call.function for call in calls if call.index == 0), None)
        else:
            delta.tool_calls = calls or None
        if not self._begun:
            delta.role = "assistant"
        choice = ChunkChoice(index=self.index, delta=delta, finish_reason=self.finish_reason, token_ids=self._token_ids)
        if self._logprobs or (self._wanted_logprobs is not None and not self._begun):
            choice.logprobs = Logprobs(content=self._logprobs)
        chunk = replace(self._completion, choices=[choice])
        if not self._begun and decision:
            details = self.prompt_details
            chunk.routing = Routing(
                worker_id=decision.worker_id,
                overlap_blocks=decision.overlap_blocks,
                cached_tokens=details.cached_tokens if details else None,
                by_load=decision.by_load,
            )
        self._begun = True
        self._text, self._thoughts, self._calls, self._logprobs, self._token_ids = "", "", [], [], []
        return chunk

    def resume(self, so_far: AnswerSoFar, cached_tokens: int | None) -> None:
        """Be as another one was that had sent this much: what it held back comes again."""
        self.add(EngineOutput(token_ids=so_far.token_ids), None)
        self._begun = True
        self.finish_reason = so_far.finish_reason
        if cached_tokens is not None:
            self.prompt_details = PromptTokensDetails(cached_tokens=cached_tokens)
