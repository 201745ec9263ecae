"""GET /events: viewers hear what all programs tell, who is there, and what they missed."""

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine
from contextlib import aclosing, suppress
from typing import Any, cast

from common.errors import Unavailable
from common.events import VERSION, WATCH_FRONTEND, WATCH_ROUTER, Answering, Feed, RequestEvent, Teller, WatchRequest
from common.http import watch
from common.http.status import Status
from common.http.watch import Watch
from common.messages import FIND_WORKER, GENERATE, WORKERS, RouterStatus
from common.openai_api import PROCESS
from common.remote import Remote
from tests.unit.stand_ins import Handler, LocalClient
from tests.unit.test_events import ONE_OF_EACH

import msgspec
import pytest
from dynamo.runtime import Context

BIG = 2**63 + 1  # JavaScript would round it
FRONTEND, ROUTER = BIG, BIG + 2


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Looks often, so that the tests need not wait."""
    monkeypatch.setattr(watch, "LOOK_SECONDS", 0.02)


async def never(body: Any, context: Context) -> AsyncIterator[Any]:
    raise Unavailable("not in this test")
    yield


class Scene:
    """A frontend and a router that tell, a processor and two engines that are there, and who watches them."""

    def __init__(self) -> None:
        self.stopping = asyncio.Event()
        self.feeds = {name: Feed(name, self.stopping.wait) for name in (FRONTEND, ROUTER)}
        self.frontends, self.routers = (LocalClient({name: self.serve(name)}) for name in (FRONTEND, ROUTER))
        self.engines = LocalClient({BIG + 3: never, BIG + 4: never})
        stages: dict[str, Remote[Any, Any]] = {
            "processor": Remote(PROCESS, _client(LocalClient({BIG + 1: never}))),
            "router": Remote(FIND_WORKER, _client(self.routers)),
            "engine": Remote(GENERATE, _client(self.engines)),
        }
        self.report = RouterStatus(router=ROUTER, policy="kv", workers=[])
        none: Any = None  # which only health asks
        workers = Remote(WORKERS, _client(LocalClient({ROUTER: self.workers})))
        status = Status(stages, workers, none, none, lambda: False)
        feeds = [Remote(WATCH_FRONTEND, _client(self.frontends)), Remote(WATCH_ROUTER, _client(self.routers))]
        self.watch = Watch(feeds, status, cast(Any, self.stopping.wait), {"frontend": str(FRONTEND), "demo": True})

    def serve(self, name: int) -> Handler:
        """A program's endpoint."""

        async def serve(body: Any, context: Context) -> AsyncIterator[Any]:
            async for message in self.feeds[name].watch(WatchRequest.decode(body), context):
                yield message.encode()

        return serve

    async def workers(self, body: Any, context: Context) -> AsyncIterator[Any]:
        yield self.report.encode()

    async def viewer(self) -> "Viewer":
        response = await self.watch.get_events()
        assert response.media_type == "text/event-stream"
        return Viewer(cast(AsyncGenerator[bytes], response.body_iterator))

    def teller(self, name: int) -> Teller:
        tell = self.feeds[name].teller("request")
        assert tell
        return tell

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(30):
            while not condition():
                await asyncio.sleep(0.005)


def _client(client: LocalClient) -> Any:
    return client


class Viewer:
    """Reads, event by event."""

    def __init__(self, parts: AsyncGenerator[bytes]) -> None:
        self.parts = parts
        self._events: list[tuple[str, dict[str, Any]]] = []

    async def next(self) -> tuple[str, dict[str, Any]]:
        while not self._events:
            text = (await asyncio.wait_for(anext(self.parts), 30)).decode()
            *events, rest = text.split("\n\n")
            assert rest == ""
            for event in events:
                if not event.startswith(":"):
                    name, data = event.split("\n")
                    self._events.append((name.removeprefix("event: "), json.loads(data.removeprefix("data: "))))
        return self._events.pop(0)

    async def one(self, wanted: str) -> dict[str, Any]:
        """The next event of this name."""
        while True:
            name, fields = await self.next()
            if name == wanted:
                return fields


