"""What a frontend tells of its requests to those who watch."""

import time

from common import tracing
from common.errors import Cancelled
from common.events import Answering, Ended, Feed, Started, Teller
from common.http.exchange import Exchange
from common.openai_request import ChatCompletionRequest, CompletionRequest, GenerationRequest

PROMPT_CHARACTERS = 80  # of a prompt that are shown


class RequestEvents:
    """Tells of requests as an Observer sees them."""

    def __init__(self, feed: Feed, *, show_prompts: bool = False) -> None:
        """show_prompts: tell the first words of each prompt."""
        self._feed = feed
        self._show_prompts = show_prompts
        self._tellers: dict[str, Teller] = {}  # by context id, of those that are told of

    def on_start(self, exchange: Exchange) -> None:
        request = exchange.completion_request
        if request and (tell := self._feed.teller(exchange.request_id)):
            self._tellers[exchange.context.id()] = tell
            prompt = _first_words(request) if self._show_prompts else None
            tell(Started(frontend=self._feed.instance_id, model=request.model, prompt=prompt))

    def on_first(self, exchange: Exchange) -> None:
        if self._tellers and (tell := self._tellers.get(exchange.context.id())):
            tell(Answering(worker_id=exchange.routing.worker_id if exchange.routing else None))

    def on_end(self, exchange: Exchange) -> None:
        if not self._tellers or not (tell := self._tellers.pop(exchange.context.id(), None)):
            return
        routing, usage, began, first = exchange.routing, exchange.usage, exchange.began, exchange.first
        details = usage.prompt_tokens_details if usage else None
        tell(
            Ended(
                status=exchange.status,
                error=str(exchange.error) if exchange.error and exchange.status != Cancelled.http_status else None,
                worker_id=routing.worker_id if routing else None,
                overlap_blocks=routing.overlap_blocks if routing else None,
                migrations=routing.migrations if routing else 0,
                prompt_tokens=usage.prompt_tokens if usage else None,
                cached_tokens=details.cached_tokens if details else None,
                completion_tokens=usage.completion_tokens if usage else None,
                finish_reason=exchange.finish_reason,
                ttft_seconds=None if first is None else first - began,
                seconds=time.perf_counter() - began,
                trace_id=tracing.trace_id(exchange.context),
            )
        )


def _first_words(request: GenerationRequest) -> str | None:
    """Those of what the user said last, or of the text that is to go on."""
    text = ""
    if isinstance(request, ChatCompletionRequest) and request.messages:
        text = request.messages[-1].text
    elif isinstance(request, CompletionRequest):
        text = next((prompt for prompt in request.prompts if isinstance(prompt, str)), "")
    return " ".join(text[: 2 * PROMPT_CHARACTERS].split())[:PROMPT_CHARACTERS]
