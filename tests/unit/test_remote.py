"""Where a request goes when instances have died that etcd still lists."""

import asyncio
import weakref
from collections.abc import AsyncIterator, Sequence
from typing import Any, cast

from common import remote
from common.errors import (
    Abandoned,
    Cancelled,
    Internal,
    InvalidRequest,
    Lost,
    NotFound,
    Overloaded,
    PipelineError,
    Unavailable,
    Unreachable,
)
from common.messages import EndpointSpec, Failure, Message
from common.remote import TRIES, Remote, linked

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
        (Instances("InvalidRequest: too large", "InvalidRequest: too large"), InvalidRequest, 1),
    ],
)
def test_it_is_not_sent_for_ever(instances: Instances, error: type[PipelineError], sent: int) -> None:
    with pytest.raises(error):
        ask(instances)
    assert instances.sent == sent


def test_what_is_for_one_instance_goes_to_no_other() -> None:
    with pytest.raises(Unavailable):
        ask(Instances(DEAD, None), instance_ids=[0])


def test_what_the_other_side_gives_up_as_it_leaves_another_one_can_go_on_with() -> None:
    with pytest.raises(Abandoned, match="abandoned the request") as error:
        ask(Instances(Cancelled("its time is over")))
    assert error.value.code == "no_thing" and not isinstance(error.value, Lost)  # nobody has died of it


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
        async def direct(self, *_: object, **__: object) -> Any:
            self.streamed = weakref.ref(stream := Stream())
            return stream

    with pytest.raises(asyncio.CancelledError) as kept:
        ask(instance := Instance(None))
    assert kept.tb and instance.streamed() is None


def call(instances: Any) -> str:
    async def called() -> str:
        return (await Remote(SPEC, instances).call(Question())).text

    return asyncio.run(called())


@pytest.mark.parametrize("error", [Unavailable("no engine fits", code="no_worker"), Overloaded("full"), NotFound("x")])
def test_somebody_who_answered_with_an_error_is_not_asked_again(error: PipelineError) -> None:
    with pytest.raises(type(error), match=error.message):
        call(instances := Instances(error, error))
    assert instances.sent == 1


class TestOneThatDoesNotTakeRequests:
    """It hangs, or is dead although etcd still lists it."""

    @pytest.fixture(autouse=True)
    def impatient(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(remote, "ACK_SECONDS", 0.05)

    def test_costs_little_time_where_there_is_another(self) -> None:
        assert ask(Instances(SILENT, SILENT, None)) == ["first", "second"]

    def test_is_asked_last_from_then_on_for_a_while(self, monkeypatch: pytest.MonkeyPatch) -> None:
        instances: Any = Instances(SILENT, None, None)
        asked = Remote(SPEC, instances)

        async def ask_often(times: int) -> None:
            for _ in range(times):
                assert [reply.text async for reply in asked.stream(Question(), Context("x"))]

        async def run() -> None:
            await ask_often(6)
            assert instances.asked.count(0) == 1
            monkeypatch.setattr(asked, "_suspected", {})  # as it is when that time is over
            await ask_often(3)
            assert instances.asked.count(0) == 2

        asyncio.run(run())

    def test_if_it_is_the_only_one_the_runtime_says_when_to_give_up(self) -> None:
        class Slow(Instances):
            async def direct(self, *args: Any, **options: Any) -> AsyncIterator[object]:
                await asyncio.sleep(0.2)
                return await super().direct(*args, **options)

        assert ask(Slow(None)) == ["first", "second"]

    def test_or_the_caller(self) -> None:
        async def run() -> None:
            stream = Remote(SPEC, Instances(SILENT)).stream(Question(), Context("x"), ack_seconds=0.05)  # type: ignore[arg-type]
            with pytest.raises(Unreachable) as error:
                await anext(stream)
            assert type(error.value) is Unreachable and error.value.code == "no_thing"

        asyncio.run(run())

    @pytest.mark.parametrize(("heard", "seconds"), [(True, 0.2), (True, 1.0), (None, 1.0), (False, 0.2)])
    def test_one_that_is_heard_of_is_only_slow_for_some_time(self, heard: bool | None, seconds: float) -> None:
        """Where nobody can say, the runtime says when to give up."""

        class Slow(Instances):
            async def direct(self, *args: Any, **options: Any) -> AsyncIterator[object]:
                await asyncio.sleep(seconds)
                return await super().direct(*args, **options)

        async def is_heard(instance_id: int) -> bool | None:
            return heard

        async def run() -> None:
            slow: Any = Slow(None)
            stream = Remote(SPEC, slow).stream(Question(), Context("x"), ack_seconds=0.05, is_heard=is_heard)
            if heard is None or (heard and seconds < TRIES * 0.05):
                assert [reply.text async for reply in stream] == ["first", "second"]
            else:
                with pytest.raises(Unreachable):
                    await anext(stream)

        asyncio.run(run())


def test_one_that_dies_or_hangs_with_a_request_is_lost_and_no_other_is_asked() -> None:
    class Dies(Instances):
        async def _answer(self, error: PipelineError | None, context: Context) -> AsyncIterator[object]:
            yield {"text": "first"}
            raise Exception("Unavailable: Stream ended before generation completed")

    with pytest.raises(Lost) as error:
        ask(instances := Dies(None, None))
    assert (error.value.code, instances.sent) == ("no_thing", 1)


def test_signs_of_life_are_no_messages() -> None:
    class Waits(Instances):
        async def _answer(self, error: PipelineError | None, context: Context) -> AsyncIterator[object]:
            for item in ({}, {"text": "first"}, {}, {}):
                yield item

    assert ask(Waits(None)) == ["first"]


def test_of_all_that_are_asked_those_that_do_not_answer_in_time_are_left_out() -> None:
    async def run() -> None:
        instances: Any = Instances(None, DEAD, SILENT, Overloaded("full"), None)
        answers = await Remote(SPEC, instances).ask_all(Question(), 0.1)
        assert [answer.text for answer in answers] == ["first", "first"]
        assert sorted(instances.asked) == [0, 1, 2, 3, 4]
        assert await Remote(SPEC, cast(Any, Instances())).ask_all(Question(), 0.1) == []

    asyncio.run(run())


class TestLinkedContexts:
    def test_the_first_is_the_request_s_own_and_each_other_has_its_id(self) -> None:
        async def run() -> None:
            context = Context("x", {"x-request-id": "mine"})
            async with linked(context, 0) as own, linked(context, 1) as other, linked(context, 2) as third:
                assert own is context
                assert len({one.id() for one in (own, other, third)}) == 3
                assert other.metadata["x-request-id"] == "mine"

        asyncio.run(run())

    def test_they_stop_with_it_and_at_the_end_but_not_it_with_them(self) -> None:
        async def run() -> None:
            context = Context("x")
            async with linked(context, 1) as other:
                pass
            assert (other.is_stopped(), context.is_stopped()) == (True, False)
            async with linked(context, 1) as other:
                context.stop_generating()
                await asyncio.wait_for(other.async_killed_or_stopped(), 5)

        asyncio.run(run())


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


def test_a_called_stream_is_stopped_once_it_has_answered() -> None:
    call(instances := Instances(None))
    assert instances.contexts[0].is_stopped()


def test_an_answer_of_nothing_is_a_fault() -> None:
    class Empty(Instances):
        async def _answer(self, error: PipelineError | None, context: Context) -> AsyncIterator[object]:
            return
            yield

    with pytest.raises(Internal, match="answered nothing"):
        call(Empty(None))
