"""Which processor serves which model."""

import asyncio
import logging
import math
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from common.errors import Abandoned, NotFound, PipelineError, Unavailable
from common.http.continuation import Asked, Progress
from common.log import request_id
from common.messages import DescribeRequest
from common.openai_api import COMPLETE, PROCESS, ChatCompletionChunk, ModelCard
from common.openai_request import ChatCompletionRequest
from common.remote import Remote, linked

from dynamo.runtime import Context

log = logging.getLogger(__name__)

DESCRIBE_SECONDS = 2.0  # for a processor that is new to say what it serves, before a request is told that nobody does
RETRY_SECONDS = 1.0  # until a processor that could not say is asked again
LOOK_SECONDS = 0.1  # between looks for a processor where there is none
SILENT_SECONDS = 5.0  # of a processor, which says every second at least that it lives


@dataclass(slots=True)
class _Known:
    """A processor, and what it has said."""

    since: float  # on the loop's clock
    asking: asyncio.Task[None] | None = None
    card: ModelCard | None = None


class Processors:
    """The processors that are running, found by the model that a request names.

    Each says once which model it serves: it is asked when it is first seen, and again until it answers.
    """

    def __init__(
        self,
        process: Remote[ChatCompletionRequest, ChatCompletionChunk],
        describe: Remote[DescribeRequest, ModelCard],
        *,
        moves: int = 3,
        seconds: float = 10.0,
    ) -> None:
        """moves: times that an answer may go on at another processor; seconds: to wait for one where there is none."""
        self.process = process
        self._describe = describe
        self._moves = moves
        self.seconds = seconds
        self._known: dict[int, _Known] = {}
        self._gone: dict[str, float] = {}  # by model, when one that served it has left

    async def models(self) -> list[ModelCard]:
        """A card for each model."""
        await self._meet()
        return list({card.id: card for card in self._cards().values()}.values())

    async def find(self, model: str) -> dict[int, ModelCard]:
        """The instances that serve a model, with their cards. Raises NotFound, with the models that there are, or
        Unavailable."""
        self._look()
        if found := self._serving(model):
            return found
        await self._meet()
        if found := self._serving(model):
            return found
        names = sorted({card.id for card in self._cards().values()})
        if not names:
            raise Unavailable("no processor is running; try again in a moment", code="no_processor")
        if self._gone.get(model, -math.inf) > asyncio.get_running_loop().time() - self.seconds:
            raise Unavailable(f"no processor of {model} is running; try again in a moment", code="no_processor")
        raise NotFound(
            f"the model {model!r} does not exist; this pipeline serves {', '.join(map(repr, names))}",
            code="model_not_found",
            param="model",
        )

    async def alive(self, seconds: float) -> set[str]:
        """The models of the processors that answer now, within `seconds`."""
        return {card.id for card in await self._describe.ask_all(DescribeRequest(), seconds)}

    def serves(self, model: str) -> bool:
        """Whether one has said that it serves a model of this name."""
        return bool(self._serving(model))

    async def stream(
        self,
        request: Asked,
        context: Context,
        remote: Remote[Asked, ChatCompletionChunk] | None = None,
    ) -> AsyncGenerator[ChatCompletionChunk]:
        """Yield what the processors of a model answer at `remote`, which may be a stage before them; by default it is
        where they take conversations. If one is lost on the way, another one goes on from there.

        Raises PipelineError, as `find` and `Remote.stream` do.
        """
        asked: Remote[Any, ChatCompletionChunk] = remote or self.process
        progress, moved = Progress(request), 0
        loop = asyncio.get_running_loop()
        since = loop.time()
        while True:
            try:
                found = list(await self.find(request.model))
                those = found if asked.spec in (PROCESS, COMPLETE) else None
                async with (
                    linked(context, moved) as own,
                    aclosing(asked.stream(progress.request, own, those, hopeless=_silent)) as chunks,
                ):
                    async for chunk in chunks:
                        progress.note(chunk)
                        yield chunk
                return
            except Abandoned as error:
                if context.is_stopped() or not progress.resumable or moved >= self._moves:
                    raise
                moved += 1
                since = loop.time()
                log.warning("request_id=%s moves to another processor: %s", request_id(context), error)
            except Unavailable as error:
                if error.code != "no_processor" or loop.time() > since + self.seconds or context.is_stopped():
                    raise
                await asyncio.sleep(LOOK_SECONDS)

    def _serving(self, model: str) -> dict[int, ModelCard]:
        return {instance_id: card for instance_id, card in self._cards().items() if card.id == model}

    def _cards(self) -> dict[int, ModelCard]:
        """What the processors have said, by instance."""
        return {instance_id: known.card for instance_id, known in self._known.items() if known.card}

    def _look(self) -> None:
        """Ask the processors that are new, and forget those that have left."""
        there = set(self._describe.instance_ids())
        for instance_id in self._known.keys() - there:
            left = self._known.pop(instance_id)
            if left.asking:
                left.asking.cancel()
            if left.card:
                self._gone[left.card.id] = asyncio.get_running_loop().time()
        for instance_id in there - self._known.keys():
            known = self._known[instance_id] = _Known(asyncio.get_running_loop().time())
            known.asking = asyncio.create_task(self._ask(instance_id, known))

    async def _meet(self) -> None:
        """Give the processors that are new the time to say what they serve; one that hangs had its time before."""
        self._look()
        latest = asyncio.get_running_loop().time() - DESCRIBE_SECONDS
        new = [known for known in self._known.values() if known.card is None and known.since > latest]
        tasks = [known.asking for known in new if known.asking]
        if tasks:
            await asyncio.wait(tasks, timeout=min(known.since for known in new) - latest)

    async def _ask(self, instance_id: int, known: _Known) -> None:
        while known.card is None:
            try:
                async with asyncio.timeout(DESCRIBE_SECONDS):
                    known.card = await self._describe.call(DescribeRequest(), instance_id)
            except (PipelineError, TimeoutError):
                await asyncio.sleep(RETRY_SECONDS)


def _silent(silence: float, begun: bool) -> str | None:
    return f"it has said nothing for {silence:.0f} s" if silence > SILENT_SECONDS else None
