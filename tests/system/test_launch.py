"""The one command: it says what it does, and nothing outlives it. The engines are simulated."""

import os
import pty
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from common.engines.ports import free_ports
from scripts.launch import arguments, claim
from scripts.part import LaunchError
from tests.system.conftest import REPOSITORY, Process, until

import httpx
import psutil
import pytest

GUARD = """
import argparse, sys
from collections.abc import AsyncIterator
from common.errors import InvalidRequest
from common.http.processors import Processors
from common.openai_api import DESCRIBE_MODEL, PROCESS, ChatCompletionChunk, ChatCompletionRequest
from common.remote import Remote
from common.service import Service, parser, run
from dynamo.runtime import Context, DistributedRuntime, dynamo_worker


class Guard:
    def __init__(self, processors: Processors) -> None:
        self._processors = processors

    async def process(self, request: ChatCompletionRequest, context: Context) -> AsyncIterator[ChatCompletionChunk]:
        if "password" in str(request.messages):
            raise InvalidRequest("this pipeline does not talk about passwords")
        async for chunk in self._processors.stream(request, context):
            yield chunk


@dynamo_worker()
async def main(runtime: DistributedRuntime, args: argparse.Namespace) -> None:
    endpoint = runtime.endpoint("inference.guard.process")
    process = Remote(PROCESS, await runtime.endpoint(PROCESS.path).client())
    describe = Remote(DESCRIBE_MODEL, await runtime.endpoint(DESCRIBE_MODEL.path).client())
    guard = Guard(Processors(process, describe))
    async with Service(runtime, drain_seconds=args.drain_seconds) as service:
        service.add(endpoint, PROCESS.at("inference.guard.process"), guard.process)
        await service.serve()
        await service.wait_for(process)
        await service.stopped()


if __name__ == "__main__":
    sys.exit(run(main, parser(__doc__).parse_args()))
"""


class Launch(Process):
    """launch.sh on a free port, with one of each program on any machine, unless told otherwise."""

    def __init__(self, folder: Path, *options: str, **env: str) -> None:
        self.port = free_ports(1)[0]
        command = ["./launch.sh", "--backend", "mocker", "--port", str(self.port)]
        command += ["--processors", "1", "--routers", "1", "--frontends", "1", *options]
        super().__init__(command, folder / "launch.log", env)

    def parts(self) -> list[psutil.Process]:
        return psutil.Process(self.popen.pid).children(recursive=True)

    def part(self, program: str) -> psutil.Process:
        names = (program, f"{program}.py")
        return next(part for part in self.parts() if any(word.endswith(names) for word in words(part)[:2]))

    def ask(self, content: str = "Hello!", model: str = "pipeline-chat") -> httpx.Response:
        body = {"model": model, "messages": [{"role": "user", "content": content}], "max_tokens": 4}
        return httpx.post(f"http://127.0.0.1:{self.port}/v1/chat/completions", json=body, timeout=60)

    def close(self) -> None:
        super().close()
        shutil.rmtree(self.data, ignore_errors=True)

    @property
    def data(self) -> Path:
        return REPOSITORY / "logs" / str(self.port) / "data"

    def health(self) -> str:
        try:
            status: str = httpx.get(f"http://127.0.0.1:{self.port}/health").json()["status"]
        except httpx.TransportError:
            return "down"
        return status

    def instances(self) -> dict[str, int]:
        found: dict[str, int] = httpx.get(f"http://127.0.0.1:{self.port}/health").json()["instances"]
        return found


def words(part: psutil.Process) -> list[str]:
    """The command line of a process; none if it has just ended."""
    try:
        return part.cmdline()
    except psutil.NoSuchProcess:  # a zombie is one too
        return []


@pytest.fixture
def launch(tmp_path: Path) -> Iterator[Launch]:
    launch = Launch(tmp_path)
    try:
        launch.wait_for("Ctrl-C ends it")
        yield launch
    finally:
        launch.close()


def gone(parts: list[psutil.Process]) -> None:
    until(lambda: not any(part.is_running() and part.status() != psutil.STATUS_ZOMBIE for part in parts), "the end", 30)


