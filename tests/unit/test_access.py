"""Who may use the HTTP server: with a file of keys, those who have one, and nobody for too much at once."""

import asyncio
import os
from collections.abc import AsyncGenerator, Callable
from pathlib import Path
from typing import Any

from common.errors import StartupError
from common.http import page
from common.http.access import guard, read_keys
from common.openai_api import ChatCompletionChunk
from common.openai_request import ChatCompletionRequest
from tests.unit.door import CHAT, HELLO, Door, two_words

import httpx
import pytest
from dynamo.runtime import Context

KEY = "sk-mine"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return write(tmp_path / "keys", f"# of Ada\n\n{KEY}\r\n  sk-other \n")


def write(file: Path, text: str) -> Path:
    file.write_text(text)
    file.chmod(0o600)
    return file


def door(file: Path, **options: Any) -> Door:
    return Door(guard=guard(str(file), "127.0.0.1", 0), routes=[page.routes()], **options)


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


@pytest.mark.parametrize("header", [f"Bearer {KEY}", f"bearer  {KEY} ", "Bearer sk-other"])
def test_who_has_a_key_of_the_file_gets_an_answer(file: Path, header: str) -> None:
    assert door(file).post(headers={"authorization": header}).status_code == 200


@pytest.mark.parametrize(
    "headers",
    [{}, bearer(""), bearer("sk-min"), bearer("sk-mine2"), bearer("# of Ada"), bearer("k\u00e9y"), {"x-api-key": KEY}]
    + [{"authorization": header} for header in (KEY, f"Basic {KEY}", f"Bearer{KEY}", f"Bearer {KEY} {KEY}", "Bearer")],
)
def test_who_has_none_gets_the_error_of_openai_and_it_shows_no_key(
    file: Path, headers: dict[str, str], caplog: pytest.LogCaptureFixture
) -> None:
    encoded = {name: value.encode("latin-1") for name, value in headers.items()}
    response = door(file).post(headers=encoded)
    assert response.status_code == 401
    assert response.headers["www-authenticate"] == "Bearer"
    assert response.headers["x-request-id"]
    error = response.json()["error"]
    assert (error["type"], error["param"], error["code"]) == ("invalid_request_error", None, "invalid_api_key")
    assert "key" in error["message"]
    assert "sk-" not in response.text + caplog.text


@pytest.mark.parametrize(
    "path", ["/v1/models", "/v1/models/m", "/workers", "/events", "/demo/kill/1", "/tokenize", "/x"]
)
@pytest.mark.parametrize("ask", [Door.get, lambda door, path: door.post(path=path)])
def test_all_that_is_not_said_to_be_open_needs_one(file: Path, path: str, ask: Callable[..., httpx.Response]) -> None:
    assert ask(door(file), path).status_code == 401


@pytest.mark.parametrize("path", ["/", "/live", "/health", "/docs", "/openapi.json", "/page/main.js"])
def test_probes_and_what_is_the_same_everywhere_are_open(file: Path, path: str) -> None:
    assert door(file).get(path).status_code in (200, 503)


@pytest.mark.parametrize(
    "path", ["/page/../v1/models", "/health/../workers", "/live//workers", "/live/", "/page/%2e%2e/workers"]
)
def test_no_path_looks_open_and_leads_elsewhere(file: Path, path: str) -> None:
    assert door(file).get(path).status_code in (401, 404)


def test_a_page_of_another_origin_may_ask_before_it_sends_its_key(file: Path) -> None:
    asks = {"origin": "http://a", "access-control-request-method": "POST"}
    asks["access-control-request-headers"] = "authorization"
    answer = door(file, cors_origins=["http://a"]).request("OPTIONS", CHAT, headers=asks)
    assert answer.status_code == 200
    assert "authorization" in answer.headers["access-control-allow-headers"].lower()
    refused = door(file, cors_origins=["http://a"]).post(headers={"origin": "http://a"})
    assert (refused.status_code, refused.headers["access-control-allow-origin"]) == (401, "http://a")


