"""The frontend in this process, with processors that play their parts, and clients of its HTTP server."""

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from typing import Any, Self, cast

from common.errors import NotFound
from common.http.access import Guard
from common.http.canary import Canary
from common.http.exchange import Observer
from common.http.status import Status
from common.messages import WORKERS, PromptTokensDetails, Usage
from common.openai_api import (
    DETOKENIZE,
    TOKENIZE,
    ChatCompletionChunk,
    ChunkChoice,
    Delta,
    ModelCard,
    Routing,
    Text,
    Tokens,
)
from common.openai_request import ChatCompletionRequest, DetokenizeRequest, TokenizeRequest
from common.remote import Remote
from common.service import Service
from frontend import Frontend
from tests.unit.stand_ins import Handler, LocalClient

import httpx
from dynamo.runtime import Context
from fastapi import APIRouter

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
HELLO: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "hello"}]}
ONCE: dict[str, Any] = {"model": "m", "prompt": "once"}

Play = Callable[[ChatCompletionRequest, Context], AsyncGenerator[ChatCompletionChunk]]
Headers = Mapping[str, str] | Sequence[tuple[str, str]]


def chunk(
    content: str, finish_reason: str | None = None, routing: Routing | None = None, index: int = 0
) -> ChatCompletionChunk:
    delta = Delta(role="assistant", content=content) if routing else Delta(content=content)
    choice = ChunkChoice(index=index, delta=delta, finish_reason=finish_reason)
    made = ChatCompletionChunk(id="chatcmpl-1", created=1, model="m", choices=[choice])
    if routing:
        made.routing = routing
    return made


def first_chunk(content: str = "one") -> ChatCompletionChunk:
    return chunk(content, routing=Routing(worker_id="w1", overlap_blocks=3))


def usage_chunk() -> ChatCompletionChunk:
    made = ChatCompletionChunk(id="chatcmpl-1", created=1, model="m", choices=[])
    details = PromptTokensDetails(cached_tokens=48)
    usage = Usage(prompt_tokens=50, completion_tokens=2, total_tokens=52, prompt_tokens_details=details)
    made.usage = usage.encode()
    return made


async def two_words(request: ChatCompletionRequest, context: Context) -> AsyncGenerator[ChatCompletionChunk]:
    yield first_chunk()
    yield chunk(" two", "stop")
    yield usage_chunk()


def raises(error: Exception, *before: ChatCompletionChunk) -> Play:
    async def play(request: ChatCompletionRequest, context: Context) -> AsyncGenerator[ChatCompletionChunk]:
        for made in before:
            yield made
        raise error

    return play


async def letters(body: Any, context: Context) -> AsyncIterator[Any]:
    """The tokens of a text: as many as it has letters."""
    text = TokenizeRequest.decode(body).prompt or ""
    yield Tokens(count=len(text), max_model_len=64, tokens=[*range(len(text))]).encode()


async def numbers(body: Any, context: Context) -> AsyncIterator[Any]:
    yield Text(prompt=" ".join(map(str, DetokenizeRequest.decode(body).tokens))).encode()


class ScriptedProcessors:
    """Serve the models m and org/m, and answer every request with a play."""

    def __init__(self, play: Play) -> None:
        self._play = play
        self.tokenize = Remote(TOKENIZE, _client({1: letters}))
        self.detokenize = Remote(DETOKENIZE, _client({1: numbers}))
        self.requests: list[ChatCompletionRequest] = []
        self.contexts: list[Context] = []

    async def alive(self, seconds: float) -> set[str]:
        return {"m"}

    async def models(self) -> list[ModelCard]:
        return [ModelCard(id=name, created=1, context_length=64) for name in ("m", "org/m")]

    async def find(self, model: str) -> dict[int, ModelCard]:
        if model not in ("m", "org/m"):
            raise NotFound(f"the model {model!r} does not exist", code="model_not_found", param="model")
        return {1: ModelCard(id=model, created=1, context_length=64)}

    @property
    def process(self) -> "ScriptedProcessors":
        return self

    async def stream(
        self, request: ChatCompletionRequest, context: Context, remote: Any = None
    ) -> AsyncGenerator[ChatCompletionChunk]:
        await self.find(request.model)
        if remote not in (None, self):
            async for made in remote.stream(request, context):
                yield made
            return
        self.requests.append(request)
        self.contexts.append(context)
        async for made in self._play(request, context):
            yield made


