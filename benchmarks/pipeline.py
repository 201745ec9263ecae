"""The pipeline under test: started as a user starts it, watched, and ended."""

import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from common.engines.die_with_parent import die_with
from common.engines.ports import free_ports

import psutil

REPOSITORY = Path(__file__).parent.parent
UP = re.compile(r"(NATS_SERVER)=(\S+) (ETCD_ENDPOINTS)=(\S+)\n")  # in what launch.py says once it is up
START_SECONDS = 300
STOP_SECONDS = 60
FILES = 65536  # that a process may have open: connections, most of all
CONTEXT_TOKENS = 2**20  # as much as a simulated engine takes


@dataclass(slots=True, frozen=True)
class Setting:
    """What a pipeline is made of. All policies get the same."""

    engines: int
    block_size: int  # tokens
    blocks: int  # of KV cache, for each engine
    engine_speedup: float  # times faster than the GPU that is simulated


@dataclass(slots=True, frozen=True)
class Variant:
    """A policy of router.py with settings of its own."""

    policy: str
    options: Sequence[str] = ()  # of launch.py
    environment: Mapping[str, str] = field(default_factory=dict)


# By name; any other name is that of a policy as it is by default. The settings are those of reference.TUNED.
VARIANTS = {
    "dynamo-tuned": Variant(
        "dynamo",
        ("--prefill-load-scale", "32"),
        {"DYN_ROUTER_QUEUE_THRESHOLD": "0", "DYN_ROUTER_QUEUE_POLICY": "wspt"},
    )
}


@dataclass(slots=True)
class Pipeline:
    """A pipeline that runs."""

    address: str
    servers: dict[str, str]  # environment of programs that join it
    process: psutil.Process

    def cpu_seconds(self) -> float:
        """CPU time that all its processes have used so far."""
        return sum(map(seconds_of, family(self.process.pid)))


@contextmanager
def running(setting: Setting, policy: str, model: Path, folder: Path) -> Iterator[Pipeline]:
    """Start a pipeline with empty caches, and end it after the block. Its output goes to a file in `folder`."""
    variant = VARIANTS.get(policy, Variant(policy))
    options = ["--backend", "mocker", "--model", str(model), "--engines", str(setting.engines)]
    options += ["--block-size", str(setting.block_size), "--mocker-blocks", str(setting.blocks)]
    options += ["--mocker-speedup", str(setting.engine_speedup), "--routers", "1"]
    options += ["--policy", variant.policy, *variant.options]
    with launched(options, folder / f"{policy}.log", variant.environment) as pipeline:
        yield pipeline


@contextmanager
def launched(options: Sequence[str], log: Path, environment: Mapping[str, str] | None = None) -> Iterator[Pipeline]:
    """Start a pipeline as a user does, with these options, and end it after the block. Its output goes to `log`."""
    (port,) = free_ports(1)
    command = [sys.executable, "-m", "scripts.launch", "--port", str(port), *options]
    # Servers that the user runs may have other engines in them.
    ours = {name: value for name, value in os.environ.items() if name not in ("NATS_SERVER", "ETCD_ENDPOINTS")}
    launch = spawn(command, log, {**ours, **(environment or {})}, signal.SIGINT)
    try:
        servers = _wait_until_up(launch, log)
        yield Pipeline(f"http://127.0.0.1:{port}", servers, psutil.Process(launch.pid))
    finally:
        _end(launch)


def spawn(
    command: list[str], log: Path, environment: Mapping[str, str], last: signal.Signals
) -> subprocess.Popen[bytes]:
    """Start a program that writes to `log`. It gets the signal `last` should the benchmark die."""
    with log.open("wb") as output:
        return subprocess.Popen(
            command,
            cwd=REPOSITORY,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,  # Ctrl-C reaches the benchmark alone, which then ends what it has started
            preexec_fn=partial(die_with, os.getpid(), last),
        )


def open_many_files() -> None:
    """Let this process and those that it starts have as many connections as the system allows."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (FILES if most == resource.RLIM_INFINITY else min(most, FILES), most))


def family(pid: int) -> list[psutil.Process]:
    """A process and those that it has started."""
    process = psutil.Process(pid)
    return [process, *process.children(recursive=True)]


def seconds_of(process: psutil.Process) -> float:
    """CPU time that a process has used so far; 0 once it has ended."""
    with suppress(psutil.NoSuchProcess):
        times = process.cpu_times()
        return times.user + times.system
    return 0.0


def simulated_model(source: Path, folder: Path) -> Path:
    """A copy of a model whose context is as long as the simulation allows. There are no weights to be too small."""
    copy = folder / source.name
    copy.mkdir()
    for file in source.iterdir():
        if file.name != "config.json":
            (copy / file.name).symlink_to(file.resolve())
    config = json.loads((source / "config.json").read_text())
    config.get("text_config", config)["max_position_embeddings"] = CONTEXT_TOKENS
    (copy / "config.json").write_text(json.dumps(config))
    return copy


def _wait_until_up(launch: subprocess.Popen[bytes], log: Path) -> dict[str, str]:
    """Returns where its NATS and etcd are, as environment variables. Raises SystemExit if it does not start."""
    deadline = time.monotonic() + START_SECONDS
    while not (up := UP.search(text := log.read_text(errors="replace"))):
        if launch.poll() is not None:
            raise SystemExit(f"the pipeline did not start:\n{text[-3000:]}")
        if time.monotonic() > deadline:
            raise SystemExit(f"the pipeline is not up after {START_SECONDS} s:\n{text[-3000:]}")
        time.sleep(0.1)
    return {up[1]: up[2], up[3]: up[4]}


def _end(launch: subprocess.Popen[bytes]) -> None:
    """End the pipeline in order; if that takes too long, all of its processes at once."""
    children: list[psutil.Process] = []
    with suppress(psutil.NoSuchProcess):
        children = psutil.Process(launch.pid).children(recursive=True)
    launch.send_signal(signal.SIGINT)
    try:
        launch.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        launch.kill()
        launch.wait()
    for process in children:
        with suppress(psutil.NoSuchProcess):
            process.kill()
