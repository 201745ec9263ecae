"""A process of the pipeline: started, watched over, ended."""

import asyncio
import http.client
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NoReturn
from urllib.parse import urlsplit

from common.engines.die_with_parent import die_with

REPOSITORY = Path(__file__).parent.parent
START_SECONDS = 900  # a large model takes minutes to load, and to download even longer
BACK_OFF = (0.1, 30.0)  # seconds before a part is started again, at first and at most
STEADY_SECONDS = 60  # after so long the next death counts as the first
TERMINAL = sys.stdout.isatty() and os.environ.get("TERM") != "dumb"
CLEAR_LINE = "\r\x1b[K" if TERMINAL else ""
BOLD, RED, GREEN = 1, 31, 32  # as terminals number them
ETCD_SECONDS = 2.0  # for etcd to forget a part that has died
LAST_CHARACTERS = 4096  # of a log, in which its last line is looked for

_COLOUR = re.compile(r"\x1b\[[\d;]*[a-zA-Z]")
# What lines of our programs and of SGLang begin with: when, how bad, and who.
_PREAMBLE = re.compile(r"^\[?\d{4}-\d\d-\d\d[ T][\d:,.]+[^\]\s]*( TP\d+)?\]?( [A-Z]+ \S+:)?\s*")
_INSTANCE = re.compile(r" serving \S+ as instance (\d+)")
_NOISE = re.compile(r"\s+[^\s\d]|.*Warning: ")  # Python's warnings, and what belongs to the line before


class LaunchError(Exception):
    """The pipeline cannot start, with what to do about it."""


def etcd_command(program: str, folder: Path, client_port: int, peer_port: int) -> list[str]:
    """How to start an etcd that is alone, on two ports of this machine. Nothing in it outlives the run."""
    client, peer = (f"http://127.0.0.1:{port}" for port in (client_port, peer_port))
    command = [program, f"--data-dir={folder}/etcd", "--unsafe-no-fsync", f"--initial-cluster=default={peer}"]
    command += [f"--listen-client-urls={client}", f"--advertise-client-urls={client}"]
    command += [f"--listen-peer-urls={peer}", f"--initial-advertise-peer-urls={peer}"]
    return [*command, "--heartbeat-interval=50", "--election-timeout=250"]  # it waits for no other's vote


@dataclass
class Part:
    """A process of the pipeline."""

    name: str
    command: Sequence[str]
    ready_text: str  # what its log says when it is ready
    log: Path
    environment: dict[str, str]  # besides our own
    process: asyncio.subprocess.Process | None = None
    ready: bool = False
    _log_start: int = 0

    async def start(self) -> None:
        """Start it, or start it again. Raises LaunchError if it dies before it is ready, or that takes too long."""
        if self.process is None:
            self.log.write_bytes(b"")
        self._log_start, began = self.log.stat().st_size, time.monotonic()
        with self.log.open("ab") as output:
            self.process = await asyncio.create_subprocess_exec(
                *self.command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                cwd=REPOSITORY,
                env={**os.environ, **self.environment},
                start_new_session=True,  # Ctrl-C reaches the launcher alone, which ends the parts in order
                preexec_fn=partial(die_with, os.getpid()),
            )
        while self.ready_text not in self._log_text():
            if self.process.returncode is not None:
                raise LaunchError(self._obituary(self.process.returncode, 15))
            if time.monotonic() - began > START_SECONDS:
                raise LaunchError(f"{self.name} is not ready after {START_SECONDS} s; see {self.log}")
            await asyncio.sleep(0.1)
        self.ready = True
        say(f"{paint(f'{self.name} is ready', GREEN)} ({time.monotonic() - began:.1f} s)")

    def last_words(self) -> str:
        """The last line of its log that says what it is doing. A progress bar is a line written over and over."""
        if self.process is None:
            return ""
        lines = _COLOUR.sub("", self._log_text()[-LAST_CHARACTERS:]).replace("\r", "\n").splitlines()
        line = next((line for line in reversed(lines) if line.strip() and not _NOISE.match(line)), "")
        return _PREAMBLE.sub("", line, count=1).strip()

    def wrote_at(self) -> float:
        """When its log got its last line, in seconds since the epoch."""
        return self.log.stat().st_mtime if self.process else 0.0

    async def keep_running(self) -> NoReturn:
        """Start it again whenever it dies, later each time. Runs until cancelled."""
        pause, limit = BACK_OFF
        while True:
            assert self.process is not None
            began = time.monotonic()
            code = await self.process.wait()
            if time.monotonic() - began > STEADY_SECONDS:
                pause = BACK_OFF[0]
            self.ready = False
            say(self._obituary(code, 5))
            await asyncio.to_thread(self._leave_discovery)
            say(f"starting {self.name} again in {pause:g} s")
            await self.stop(0)
            await asyncio.sleep(pause)
            pause = min(pause * 2, limit)
            try:
                await self.start()
            except LaunchError as error:
                say(str(error))

    def _leave_discovery(self) -> None:
        """Have etcd forget it at once, and not when its lease ends. The id of an instance is that of its lease."""
        addresses = {**os.environ, **self.environment}.get("ETCD_ENDPOINTS", "").split(",")
        for instance_id in set(_INSTANCE.findall(self._log_text())):
            etcd = http.client.HTTPConnection(urlsplit(addresses[0]).netloc, timeout=ETCD_SECONDS)
            with closing(etcd), suppress(OSError, http.client.HTTPException):  # else its lease ends by itself
                etcd.request("POST", "/v3/lease/revoke", json.dumps({"ID": instance_id}))
                etcd.getresponse()

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

    def kill(self) -> None:
        """End it at once."""
        if self.process and self.process.returncode is None:
            self.process.kill()

    def _obituary(self, code: int, lines: int) -> str:
        died = f"{self.name} died ({f'exit {code}' if code >= 0 else signal.Signals(-code).name})"
        tail = "\n".join("    " + line for line in self._log_text().splitlines()[-lines:])
        return f"{paint(died, RED)}. The end of {self.log}:\n{tail}"

    def _log_text(self) -> str:
        return self.log.read_bytes()[self._log_start :].decode(errors="replace")


def say(text: str) -> None:
    """Print a line, over the one that says what is being waited for."""
    print(f"{CLEAR_LINE}launch: {text}", flush=True)


def paint(text: str, colour: int) -> str:
    """`text` in a colour, for a terminal whose user wants colours."""
    return f"\x1b[{colour}m{text}\x1b[0m" if TERMINAL and not os.environ.get("NO_COLOR") else text
