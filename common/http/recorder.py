"""Writes down what traffic comes, for `python -m benchmarks.routing --trace`: which policy would have suited it?

A line of JSON for each request, in Mooncake's trace format with two fields more:

    {"timestamp": 1795663403087, "input_length": 29, "output_length": 31, "hash_ids": [4095, 17], "block_size": 16,
     "session": "mine"}

`timestamp` is in milliseconds since the epoch, and the lengths in tokens. `hash_ids` has one number for every
`block_size` tokens of the prompt (512 where the field is missing): equal numbers stand for equal tokens after equal
ones. There is no text in it, but whoever has a text can tell whether its tokens are in it.
"""

import logging
import os
import time
from itertools import accumulate

from common.errors import StartupError
from common.http.exchange import Exchange
from common.openai_api import PromptBlocks

import msgspec

log = logging.getLogger(__name__)

MASK = 2**52 - 1  # numbers of so many bits are exact in every program that reads JSON


class Recorder:
    """An Observer that writes each request to a file, once its answer is over. Several programs may write to one."""

    def __init__(self, file: str) -> None:
        """file: made if it is not there, else continued. Raises StartupError if it cannot be written."""
        try:
            self._file = os.open(file, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        except OSError as error:
            raise StartupError(f"cannot record to {file} (--record): {error.strerror}") from error
        self._prompts: dict[str, tuple[int, PromptBlocks]] = {}  # by context id: when it came, in ms, and its blocks

    def on_start(self, exchange: Exchange) -> None:
        """Ask the processor for the blocks of the prompt."""
        exchange.context.metadata["x-record"] = "1"

    def on_first(self, exchange: Exchange) -> None:
        """Keep them: a client that hangs up never gets the last chunk."""
        if exchange.routing and exchange.routing.prompt:
            came = time.time() - (time.perf_counter() - exchange.began)
            self._prompts[exchange.context.id()] = (round(came * 1000), exchange.routing.prompt)

    def on_end(self, exchange: Exchange) -> None:
        """Write the line. Of an answer that was broken off, the length is what the client got, in chunks."""
        if not (known := self._prompts.pop(exchange.context.id(), None)):
            return
        came, prompt = known
        line = {
            "timestamp": came,
            "input_length": prompt.tokens,
            "output_length": exchange.usage.completion_tokens if exchange.usage else exchange.chunks,
            "hash_ids": hash_ids(prompt, last=came),
            "block_size": prompt.block_size,
        }
        if session := exchange.headers.get("x-session-id"):
            line["session"] = session
        try:
            os.write(self._file, msgspec.json.encode(line) + b"\n")  # at once, so that lines of others do not mix in
        except OSError as error:
            log.warning("a request could not be recorded: %s", error)


def hash_ids(prompt: PromptBlocks, *, last: int) -> list[int]:
    """A number for each block of a prompt, which stands for it after those before it. last: for the block that is not
    full, of whose tokens nothing is known."""
    ids = list(accumulate(prompt.local_hashes, lambda before, block: hash((before, block)) & MASK, initial=0))
    if prompt.tokens > len(prompt.local_hashes) * prompt.block_size:
        ids.append(hash((ids[-1], last)) & MASK)
    return ids[1:]