def play(test: Callable[[Scene], Coroutine[Any, Any, None]]) -> None:
    """Run a scene; whatever it has begun ends with it."""

    async def run() -> None:
        await test(Scene())

    asyncio.run(run())


def test_a_viewer_hears_first_what_this_is_and_who_is_there() -> None:
    async def test(scene: Scene) -> None:
        viewer = await scene.viewer()
        async with aclosing(viewer.parts):
            assert await viewer.next() == ("hello", {"version": VERSION, "frontend": str(FRONTEND), "demo": True})
            joined = [await viewer.one("joined") for _ in range(5)]
            assert [(one["stage"], one["instance_id"]) for one in joined] == [
                ("engine", str(BIG + 3)),
                ("engine", str(BIG + 4)),
                ("frontend", str(FRONTEND)),
                ("processor", str(BIG + 1)),
                ("router", str(ROUTER)),
            ]
            fleet = await viewer.one("fleet")
            assert fleet["routers"][0]["router"] == str(ROUTER)

    play(test)


def test_nothing_that_happens_after_the_hello_is_missed() -> None:
    async def test(scene: Scene) -> None:
        viewer = await scene.viewer()
        async with aclosing(viewer.parts):
            await viewer.one("hello")
            for name in (FRONTEND, ROUTER):
                scene.teller(name)(Answering(worker_id=str(name)))
            assert {(await viewer.one("answering"))["worker_id"] for _ in range(2)} == {str(FRONTEND), str(ROUTER)}

    play(test)


def test_a_program_that_never_answers_does_not_keep_viewers_waiting() -> None:
    async def hang(body: Any, context: Context) -> AsyncIterator[Any]:
        await asyncio.Event().wait()
        yield

    async def test(scene: Scene) -> None:
        scene.routers.handlers[ROUTER] = hang
        viewer = await scene.viewer()
        async with aclosing(viewer.parts):
            assert (await viewer.next())[0] == "hello"

    play(test)


def test_events_are_of_the_types_that_are_documented_and_ids_are_strings() -> None:
    async def test(scene: Scene) -> None:
        viewer = await scene.viewer()
        async with aclosing(viewer.parts):
            await viewer.one("hello")
            tell = scene.teller(ROUTER)
            for event in ONE_OF_EACH:
                tell(event)
            told = 0
            while told < len(ONE_OF_EACH):
                name, fields = await viewer.next()
                for field in ("frontend", "processor", "router", "instance_id"):
                    assert isinstance(fields.get(field, ""), str)
                if "request_id" in fields:
                    assert msgspec.convert({"event": name, **fields}, RequestEvent) == ONE_OF_EACH[told]
                    told += 1

    play(test)


def test_viewers_share_one_following_and_it_ends_with_the_last_of_them() -> None:
    async def test(scene: Scene) -> None:
        assert scene.feeds[FRONTEND].teller("request") is None
        viewers = [await scene.viewer() for _ in range(3)]
        for viewer in viewers:
            await viewer.one("hello")
        scene.teller(FRONTEND)(Answering(worker_id="all hear it"))
        for viewer in viewers:
            assert (await viewer.one("answering"))["worker_id"] == "all hear it"
        assert len(scene.frontends.bodies) == len(scene.routers.bodies) == 1
        for viewer in viewers[1:]:
            await viewer.parts.aclose()
        await viewers[0].one("fleet")
        assert scene.feeds[FRONTEND].teller("request")
        await viewers[0].parts.aclose()
        await scene.until(lambda: not any(feed.teller("request") for feed in scene.feeds.values()))
        again = await scene.viewer()
        async with aclosing(again.parts):
            await again.one("hello")
            assert (await again.one("joined"))["stage"] == "engine"
            assert scene.feeds[FRONTEND].teller("request")

    play(test)


