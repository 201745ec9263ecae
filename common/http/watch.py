"""GET /events: what happens in the whole pipeline, as server-sent events for pages and other programs.

    hello    version of the events (common/events.py), this frontend's instance id, whether it has a demo's buttons;
             comes once all programs are listened to
    joined   an instance of a stage is there: stage, instance_id
    left     one is there no longer
    fleet    every second: what each router knows of the workers, as GET /workers has it
    sampled  so busy that only a share of the requests is told of from here on
    started asked decided answering moved ended    a request's life
    skipped  this reader was too slow for so many parts; then everybody who is there joins anew

Each is one JSON object. Ids of instances are strings, because they have 64 bits.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

from common.errors import PipelineError
from common.events import VERSION, Events, WatchRequest
from common.http.status import Status
from common.remote import Remote
from common.service import first_of

import msgspec
from dynamo.runtime import Context
from fastapi import APIRouter
from fastapi.responses import StreamingResponse

log = logging.getLogger(__name__)

LOOK_SECONDS = 1.0  # between looks at who is there, and at what routers know
ROOM = 1000  # parts that wait for a reader
QUIET_SECONDS = 15.0  # after which a comment keeps the connection alive


class _Viewer:
    """One who reads, and what waits to be read."""

    def __init__(self) -> None:
        self.waiting = asyncio.Event()  # there is something to read
        self._parts: list[bytes] = []
        self._skipped = 0

    def put(self, part: bytes) -> None:
        self.waiting.set()
        if len(self._parts) < ROOM:
            self._parts.append(part)
        else:
            self._skipped += 1

    def take(self) -> tuple[bytes, int]:
        """All of it, and how many parts did not find room."""
        taken = b"".join(self._parts), self._skipped
        self.waiting.clear()
        self._parts.clear()
        self._skipped = 0
        return taken


class Watch:
    """Follows every program for as long as somebody reads GET /events."""

    def __init__(
        self,
        feeds: Sequence[Remote[WatchRequest, Events]],
        status: Status,
        stopped: Callable[[], Awaitable[None]],
        hello: Mapping[str, object],
    ) -> None:
        """feeds: the endpoints that tell; stopped: returns when this program leaves; hello: what a page is told first,
        besides the version."""
        self._feeds = feeds
        self._status = status
        frontends = {feed.spec.component: feed for feed in feeds if feed.spec.component == "frontend"}
        self._stages: Mapping[str, Remote[Any, Any]] = {**frontends, **status.stages}
        self._stopped = stopped
        self._hello = event("hello", {"version": VERSION, **hello})
        self._viewers: set[_Viewer] = set()
        self._there: set[tuple[str, int]] = set()  # stages and instances that are known to be there
        self._fleet = b""  # what was told last of the workers
        self._listened: set[tuple[str, int]] = set()  # programs that are to tell
        self._shares: dict[tuple[str, int], float] = {}  # of the requests that each does tell of
        self._following: asyncio.Task[None] | None = None
        self._followed = asyncio.Event()  # once each has answered

    def routes(self) -> APIRouter:
        routes = APIRouter()
        routes.add_api_route("/events", self.get_events, response_class=StreamingResponse)
        return routes

    async def get_events(self) -> StreamingResponse:
        """What happens in the pipeline, as server-sent events; see common/events.py."""
        headers = {"cache-control": "no-cache", "x-accel-buffering": "no"}
        return StreamingResponse(self._read(), media_type="text/event-stream", headers=headers)

    async def _read(self) -> AsyncIterator[bytes]:
        viewer = _Viewer()
        self._viewers.add(viewer)
        if not self._following or self._following.done():
            self._following, self._followed = asyncio.create_task(self._follow()), asyncio.Event()
        leaving = asyncio.ensure_future(self._stopped())
        try:
            # One that has died without a word, and that etcd still believes in, is not waited for.
            await first_of(self._followed.wait(), asyncio.shield(leaving), seconds=LOOK_SECONDS)
            viewer.take()  # it is all in what comes now
            yield self._hello + self._state()
            while not leaving.done():
                await first_of(viewer.waiting.wait(), asyncio.shield(leaving), seconds=QUIET_SECONDS)
                parts, skipped = viewer.take()
                if skipped:
                    parts += event("skipped", {"parts": skipped}) + self._state()
                yield parts or b": nothing has happened\n\n"
        finally:
            leaving.cancel()
            self._viewers.discard(viewer)
            if not self._viewers and self._following:
                self._following.cancel()
                self._following = None
                self._there, self._shares, self._fleet = set(), {}, b""

    def _state(self) -> bytes:
        """What one must know who has heard nothing so far."""
        joined = b"".join(_instance("joined", *one) for one in sorted(self._there))
        return joined + self._fleet + event("sampled", {"share": self._share})

    def _tell(self, part: bytes) -> None:
        for viewer in self._viewers:
            viewer.put(part)

    async def _follow(self) -> None:
        """Tell the viewers what all programs tell. Runs until cancelled."""
        following: dict[tuple[str, int], asyncio.Task[None]] = {}
        try:
            while True:
                self._look()
                told = {(feed.spec.component, one): feed for feed in self._feeds for one in feed.instance_ids()}
                for key in told.keys() - following.keys():
                    following[key] = asyncio.create_task(self._follow_one(told[key], key[1]))
                for key in following.keys() - told.keys():
                    following.pop(key).cancel()
                    self._note(key, None)
                self._listened = set(told)
                with suppress(PipelineError):
                    report = await self._status.get_workers()
                    self._fleet = b"event: fleet\ndata: %b\n\n" % report.model_dump_json().encode()
                    self._tell(self._fleet)
                await asyncio.sleep(LOOK_SECONDS)
        finally:
            for task in following.values():
                task.cancel()

    def _look(self) -> None:
        """Tell who has come and gone."""
        there = {(stage, one) for stage, remote in self._stages.items() for one in remote.instance_ids()}
        for what, ones in (("joined", there - self._there), ("left", self._there - there)):
            for one in sorted(ones):
                self._tell(_instance(what, *one))
        self._there = there

    @property
    def _share(self) -> float:
        """That of which all programs tell."""
        return min(self._shares.values(), default=1.0)

    def _note(self, key: tuple[str, int], share: float | None) -> None:
        """A program tells of this share; None: of nothing any more."""
        before = self._share
        if share is None:
            self._shares.pop(key, None)
        else:
            self._shares[key] = share
        if self._share != before:
            self._tell(event("sampled", {"share": self._share}))
        if self._listened <= self._shares.keys():
            self._followed.set()

    async def _follow_one(self, feed: Remote[WatchRequest, Events], instance_id: int) -> None:
        """Tell what one program tells, also after it did not answer for a while."""
        while True:
            context = Context()
            try:
                async for message in feed.stream(WatchRequest(), context, [instance_id]):
                    self._note((feed.spec.component, instance_id), message.share)
                    if message.events:
                        self._tell(b"".join(map(request_event, message.events)))
            except PipelineError as error:
                log.debug("%s of instance %d ended: %s", feed.spec.path, instance_id, error)
            finally:
                context.stop_generating()
            await asyncio.sleep(LOOK_SECONDS)


def event(name: str, fields: Mapping[str, object]) -> bytes:
    """A server-sent event."""
    return b"event: %b\ndata: %b\n\n" % (name.encode(), msgspec.json.encode(fields))


def request_event(told: object) -> bytes:
    """One of common/events.py as a server-sent event."""
    fields = msgspec.to_builtins(told)
    return event(fields.pop("event"), fields)


def _instance(name: str, stage: str, instance_id: int) -> bytes:
    return event(name, {"stage": stage, "instance_id": str(instance_id)})
