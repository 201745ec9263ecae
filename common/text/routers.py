"""Which worker gets a prompt: what routers say, or while none of them answers, one of those that they have named."""

import asyncio
import logging
import random
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, aclosing, asynccontextmanager, contextmanager, suppress

from common.errors import Cancelled, Internal, PipelineError, Unavailable, Unreachable
from common.messages import FindWorkerRequest, RoutingDecision
from common.remote import Remote
from common.text.lease import Lease

from dynamo.runtime import Context
from msgspec.structs import replace

log = logging.getLogger(__name__)

ANSWER_SECONDS = 0.5  # for a router that decides nothing else either to answer
RESTART_SECONDS = 5.0  # to wait for a router that is restarting, if no worker is known
RETRY_SECONDS = 0.1


class Routers:
    """Asks routers for workers."""

    def __init__(
        self, router: Remote[FindWorkerRequest, RoutingDecision], instance_ids: Callable[[], list[int]]
    ) -> None:
        """instance_ids: the workers that are registered now."""
        self._router = router
        self._instance_ids = instance_ids
        self._answered: dict[int, float] = {}  # by router, when it last decided, on the loop's clock
        self._known: dict[int, RoutingDecision] = {}  # by worker, the last decision for it
        self._requests = Counter[int]()  # by worker, those in progress there of which no router knows
        self._alone = False  # whether the log knows that no router answers

    @asynccontextmanager
    async def lease(self, wanted: FindWorkerRequest, context: Context) -> AsyncIterator[Lease]:
        """A worker, which a router counts as loaded while the block runs.

        Raises Unavailable if no router answers and no worker is known, Cancelled if `context` is stopped first, and
        what a router refuses with.
        """
        async with AsyncExitStack() as stack:
            yield await self._find(wanted, context, stack)

    async def _find(self, wanted: FindWorkerRequest, context: Context, stack: AsyncExitStack) -> Lease:
        now = asyncio.get_running_loop().time
        deadline = now() + RESTART_SECONDS
        while not context.is_stopped():
            error: Unreachable | None = None
            for instance_id in self._router.in_turn(self._router.instance_ids()):
                # One that did not answer a moment ago is not waited for again, if there is another way.
                if not (self._router.is_suspected(instance_id) and self._known):
                    try:
                        return await stack.enter_async_context(self._asked(instance_id, wanted, context))
                    except Unreachable as unreachable:
                        error = unreachable
                        self._router.suspect(instance_id)
            if decision := self._by_load(wanted):
                self._say(alone=True)
                return stack.enter_context(self._unrouted(decision))
            if now() > deadline:
                text = "no router is running; try again in a moment"
                raise error or Unavailable(text, code="no_router")
            await asyncio.sleep(RETRY_SECONDS)
        raise Cancelled("the caller went away")

    @asynccontextmanager
    async def _asked(self, instance_id: int, wanted: FindWorkerRequest, parent: Context) -> AsyncIterator[Lease]:
        """What one router says. Raises Unreachable if it does not answer."""
        loop = asyncio.get_running_loop()

        def hopeless(silence: float, begun: bool) -> str | None:
            quiet = min(silence, loop.time() - self._answered.get(instance_id, 0.0))
            return None if begun or quiet < ANSWER_SECONDS else f"router {instance_id} does not answer"

        context = Context(metadata=dict(parent.metadata))  # of its own: it ends with the lease
        ack = ANSWER_SECONDS if self._known else None
        items = self._router.stream(wanted, context, [instance_id], hopeless=hopeless, ack_seconds=ack)
        async with aclosing(items):
            try:
                lease = Lease(await anext(items))
            except StopAsyncIteration:
                raise Internal(f"{self._router.spec.path} answered nothing") from None
            self._say(alone=False)
            self._answered[instance_id] = loop.time()
            self._known[lease.decision.instance_id] = lease.decision
            following = asyncio.create_task(_follow(items, lease))
            try:
                yield lease
            finally:
                context.stop_generating()
                following.cancel()
                await asyncio.wait([following])

    def _by_load(self, wanted: FindWorkerRequest) -> RoutingDecision | None:
        """The known worker with the fewest requests of ours; the one of another answer to the prompt, if there is."""
        there = set(self._instance_ids())
        self._known = {instance_id: known for instance_id, known in self._known.items() if instance_id in there}
        choices = self._known.keys() - set(wanted.excluded)
        if wanted.beside in choices:
            choices = {wanted.beside}
        if not choices:
            return None
        fewest = min(self._requests[instance_id] for instance_id in choices)
        return self._known[random.choice([one for one in choices if self._requests[one] == fewest])]

    @contextmanager
    def _unrouted(self, known: RoutingDecision) -> Iterator[Lease]:
        self._requests[known.instance_id] += 1
        try:
            yield Lease(replace(known, overlap_blocks=0, cost=0.0, reasons=[], by_load=True))
        finally:
            self._requests[known.instance_id] -= 1

    def _say(self, alone: bool) -> None:
        """Tell the log, once, that nobody routes, or somebody again."""
        if alone and not self._alone:
            log.warning("no router answers: workers are taken by the requests that they have from here")
        elif self._alone and not alone:
            log.info("a router answers again")
        self._alone = alone


async def _follow(items: AsyncGenerator[RoutingDecision], lease: Lease) -> None:
    with suppress(PipelineError):  # a router that dies takes its lease along, and nothing else
        async for decision in items:
            lease.revoked = decision.revoked
