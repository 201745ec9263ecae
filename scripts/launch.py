"""Runs the whole pipeline on this machine: NATS, etcd, the engines, the routers, the processors and the frontends.

Starts each part, waits until all are ready, checks them with real requests, and then watches over them: a part that
dies is started again. Ctrl-C ends everything in order.

With NATS_SERVER or ETCD_ENDPOINTS set, those servers are used and none is started.
"""

import argparse
import asyncio
import errno
import http.client
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from itertools import groupby
from pathlib import Path
from typing import Any

import engine
import frontend
import processor
import router
from common import service
from common.engines.ports import free_ports
from common.errors import StartupError
from common.http.access import read_keys
from common.messages import FIND_WORKER, GENERATE, NAMESPACE
from common.model import BLOCK_SIZE, DEFAULT_MODEL, served_name
from common.openai_api import PROCESS
from scripts.part import BOLD, CLEAR_LINE, REPOSITORY, TERMINAL, LaunchError, Part, etcd_command, paint, say

NATS_PAYLOAD = "32MB"  # a prompt of a million tokens is about 7 MB of token ids
REACH_SECONDS = 10  # for servers that are said to run already
JOIN_SECONDS = 30  # for parts that are ready to find each other
ANSWER_SECONDS = 60
STOP_SECONDS = 15  # for a program to end, besides what it gives requests in progress
SIGN_SECONDS = 0.5 if TERMINAL else 10.0  # between signs of life while parts start
GPU_SHARE = 0.85  # of a GPU's memory for engines
SYSTEM_PORT = 18000  # the first for metrics: the kernel hands out none so low, so each stays its part's own
SPARE_CORES = 4  # from which there are two of each program but engines, so that one can die or be restarted
SPARE = f"from {SPARE_CORES} cores on at least two"
SCRAPE_SECONDS = 2  # between two looks of Prometheus at all parts
SAID = 90  # characters of what a part says while it starts, where that is no terminal
QUESTION = "What does the router do, and how does it know which worker has my prompt cached?"
# What --demo adds: two minutes on the page.
TOUR = (
    "Click one of the questions in the chat: a dot goes from frontend to processor to router and to an engine.",
    "Ask another one: green squares are blocks of the conversation that an engine has cached, so it costs less there.",
    'Read under "The last decisions" why each engine won, and click one for the life of its request.',
    'Click "Send 20 like it": they share a beginning, so most of their blocks come from a cache.',
    'Click "Send 20 different ones": nothing is cached, so they go to whoever has least to do.',
    "Ask for something long, and kill the engine that answers: another one goes on in the middle of the answer.",
)
OURS = ("worker_id", "reuse_port")  # options of the programs that are not for the user to set
LOCAL = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # where this machine reaches a server that listens on all addresses


# The command lines of the programs, whose options are handed on.
PARSERS = {
    "processor": processor.arguments,
    "router": router.arguments,
    "engine": engine.arguments,
    "frontend": frontend.arguments,
}