def test_a_file_that_changes_is_read_again_and_one_that_is_spoilt_changes_nothing(
    file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    one = door(file)
    write(file, "sk-newer")
    assert [one.post(headers=bearer(key)).status_code for key in (KEY, "sk-newer")] == [401, 200]
    for spoil in (lambda: write(file, ""), file.unlink, lambda: write(file, "no key\n")):
        caplog.clear()
        spoil()
        assert [one.post(headers=bearer(key)).status_code for key in (KEY, "sk-newer")] == [401, 200]
        assert [record.levelname for record in caplog.records if "API keys stay" in record.message] == ["ERROR"]
    write(file, KEY)
    assert one.post(headers=bearer(KEY)).status_code == 200


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "has no API keys"),
        ("# none\n \n", "has no API keys"),
        ("sk-1\nsk-2 # mine\n", "line 2 of"),
        ("sk-\u00e9", "line 1 of"),
        ("sk-\x00", "line 1 of"),
    ],
)
def test_a_file_without_keys_or_with_odd_ones_is_refused(tmp_path: Path, text: str, says: str) -> None:
    with pytest.raises(StartupError, match=says) as refused:
        read_keys(str(write(tmp_path / "keys", text)))
    assert "sk-" not in str(refused.value)


def test_so_is_one_that_cannot_be_read(tmp_path: Path) -> None:
    for path in (tmp_path / "none", tmp_path):
        with pytest.raises(StartupError, match=r"cannot read the API keys in .* \(--api-keys-file\): "):
            read_keys(str(path))


def test_others_who_could_read_it_are_worth_a_warning(file: Path, caplog: pytest.LogCaptureFixture) -> None:
    guard(str(file), "127.0.0.1", 0)
    assert not caplog.records
    os.chmod(file, 0o640)
    guard(str(file), "127.0.0.1", 0)
    assert "chmod 600" in caplog.text


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "example.org", ""])
def test_a_door_that_is_open_to_other_machines_is_worth_one_too(host: str, caplog: pytest.LogCaptureFixture) -> None:
    guard(None, host, 0)
    assert "--api-keys-file" in caplog.text


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1", "127.1.2.3"])
def test_one_for_this_machine_alone_is_not(host: str, caplog: pytest.LogCaptureFixture) -> None:
    guard(None, host, 0)
    assert not caplog.records


@pytest.mark.parametrize("by_key", [True, False])
def test_a_client_has_only_so_many_requests_in_progress(file: Path, by_key: bool) -> None:
    """Which is known by its key, or without keys by its address."""
    going_on = asyncio.Event()

    async def waits(request: ChatCompletionRequest, context: Context) -> AsyncGenerator[ChatCompletionChunk]:
        await going_on.wait()
        async for made in two_words(request, context):
            yield made

    async def run() -> None:
        app = Door(waits, guard=guard(str(file) if by_key else None, "127.0.0.1", 2)).app

        def client(number: int) -> httpx.AsyncClient:
            transport = httpx.ASGITransport(app=app, client=("127.0.0.1" if by_key else f"127.0.0.{number}", 1))
            headers = bearer((KEY, "sk-other")[number]) if by_key else {}
            return httpx.AsyncClient(transport=transport, base_url="http://door", headers=headers)

        async with client(0) as one, client(1) as other:
            first = [asyncio.create_task(who.post(CHAT, json=HELLO)) for who in (one, one, other)]
            await asyncio.sleep(0.05)
            refused = await one.post(CHAT, json=HELLO)
            assert (refused.status_code, refused.headers["retry-after"]) == (429, "1")
            assert refused.json()["error"]["type"] == "rate_limit_error"
            assert (await one.get("/live")).status_code == 200
            going_on.set()
            assert [answer.status_code for answer in await asyncio.gather(*first)] == [200, 200, 200]
            assert (await one.post(CHAT, json=HELLO)).status_code == 200

    asyncio.run(run())
