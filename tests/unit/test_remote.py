"""Where a request goes when instances have died that etcd still lists."""

import asyncio
import weakref
from collections.abc import AsyncIterator
from typing import Any

from common.errors import Cancelled, InvalidRequest, PipelineError, Unavailable
from common.remote import ATTEMPTS, Remote

import pytest
from dynamo.runtime import Context


class Instances:
    """Dynamo's client, with instances that fail to take a request, or answer it."""

    def __init__(self, *errors: str | None) -> None:
        self._errors = errors
        self.sent = 0

    def instance_ids(self) -> list[int]:
        return list(range(len(self._errors)))

    async def round_robin(self, body: object, annotated: bool, context: Context) -> AsyncIterator[object]:
        return await self.direct(body, self.sent % len(self._errors), annotated, context)

    async def direct(self, body: object, instance_id: int, annotated: bool, context: Context) -> AsyncIterator[object]:
        self.sent += 1
        if self._errors[instance_id] == SILENT:
            await asyncio.Event().wait()
        if error := self._errors[instance_id]:
            raise Exception(error)
        return self._answer(context)

    async def _answer(self, context: Context) -> AsyncIterator[object]:
        yield "first"
        if not context.is_stopped():
            yield "second"


SILENT = "it has the request and will never answer"
DEAD = "Unavailable: NATS request to inference_processor.process-1 failed"


def ask(instances: Any, instance_id: int | None = None, stop: bool = False) -> list[str]:
    async def collect() -> list[str]:
        context, answer = Context("x"), []
        async for item in Remote("a.b.c", instances, str).stream({}, context, instance_id):
            answer.append(item)
            if stop:
                context.stop_generating()
        return answer

    return asyncio.run(collect())


def test_a_request_that_reached_nobody_goes_to_the_next() -> None:
    assert ask(Instances(DEAD, DEAD, None)) == ["first", "second"]


@pytest.mark.parametrize(
    ("instances", "error", "sent"),
    [
        (Instances(DEAD, DEAD), Unavailable, 2),
        (Instances("InvalidRequest: too large", None), InvalidRequest, 1),
    ],
)
def test_it_is_not_sent_for_ever(instances: Instances, error: type[PipelineError], sent: int) -> None:
    with pytest.raises(error):
        ask(instances)
    assert instances.sent == sent


def test_what_is_for_one_instance_goes_to_no_other() -> None:
    with pytest.raises(Unavailable):
        ask(Instances(DEAD, None), instance_id=0)


def test_an_answer_that_was_stopped_is_not_taken_for_a_complete_one() -> None:
    with pytest.raises(Cancelled):
        ask(Instances(None), stop=True)


def test_a_stream_is_let_go_even_if_the_error_that_ended_it_is_kept() -> None:
    """The runtime may pass on a stop only then."""

    class Stream:
        def __aiter__(self) -> "Stream":
            return self

        def __anext__(self) -> asyncio.Future[object]:
            future = asyncio.get_running_loop().create_future()
            future.cancel()
            return future

    class Instance(Instances):
        async def direct(self, *_: object) -> Any:
            self.streamed = weakref.ref(stream := Stream())
            return stream

    with pytest.raises(asyncio.CancelledError) as kept:
        ask(instance := Instance(None))
    assert kept.tb and instance.streamed() is None


def first(instances: Any, patience: float) -> str:
    async def opened() -> str:
        async with Remote("a.b.c", instances, str).open({}, patience=patience) as item:
            return item

    return asyncio.run(opened())


def test_one_that_never_answers_is_left_for_another() -> None:
    assert first(Instances(SILENT, None), patience=0.1) == "first"


def test_patience_ends() -> None:
    with pytest.raises(Unavailable, match="does not answer"):
        first(instances := Instances(SILENT), patience=0.2)
    assert 1 < instances.sent <= ATTEMPTS + 1
