"""What a demo adds: an engine can be killed from the page, to see how its answers go on."""

from common.errors import NotFound, PipelineError
from common.http.openapi import errors
from common.messages import Die, DieRequest
from common.remote import Remote

from fastapi import APIRouter


class Demo:
    """Answers POST /demo/kill/{instance_id}."""

    def __init__(self, engines: Remote[DieRequest, Die]) -> None:
        self._engines = engines

    def routes(self) -> APIRouter:
        """The path."""
        routes = APIRouter()
        routes.add_api_route("/demo/kill/{instance_id}", self.kill, methods=["POST"], responses=errors(404))
        return routes

    async def kill(self, instance_id: int) -> dict[str, str]:
        """Kill an engine that was started with --demo, with SIGKILL: it finishes nothing and says goodbye to nobody."""
        if instance_id not in self._engines.instance_ids():
            raise NotFound(f"no engine of instance {instance_id} runs with --demo")
        try:
            await self._engines.call(DieRequest(), instance_id)
        except PipelineError:
            return {"status": "killed"}  # it had no time for an answer
        return {"status": "dying"}
