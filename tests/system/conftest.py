"""Real processes for the tests: NATS, etcd and the programs, on free ports, ended by id whatever happens."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from common.engines.die_with_parent import die_with
from common.engines.ports import free_ports
from common.model import DEFAULT_MODEL
from scripts.part import etcd_command

import httpx
import openai
import pytest

REPOSITORY = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
PATIENCE = 120.0  # seconds that anything may take on a busy machine before it counts as never


def until(condition: Callable[[], Any], what: str, timeout: float = PATIENCE) -> Any:
    """The first true value of `condition`."""
    deadline = time.monotonic() + timeout
    while not (value := condition()):
        assert time.monotonic() < deadline, f"{what}: not in {timeout} s"
        time.sleep(0.05)
    return value


class Process:
    """A running program and what it has written."""

    def __init__(self, command: list[str], log: Path, env: dict[str, str], cwd: Path = REPOSITORY) -> None:
        self.log = log
        with log.open("wb") as output:
            self.popen = subprocess.Popen(
                command,
                cwd=cwd,
                env={**os.environ, **env},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
                preexec_fn=partial(die_with, os.getpid()),
            )

    @property
    def text(self) -> str:
        return self.log.read_text(errors="replace")

    def wait_for(self, text: str, count: int = 1) -> "Process":
        """Return once it has written `text`."""

        def written() -> bool:
            assert self.popen.poll() is None or text in self.text, f"it ended:\n{self.text[-3000:]}"
            return self.text.count(text) >= count

        until(written, f"{text!r} in {self.log}")
        return self

    def signal(self, number: int = signal.SIGTERM) -> None:
        self.popen.send_signal(number)

    def exit_code(self) -> int:
        return self.popen.wait(PATIENCE)

    def close(self) -> None:
        """End it and whatever it started."""
        with suppress(ProcessLookupError):
            os.killpg(self.popen.pid, signal.SIGKILL)
        self.popen.wait()


class Cluster:
    """NATS and etcd, and the programs that meet there."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.processes: list[Process] = []
        nats, client, peer, self.port = free_ports(4)
        self.env = {
            "NATS_SERVER": f"nats://127.0.0.1:{nats}",
            "ETCD_ENDPOINTS": f"http://127.0.0.1:{client}",
            "ETCD_LEASE_TTL": "10",  # for tests that wait until what they have killed is gone
        }
        self.nats = self.run(
            "nats", str(BIN / "nats-server"), "-js", "-a", "127.0.0.1", "-p", str(nats), "-sd", str(folder / "nats")
        )
        self.etcd = self.run("etcd", *etcd_command(str(BIN / "etcd"), folder, client, peer))

    def run(self, name: str, *command: str, env: dict[str, str] | None = None, cwd: Path = REPOSITORY) -> Process:
        process = Process([*command], self.folder / f"{name}.log", {**self.env, **(env or {})}, cwd)
        self.processes.append(process)
        return process

    def start(self, program: str, *options: str, name: str | None = None, env: dict[str, str] | None = None) -> Process:
        """Start one of the four programs."""
        if program == "frontend":
            options = ("--port", str(self.port), *options)
        return self.run(name or program, sys.executable, f"{program}.py", *options, env=env)

    def client(self) -> httpx.Client:
        return httpx.Client(base_url=f"http://127.0.0.1:{self.port}", timeout=PATIENCE)

    def openai(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"http://127.0.0.1:{self.port}/v1", api_key="any", max_retries=0)

    def instances(self) -> dict[str, int]:
        """How many instances of each stage the frontend knows; none while there is no frontend."""
        try:
            with self.client() as client:
                found: dict[str, int] = client.get("/health").json()["instances"]
                return found
        except httpx.TransportError:
            return {"processor": 0, "router": 0, "engine": 0}

    def wait_for_instances(self, **wanted: int) -> None:
        until(lambda: self.instances().items() >= wanted.items(), f"{wanted}, in {self.folder}")

    def workers(self) -> list[list[dict[str, Any]]]:
        """What each router knows of the workers; nothing while no router answers."""
        with self.client() as client:
            return [router["workers"] for router in client.get("/workers").json().get("routers", [])]

    def heard_of(self, worker_id: str) -> bool:
        """Whether every router has had a report or a KV event from a worker."""
        known = self.workers()
        workers = [worker for router in known for worker in router if worker["worker_id"] == worker_id]
        return 0 < len(known) == sum(worker["heard_seconds"] is not None for worker in workers)

    def close(self) -> None:
        for process in reversed(self.processes):
            process.close()


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    """NATS and etcd, and nothing else yet."""
    cluster = Cluster(tmp_path)
    yield cluster
    cluster.close()


