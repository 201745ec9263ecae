"""What happens in the pipeline, told to whoever watches: the page, and anything else that reads GET /events.

Frontends, processors and routers each tell their own part of a request's life, under the id that they share. While
nobody watches, nothing is told, and it costs a look; under load only some requests are told of, everywhere the same
ones.
"""

import math
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from zlib import crc32

from common.messages import EndpointSpec, Message, StructMessage, WorkerCost
from common.service import first_of

import msgspec
from dynamo.runtime import Context

VERSION = 1  # of what is below; a new one if a field is taken away or means something else
REQUESTS_PER_SECOND = 20  # that are told of
BATCH_SECONDS = 0.1  # between messages to a watcher
ROOM = 2000  # events that wait for one; what comes then is not told


class Event(msgspec.Struct, kw_only=True, omit_defaults=True, tag_field="event", tag=str.lower):
    """Base of the events. at: seconds since the epoch, by the clock of the machine where it happened."""

    request_id: str = ""  # which its teller writes
    at: float = msgspec.field(default_factory=time.time)


class Started(Event):
    """A frontend has a request."""

    frontend: str  # instance id, as are those of other programs: 64 bits, and so text in JSON
    model: str
    prompt: str | None = None  # its first words, if prompts may be shown


class Asked(Event):
    """A processor asks a router for a worker: the prompt is rendered and tokenized."""

    processor: str
    tokens: int  # of the prompt, and of the answer if this is not its first worker
    blocks: int  # KV blocks that they fill


class Decided(Event):
    """A router has chosen a worker."""

    router: str
    policy: str
    worker_id: str
    prompt_blocks: float
    overlap_blocks: int  # leading blocks of the prompt in its KV cache
    costs: list[WorkerCost]  # of all that could have had it; the lowest wins


class Answering(Event):
    """The first part of the answer is on its way to the client."""

    worker_id: str | None = None


class Moved(Event):
    """A worker was lost in the middle of an answer, and another one will go on."""

    worker_id: str  # the lost one
    tokens: int  # of the answer so far
    reason: str


class Ended(Event):
    """A request is over."""

    status: int  # HTTP's, or of a stream that failed later, the one that its error would have had
    error: str | None = None
    worker_id: str | None = None
    overlap_blocks: int | None = None
    migrations: int = 0
    prompt_tokens: int | None = None
    cached_tokens: int | None = None  # of the prompt, by the worker's own account
    completion_tokens: int | None = None
    finish_reason: str | None = None
    ttft_seconds: float | None = None  # to the first chunk
    seconds: float = 0.0
    trace_id: str | None = None


RequestEvent = Started | Asked | Decided | Answering | Moved | Ended


class WatchRequest(Message):
    """Asks a program to tell what happens there, until the stream ends."""


class Events(StructMessage):
    """What has happened since the last of these messages."""

    events: list[RequestEvent]
    share: float = 1.0  # of the requests that are told of


WATCH_FRONTEND = EndpointSpec("frontend", "events", WatchRequest, Events)
WATCH_PROCESSOR = EndpointSpec("processor", "events", WatchRequest, Events)
WATCH_ROUTER = EndpointSpec("router", "events", WatchRequest, Events)


Teller = Callable[[RequestEvent], None]


class Feed:
    """Tells watchers what happens in this program."""

    def __init__(self, instance_id: int, stopped: Callable[[], Awaitable[object]]) -> None:
        """instance_id: this program's; stopped: returns when it leaves."""
        self.instance_id = str(instance_id)
        self._stopped = stopped
        self._watchers: list[list[RequestEvent]] = []  # of each, what waits to be sent
        self._level = 0  # one request of 2 ** level is told of
        self._second = 0.0
        self._requests = 0  # in this second

    def teller(self, request_id: str) -> Teller | None:
        """What tells watchers of this request; None if nobody watches, or this is not one of those that are told of.
        To be asked for once for each request.

        Which those are follows from the id, so that all programs choose the same, and from the load: with half the
        share, one of two of them is left.
        """
        if not self._watchers:
            return None
        if (elapsed := (now := time.monotonic()) - self._second) >= 1:
            rate = max(self._requests / elapsed, 1.0)  # also of a second that was long ago: after a rest, all are told
            self._level = max(0, math.ceil(math.log2(rate / REQUESTS_PER_SECOND)))
            self._second, self._requests = now, 0
        self._requests += 1
        if self._requests > REQUESTS_PER_SECOND << self._level:
            self._level += 1
        if crc32(request_id.encode()) % (1 << self._level):
            return None

        def tell(event: RequestEvent) -> None:
            event.request_id = request_id
            for waiting in self._watchers:
                if len(waiting) < ROOM:
                    waiting.append(event)

        return tell

    async def watch(self, request: WatchRequest, context: Context) -> AsyncIterator[Events]:
        """Yield what happens from now on."""
        waiting: list[RequestEvent] = []
        self._watchers.append(waiting)
        try:
            left = False
            while not left:
                told = waiting.copy()
                waiting.clear()  # before it is sent: what happens meanwhile is for the next message
                yield Events(events=told, share=1 / (1 << self._level))
                left = await first_of(context.async_killed_or_stopped(), self._stopped(), seconds=BATCH_SECONDS)
        finally:
            self._watchers.remove(waiting)
