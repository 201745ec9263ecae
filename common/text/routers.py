"""Which worker gets a prompt: what routers say, or while none of them answers, one of those that they have named."""

import asyncio
import logging
import random
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, aclosing, asynccontextmanager, contextmanager, suppress

from common import tracing
from common.errors import Cancelled, Internal, PipelineError, Unavailable, Unreachable
from common.messages import FindWorkerRequest, RouterStatus, RoutingDecision, WorkersRequest, WorkerStatus
from common.patience import Hopeless, Question
from common.remote import Remote
from common.text.limits import Limits

from dynamo.runtime import Context
from msgspec.structs import replace

log = logging.getLogger(__name__)

ANSWER_SECONDS = 0.5  # for a router to answer that decides nothing else either
RESTART_SECONDS = 5.0  # to wait for a router that is restarting, if no worker is known
REPLACE_SECONDS = 30.0  # to wait for another worker once all have failed a request: they may be restarting
FORGIVE_SECONDS = 5.0  # after which one that has failed it is as good: NATS may have been away from all of them
RETRY_SECONDS = 0.1
QUIET_SECONDS = 2.0  # of a worker, after which routers are asked about it
LOOK_SECONDS = 1.0  # between questions to routers
HEARD_SECONDS = 2.0  # since the last sign of life of a worker, which come every second


