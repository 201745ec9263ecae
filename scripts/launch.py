"""Runs the whole pipeline on this machine: NATS, etcd, the engines, the router, the processor and the frontend.

Starts each part, waits until all are ready, checks them with a real request, and then watches over them: a part that
dies is started again. Ctrl-C ends everything in order.

With NATS_SERVER or ETCD_ENDPOINTS set, those servers are used and none is started.
"""

import argparse
import asyncio
import ctypes
import errno
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Coroutine, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

REPOSITORY = Path(__file__).parent.parent
NATS_PAYLOAD = "32MB"  # a prompt of a million tokens is about 7 MB of token ids
START_SECONDS = 900  # a large model takes minutes to load, and to download even longer
REACH_SECONDS = 10  # for servers that are said to run already
STOP_SECONDS = 45  # the programs give requests in progress 30
BACK_OFF = (1.0, 30.0)  # seconds before a part is started again, at first and at most
STEADY_SECONDS = 60  # after so long the next death counts as the first
GPU_SHARE = 0.85  # of a GPU's memory for engines
PR_SET_PDEATHSIG = 1


class LaunchError(Exception):
    """The pipeline cannot start, with what to do about it."""


@dataclass
class Part:
    """A process of the pipeline."""

    name: str
    command: Sequence[str]
    log: Path
    ready: str  # what its log says when it is ready
    environment: Mapping[str, str] = field(default_factory=dict)
    process: asyncio.subprocess.Process | None = None
    _log_start: int = 0

    async def start(self) -> None:
        """Start it, or start it again."""
        if self.process is None:
            self.log.write_bytes(b"")
        self._log_start = self.log.stat().st_size
        with self.log.open("ab") as output:
            self.process = await asyncio.create_subprocess_exec(
                *self.command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                cwd=REPOSITORY,
                env={**os.environ, **self.environment},
                start_new_session=True,  # Ctrl-C reaches the launcher alone, which ends the parts in order
                preexec_fn=_die_with_parent(os.getpid()),
            )

    async def wait_until_ready(self) -> None:
        """Raises LaunchError if the part dies first, or takes too long."""
        began = time.monotonic()
        while self.ready not in self._log_text():
            if self.process is None or self.process.returncode is not None:
                raise LaunchError(f"{self.name} died. The end of {self.log}:\n{self.tail()}")
            if time.monotonic() - began > START_SECONDS:
                raise LaunchError(f"{self.name} is not ready after {START_SECONDS} s; see {self.log}")
            await asyncio.sleep(0.1)
        say(f"{self.name} is ready ({time.monotonic() - began:.1f} s)")

    async def stop(self, seconds: float) -> None:
        """End it with SIGTERM, after `seconds` with SIGKILL, and with it whatever it started."""
        if self.process is None:
            return
        if self.process.returncode is None:
            self.process.terminate()
            try:
                await asyncio.wait_for(self.process.wait(), seconds)
            except TimeoutError:
                say(f"{self.name} did not end after {seconds:g} s and is killed")
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        await self.process.wait()

    def tail(self, lines: int = 15) -> str:
        return "\n".join("    " + line for line in self._log_text().splitlines()[-lines:])

    def _log_text(self) -> str:
        return self.log.read_bytes()[self._log_start :].decode(errors="replace")


def _die_with_parent(parent: int) -> Callable[[], None]:
    """For the child between fork and exec: the kernel kills it when the launcher is gone, however that went."""
    libc = ctypes.CDLL(None)

    def prepare() -> None:
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)

    return prepare


