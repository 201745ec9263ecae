"""What the engines did in a run, by their own account."""

import asyncio
import os
import sys
from asyncio.subprocess import PIPE
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager

from benchmarks.pipeline import REPOSITORY

import msgspec


class Work(msgspec.Struct):
    """What an engine has done."""

    computed_tokens: int = 0  # of prompts
    busy_seconds: float = 0.0
    passes: int = 0
    first_pass: int = 0  # the engine numbers them
    last_pass: int = 0

    @property
    def lost_passes(self) -> int:
        """How many were not heard of."""
        return self.last_pass - self.first_pass + 1 - self.passes if self.passes else 0

    def since(self, before: "Work") -> "Work":
        """What was done after `before`."""
        return Work(
            self.computed_tokens - before.computed_tokens,
            self.busy_seconds - before.busy_seconds,
            self.passes - before.passes,
            before.last_pass + 1 if before.passes else self.first_pass,
            self.last_pass,
        )


class Observer:
    """benchmarks/observe.py in a process of its own."""

    def __init__(self, questions: asyncio.StreamWriter, answers: asyncio.StreamReader) -> None:
        self._questions = questions
        self._answers = answers

    @classmethod
    @asynccontextmanager
    async def running(cls, servers: Mapping[str, str]) -> "AsyncIterator[Observer]":
        """Observe the engines that are found with `servers`, a part of the environment."""
        command = [sys.executable, "-m", "benchmarks.observe"]
        process = await asyncio.create_subprocess_exec(
            *command, stdin=PIPE, stdout=PIPE, env={**os.environ, **servers}, cwd=REPOSITORY, start_new_session=True
        )
        assert process.stdin and process.stdout
        try:
            yield cls(process.stdin, process.stdout)
        finally:
            process.kill()
            await process.wait()

    async def work(self) -> dict[str, Work]:
        """What each engine has done since the observer began, by instance id. Idle ones are not in it."""
        self._questions.write(b"\n")
        line = await self._answers.readline()
        if not line:
            raise RuntimeError("the observer of the engines died")
        return msgspec.json.decode(line, type=dict[str, Work])
