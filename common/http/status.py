"""What operators ask a frontend: who is there, and what of them is known."""

from collections.abc import Callable, Mapping
from typing import Any

from common.errors import Unavailable
from common.http.openapi import errors
from common.messages import Message, RouterStatus, WorkersRequest
from common.remote import Remote

from fastapi import APIRouter, Response
from fastapi.responses import JSONResponse

ROUTER_SECONDS = 2.0  # for a router to say what it knows


class WorkersReport(Message):
    """The answer of GET /workers."""

    routers: list[RouterStatus]


class Health(Message):
    """The answer of GET /health."""

    status: str
    instances: dict[str, int]


class Status:
    """Answers GET /workers, /health and /live."""

    def __init__(
        self,
        stages: Mapping[str, Remote[Any, Any]],
        routers: Remote[WorkersRequest, RouterStatus],
        stopping: Callable[[], bool],
    ) -> None:
        """stages: what must have an instance for this pipeline to be healthy; stopping: whether this program is."""
        self.stages = stages
        self._routers = routers
        self._stopping = stopping

    def routes(self) -> APIRouter:
        """The paths."""
        routes = APIRouter()
        routes.add_api_route("/workers", self.get_workers, responses=errors(503))
        routes.add_api_route("/health", self.get_health, response_model=Health, responses={503: {"model": Health}})
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
        """Whether a request would be answered: 200 if every stage has an instance, else 503."""
        instances = {name: len(remote.instance_ids()) for name, remote in self.stages.items()}
        healthy = all(instances.values()) and not self._stopping()
        health = Health(status="healthy" if healthy else "unhealthy", instances=instances)
        return JSONResponse(health.model_dump(), 200 if healthy else 503)

    async def get_live(self) -> dict[str, str]:
        """Whether this process runs."""
        return {"status": "live"}