class Door:
    """A frontend."""

    def __init__(
        self,
        play: Play = two_words,
        *,
        cors_origins: Sequence[str] = (),
        routers: Mapping[int, Handler] | None = None,
        stages: Mapping[str, Mapping[int, Handler]] | None = None,
        stage: Any = None,
        keepalive_seconds: float = 0.0,
        strict_fields: bool = False,
        observers: Sequence[Observer] = (),
        routes: Sequence[APIRouter] = (),
        guard: Guard | None = None,
    ) -> None:
        runtime: Any = None
        self.service = Service(runtime, drain_seconds=0.0)
        self.processors = ScriptedProcessors(play)
        self.frontend = Frontend(
            self.service,
            processors=cast(Any, self.processors),
            complete=cast(Any, self.processors),
            tokenize=self.processors.tokenize,
            detokenize=self.processors.detokenize,
            stage=stage,
            keepalive_seconds=keepalive_seconds,
            strict_fields=strict_fields,
        )
        remotes = {name: Remote(WORKERS, _client(handlers)) for name, handlers in (stages or {}).items()}
        processors = cast(Any, self.processors)
        canary = Canary(processors, processors, stage)
        workers = Remote(WORKERS, _client(routers or {}))
        status = Status(remotes, workers, processors, canary, lambda: self.service.stopping)
        self.app: Any = self.frontend.app(cors_origins, [status.routes(), *routes], observers, guard=guard)

    def get(self, path: str, **options: Any) -> httpx.Response:
        return self.request("GET", path, **options)

    def post(self, body: Any = HELLO, path: str = CHAT, **options: Any) -> httpx.Response:
        """Ask for a chat completion, or for what `path` says. body: JSON, or bytes as they are."""
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        return self.request("POST", path, content=content, **options)

    def request(self, method: str, path: str, **options: Any) -> httpx.Response:
        async def send() -> httpx.Response:
            transport = httpx.ASGITransport(app=self.app)
            async with httpx.AsyncClient(transport=transport, base_url="http://door") as client:
                return await client.request(method, path, **options)

        return asyncio.run(send())


def _client(handlers: Mapping[int, Handler]) -> Any:
    return LocalClient(handlers)


class Connection:
    """One request, whose answer is read message by message, and whose client may hang up.

    room: for messages that are not read yet; 0 is any number.
    """

    def __init__(self, door: Door, body: Any = HELLO, headers: Headers = (), room: int = 0) -> None:
        self._door = door
        self._content = json.dumps(body).encode()
        self._headers = list(headers.items() if isinstance(headers, Mapping) else headers)
        self._from_client: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self._to_client: asyncio.Queue[dict[str, Any]] = asyncio.Queue(room)
        self._events: list[str] = []  # that came with others, and are not read yet
        self.finished: asyncio.Task[None]

    async def __aenter__(self) -> Self:
        scope = {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "method": "POST",
            "scheme": "http",
            "path": CHAT,
            "raw_path": CHAT.encode(),
            "query_string": b"",
            "root_path": "",
            "headers": [(name.encode("latin-1"), value.encode("latin-1")) for name, value in self._headers],
            "server": ("door", 80),
            "client": ("client", 1234),
        }
        self._from_client.put_nowait({"type": "http.request", "body": self._content, "more_body": False})
        app: Any = self._door.app
        self.finished = asyncio.create_task(app(scope, self._from_client.get, self._to_client.put))
        return self

    async def __aexit__(self, *_: object) -> None:
        self.finished.cancel()

    async def next(self) -> dict[str, Any]:
        """The next message of the answer, as the server would get it."""
        return await asyncio.wait_for(self._to_client.get(), 30)

    async def event(self) -> Any:
        """The next server-sent event, or the next comment as it is."""
        while not self._events:
            message = await self.next()
            assert message["type"] == "http.response.body"
            *self._events, rest = message["body"].decode().split("\n\n")
            assert rest == "", "an event in pieces"
        text = self._events.pop(0)
        if text.startswith(":"):
            return text
        assert text.startswith("data: ")
        data = text.removeprefix("data: ")
        return data if data == "[DONE]" else json.loads(data)

    async def content(self) -> str:
        """That of the next event that has some."""
        while True:
            event = await self.event()
            if isinstance(event, dict) and (content := event["choices"][0]["delta"].get("content")):
                return str(content)

    @property
    def unread(self) -> int:
        return self._to_client.qsize() + len(self._events)

    def hang_up(self) -> None:
        self._from_client.put_nowait({"type": "http.disconnect"})

    async def end(self) -> None:
        """Return when the answer is over."""
        await asyncio.wait_for(asyncio.shield(self.finished), 30)