def test_who_joins_and_who_leaves_is_told() -> None:
    async def test(scene: Scene) -> None:
        viewer = await scene.viewer()
        async with aclosing(viewer.parts):
            await viewer.one("fleet")
            scene.engines.handlers[BIG + 5] = never
            assert await viewer.one("joined") == {"stage": "engine", "instance_id": str(BIG + 5)}
            del scene.engines.handlers[BIG + 3]
            assert await viewer.one("left") == {"stage": "engine", "instance_id": str(BIG + 3)}

    play(test)


def test_a_program_that_dies_and_comes_back_is_followed_again() -> None:
    async def test(scene: Scene) -> None:
        viewer = await scene.viewer()
        async with aclosing(viewer.parts):
            await viewer.one("hello")
            serve = scene.routers.handlers[ROUTER]
            scene.routers.handlers[ROUTER] = never  # it is still in etcd, and nobody answers
            scene.routers.contexts[0].stop_generating()
            await scene.until(lambda: len(scene.routers.bodies) > 2)
            scene.routers.handlers[ROUTER] = serve
            await scene.until(lambda: scene.feeds[ROUTER].teller("request") is not None)
            scene.teller(ROUTER)(Answering(worker_id="back"))
            assert (await viewer.one("answering"))["worker_id"] == "back"
            # And as another instance, as one that was started again is.
            scene.feeds[BIG + 9] = Feed(BIG + 9, scene.stopping.wait)
            scene.routers.handlers[BIG + 9] = scene.serve(BIG + 9)
            del scene.routers.handlers[ROUTER]
            await scene.until(lambda: scene.feeds[BIG + 9].teller("request") is not None)
            scene.teller(BIG + 9)(Answering(worker_id="anew"))
            assert (await viewer.one("answering"))["worker_id"] == "anew"
            await scene.until(lambda: scene.feeds[ROUTER].teller("request") is None)

    play(test)


def test_a_slow_viewer_skips_and_is_told_so_and_who_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "ROOM", 3)

    async def test(scene: Scene) -> None:
        slow, quick = await scene.viewer(), await scene.viewer()
        async with aclosing(slow.parts), aclosing(quick.parts):
            await slow.one("hello")
            await quick.one("hello")
            for _ in range(10):
                await quick.one("fleet")
            assert (await slow.one("skipped"))["parts"] > 0
            assert {(await slow.one("joined"))["stage"] for _ in range(5)} == {
                *("frontend", "processor", "router", "engine")
            }

    play(test)


def test_that_only_a_share_is_told_of_is_told() -> None:
    async def test(scene: Scene) -> None:
        viewer = await scene.viewer()
        async with aclosing(viewer.parts):
            assert await viewer.one("sampled") == {"share": 1}
            for number in range(100):
                scene.feeds[ROUTER].teller(f"request-{number}")
            share = (await viewer.one("sampled"))["share"]
            assert share < 1
            late = await scene.viewer()
            async with aclosing(late.parts):
                assert await late.one("sampled") == {"share": share}

    play(test)


def test_the_stream_ends_when_the_service_stops() -> None:
    async def test(scene: Scene) -> None:
        viewer = await scene.viewer()
        await viewer.one("hello")
        scene.stopping.set()
        async with asyncio.timeout(30):
            with suppress(StopAsyncIteration):
                while True:
                    await anext(viewer.parts)

    play(test)


def test_an_idle_connection_is_kept_alive(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "QUIET_SECONDS", 0.01)

    async def test(scene: Scene) -> None:
        monkeypatch.setattr(watch, "LOOK_SECONDS", 30.0)
        viewer = await scene.viewer()
        async with aclosing(viewer.parts):
            async with asyncio.timeout(30):
                while not (await anext(viewer.parts)).startswith(b": "):
                    pass

    play(test)
