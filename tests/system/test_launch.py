"""The one command: it says what it does, and nothing outlives it. The engines are simulated."""

import os
import re
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

from scripts.launch import claim
from tests.system.conftest import REPOSITORY, Process, free_ports, until

import httpx
import psutil
import pytest


class Launch(Process):
    """launch.sh on a free port."""

    def __init__(self, folder: Path, *options: str, **env: str) -> None:
        self.port = free_ports(1)[0]
        command = ["./launch.sh", "--backend", "mocker", "--port", str(self.port), *options]
        super().__init__(command, folder / "launch.log", env)

    def parts(self) -> list[psutil.Process]:
        return psutil.Process(self.popen.pid).children(recursive=True)

    def part(self, program: str) -> psutil.Process:
        names = (program, f"{program}.py")
        return next(part for part in self.parts() if any(word.endswith(names) for word in part.cmdline()[:2]))

    @property
    def data(self) -> Path:
        return REPOSITORY / "logs" / str(self.port) / "data"

    def health(self) -> str:
        try:
            status: str = httpx.get(f"http://127.0.0.1:{self.port}/health").json()["status"]
        except httpx.TransportError:
            return "down"
        return status


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


def test_killed_hard_it_leaves_nothing_behind(launch: Launch) -> None:
    parts = launch.parts()
    launch.signal(signal.SIGKILL)
    gone(parts)


def test_killed_hard_while_sglang_loads_it_leaves_nothing_behind(tmp_path: Path) -> None:
    launch = Launch(tmp_path, "--engines", "1", "--backend", "sglang")
    try:
        until(
            lambda: sum("spawn_main" in " ".join(part.cmdline()) for part in launch.parts()) > 1, "SGLang's processes"
        )
        parts = launch.parts()
        launch.signal(signal.SIGKILL)
        gone(parts)
    finally:
        launch.close()
        shutil.rmtree(launch.data, ignore_errors=True)


def test_what_a_killed_launch_left_is_cleaned_up(tmp_path: Path) -> None:
    launch = Launch(tmp_path, "--engines", "1")
    try:
        (launch.data / "etcd").mkdir(parents=True)
        (launch.data / "etcd" / "left").touch()
        launch.wait_for("etcd is ready")
        assert not (launch.data / "etcd" / "left").exists()
    finally:
        launch.close()
        shutil.rmtree(launch.data)


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
    with pytest.raises(OSError):
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
    "option", [("--port", "0"), ("--port", "99999"), ("--block-size", "0"), ("--engines", "0"), ("--engines", "x")]
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
    until(lambda: launch.health() == "healthy", "health")
    body = {"model": "pipeline-chat", "messages": [{"role": "user", "content": "Hello!"}], "max_tokens": 4}
    assert httpx.post(f"http://127.0.0.1:{launch.port}/v1/chat/completions", json=body).status_code == 200


def test_servers_that_run_already_are_used(launch: Launch, tmp_path: Path) -> None:
    """With NATS_SERVER and ETCD_ENDPOINTS of the first launch, the second one joins its engines to it."""
    servers = dict(re.findall(r"(NATS_SERVER|ETCD_ENDPOINTS)=(\S+)", launch.text))
    port = free_ports(1)[0]
    command = ["./launch.sh", "--backend", "mocker", "--port", str(port), "--engines", "1"]
    second = Process(command, tmp_path / "second.log", servers)
    try:
        second.wait_for("Ctrl-C ends it")
        assert "using NATS at" in second.text and "using etcd at" in second.text
        assert "nats is ready" not in second.text
        health = httpx.get(f"http://127.0.0.1:{port}/health").json()
        assert health["instances"] == {"processor": 2, "router": 2, "engine": 3}
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
    for option in ("--engines", "--model", "--backend", "--port"):
        assert option in done.stdout


class TestInstall:
    def test_a_second_time_it_does_nothing(self) -> None:
        done = subprocess.run(["scripts/install"], cwd=REPOSITORY, capture_output=True, text=True)
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")

    def test_without_python_it_says_what_is_missing(self, tmp_path: Path) -> None:
        for folder in ("scripts", "scripts/requirements"):
            (tmp_path / folder).mkdir()
            for file in (REPOSITORY / folder).iterdir():
                if file.is_file():
                    target = tmp_path / folder / file.name
                    target.write_bytes(file.read_bytes())
                    target.chmod(0o755)
        done = subprocess.run(
            [tmp_path / "scripts/install"], env={**os.environ, "PYTHON": "python2"}, capture_output=True, text=True
        )
        assert done.returncode == 1
        assert "no Python 3.11 or later found" in done.stderr