class Routers:
    """Asks routers for workers, and about them."""

    def __init__(
        self,
        router: Remote[FindWorkerRequest, RoutingDecision],
        status: Remote[WorkersRequest, RouterStatus],
        instance_ids: Callable[[], list[int]],
        limits: Limits,
    ) -> None:
        """instance_ids: the workers that are registered now."""
        self._router = router
        self._status = status
        self._instance_ids = instance_ids
        self._limits = limits
        self._answered: dict[int, float] = {}  # by router, when it last answered anything, on the loop's clock
        self._there: dict[int, Question[None]] = {}  # by router, whether it is
        self._known: dict[int, RoutingDecision] = {}  # by worker, the last decision for it
        self._requests = Counter[int]()  # by worker, those in progress there of which no router knows
        self._alone = False  # whether the log knows that no router answers
        self._silent: set[int] = set()  # workers that hang, and whose requests others could take
        self._heard: set[int] | None = None  # workers that routers had heard of at the last look, if any answered
        self._look = Question(self._ask_for_workers)

    @asynccontextmanager
    async def lease(self, wanted: FindWorkerRequest, context: Context) -> AsyncIterator[RoutingDecision]:
        """A worker, which a router counts as loaded while the block runs.

        Raises Unavailable if no router answers and no worker is known, Cancelled if `context` is stopped first, and
        what a router refuses with.
        """
        async with AsyncExitStack() as stack:
            yield await self._find_another(wanted, context, stack)

    async def _find_another(
        self, wanted: FindWorkerRequest, context: Context, stack: AsyncExitStack
    ) -> RoutingDecision:
        """What `_find` finds; a request that has lost its worker waits for that if there is no other one."""
        now = asyncio.get_running_loop().time
        since, failed = now(), bool(wanted.excluded)
        while True:
            try:
                return await self._find(wanted, context, stack)
            except Unavailable as error:
                if error.code != "no_worker" or not failed or now() > since + REPLACE_SECONDS:
                    raise
            await asyncio.sleep(RETRY_SECONDS)
            if now() > since + FORGIVE_SECONDS:
                wanted = wanted.model_copy(update={"excluded": []})

    async def _find(self, wanted: FindWorkerRequest, context: Context, stack: AsyncExitStack) -> RoutingDecision:
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
                return stack.enter_context(self._unrouted(decision))
            if now() > deadline:
                raise error or Unavailable("no router is running; try again in a moment", code="no_router")
            await asyncio.sleep(RETRY_SECONDS)
        raise Cancelled("the caller went away")

    @asynccontextmanager
    async def _asked(
        self, instance_id: int, wanted: FindWorkerRequest, parent: Context
    ) -> AsyncIterator[RoutingDecision]:
        """What one router says. Raises Unreachable if it does not answer."""
        loop = asyncio.get_running_loop()

        def hopeless(silence: float, begun: bool) -> str | None:
            quiet = min(silence, loop.time() - self._answered.get(instance_id, 0.0))
            if quiet > ANSWER_SECONDS / 3:  # it may only let the prompt wait
                self._check(instance_id)
            there = quiet < ANSWER_SECONDS and not self._limits.exceeded(silence, begun=False)
            return None if there else f"router {instance_id} does not answer"

        context = parent.detached(uuid.uuid4().hex)  # of its own: it ends with the lease
        ack = ANSWER_SECONDS if self._known or len(self._router.instance_ids()) > 1 else None
        async with aclosing(
            self._router.stream(wanted, context, [instance_id], hopeless=hopeless, ack_seconds=ack)
        ) as items:
            try:
                with tracing.span("find_worker", context, kind="client"):
                    if not (decision := await anext(items, None)):
                        raise Internal(f"{self._router.spec.path} answered nothing")
                self._answered[instance_id] = loop.time()
                self._known[decision.instance_id] = decision
                self._say(alone=False)
                yield decision
            finally:
                context.stop_generating()

    def _check(self, router_id: int) -> None:
        """Note whether a router answers that has said nothing for a while."""

        async def ask() -> None:
            with suppress(PipelineError, TimeoutError):
                async with asyncio.timeout(ANSWER_SECONDS):
                    await self._status.call(WorkersRequest(), router_id)
                    self._answered[router_id] = asyncio.get_running_loop().time()

        self._there.setdefault(router_id, Question(ask)).within(0.0)

    def _by_load(self, wanted: FindWorkerRequest) -> RoutingDecision | None:
        """The known worker with the fewest requests of ours; the one of another answer to the prompt, if there is."""
        there = set(self._instance_ids())
        self._known = {instance_id: known for instance_id, known in self._known.items() if instance_id in there}
        choices = self._known.keys() - set(wanted.excluded)
        if wanted.beside in choices:
            choices = {wanted.beside}
        chosen = min(choices, key=lambda one: (self._requests[one], random.random()), default=None)
        return None if chosen is None else self._known[chosen]

    @contextmanager
    def _unrouted(self, known: RoutingDecision) -> Iterator[RoutingDecision]:
        self._say(alone=True)
        self._requests[known.instance_id] += 1
        try:
            yield replace(known, overlap_blocks=0, cost=0.0, reasons=[], by_load=True)
        finally:
            self._requests[known.instance_id] -= 1

    def _say(self, alone: bool) -> None:
        """Tell the log, once, that nobody routes, or somebody again."""
        if alone and not self._alone:
            log.warning("no router answers: workers are taken by the requests that they have from here")
        elif self._alone and not alone:
            log.info("a router answers again")
        self._alone = alone

    def hopeless(self, instance_id: int) -> Hopeless:
        """When to give a worker up: a limit is exceeded, it has left and says nothing, or routers say that it hangs."""

        def reason(silence: float, begun: bool) -> str | None:
            if self._limits.exceeded(silence, begun):
                return f"it has said nothing for {silence:.0f} s"
            if silence < QUIET_SECONDS:
                return None
            if instance_id not in self._instance_ids():  # one that drains has left too, but is not silent
                return f"it is no longer registered, and has said nothing for {silence:.0f} s"
            self._look.within(LOOK_SECONDS)
            return "it hangs, by what a router knows" if instance_id in self._silent else None

        return reason

    async def is_heard(self, instance_id: int) -> bool | None:
        """Whether a router has heard of a worker within the last moments; None if no router answers."""
        await asyncio.shield(self._look.within(0.0))
        return None if self._heard is None else instance_id in self._heard

    async def _ask_for_workers(self) -> None:
        """How the workers are, by what routers know."""
        answers = await self._status.ask_all(WorkersRequest(), LOOK_SECONDS)
        self._silent = set[int]().union(*map(silent_workers, answers))
        workers = (worker for answer in answers for worker in answer.workers)
        self._heard = {one.instance_id for one in workers if heard_lately(one)} if answers else None


def heard_lately(worker: WorkerStatus) -> bool:
    """Whether a router has heard of a worker within the last moments."""
    return worker.heard_seconds is not None and worker.heard_seconds < HEARD_SECONDS


def silent_workers(status: RouterStatus) -> set[int]:
    """Workers that hang, if there are others of the same model that do not."""
    alive = {worker.model.name for worker in status.workers if worker.model and worker.silent_seconds is None}
    return {
        worker.instance_id
        for worker in status.workers
        if worker.silent_seconds is not None and worker.model and worker.model.name in alive
    }