class Pipeline(Cluster):
    """A whole pipeline, and questions to it."""

    model = "pipeline-chat"

    def ask(self, content: Any = "Hello!", *, headers: dict[str, str] | None = None, **fields: Any) -> httpx.Response:
        messages = content if isinstance(content, list) else [{"role": "user", "content": content}]
        body = {"model": self.model, "messages": messages, "max_tokens": 16, "temperature": 0, **fields}
        with self.client() as client:
            return client.post("/v1/chat/completions", json=body, headers=headers)

    def answer(self, content: Any = "Hello!", **fields: Any) -> str:
        response = self.ask(content, **fields)
        assert response.status_code == 200, response.text
        text: str = response.json()["choices"][0]["message"]["content"]
        return text

    def stream(self, content: Any = "Hello!", **fields: Any) -> list[dict[str, Any]]:
        response = self.ask(content, stream=True, **fields)
        assert response.status_code == 200, response.text
        return events(response.text)

    def loads(self) -> dict[str, dict[str, int]]:
        """By worker, the last load that it published. Needs the observer to run."""
        lines = (self.folder / "observer.log").read_text().splitlines()
        reports = [json.loads(line) for line in lines if line.startswith("{") and line.endswith("}")]
        return {report["worker"]: report for report in reports}

    def idle(self) -> bool:
        return not any(load["running"] + load["waiting"] for load in self.loads().values())


def events(text: str) -> list[dict[str, Any]]:
    """The server-sent events of a body, which must be well formed and end with [DONE]."""
    blocks = text.split("\n\n")
    assert blocks[-2:] == ["data: [DONE]", ""]
    return [json.loads(re.fullmatch(r"data: (.*)", block).group(1)) for block in blocks[:-2]]  # type: ignore[union-attr]


def said(chunks: list[dict[str, Any]]) -> str:
    """The text of a streamed answer."""
    return "".join(choice["delta"].get("content") or "" for chunk in chunks for choice in chunk["choices"])


@pytest.fixture(scope="session")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pipeline]:
    """The pipeline with two SGLang engines."""
    pipeline = Pipeline(tmp_path_factory.mktemp("pipeline"))
    try:
        for number in ("0", "1"):
            pipeline.start("engine", "--worker-id", number, "--register-model", name=f"engine-{number}")
        for program in ("router", "processor", "frontend"):
            pipeline.start(program, "--log-level", "debug")  # a line about every request, however many there are
        pipeline.wait_for_instances(processor=1, router=1, engine=2)
        pipeline.run("observer", sys.executable, "-m", "tests.system.observe").wait_for('"worker"', 2)
        yield pipeline
    finally:
        pipeline.close()


# One that knows tools, and shows what it was given of them.
TEMPLATE = """{% if tools %}<|im_start|>tools
{{ tools | tojson }}<|im_end|>
{% endif %}{% for message in messages %}<|im_start|>{{ message.role }}
{{ message | tojson }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% if enable_thinking %}<think>
{% endif %}{% endif %}"""
# By the names of models: how they write tool calls and thoughts.
PARSERS = {
    "hermes": ("hermes", "none"),
    "llama3": ("llama3", "none"),
    "mistral": ("mistral", "none"),
    "pythonic": ("pythonic", "none"),
    "thinker": ("hermes", "qwen3"),
}


@pytest.fixture(scope="session")
def scripted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pipeline]:
    """The pipeline with two workers that say what they are told, for models that write calls in each of the ways."""
    pipeline = Pipeline(tmp_path_factory.mktemp("scripted"))
    model = pipeline.folder / "model"
    model.mkdir()
    for file in DEFAULT_MODEL.iterdir():
        (model / file.name).symlink_to(file)
    (model / "chat_template.jinja").unlink()
    (model / "chat_template.jinja").write_text(TEMPLATE)
    try:
        pipeline.start("router")
        pipeline.start("frontend")
        for name, (calls, thoughts) in PARSERS.items():
            parsers = ("--tool-call-parser", calls, "--reasoning-parser", thoughts)
            pipeline.start(
                "processor", "--model", str(model), "--model-name", name, "--coalesce-ms", "0", *parsers, name=name
            )
        for number in ("0", "1"):
            command = (sys.executable, "-m", "tests.system.scripted_worker", "--model", str(model))
            pipeline.run(f"worker-{number}", *command)
        pipeline.wait_for_instances(processor=len(PARSERS), router=1, engine=2)
        yield pipeline
    finally:
        pipeline.close()