class Launcher:
    """The parts of one pipeline."""

    def __init__(self, args: argparse.Namespace) -> None:
        self._args = args
        self._host = LOCAL.get(args.host, args.host)
        self._logs = REPOSITORY / "logs" / str(args.port)
        self._data = self._logs / "data"
        self._claims: list[socket.socket] = []
        self._environment: dict[str, str] = {}
        self._headers = {"content-type": "application/json"}
        if args.api_keys_file:
            self._headers["authorization"] = f"Bearer {read_keys(args.api_keys_file)[0]}"
        self._system_ports: dict[str, int] = {}  # by part
        self._prometheus = ""  # its address
        self._parts: list[Part] = []

    async def run(self) -> None:
        """Start everything, watch over it until a signal comes, and end it. Raises LaunchError if it cannot start."""
        work = asyncio.create_task(self._work())

        def stop() -> None:
            if work.cancelling() or not work.cancel():  # for the second time
                for part in self._parts:
                    part.kill()

        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            asyncio.get_running_loop().add_signal_handler(number, stop)
        try:
            await work
        except asyncio.CancelledError:
            pass
        except ExceptionGroup as errors:
            raise errors.exceptions[0] from None
        finally:
            await self._end()

    async def _work(self) -> None:
        if self._args.prometheus and not shutil.which("prometheus"):
            hint = "apt install prometheus, or https://prometheus.io/download"
            raise LaunchError(f"--prometheus: there is none on the PATH; install it ({hint}), or leave the option out")
        try:
            self._claims.append(claim(self._args.port, self._args.host))
        except LaunchError as error:
            raise LaunchError(f"{error}; use another one: ./launch.sh --port N") from error
        shutil.rmtree(self._data, ignore_errors=True)  # of a launch that was killed
        self._data.mkdir(parents=True)
        async with asyncio.TaskGroup() as group:

            async def start(parts: list[Part]) -> None:
                """One after the other."""
                for part in parts:
                    await part.start()
                    group.create_task(part.keep_running())

            signs = group.create_task(self._show_signs_of_life())
            # All at once: the programs wait for NATS and etcd themselves.
            rows = [await self._nats(), await self._etcd(), *self._engines(), *self._others(), self._scraper()]
            self._parts += [part for row in rows for part in row]
            await asyncio.gather(*(group.create_task(start(row)) for row in rows))
            model = await self._check()
            signs.cancel()
            self._report(model)

    async def _show_signs_of_life(self) -> None:
        """Say what is being waited for, and what one of that says itself: on a terminal in one line that changes, else
        now and then."""
        began = time.monotonic()
        while True:
            await asyncio.sleep(SIGN_SECONDS)
            waiting = [part for part in self._parts if not part.ready]
            names = ", ".join(part.name for part in waiting) or "answers"
            text = f"launch: waiting for {names} … {time.monotonic() - began:.0f} s"
            if waiting and (said := (speaker := max(waiting, key=Part.wrote_at)).last_words()):
                text += f" ({speaker.name}: {said if len(said) <= SAID else f'{said[:SAID]}…'})"
            columns = shutil.get_terminal_size().columns - 1  # a line that wraps could not be cleared
            print(f"{CLEAR_LINE}{text[:columns]}" if TERMINAL else f"{text}\n", end="", flush=True)

    def _server_port(self, wanted: int) -> int:
        """Claim the port that is wanted, or another one if it is in use."""
        try:
            self._claims.append(claim(wanted))
            return wanted
        except LaunchError as error:
            [port] = free_ports(1)
            say(f"{error}; taking {port}")
            return self._server_port(port)

    async def _nats(self) -> list[Part]:
        if await runs_already("NATS", "NATS_SERVER"):
            return []
        port = self._server_port(4222)
        config = self._data / "nats.conf"
        config.write_text(
            f"host: 127.0.0.1\nport: {port}\nmax_payload: {NATS_PAYLOAD}\n"
            f'jetstream {{ store_dir: "{self._data}/nats" }}\n'
        )
        self._environment["NATS_SERVER"] = f"nats://127.0.0.1:{port}"
        return [self._part("nats", [find("nats-server"), "-c", str(config)], "Server is ready")]

    async def _etcd(self) -> list[Part]:
        if await runs_already("etcd", "ETCD_ENDPOINTS"):
            return []
        client, peer = self._server_port(2379), self._server_port(2380)
        self._environment["ETCD_ENDPOINTS"] = f"http://127.0.0.1:{client}"
        command = etcd_command(find("etcd"), self._data, client, peer)
        return [self._part("etcd", command, "ready to serve client requests")]

    def _engines(self) -> list[list[Part]]:
        """In rows to start one after the other: those that share a GPU, of which each measures how much is free."""
        args = self._args
        count = args.engines * len(args.models)
        found = subprocess.getoutput("nvidia-smi -L").splitlines() if args.backend == "sglang" else []
        devices = visible_devices(sum(line.startswith("GPU ") for line in found))
        gpus = min(len(devices), count)
        rows: list[list[Part]] = [[] for _ in range(gpus or count)]
        for number in range(count):
            own = {**args.models[number // args.engines], "worker_id": number, "host": None}
            if gpus and args.gpu_memory_fraction is None:
                own["gpu_memory_fraction"] = round(GPU_SHARE / len(range(number, count, gpus)), 3)
            part = self._program(f"engine {number}", f"serving {GENERATE.path} ", own)
            if gpus:
                part.environment["CUDA_VISIBLE_DEVICES"] = devices[number % gpus]
            rows[number % len(rows)].append(part)
        return rows

    def _others(self) -> list[list[Part]]:
        args = self._args
        own: dict[str, Any] = {"reuse_port": args.frontends > 1}
        parts = [self._program(name, f"serving {FIND_WORKER.path} ") for name in names("router", args.routers)]
        for number, name in enumerate(names("processor", args.processors * len(args.models))):
            parts.append(self._program(name, f"serving {PROCESS.path} ", args.models[number // args.processors]))
        if args.stage:
            own["processor"] = f"{NAMESPACE}.{args.stage.stem}.process"
            command = [sys.executable, str(args.stage), *options_of(service.parser(None), vars(args))]
            parts.append(self._part(args.stage.stem, command, f"serving {own['processor']} ", metrics=True))
        parts += [self._program(name, "listening on", own) for name in names("frontend", args.frontends)]
        cores = sorted(os.sched_getaffinity(0))
        if len(cores) >= len(parts) + args.engines * len(args.models):  # one for each, and some for engines and servers
            for part, core in zip(parts, cores, strict=False):
                part.environment[service.CORE] = str(core)
        return [[part] for part in parts]

    def _program(self, name: str, ready_text: str, own: Mapping[str, Any] | None = None) -> Part:
        """One of the four programs, the first word of `name`. own: values of options that are not the launch's."""
        program = name.split()[0]
        options = options_of(PARSERS[program](), {**vars(self._args), **(own or {})})
        command = [sys.executable, str(REPOSITORY / f"{program}.py"), *options]
        return self._part(name, command, ready_text, metrics=True)

    def _system_port(self, name: str) -> int:
        """Claim the port for the metrics of a part."""
        for port in range(SYSTEM_PORT, 2**15):  # the runtime takes none that is higher
            with suppress(LaunchError):
                self._claims.append(claim(port))
                self._system_ports[name] = port
                return port
        raise LaunchError(f"no port from {SYSTEM_PORT} to {2**15 - 1} is free for the metrics of {name}")

    def _scraper(self) -> list[Part]:
        """A Prometheus that asks all programs, if it is wanted. They keep their ports when they are started again."""
        if not self._args.prometheus:
            return []
        config, address = self._data / "prometheus.yml", f"127.0.0.1:{self._server_port(9090)}"
        config.write_text(json.dumps(scraping(self._system_ports), indent=2))  # JSON is YAML
        self._prometheus = f"http://{address}"
        options = [f"--storage.tsdb.path={self._data}/prometheus", f"--web.listen-address={address}"]
        command = ["prometheus", f"--config.file={config}", *options]
        return [self._part("prometheus", command, "Server is ready to receive web requests")]

    def _part(self, name: str, command: list[str], ready_text: str, *, metrics: bool = False) -> Part:
        """metrics: it shows some, at a port of its own."""
        environment = dict(self._environment)
        if metrics:
            environment["DYN_SYSTEM_PORT"] = str(self._system_port(name))
        return Part(name, command, ready_text, self._logs / f"{name.replace(' ', '-')}.log", environment)

    async def _check(self) -> str:
        """Ask each model a real question. Returns the first model's name; raises LaunchError."""
        models = await self._joined()
        for model in models:
            began = time.monotonic()
            answer = await self._ask("/v1/chat/completions", question(model, "Hello!", max_tokens=16))
            if "usage" not in answer:
                raise LaunchError(f"a first request failed: {json.dumps(answer)}; see {self._logs}")
            tokens, seconds = answer["usage"]["completion_tokens"], time.monotonic() - began
            by = f" by {model}" if len(models) > 1 else ""
            say(f"a first request was answered with {tokens} tokens in {seconds:.2f} s{by}")
        return models[0]

    async def _joined(self) -> list[str]:
        """The models that a frontend knows, once all that was started has joined. Raises LaunchError."""
        args, models = self._args, len(self._args.models)
        started = {"router": args.routers, "processor": args.processors * models, "engine": args.engines * models}
        deadline = time.monotonic() + JOIN_SECONDS
        while True:
            health, cards = await self._ask("/health"), (await self._ask("/v1/models")).get("data", [])
            instances = health.get("instances", {})
            joined = all(instances.get(stage, 0) >= count for stage, count in started.items())
            if joined and health["status"] == "healthy" and len(cards) >= models:
                return [card["id"] for card in cards]
            if time.monotonic() > deadline:
                state = f"{json.dumps(health)}, {len(cards)} of {models} models"
                raise LaunchError(f"the parts are ready but do not find each other: {state}; see {self._logs}")
            await asyncio.sleep(0.1)

    async def _ask(self, path: str, body: object = None) -> Any:
        """What the frontend answers; {"error": reason} if it does not."""

        def ask() -> Any:
            connection = http.client.HTTPConnection(self._host, self._args.port, timeout=ANSWER_SECONDS)
            try:
                sent = json.dumps(body) if body else None
                connection.request("POST" if body else "GET", path, sent, self._headers)
                return json.load(connection.getresponse())
            except (OSError, http.client.HTTPException) as error:  # the frontend died and is being started again
                return {"error": str(error)}
            finally:
                connection.close()

        return await asyncio.to_thread(ask)

    def _report(self, model: str) -> None:
        """Say what the user can do now."""
        address = f"http://{f'[{self._host}]' if ':' in self._host else self._host}:{self._args.port}"
        say(f"the pipeline is up at {paint(address, BOLD)} (OpenAI clients: {paint(f'{address}/v1', BOLD)})")
        if self._environment:
            servers = " ".join(f"{name}={value}" for name, value in self._environment.items())
            say(f"for a program of your own beside it: {servers}")
        ports = ", ".join(f"{name} {port}" for name, port in self._system_ports.items())
        say(f"metrics, at http://127.0.0.1:PORT/metrics: {ports}")
        if self._prometheus:
            say(f"Prometheus asks them all: {self._prometheus}")
        say(f"logs: {self._logs.relative_to(REPOSITORY)}/")
        say("try this, twice: the second time, x-kv-overlap-blocks says how much of it the same worker had cached")
        key = " -H 'authorization: Bearer KEY'" if self._args.api_keys_file else ""
        if not key and not service.is_loopback(self._args.host):
            say(f"{self._args.host} is open to other machines, and --api-keys-file would keep out who has no key")
        print(f"\n  curl -iN {address}/v1/chat/completions -H 'content-type: application/json'{key} \\")
        print(f"    -d '{json.dumps(question(model, QUESTION, stream=True, max_tokens=64))}'\n")
        say(f"or open {paint(f'{address}/', BOLD)} in a browser, and watch the routing happen")
        if self._args.demo:
            print("\n".join(["", *(f"  {number}. {step}" for number, step in enumerate(TOUR, 1)), ""]))
        say("Ctrl-C ends it")

    async def _end(self) -> None:
        """End the parts: first who asks, then who is asked."""
        print(CLEAR_LINE, end="", flush=True)
        for _, parts in groupby(reversed(self._parts), lambda part: part.name.split()[0]):
            await asyncio.gather(*(part.stop(self._args.drain_seconds + STOP_SECONDS) for part in parts))
        if self._parts:
            shutil.rmtree(self._data, ignore_errors=True)
            say("everything has ended")


def visible_devices(count: int) -> list[str]:
    """The GPUs to use, as CUDA names them: all of `count`, or those that the environment says."""
    if (said := os.environ.get("CUDA_VISIBLE_DEVICES")) is None or not count:
        return [str(number) for number in range(count)]
    return [name.strip() for name in said.split(",") if name.strip() not in ("", "-1")]


def scraping(ports: Mapping[str, int]) -> dict[str, Any]:
    """What tells Prometheus to ask the parts at these ports, each program a job."""
    jobs: dict[str, list[dict[str, Any]]] = {}
    for part, port in ports.items():
        target = {"targets": [f"127.0.0.1:{port}"], "labels": {"part": part}}
        jobs.setdefault(part.split()[0], []).append(target)
    return {
        "global": {"scrape_interval": f"{SCRAPE_SECONDS}s"},
        "scrape_configs": [{"job_name": job, "static_configs": targets} for job, targets in jobs.items()],
    }


def question(model: str, content: str, **fields: Any) -> dict[str, Any]:
    """The body of a chat completion request."""
    return {"model": model, **fields, "messages": [{"role": "user", "content": content}]}


def find(program: str) -> str:
    """The program on the PATH, else the one in the environment. Raises LaunchError."""
    if found := shutil.which(program) or shutil.which(program, path=os.path.dirname(sys.executable)):
        return found
    raise LaunchError(f"{program} is neither on the PATH nor in the environment: delete .venv and try again")


def claim(port: int, host: str = "127.0.0.1") -> socket.socket:
    """Take a port that nobody listens on. Until the socket that comes back is closed, no other launch gets it, not even
    while the server that this one runs there is down. Raises LaunchError."""
    name = socket.socket(socket.AF_UNIX)
    try:
        socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET).close()
        name.bind(f"\0inference-port-{port}")
    except OSError as error:
        name.close()
        if error.errno == errno.EADDRINUSE:
            raise LaunchError(f"port {port} is in use") from error
        raise LaunchError(f"cannot listen on {host}:{port} (--host): {error.strerror}") from error
    return name


async def runs_already(name: str, variable: str) -> bool:
    """Whether the environment's `variable` names a server, which then answers. Raises LaunchError if it does not."""
    if not (addresses := os.environ.get(variable)):
        return False
    try:
        await asyncio.wait_for(service.until_reachable(name, addresses), REACH_SECONDS)
    except TimeoutError:
        hint = f"start it, or unset {variable} to have one started"
        raise LaunchError(f"no {name} answers at {addresses}; {hint}") from None
    say(f"using {name} at {addresses}")
    return True


def names(program: str, count: int) -> list[str]:
    """What the parts are called that run a program: with a number if there are several."""
    return [f"{program} {number}" for number in range(count)] if count > 1 else [program]


def one_per(cores: int) -> int:
    """How many of a program run by default: one per so many cores of this machine, up to 8, and at least 1, or 2 where
    there are `SPARE_CORES`."""
    found = len(os.sched_getaffinity(0))
    return min(max(2 if found >= SPARE_CORES else 1, found // cores), 8)


def number(most: int) -> Callable[[str], int]:
    """For argparse: a whole number from 1 to `most`."""

    def parse(text: str) -> int:
        if not text.isdecimal() or not 1 <= int(text) <= most:
            raise argparse.ArgumentTypeError(f"{text} is not a number from 1 to {most}")
        return int(text)

    return parse


def script(text: str) -> Path:
    """For argparse: a file that is there, and has a name that no other part has."""
    path = Path(text).absolute()
    if not path.is_file() or path.stem in (*PARSERS, "nats", "etcd", "prometheus"):
        raise argparse.ArgumentTypeError(f"{path} is not there, or has the name of another part")
    return path


def options_of(parser: argparse.ArgumentParser, values: Mapping[str, Any]) -> list[str]:
    """The command line that sets options of `parser` to `values`, by their names. None leaves one at its default."""
    words: list[str] = []
    for action in parser._actions:
        value, flag = values.get(action.dest), action.option_strings[-1]
        if value is True:
            words.append(flag)
        elif value is not None and value != action.default:
            words += [f"{flag}={one}" for one in (value if isinstance(value, list) else [value])]
    return words


def arguments() -> argparse.ArgumentParser:
    """The command line: our own options, and those of the programs, which are handed on."""
    options = argparse.ArgumentParser("launch.sh", "%(prog)s [options]", __doc__, formatter_class=service.Formatter)
    add = options.add_argument
    add("--engines", type=number(1000), default=2, help="engines for each model")
    add("--processors", type=number(100), default=one_per(4), help=f"for each model: one per 4 cores, up to 8; {SPARE}")
    add(
        "--frontends",
        type=number(100),
        default=one_per(8),
        help=f"that share the port: one per 8 cores, up to 8; {SPARE}",
    )
    add("--routers", type=number(100), default=min(one_per(4), 2), help=SPARE)
    add("--model", action="append", help="folder, or name on the Hugging Face hub; one more with each")
    add("--model-name", action="append", help="what clients call it; once for each model")
    add("--block-size", type=number(2**16), default=BLOCK_SIZE, help="tokens in a KV block")
    add("--port", type=number(2**16 - 1), default=8000, help="HTTP port")
    add("--host", default="127.0.0.1", help="HTTP address; 0.0.0.0 for all")
    add("--stage", type=script, help="script to put before the processors, at inference.NAME.process")
    add("--prometheus", action="store_true", help="start a Prometheus that collects the metrics of all parts")
    for program, parser in PARSERS.items():
        title = "all programs" if program == "processor" else f"{program}.py"
        group = options.add_argument_group(f"handed on to {title}")
        for action in parser()._actions:
            if action.dest not in OURS and options._option_string_actions.keys().isdisjoint(action.option_strings):
                group._add_action(action)
    return options


def main() -> None:
    options = arguments()
    args = options.parse_args()
    models = args.model or [None]
    names = args.model_name or [None] * len(models)
    if len(names) != len(models):
        options.error(f"argument --model-name: {len(names)} for {len(models)} models; give one for each, or none")
    # The programs run in the repository's folder, and not where the user stands.
    models = [os.path.abspath(model) if model and os.path.isdir(model) else model for model in models]
    served = [name or served_name(model or str(DEFAULT_MODEL)) for model, name in zip(models, names, strict=True)]
    if len(set(served)) < len(served):
        options.error("argument --model: clients would call two of them the same; give each its own --model-name")
    args.models = [{"model": model, "model_name": name} for model, name in zip(models, names, strict=True)]
    try:
        asyncio.run(Launcher(args).run())
    except (LaunchError, StartupError) as error:
        raise SystemExit(f"launch: {error}") from error


if __name__ == "__main__":
    main()
