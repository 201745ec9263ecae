"""What a demo adds: an engine can be killed from the page, to see how its answers go on."""

from common.errors import NotFound, PipelineError
from common.http.openapi import errors
from common.messages import Die, DieRequest
from common.remote import Remote

from fastapi import APIRouter


def routes(engines: Remote[DieRequest, Die]) -> APIRouter:
    """POST /demo/kill/{instance_id}."""
    routes = APIRouter()

    @routes.post("/demo/kill/{instance_id}", responses=errors(404))
    async def kill(instance_id: int) -> dict[str, str]:
        """Kill an engine that was started with --demo, with SIGKILL: it finishes nothing and says goodbye to nobody."""
        if instance_id not in engines.instance_ids():
            raise NotFound(f"no engine of instance {instance_id} runs with --demo")
        try:
            await engines.call(DieRequest(), instance_id)
        except PipelineError:
            return {"status": "killed"}  # it had no time for an answer
        return {"status": "dying"}

    return routes