def test_shows_each_part_and_a_curl_that_answers(launch: Launch) -> None:
    for part in ("nats", "etcd", "engine 0", "engine 1", "router", "processor", "frontend"):
        assert f"{part} is ready" in launch.text
    assert "a first request was answered with" in launch.text
    curl = re.search(r"(curl -iN .*\\\n.*)\n", launch.text)
    assert curl
    first, second = (
        subprocess.run(["bash", "-c", curl.group(1)], capture_output=True, text=True).stdout for _ in range(2)
    )
    assert first.endswith("data: [DONE]\n\n")
    worker = re.search(r"x-worker-id: .*", first)
    assert worker and worker.group() in second
    assert re.search(r"x-kv-overlap-blocks: [1-9]", second)
    metrics = re.search(r"metrics, at http://127.0.0.1:PORT/metrics: (.*)", launch.text)
    assert metrics
    ports = dict(re.findall(r"([a-z]+(?: \d)?) (\d+)", metrics.group(1)))
    assert ports.keys() == {"engine 0", "engine 1", "router", "processor", "frontend"}
    for port in ports.values():
        assert "process_cpu_seconds_total" in httpx.get(f"http://127.0.0.1:{port}/metrics").text
    logs = re.search(r"logs: (\S+)", launch.text)
    assert logs and (REPOSITORY / logs.group(1) / "router.log").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ends_everything_in_order(launch: Launch, number: signal.Signals) -> None:
    parts = launch.parts()
    assert len(parts) >= 7
    launch.signal(number)
    assert launch.exit_code() == 0
    gone(parts)
    assert "is killed" not in launch.text
    assert "everything has ended" in launch.text
    assert not launch.data.exists()


def test_a_second_ctrl_c_ends_it_at_once(launch: Launch) -> None:
    """Also while it waits for a part that does not end."""
    parts = launch.parts()
    frontend, router = launch.part("frontend"), launch.part("router")
    router.suspend()
    launch.signal(signal.SIGINT)
    gone([frontend])
    assert router.is_running()
    launch.signal(signal.SIGINT)
    assert launch.exit_code() == 0
    gone(parts)
    assert "did not end" not in launch.text
    assert "everything has ended" in launch.text
    assert not launch.data.exists()


def test_killed_hard_it_leaves_nothing_behind(launch: Launch) -> None:
    parts = launch.parts()
    launch.signal(signal.SIGKILL)
    gone(parts)


def test_killed_hard_while_sglang_loads_it_leaves_nothing_behind(tmp_path: Path) -> None:
    launch = Launch(tmp_path, "--engines", "1", "--backend", "sglang")
    try:
        until(lambda: sum("spawn_main" in " ".join(words(part)) for part in launch.parts()) > 1, "SGLang's processes")
        parts = launch.parts()
        launch.signal(signal.SIGKILL)
        gone(parts)
    finally:
        launch.close()


def test_what_a_killed_launch_left_is_cleaned_up(tmp_path: Path) -> None:
    launch = Launch(tmp_path, "--engines", "1")
    try:
        (launch.data / "etcd").mkdir(parents=True)
        (launch.data / "etcd" / "left").touch()
        launch.wait_for("etcd is ready")
        assert not (launch.data / "etcd" / "left").exists()
    finally:
        launch.close()


def test_a_part_that_dies_during_the_start_is_said_and_started_again(tmp_path: Path) -> None:
    launch = Launch(tmp_path, "--engines", "1")
    try:
        launch.wait_for("etcd is ready").wait_for("nats is ready")
        launch.part("nats-server").kill()
        launch.wait_for("nats died (SIGKILL)").wait_for("nats is ready", 2)
        launch.wait_for("Ctrl-C ends it")
    finally:
        launch.close()


def test_a_port_is_kept_while_what_listens_there_is_down(launch: Launch, tmp_path: Path) -> None:
    """Else the programs of one launch would find the servers of another."""
    etcd = re.search(r"ETCD_ENDPOINTS=http://127.0.0.1:(\d+)", launch.text)
    assert etcd
    port = int(etcd.group(1))
    launch.part("etcd").kill()
    launch.wait_for("etcd died")
    with pytest.raises(LaunchError, match="is in use"):
        claim(port)