class Launcher:
    """The parts of one pipeline."""

    def __init__(self, args: argparse.Namespace, extra: list[str]) -> None:
        self._args = args
        self._extra = extra
        self._address = address_of(args.host, args.port)
        self._logs = REPOSITORY / "logs" / str(args.port)
        self._data = self._logs / "data"
        self._claims: list[socket.socket] = []
        self._environment: dict[str, str] = {}
        self._parts: list[Part] = []
        self._watches: list[asyncio.Task[bool]] = []
        self._stopping = asyncio.Event()
        self._hurry = False

    async def run(self) -> None:
        """Start everything, watch over it until a signal comes, and end it."""
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            asyncio.get_running_loop().add_signal_handler(number, self._stop)
        try:
            if await self._unless_stopped(self._start()):
                self._report()
                await asyncio.gather(*self._watches)
        finally:
            await self._end()

    def _stop(self) -> None:
        self._hurry = self._stopping.is_set()
        self._stopping.set()
        if self._hurry:
            for part in self._parts:
                if part.process and part.process.returncode is None:
                    part.process.kill()

    async def _unless_stopped(self, work: Coroutine[Any, Any, None]) -> bool:
        """Do `work` to its end, or until it is time to stop. Whether it came to its end."""
        task, stop = asyncio.create_task(work), asyncio.create_task(self._stopping.wait())
        await asyncio.wait((task, stop), return_when=asyncio.FIRST_COMPLETED)
        stop.cancel()
        if task.done():
            task.result()
            return True
        task.cancel()
        await asyncio.wait((task,))
        return False

    async def _start(self) -> None:
        args = self._args
        self._claim_http_port()
        shutil.rmtree(self._data, ignore_errors=True)  # of a launch that was killed
        self._data.mkdir(parents=True)
        await self._start_servers()
        send_tokens = ["--send-tokens"] if args.policy == "dynamo" else []
        engines = [self._engine(number) for number in range(args.engines)]
        model = self._model_options()
        others = [
            self._program("router", [*model, "--policy", args.policy], "serving inference.router.find_worker"),
            self._program("processor", [*model, *send_tokens], "serving inference.processor.process"),
            self._program("frontend", ["--port", str(args.port), "--host", args.host], "listening on"),
        ]
        await asyncio.gather(self._start_engines(engines), *(self._start_part(part) for part in others))
        await asyncio.to_thread(self._check)

    def _claim_http_port(self) -> None:
        host, port = self._args.host, self._args.port
        try:
            self._claims.append(claim(port, host))
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise LaunchError(f"cannot listen on {host}:{port} (--host, --port): {error.strerror}") from error
            command = sys.argv[0].replace("scripts/launch.py", "launch.sh")
            raise LaunchError(f"port {port} is in use; use another one: {command} --port N") from error

    def _prefer_port(self, port: int) -> int:
        """`port` if it is free, else one that is."""
        taken = port
        while True:
            try:
                self._claims.append(claim(taken))
                break
            except OSError:
                taken = any_port()
        if taken != port:
            say(f"port {port} is in use; taking {taken}")
        return taken

    async def _start_servers(self) -> None:
        servers = []
        if "NATS_SERVER" in os.environ:
            await reach("NATS", "NATS_SERVER", 4222)
        else:
            port = self._prefer_port(4222)
            config = self._data / "nats.conf"
            config.write_text(
                f"host: 127.0.0.1\nport: {port}\nmax_payload: {NATS_PAYLOAD}\n"
                f'jetstream {{ store_dir: "{self._data}/nats" }}\n'
            )
            servers.append(self._part("nats", [find("nats-server"), "-c", str(config)], "Server is ready"))
            self._environment["NATS_SERVER"] = f"nats://127.0.0.1:{port}"
        if "ETCD_ENDPOINTS" in os.environ:
            await reach("etcd", "ETCD_ENDPOINTS", 2379)
        else:
            client, peer = (f"http://127.0.0.1:{self._prefer_port(port)}" for port in (2379, 2380))
            command = [
                find("etcd"),
                f"--data-dir={self._data}/etcd",
                f"--listen-client-urls={client}",
                f"--advertise-client-urls={client}",
                f"--listen-peer-urls={peer}",
                f"--initial-advertise-peer-urls={peer}",
                f"--initial-cluster=default={peer}",
                "--unsafe-no-fsync",  # nothing in it outlives this run
            ]
            servers.append(self._part("etcd", command, "ready to serve client requests"))
            self._environment["ETCD_ENDPOINTS"] = client
        await asyncio.gather(*(self._start_part(part) for part in servers))

    async def _start_engines(self, engines: list[Part]) -> None:
        """All at once, but one after the other where they share a GPU: each measures what is free."""
        gpus = count_gpus() if self._args.backend == "sglang" else 0
        rows = [engines[first::gpus] for first in range(min(gpus, len(engines)))] if gpus else [[e] for e in engines]

        async def start_row(row: list[Part], gpu: int) -> None:
            for number, part in enumerate(row):
                if gpus:
                    part.environment = {**part.environment, "CUDA_VISIBLE_DEVICES": str(gpu)}
                    part.command = [*part.command, "--gpu-memory-fraction", f"{GPU_SHARE / (len(row) - number):.3f}"]
                await self._start_part(part)

        await asyncio.gather(*(start_row(row, gpu) for gpu, row in enumerate(rows)))

    def _model_options(self) -> list[str]:
        options = ["--block-size", str(self._args.block_size)]
        for name in ("model", "model_name"):
            if value := getattr(self._args, name):
                options += [f"--{name.replace('_', '-')}", value]
        return options

    def _engine(self, number: int) -> Part:
        options = ["--worker-id", str(number), "--backend", self._args.backend, *self._model_options(), *self._extra]
        part = self._program("engine", options, "serving inference.engine.generate")
        part.name, part.log = f"engine {number}", self._logs / f"engine-{number}.log"
        return part

    def _program(self, name: str, options: list[str], ready: str) -> Part:
        return self._part(name, [sys.executable, str(REPOSITORY / f"{name}.py"), *options], ready)

    def _part(self, name: str, command: Sequence[str], ready: str) -> Part:
        return Part(name, command, self._logs / f"{name}.log", ready, self._environment)

    async def _start_part(self, part: Part) -> None:
        self._parts.append(part)
        await part.start()
        await part.wait_until_ready()
        self._watches.append(asyncio.create_task(self._unless_stopped(self._watch(part))))

    def _check(self) -> None:
        """Ask the pipeline a real question, once every engine has joined."""
        deadline = time.monotonic() + 30
        while not self._healthy(health := self._health()):
            if time.monotonic() > deadline:
                raise LaunchError(f"the parts are ready but do not find each other: {health}; see {self._logs}")
            time.sleep(0.1)
        try:
            self._model = self._get("/v1/models")["data"][0]["id"]
            question = {"model": self._model, "messages": [{"role": "user", "content": "Hello!"}], "max_tokens": 16}
            began = time.monotonic()
            answer = self._get("/v1/chat/completions", question)
        except OSError as error:
            reason = error.read().decode() if isinstance(error, urllib.error.HTTPError) else error
            raise LaunchError(f"a first request failed: {reason}; see {self._logs}") from error
        tokens = answer["usage"]["completion_tokens"]
        say(f"a first request was answered with {tokens} tokens in {time.monotonic() - began:.2f} s")

    def _healthy(self, health: Any) -> bool:
        return bool(health["status"] == "healthy" and health["instances"]["engine"] >= self._args.engines)

    def _health(self) -> Any:
        try:
            return self._get("/health")
        except urllib.error.HTTPError as error:
            return json.load(error)
        except OSError as error:  # the frontend died and is being started again
            return {"status": str(error)}

    def _get(self, path: str, body: object = None) -> Any:
        request = urllib.request.Request(
            f"{self._address}{path}",
            data=json.dumps(body).encode() if body else None,
            headers={"content-type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=60) as response:
            return json.load(response)

    def _report(self) -> None:
        address = self._address
        question = "What does the router do, and how does it know which worker has my prompt cached?"
        body = {
            "model": self._model,
            "stream": True,
            "max_tokens": 64,
            "messages": [{"role": "user", "content": question}],
        }
        servers = " ".join(f"{name}={value}" for name, value in self._environment.items())
        say(f"the pipeline is up at {address} (OpenAI clients: {address}/v1)")
        if servers:
            say(f"for a program of your own beside it: {servers}")
        say(f"logs: {self._logs.relative_to(REPOSITORY)}/")
        say("try this, twice: the second time, x-kv-overlap-blocks says how much of it the same worker had cached")
        print(f"\n  curl -iN {address}/v1/chat/completions -H 'content-type: application/json' \\")
        print(f"    -d '{json.dumps(body)}'\n")
        say("Ctrl-C ends it")

    async def _watch(self, part: Part) -> None:
        """Start the part again whenever it dies, later each time."""
        pause, limit = BACK_OFF
        while True:
            assert part.process is not None
            began = time.monotonic()
            code = await part.process.wait()
            if time.monotonic() - began > STEADY_SECONDS:
                pause = BACK_OFF[0]
            say(f"{part.name} died ({describe(code)}). The end of {part.log}:\n{part.tail(5)}")
            say(f"starting {part.name} again in {pause:g} s")
            await part.stop(0)
            await asyncio.sleep(pause)
            pause = min(pause * 2, limit)
            await part.start()
            try:
                await part.wait_until_ready()
            except LaunchError as error:
                say(str(error))

    async def _end(self) -> None:
        """End the parts: first who asks, then who is asked."""
        self._stopping.set()
        order = ["frontend", "processor", "router", "engine", "etcd", "nats"]
        for name in order:
            parts = [part for part in self._parts if part.name.split()[0] == name and part.process]
            seconds = 0 if self._hurry else STOP_SECONDS
            await asyncio.gather(*(part.stop(seconds) for part in parts))
        if self._parts:
            shutil.rmtree(self._data, ignore_errors=True)
            say("everything has ended")


def say(text: str) -> None:
    print(f"launch: {text}", flush=True)


def describe(code: int) -> str:
    return f"exit {code}" if code >= 0 else signal.Signals(-code).name


def find(program: str) -> str:
    """The program on the PATH, else the one in the environment."""
    found = shutil.which(program) or shutil.which(program, path=os.path.dirname(sys.executable))
    if not found:
        raise LaunchError(f"{program} is neither on the PATH nor in the environment: delete .venv and try again")
    return found


def claim(port: int, host: str = "127.0.0.1") -> socket.socket:
    """Take a port that nobody listens on. Until the socket that comes back is closed, no other launch gets it, not even
    while the server that this one runs there is down. Raises OSError."""
    socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET).close()
    name = socket.socket(socket.AF_UNIX)
    try:
        name.bind(f"\0inference-port-{port}")
    except OSError:
        name.close()
        raise
    return name


def any_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port: int = probe.getsockname()[1]
        return port


def address_of(host: str, port: int) -> str:
    """Where this machine reaches a server that listens on `host`."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


async def reach(name: str, variable: str, default_port: int) -> None:
    """Return once a server of the environment's `variable`, comma-separated URLs, accepts connections."""
    addresses = os.environ[variable]
    say(f"using {name} at {addresses}")
    deadline = time.monotonic() + REACH_SECONDS
    while True:
        for address in addresses.split(","):
            url = urlsplit(address.strip() if "//" in address else f"//{address.strip()}")
            with suppress(OSError):
                _, writer = await asyncio.open_connection(url.hostname, url.port or default_port)
                writer.close()
                return
        if time.monotonic() > deadline:
            raise LaunchError(f"no {name} answers at {addresses}; start it, or unset {variable} to have one started")
        await asyncio.sleep(0.5)


def count_gpus() -> int:
    try:
        listing = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return 0
    return listing.count("GPU ")


def number(most: int) -> Callable[[str], int]:
    """For argparse: a whole number from 1 to `most`."""

    def parse(text: str) -> int:
        if not text.isdecimal() or not 1 <= int(text) <= most:
            raise argparse.ArgumentTypeError(f"{text} is not a number from 1 to {most}")
        return int(text)

    return parse


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="launch.sh", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--engines", type=number(1000), default=2, help="number of engines (default: 2)")
    parser.add_argument(
        "--model", help="folder of the model, or its name on the Hugging Face hub (default: models/pipeline-chat)"
    )
    parser.add_argument("--model-name", help="what clients call it (default: the folder's or hub's name)")
    parser.add_argument("--backend", choices=["sglang", "mocker"], default="sglang", help="mocker: simulated engines")
    parser.add_argument("--policy", default="kv", help="how the router chooses, see router.py --help (default: kv)")
    parser.add_argument("--block-size", type=number(2**16), default=16, help="tokens in a KV block (default: 16)")
    parser.add_argument("--port", type=number(2**16 - 1), default=8000, help="HTTP port (default: 8000)")
    parser.add_argument("--host", default="127.0.0.1", help="HTTP address; 0.0.0.0 for all (default: 127.0.0.1)")
    parser.epilog = "All other options go to every engine: see `.venv/bin/python engine.py --help`."
    return parser


def main() -> None:
    args, extra = arguments().parse_known_args()
    try:
        asyncio.run(Launcher(args, extra).run())
    except LaunchError as error:
        raise SystemExit(f"launch: {error}") from error


if __name__ == "__main__":
    main()
