"""A request for one token, which tells whether others would be answered."""

import asyncio
import uuid
from contextlib import aclosing
from typing import Any

from common.errors import PipelineError
from common.http.processors import Processors
from common.openai_request import ChatCompletionRequest, CompletionRequest, GenerationRequest
from common.patience import Question
from common.remote import Remote

from dynamo.runtime import Context

ANSWER_SECONDS = 5.0  # for a model to answer
FRESH_SECONDS = 1.0  # that an answer counts for all who want to know, however many they are


class Canary:
    """Asks each model as a client would, through all stages. At most one such question is on its way."""

    def __init__(self, processors: Processors, complete: Remote[Any, Any], stage: Remote[Any, Any] | None) -> None:
        """stage: one of your own before the processors; it takes conversations. Without one, it is `complete` that is
        asked, for which a model needs no chat template."""
        self._processors = processors
        self._remote = stage or complete
        self._stage = stage is not None
        self._faults = Question(self._ask_all)

    async def faults(self) -> list[str]:
        """What is wrong, model by model; nothing if every one that is served has answered."""
        return await asyncio.shield(self._faults.within(FRESH_SECONDS))

    async def _ask_all(self) -> list[str]:
        names = [card.id for card in await self._processors.models()]
        found = await asyncio.gather(*map(self._ask, names))
        return [fault for fault in found if fault] if names else ["no processor is running"]

    async def _ask(self, model: str) -> str | None:
        context, finished = Context(uuid.uuid4().hex, {"x-request-id": "canary"}), False
        answer = self._processors.stream(self._question(model), context, self._remote)
        try:
            async with asyncio.timeout(ANSWER_SECONDS), aclosing(answer) as chunks:
                async for chunk in chunks:
                    finished = finished or any(choice.finish_reason for choice in chunk.choices)
        except TimeoutError:
            return f"{model} has made no token in {ANSWER_SECONDS:g} s"
        except PipelineError as error:
            return f"{model}: {error}"
        finally:
            context.stop_generating()
        return None if finished else f"{model} answered nothing"

    def _question(self, model: str) -> GenerationRequest:
        fields = {"model": model, "max_tokens": 1}
        if self._stage:
            return ChatCompletionRequest.decode({**fields, "messages": [{"role": "user", "content": "Hello!"}]})
        return CompletionRequest.decode({**fields, "prompt": "Hello!"})