def test_on_another_address(tmp_path: Path) -> None:
    launch = Launch(tmp_path, "--engines", "1", "--host", "127.0.0.2")
    try:
        launch.wait_for("Ctrl-C ends it")
        assert httpx.get(f"http://127.0.0.2:{launch.port}/health").json()["status"] == "healthy"
        assert f"the pipeline is up at http://127.0.0.2:{launch.port}" in launch.text
    finally:
        launch.close()


@pytest.mark.parametrize("variable", ["NATS_SERVER", "ETCD_ENDPOINTS"])
def test_a_server_that_does_not_answer_is_said(tmp_path: Path, variable: str) -> None:
    launch = Launch(tmp_path, **{variable: "http://127.0.0.1:1"})
    try:
        assert launch.exit_code() == 1
        assert f"answers at http://127.0.0.1:1; start it, or unset {variable}" in launch.text
        assert "Traceback" not in launch.text
    finally:
        launch.close()


@pytest.mark.parametrize(
    "option", [("--port", "0"), ("--port", "99999"), ("--block-size", "0"), ("--processors", "0"), ("--engines", "x")]
)
def test_a_number_that_makes_no_sense_is_said(option: tuple[str, str]) -> None:
    done = subprocess.run(["./launch.sh", *option], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 2
    assert f"argument {option[0]}: {option[1]} is not a number from 1 to" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_part_that_dies_is_started_again(launch: Launch) -> None:
    for program, name in (("router", "router"), ("engine", "engine [01]")):
        ready = len(re.findall(f"{name} is ready", launch.text))
        launch.part(program).kill()
        until(lambda name=name: re.search(f"{name} died \\(SIGKILL\\)", launch.text), "the news")  # type: ignore[misc]
        until(lambda name=name, ready=ready: len(re.findall(f"{name} is ready", launch.text)) > ready, "its return")  # type: ignore[misc]
    # Whoever has died does not stay until its lease ends.
    until(lambda: launch.instances() == {"processor": 1, "router": 1, "engine": 2}, "those that are there", 30)
    until(lambda: launch.health() == "healthy", "health")
    assert launch.ask().status_code == 200


def test_servers_that_run_already_are_used(launch: Launch, tmp_path: Path) -> None:
    """With NATS_SERVER and ETCD_ENDPOINTS of the first launch, the second one joins its engines to it."""
    servers = dict(re.findall(r"(NATS_SERVER|ETCD_ENDPOINTS)=(\S+)", launch.text))
    port = free_ports(1)[0]
    command = ["./launch.sh", "--backend", "mocker", "--port", str(port), "--engines", "1", "--processors", "1"]
    second = Process(command, tmp_path / "second.log", servers)
    try:
        second.wait_for("Ctrl-C ends it")
        assert "using NATS at" in second.text and "using etcd at" in second.text
        assert "nats is ready" not in second.text
        assert launch.instances() == {"processor": 2, "router": 2, "engine": 3}
        second.signal()
        assert second.exit_code() == 0
        assert launch.health() == "healthy"
    finally:
        second.close()


def test_a_port_in_use_is_said(launch: Launch, tmp_path: Path) -> None:
    command = ["./launch.sh", "--backend", "mocker", "--port", str(launch.port)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 1
    assert f"port {launch.port} is in use" in done.stderr
    assert "--port N" in done.stderr


def test_a_missing_prometheus_is_said(tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    for program in ("bash", "dirname", "env", "cat", "grep", "sha256sum", "cut"):
        found = shutil.which(program)
        assert found
        (tmp_path / "bin" / program).symlink_to(found)
    command = ["./launch.sh", "--backend", "mocker", "--prometheus"]
    environment = {**os.environ, "PATH": str(tmp_path / "bin")}
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, "")
    assert "install it (apt install prometheus" in done.stderr


def test_a_missing_model_is_said(tmp_path: Path) -> None:
    port = str(free_ports(1)[0])
    command = ["./launch.sh", "--backend", "mocker", "--port", port, "--model", "/nowhere"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 1
    assert "no model at '/nowhere'" in done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr


def test_help() -> None:
    done = subprocess.run(["./launch.sh", "--help"], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0
    for option in (
        "--engines",
        "--processors",
        "--frontends",
        "--routers",
        "--model",
        "--backend",
        "--port",
        "--stage",
        "--prometheus",
    ):
        assert option in done.stdout
    for options in (
        "all programs:\n.*--drain-seconds",
        "router.py:\n.*--policy",
        "engine.py:\n.*--mocker-speedup",
        "frontend.py:\n.*--cors-origin",
    ):
        assert re.search(f"handed on to {options}", done.stdout, re.DOTALL)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--frobnicate"], "unrecognized arguments: --frobnicate"),
        (["--policy", "foo"], "argument --policy: invalid choice: 'foo'"),
        (["--router-temperature", "warm"], "argument --router-temperature: invalid float value: 'warm'"),
        (["--worker-id", "x"], "unrecognized arguments: --worker-id"),
        (["--reuse-port"], "unrecognized arguments: --reuse-port"),
        (["--model", "a", "--model", "b", "--model-name", "c"], "argument --model-name: 1 for 2 models"),
        (["--stage", "nowhere.py"], "nowhere.py is not there"),
        (["--stage", "router.py"], "router.py is not there, or has the name of another part"),
    ],
)
def test_options_that_make_no_sense_are_refused_before_anything_starts(options: list[str], reason: str) -> None:
    done = subprocess.run(["./launch.sh", *options], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("usage: launch.sh")
    assert reason in done.stderr


def test_options_of_the_programs_are_handed_on_to_those_that_have_them(tmp_path: Path) -> None:
    options = ["--router-temperature", "0.5", "--mocker-speedup", "100", "--cors-origin", "*", "--drain-seconds", "7"]
    launch = Launch(tmp_path, "--engines", "1", *options)
    try:
        launch.wait_for("Ctrl-C ends it")
        commands = {name: launch.part(name).cmdline() for name in ("engine", "router", "processor", "frontend")}
        for option, takers in {
            "--router-temperature=0.5": {"router"},
            "--mocker-speedup=100.0": {"engine"},
            "--backend=mocker": {"engine"},
            "--cors-origin=*": {"frontend"},
            "--drain-seconds=7.0": set(commands),
        }.items():
            assert {name for name, command in commands.items() if option in command} == takers
        origin = httpx.get(f"http://127.0.0.1:{launch.port}/live", headers={"origin": "http://page"})
        assert origin.headers["access-control-allow-origin"] == "*"
    finally:
        launch.close()


def test_dynamos_policy_needs_no_other_option(tmp_path: Path) -> None:
    launch = Launch(tmp_path, "--engines", "1", "--policy", "dynamo")
    try:
        launch.wait_for("Ctrl-C ends it")
        assert launch.ask().status_code == 200
    finally:
        launch.close()


def test_two_models_at_once(tmp_path: Path) -> None:
    other = tmp_path / "other-chat"
    shutil.copytree(REPOSITORY / "models" / "pipeline-chat", other)
    launch = Launch(tmp_path, "--engines", "2", "--model", "models/pipeline-chat", "--model", str(other))
    try:
        launch.wait_for("Ctrl-C ends it")
        for part in ("engine 0", "engine 1", "engine 2", "engine 3", "router", "processor 0", "processor 1"):
            assert f"{part} is ready" in launch.text
        assert (launch.data.parent / "processor-1.log").exists()
        listed = httpx.get(f"http://127.0.0.1:{launch.port}/v1/models").json()["data"]
        assert {card["id"] for card in listed} == {"pipeline-chat", "other-chat"}
        workers = {}
        for model in ("pipeline-chat", "other-chat"):
            assert re.search(f"a first request was answered with .* by {model}\n", launch.text)
            answers = [launch.ask(str(number), model) for number in range(8)]
            assert {answer.json()["model"] for answer in answers} == {model}
            workers[model] = {answer.headers["x-worker-id"] for answer in answers}
        assert workers["pipeline-chat"] <= {"0", "1"}
        assert workers["other-chat"] <= {"2", "3"}
        unknown = launch.ask(model="gpt-0")
        assert unknown.status_code == 404
        assert "'other-chat', 'pipeline-chat'" in unknown.json()["error"]["message"]
    finally:
        launch.close()


def test_several_frontends_processors_and_routers_share_the_work(tmp_path: Path) -> None:
    kinds = ("frontend", "processor", "router")
    launch = Launch(tmp_path, *(f"--{kind}s=2" for kind in kinds))
    try:
        launch.wait_for("Ctrl-C ends it")
        assert [launch.ask().status_code for _ in range(40)] == [200] * 40
        for name in (f"{kind}-{number}" for kind in kinds for number in range(2)):
            assert (launch.data.parent / f"{name}.log").read_text().count("request_id=") > 1, name
        with pytest.raises(LaunchError, match="is in use"):
            claim(launch.port)
        launch.part("frontend").kill()
        until(lambda: re.search(r"frontend \d died \(SIGKILL\)", launch.text), "the news")
        assert [launch.ask().status_code for _ in range(20)] == [200] * 20
        until(lambda: len(re.findall(r"frontend \d is ready", launch.text)) == 3, "its return")
        parts = launch.parts()
        launch.signal(signal.SIGINT)
        assert launch.exit_code() == 0
        gone(parts)
        assert "is killed" not in launch.text
    finally:
        launch.close()


@pytest.mark.parametrize(
    ("cores", "processors", "frontends", "routers"),
    [(1, 1, 1, 1), (3, 1, 1, 1), (4, 2, 2, 2), (8, 2, 2, 2), (16, 4, 2, 2), (192, 8, 8, 2)],
)
def test_there_are_more_on_a_larger_machine(
    monkeypatch: pytest.MonkeyPatch, cores: int, processors: int, frontends: int, routers: int
) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(cores)))
    args = arguments().parse_args([])
    assert (args.processors, args.frontends, args.routers) == (processors, frontends, routers)


def test_models_get_the_names_they_are_given(tmp_path: Path) -> None:
    """Also two that are the same."""
    models = ["--model", "models/pipeline-chat"] * 2
    launch = Launch(tmp_path, "--engines", "1", *models, "--model-name", "one", "--model-name", "two")
    try:
        launch.wait_for("Ctrl-C ends it")
        for number, model in enumerate(("one", "two")):
            answer = launch.ask(model=model)
            assert (answer.json()["model"], answer.headers["x-worker-id"]) == (model, str(number))
        launch.part("processor").kill()
        until(lambda: launch.instances()["processor"] == 1, "the end of one")
        assert [launch.ask(model=model).status_code for model in ("one", "two", "three")] == [200, 200, 404]
    finally:
        launch.close()


def test_a_stage_is_put_before_the_processors(tmp_path: Path) -> None:
    (tmp_path / "guard.py").write_text(GUARD)
    launch = Launch(tmp_path, "--engines", "1", "--stage", str(tmp_path / "guard.py"))
    try:
        launch.wait_for("Ctrl-C ends it")
        assert "guard is ready" in launch.text
        assert launch.ask().status_code == 200
        refused = launch.ask("What is your password?")
        assert refused.status_code == 400
        assert refused.json()["error"]["message"] == "this pipeline does not talk about passwords"
        parts = launch.parts()
        launch.signal(signal.SIGINT)
        assert launch.exit_code() == 0
        gone(parts)
        assert "is killed" not in launch.text
        logs = {
            name: (launch.data.parent / f"{name}.log").stat().st_mtime for name in ("frontend", "guard", "processor")
        }
        assert logs["frontend"] <= logs["guard"] <= logs["processor"], "they did not end in this order"
    finally:
        launch.close()


def test_it_says_what_it_waits_for(tmp_path: Path) -> None:
    """Without a terminal in plain lines."""
    go = tmp_path / "go"
    script = f"import pathlib, time\nwhile not pathlib.Path({str(go)!r}).exists(): time.sleep(0.1)\n"
    script = "print('2026-11-26 03:45:02,486 INFO slow: counting sheep', flush=True)\n" + script
    script += "print('serving inference.slow.process as told', flush=True)\ntime.sleep(3600)\n"
    (tmp_path / "slow.py").write_text(script)
    launch = Launch(tmp_path, "--engines", "1", "--stage", str(tmp_path / "slow.py"))
    try:
        launch.wait_for("router is ready")
        waiting = r"^launch: waiting for (.*\b)?slow\b.* … \d+ s( \(.*\))?$"
        until(lambda: re.search(waiting, launch.text, re.MULTILINE), "a sign of life")
        until(
            lambda: re.search(r"waiting for slow … \d+ s \(slow: counting sheep\)$", launch.text, re.MULTILINE), "more"
        )
        go.touch()
        launch.wait_for("slow is ready")
        assert "\x1b" not in launch.text
        assert "\r" not in launch.text
    finally:
        launch.close()


@pytest.mark.parametrize("no_color", ["", "1"])
def test_on_a_terminal_it_shows_what_it_waits_for_in_one_line_and_colours_unless_told_not_to(no_color: str) -> None:
    port = free_ports(1)[0]
    master, slave = pty.openpty()
    command = ["./launch.sh", "--backend", "mocker", "--engines", "1", "--port", str(port)]
    environment = {**os.environ, "TERM": "xterm", "NO_COLOR": no_color}
    launch = subprocess.Popen(
        command, cwd=REPOSITORY, env=environment, stdin=slave, stdout=slave, stderr=slave, start_new_session=True
    )
    os.close(slave)
    shown: list[bytes] = []

    def read() -> None:
        with suppress(OSError):  # of a terminal on which nobody writes any more
            while data := os.read(master, 4096):
                shown.append(data)

    reader = threading.Thread(target=read)
    reader.start()
    try:
        until(lambda: b"Ctrl-C ends it" in b"".join(shown), "the end of the start")
        [router] = [part for part in psutil.Process(launch.pid).children() if f"{REPOSITORY}/router.py" in words(part)]
        router.kill()
        until(lambda: b"router died" in b"".join(shown), "the news")
        launch.send_signal(signal.SIGINT)
        assert launch.wait(120) == 0
    finally:
        with suppress(ProcessLookupError):
            os.killpg(launch.pid, signal.SIGKILL)
        launch.wait()
        reader.join()
        os.close(master)
    text = b"".join(shown).decode()
    assert "\r\x1b[Klaunch: waiting for " in text
    coloured = (
        "\x1b[32mrouter is ready\x1b[0m",
        "\x1b[31mrouter died (SIGKILL)\x1b[0m",
        f"\x1b[1mhttp://127.0.0.1:{port}",
    )
    assert [colour in text for colour in coloured] == [not no_color] * 3
    assert ("\x1b[" in text.replace("\x1b[K", "")) == (not no_color)


class TestInstall:
    @pytest.fixture
    def copy(self, tmp_path: Path) -> Path:
        """What installs, and an environment that looks up to date but has no pip."""
        shutil.copytree(REPOSITORY / "scripts", tmp_path / "scripts")
        shutil.copy(REPOSITORY / "pyproject.toml", tmp_path)
        (tmp_path / ".venv" / "bin").mkdir(parents=True)
        (tmp_path / ".venv" / "bin" / "python").symlink_to(sys.executable)
        shutil.copy(REPOSITORY / ".venv" / ".installed", tmp_path / ".venv")
        return tmp_path

    def install(self, folder: Path) -> "subprocess.CompletedProcess[str]":
        """Where no Python is found with which an environment could be made."""
        environment = {**os.environ, "PYTHON": "python2"}
        return subprocess.run([folder / "scripts/install", "--dev"], env=environment, capture_output=True, text=True)

    def test_it_does_nothing_when_another_part_of_pyproject_changes(self, copy: Path) -> None:
        pyproject = copy / "pyproject.toml"
        pyproject.write_text("# new\n" + pyproject.read_text().replace("line-length = 120", "line-length = 100"))
        done = self.install(copy)
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")

    @pytest.mark.parametrize("package", ["fastapi", "sglang", "ruff", "ai-dynamo"])
    def test_it_installs_again_when_a_list_of_packages_changes(self, copy: Path, package: str) -> None:
        pyproject = copy / "pyproject.toml"
        pyproject.write_text(re.sub(f'"{package}==[^"]*"', f'"{package}==1.0"', pyproject.read_text()))
        done = self.install(copy)
        assert done.returncode == 1
        assert "no Python 3.11 or later found" in done.stderr

    def test_a_second_time_it_does_nothing(self) -> None:
        done = subprocess.run(["scripts/install"], cwd=REPOSITORY, capture_output=True, text=True)
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")

    def test_without_python_it_says_what_is_missing(self, copy: Path) -> None:
        shutil.rmtree(copy / ".venv")
        done = self.install(copy)
        assert done.returncode == 1
        assert "no Python 3.11 or later found" in done.stderr
