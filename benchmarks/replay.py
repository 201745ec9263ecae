"""Sends a trace's requests when they are due, whatever has become of those before, and measures each answer.

The client shares the machine with the pipeline, so it does as little as it can: bodies are made beforehand, and of an
answer only the first event and the last two are looked at.
"""

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NoReturn

import aiohttp
import msgspec
from tqdm import tqdm

SILENCE_SECONDS = 120  # an answer that does not go on for so long has failed
REJECTED = frozenset({429, 503, 529})
TAIL_BYTES = 4096  # more than the last two events have


@dataclass(slots=True, frozen=True)
class Planned:
    """A request that is ready to be sent."""

    due: float  # seconds after the start
    body: bytes
    prompt_tokens: int
    output_tokens: int


@dataclass(slots=True)
class Outcome:
    """What became of a request. Times are in seconds."""

    lag: float = 0.0  # how late the client was in sending it
    ttft: float = 0.0  # from sending to the first event, which comes with the first token
    total: float = 0.0  # from sending to the end of the answer
    prompt_tokens: int = 0
    overlap_blocks: int = 0  # of the prompt, that the router believed to be in the worker's cache
    worker: str = ""
    rejected: bool = False
    error: str = ""  # empty if it was answered


class _Usage(msgspec.Struct):
    prompt_tokens: int
    completion_tokens: int


class _LastEvent(msgspec.Struct):
    usage: _Usage


class WrongLength(Exception):
    """A prompt or an answer had another length than was asked for, so the replay measures something else."""


def session(address: str | None = None, silence_seconds: float = SILENCE_SECONDS) -> aiohttp.ClientSession:
    """A client that never waits for one of its own connections. address: what paths are relative to."""
    timeout = aiohttp.ClientTimeout(total=None, sock_read=silence_seconds)
    return aiohttp.ClientSession(address, connector=aiohttp.TCPConnector(limit=0), timeout=timeout)


async def replay(address: str, plan: Sequence[Planned], progress: "tqdm[NoReturn]") -> list[Outcome]:
    """Send every request when it is due. Raises WrongLength."""
    outcomes: list[Outcome] = []
    sent = 0

    async def follow(planned: Planned, due: float) -> None:
        outcomes.append(await ask(client, address, planned, due))
        progress.update()
        progress.set_postfix_str(f"{sent - len(outcomes)} in progress", refresh=False)

    try:
        async with session() as client, asyncio.TaskGroup() as tasks:
            start = time.perf_counter()
            for planned in plan:
                due = start + planned.due
                await asyncio.sleep(max(due - time.perf_counter(), 0))
                tasks.create_task(follow(planned, due))
                sent += 1
    except ExceptionGroup as group:
        raise group.exceptions[0] from None
    return outcomes


async def ask(client: aiohttp.ClientSession, address: str, planned: Planned, due: float) -> Outcome:
    """Send a request that was due at `due` (of time.perf_counter) and read its answer.

    Raises WrongLength.
    """
    began = time.perf_counter()
    outcome = Outcome(lag=max(began - due, 0.0))
    try:
        headers = {"content-type": "application/json"}
        async with client.post(f"{address}/v1/chat/completions", data=planned.body, headers=headers) as response:
            outcome.worker = response.headers.get("x-worker-id", "")
            outcome.overlap_blocks = int(response.headers.get("x-kv-overlap-blocks", 0))
            if response.status == 200:
                tail = await _read(response, outcome, began)
                _note_usage(outcome, planned, tail)
            else:
                outcome.rejected = response.status in REJECTED
                outcome.error = f"HTTP {response.status}: {(await response.text())[:500]}"
    except (aiohttp.ClientError, TimeoutError) as error:
        outcome.error = f"{type(error).__name__}: {error}"
    outcome.total = time.perf_counter() - began
    return outcome


async def _read(response: aiohttp.ClientResponse, outcome: Outcome, began: float) -> bytes:
    """Read the answer to its end, note when its first token came, and return the end of it."""
    tail = b""
    async for data in response.content.iter_any():
        if not outcome.ttft:
            outcome.ttft = time.perf_counter() - began
        tail = (tail + data)[-TAIL_BYTES:]
    return tail


def _note_usage(outcome: Outcome, planned: Planned, tail: bytes) -> None:
    events = tail.rstrip().split(b"\n\n")
    if len(events) < 2 or events[-1] != b"data: [DONE]":
        outcome.error = f"the answer broke off: {events[-1].decode(errors='replace')[-500:]}"
        return
    usage = msgspec.json.decode(events[-2].removeprefix(b"data: "), type=_LastEvent).usage
    if (usage.prompt_tokens, usage.completion_tokens) != (planned.prompt_tokens, planned.output_tokens):
        raise WrongLength(
            f"a prompt of {planned.prompt_tokens} tokens and an answer of {planned.output_tokens} were asked for; the "
            f"pipeline counted {usage.prompt_tokens} and {usage.completion_tokens}"
        )
    outcome.prompt_tokens = usage.prompt_tokens
