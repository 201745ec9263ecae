"""A client that hangs up ends its request everywhere, before the first token as after it."""

import socket
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack

from tests.system.conftest import Cluster, Pipeline, until

import httpx
import pytest

ENDLESS = {"max_tokens": 7000, "ignore_eos": True, "temperature": 0}  # takes far longer than any test waits


def question(pipeline: Pipeline, content: str, **fields: object) -> dict[str, object]:
    return {"model": pipeline.model, "messages": [{"role": "user", "content": content}], **ENDLESS, **fields}


def send(pipeline: Pipeline, body: dict[str, object]) -> socket.socket:
    """Send a request on a connection of its own, and do not wait for the answer."""
    url = f"http://127.0.0.1:{pipeline.port}/v1/chat/completions"
    request = httpx.Request("POST", url, json={**body, "stream": True})
    head = "".join(f"{name}: {value}\r\n" for name, value in request.headers.items())
    connection = socket.create_connection(("127.0.0.1", pipeline.port))
    connection.sendall(f"POST {request.url.path} HTTP/1.1\r\n{head}\r\n".encode() + request.read())
    return connection


def cancelled(pipeline: Pipeline) -> int:
    return (pipeline.folder / "frontend.log").read_text().count("status=499")


@pytest.fixture(autouse=True)
def from_idle_to_idle(pipeline: Pipeline) -> Iterator[None]:
    until(pipeline.idle, "idle engines")
    yield
    until(lambda: not any(worker["requests"] for worker in pipeline.workers()[0]), "the end of all leases")


def test_hanging_up_in_the_middle_of_a_stream(pipeline: Pipeline) -> None:
    before = cancelled(pipeline)
    body = question(pipeline, "Hi", stream=True)
    with pipeline.client() as client, client.stream("POST", "/v1/chat/completions", json=body) as response:
        for number, _ in enumerate(response.iter_lines()):
            if number > 20 and not pipeline.idle():
                break
    until(pipeline.idle, "the engine to stop", timeout=5)
    until(lambda: cancelled(pipeline) > before, "a line in the log")


def test_hanging_up_while_waiting_for_a_whole_answer(pipeline: Pipeline) -> None:
    with pipeline.client() as client, pytest.raises(httpx.ReadTimeout):
        client.post("/v1/chat/completions", json=question(pipeline, "Hi"), timeout=1)
    until(pipeline.idle, "the engine to stop", timeout=5)


def test_hanging_up_before_the_first_token(pipeline: Pipeline) -> None:
    """The client is gone while its long prompt is being computed."""
    with send(pipeline, question(pipeline, "so many words " * 1500, max_tokens=2000)):
        until(lambda: not pipeline.idle(), "work")
    until(pipeline.idle, "the engine to stop", timeout=5)


def test_a_burst_of_clients_that_all_hang_up(pipeline: Pipeline) -> None:
    """More than the engines run at once, so that some are cancelled while they wait in a queue."""
    with ExitStack() as connections:
        for number in range(48):
            connections.enter_context(send(pipeline, question(pipeline, f"number {number}")))
        until(lambda: sum(load["waiting"] for load in pipeline.loads().values()), "a queue")
    until(pipeline.idle, "the engines to stop", timeout=10)
    assert pipeline.answer()


def test_stopping_before_the_scheduler_has_the_request(cluster: Cluster) -> None:
    """SGLang sends one abort and no more, so it must not come before the request."""
    stopped = cluster.run("stop-early", sys.executable, "-m", "tests.system.stop_early")
    assert stopped.exit_code() == 0, stopped.text
    assert stopped.text.splitlines()[-1] == "cancelled"


def test_a_stop_string_ends_the_work_too(pipeline: Pipeline) -> None:
    plain = pipeline.answer(max_tokens=12)
    began = time.monotonic()
    assert pipeline.answer(stop=plain[6:9], **ENDLESS) == plain[: plain.index(plain[6:9])]
    until(pipeline.idle, "the engine to stop", timeout=5)
    assert time.monotonic() - began < 60
