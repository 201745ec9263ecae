"""Where a request goes when instances have died that etcd still lists."""

import asyncio
import weakref
from collections.abc import AsyncIterator, Sequence
from typing import Any

from common.errors import Cancelled, Internal, InvalidRequest, NotFound, Overloaded, PipelineError, Unavailable
from common.messages import EndpointSpec, Failure, Message
from common.remote import ATTEMPTS, Remote

import pytest
from dynamo.runtime import Context


class Question(Message):
    text: str = "?"


class Reply(Message):
    text: str


SPEC = EndpointSpec("thing", "work", Question, Reply)


class Instances:
    """Dynamo's client, with instances that fail to take a request, or answer it."""

    def __init__(self, *errors: str | PipelineError | None) -> None:
        self._errors = errors
        self.sent = 0
        self.asked: list[int] = []
        self.contexts: list[Context] = []

    def instance_ids(self) -> list[int]:
        return list(range(len(self._errors)))

    async def round_robin(self, body: object, annotated: bool, context: Context) -> AsyncIterator[object]:
        return await self.direct(body, self.sent % len(self._errors), annotated, context)

    async def direct(self, body: object, instance_id: int, annotated: bool, context: Context) -> AsyncIterator[object]:
        self.sent += 1
        self.asked.append(instance_id)
        self.contexts.append(context)
        error = self._errors[instance_id]
        if error == SILENT:
            await asyncio.Event().wait()
        if isinstance(error, str):
            raise Exception(error)
        return self._answer(error, context)

    async def _answer(self, error: PipelineError | None, context: Context) -> AsyncIterator[object]:
        if error:
            yield Failure.of(error).encode()
            return
        yield {"text": "first"}
        if not context.is_stopped():
            yield {"text": "second"}


SILENT = "it has the request and will never answer"
DEAD = "Unavailable: NATS request to inference_processor.process-1 failed"


def ask(instances: Any, instance_ids: Sequence[int] | None = None, stop: bool = False) -> list[str]:
    async def collect() -> list[str]:
        context, answer = Context("x"), []
        async for reply in Remote(SPEC, instances).stream(Question(), context, instance_ids):
            answer.append(reply.text)
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
        ask(Instances(DEAD, None), instance_ids=[0])


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


def first(instances: Any, retry_seconds: float = 0.0, parent: Context | None = None) -> str:
    async def opened() -> str:
        async with Remote(SPEC, instances).open(Question(), parent, retry_seconds=retry_seconds) as reply:
            return reply.text

    return asyncio.run(opened())


def test_one_that_never_answers_is_left_for_another() -> None:
    assert first(Instances(SILENT, None), retry_seconds=0.1) == "first"


def test_the_retry_time_ends() -> None:
    with pytest.raises(Unavailable, match="does not answer"):
        first(instances := Instances(SILENT), retry_seconds=0.2)
    assert 1 < instances.sent <= ATTEMPTS + 1


@pytest.mark.parametrize("error", [Unavailable("no engine fits", code="no_worker"), Overloaded("full"), NotFound("x")])
def test_somebody_who_answered_with_an_error_is_not_asked_again(error: PipelineError) -> None:
    with pytest.raises(type(error), match=error.message):
        first(instances := Instances(error), retry_seconds=5.0)
    assert instances.sent == 1


def test_some_instances_share_the_requests_and_the_others_get_nothing() -> None:
    instances: Any = Instances(None, None, None)

    async def stream_often() -> None:
        remote = Remote(SPEC, instances)
        for _ in range(100):
            answer = [reply.text async for reply in remote.stream(Question(), Context("x"), [0, 2])]
            assert answer == ["first", "second"]

    asyncio.run(stream_often())
    assert set(instances.asked) == {0, 2}
    assert min(instances.asked.count(0), instances.asked.count(2)) > 20


def test_of_some_instances_the_dead_are_left_out() -> None:
    assert ask(Instances(DEAD, None, DEAD), instance_ids=[0, 1, 2]) == ["first", "second"]
    with pytest.raises(Unavailable):
        ask(instances := Instances(DEAD, None, DEAD), instance_ids=[0, 2])
    assert sorted(instances.asked) == [0, 2]


def test_nobody_to_ask_has_a_code_that_names_the_stage() -> None:
    with pytest.raises(Unavailable, match=r"nobody serves inference\.thing\.work: no thing is running") as refusal:
        ask(Instances())
    assert refusal.value.code == "no_thing"


@pytest.mark.parametrize("item", [{"txt": "x"}, {"text": 5}, "text", None, {"error": "what?"}, {"error": None}])
def test_what_is_no_message_is_the_other_side_s_fault(item: object) -> None:
    class Odd(Instances):
        async def _answer(self, error: PipelineError | None, context: Context) -> AsyncIterator[object]:
            yield item

    with pytest.raises(Internal, match=r"inference\.thing\.work answered with an invalid "):
        ask(Odd(None))


def test_whom_a_call_is_for_goes_along_and_its_id_does_not() -> None:
    """The runtime tells requests apart by the id of their context."""
    parent = Context("parent", {"x-request-id": "mine", "x-session-id": "s"})
    first(instances := Instances(None), parent=parent)
    (context,) = instances.contexts
    assert dict(context.metadata) == dict(parent.metadata)
    assert context.id() != parent.id()


def test_an_opened_stream_is_stopped_when_its_block_ends() -> None:
    first(instances := Instances(None))
    assert instances.contexts[0].is_stopped()


def test_an_answer_of_nothing_is_a_fault() -> None:
    class Empty(Instances):
        async def _answer(self, error: PipelineError | None, context: Context) -> AsyncIterator[object]:
            return
            yield

    with pytest.raises(Internal, match="answered nothing"):
        first(Empty(None))
