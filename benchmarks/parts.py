"""Processes of a benchmark that starts its parts itself: started, measured, and ended by their ids."""

import os
import signal
import subprocess
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from benchmarks.pipeline import START_SECONDS, family, seconds_of, spawn

import psutil

END_SECONDS = 40  # a program gives its requests in progress 30


class Parts:
    """The processes that run, by their names. What they say goes to files in a folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._running: dict[str, subprocess.Popen[bytes]] = {}

    @contextmanager
    def running(self, commands: Mapping[str, list[str]], environment: Mapping[str, str]) -> Iterator[None]:
        """Start programs, and end them after the block, in the same order. environment: besides our own."""
        try:
            for name, command in commands.items():
                self._start(name, command, environment)
            yield
        finally:
            for name in commands:
                self._end(name)

    def _start(self, name: str, command: list[str], environment: Mapping[str, str]) -> None:
        self._running[name] = spawn(command, self._log(name), {**os.environ, **environment}, signal.SIGKILL)

    def _end(self, name: str) -> None:
        if process := self._running.pop(name, None):
            process.terminate()
            with suppress(subprocess.TimeoutExpired):
                process.wait(END_SECONDS)
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # with what it has started
            process.wait()

    def wait_for(self, name: str, text: str) -> None:
        """Return once a program has written `text`. Raises SystemExit if it ends or takes too long."""
        deadline = time.monotonic() + START_SECONDS
        while text not in (log := self._log(name).read_text(errors="replace")):
            self.check()
            if time.monotonic() > deadline:
                raise SystemExit(f"{name} is not ready after {START_SECONDS} s:\n{log[-3000:]}")
            time.sleep(0.1)

    def check(self) -> None:
        """Raises SystemExit if a program has ended."""
        for name, process in self._running.items():
            if process.poll() is not None:
                raise SystemExit(f"{name} has ended:\n{self._log(name).read_text(errors='replace')[-3000:]}")

    def cpu_seconds(self) -> dict[str, float]:
        """CPU time so far, with that of the processes that each has started. Numbered parts count as one."""
        total: dict[str, float] = defaultdict(float)
        for name, process in self._running.items():
            total[name.split()[0]] += sum(map(seconds_of, family(process.pid)))
        return total

    def memory(self) -> dict[str, int]:
        """Bytes of memory that each program has, with its share of what several have together, like libraries."""
        return {name: sum(map(_memory, family(process.pid))) for name, process in self._running.items()}

    def _log(self, name: str) -> Path:
        return self._folder / f"{name}.log"


def _memory(process: psutil.Process) -> int:
    with suppress(psutil.NoSuchProcess):
        return int(process.memory_full_info().pss)
    return 0
