"""What operators ask a frontend: who is there, what of them is known, and whether a request would be answered."""

import asyncio
from collections.abc import Callable, Mapping
from typing import Any

from common.errors import Unavailable
from common.http.canary import Canary
from common.http.openapi import errors
from common.http.processors import Processors
from common.messages import Message, RouterStatus, WorkersRequest
from common.remote import Remote

from fastapi import APIRouter, Response
from fastapi.responses import JSONResponse

ROUTER_SECONDS = 2.0  # for a router to say what it knows
HEALTH_SECONDS = 1.0  # for processors and routers to say that they are well


class WorkersReport(Message):
    """The answer of GET /workers."""

    routers: list[RouterStatus]


class Health(Message):
    """The answer of GET /health and of GET /health/ready."""

    status: str
    instances: dict[str, int]
    reason: str | None = None


class Status:
    """Answers GET /workers, /health, /health/ready and /live."""

    def __init__(
        self,
        stages: Mapping[str, Remote[Any, Any]],
        routers: Remote[WorkersRequest, RouterStatus],
        processors: Processors,
        canary: Canary,
        stopping: Callable[[], bool],
    ) -> None:
        """stages: what must have an instance for this pipeline to be healthy; stopping: whether this program is."""
        self.stages = stages
        self._routers = routers
        self._processors = processors
        self._canary = canary
        self._stopping = stopping

    def routes(self) -> APIRouter:
        routes = APIRouter()
        unhealthy: dict[int | str, dict[str, Any]] = {503: {"model": Health}}
        routes.add_api_route("/workers", self.get_workers, responses=errors(503))
        routes.add_api_route("/health", self.get_health, response_model=Health, responses=unhealthy)
        routes.add_api_route("/health/ready", self.get_ready, response_model=Health, responses=unhealthy)
        routes.add_api_route("/live", self.get_live)
        return routes

    async def get_workers(self) -> WorkersReport:
        """What each router knows of the workers."""
        if not self._routers.instance_ids():
            raise Unavailable("no router is running; try again in a moment", code="no_router")
        if not (routers := await self._routers.ask_all(WorkersRequest(), ROUTER_SECONDS)):
            raise Unavailable("no router answers; try again in a moment", code="no_router")
        return WorkersReport(routers=routers)

    async def get_health(self) -> Response:
        """Whether a request would be answered, by what processors and routers say: 200 if so, else 503."""
        return self._response("healthy", "unhealthy", await self._faults())

    async def get_ready(self) -> Response:
        """Whether every model has just made a token: 200 if so, else 503."""
        return self._response("ready", "unready", await self._canary.faults())

    def _response(self, well: str, ill: str, faults: list[str]) -> Response:
        if self._stopping():
            faults = ["this server is being stopped", *faults]
        health = Health(status=ill if faults else well, instances=self._instances, reason="; ".join(faults) or None)
        return JSONResponse(health.model_dump(exclude_none=True), 503 if faults else 200)

    @property
    def _instances(self) -> dict[str, int]:
        return {name: len(remote.instance_ids()) for name, remote in self.stages.items()}

    async def _faults(self) -> list[str]:
        """Who is missing; else who is there and does not answer, and the models that no engine can be asked for."""
        if missing := [f"no {name} is running" for name, count in self._instances.items() if not count]:
            return missing
        models, routers = await asyncio.gather(
            self._processors.alive(HEALTH_SECONDS), self._routers.ask_all(WorkersRequest(), HEALTH_SECONDS)
        )
        silent = [f"no {name} answers" for name, answers in (("processor", models), ("router", routers)) if not answers]
        workers = [worker for router in routers for worker in router.workers]
        served = {worker.model.name if worker.model else None for worker in workers if not worker.reason}
        unserved = [] if silent or None in served else sorted(models - served)
        reasons = ", ".join(sorted({f"{worker.worker_id} {worker.reason}" for worker in workers if worker.reason}))
        return silent + [f"no engine can be asked for {model}{f': {reasons}' if reasons else ''}" for model in unserved]

    async def get_live(self) -> dict[str, str]:
        """Whether this process runs."""
        return {"status": "live"}
