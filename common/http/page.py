"""The page at /: a picture of the pipeline at work, drawn by the browser from GET /events."""

from pathlib import Path

from fastapi import APIRouter, Response
from fastapi.responses import FileResponse

PAGE = Path(__file__).parent / "page"
# Nothing on it comes from anywhere else, so nothing else may run or be asked there.
HEADERS = {
    "content-security-policy": "default-src 'self'; img-src 'self' data:; frame-ancestors 'none'",
    "cache-control": "no-cache",
}


def routes() -> APIRouter:
    """Its files: index.html at /, the others at /page/NAME. None if the folder is not there."""
    routes = APIRouter(include_in_schema=False)

    def serve(file: Path) -> None:
        async def get() -> Response:
            return FileResponse(file, headers=HEADERS)

        routes.add_api_route("/" if file.name == "index.html" else f"/page/{file.name}", get)

    for file in sorted(PAGE.glob("*.*")):
        serve(file)
    return routes
