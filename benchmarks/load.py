"""Sends chat completion requests over many connections at once, and measures the answers.

Each connection asks again as soon as it has its answer. Run as a program it reads a Load from its input, as JSON, and
writes "began" and "ended" when the measured time does so, and then what it Measured. It shares the machine with what it
measures, so it does as little as it can: of what comes it only counts the events that carry text and looks at the
clock; an answer is checked when it is whole.

The measured time begins once every connection has had an answer, and has room for another one to each: many
connections that began together keep in step for a while, and a part of their round would not stand for the whole. What
came in this time counts, whenever it was asked for: an answer that began before or ended after it counts by the share
of its events with text that came in it.
"""

import asyncio
import gc
import re
import sys
import time
from array import array
from contextlib import suppress
from typing import cast

from benchmarks.measure import percentile

import msgspec
import uvloop

PATIENCE_SECONDS = 180  # for the first answers, for the second ones, and for those in progress in the end
PAUSE_SECONDS = 0.1  # after an error
GOOD = b"HTTP/1.1 200"
END = b"0\r\n\r\n"  # of a chunked body
TEXT, NO_TEXT = b'"content":"', b'"content":""'
EVENT = re.compile(rb"data: (\{.*\})\n\n")
USAGE = re.compile(rb'"prompt_tokens":(\d+),"completion_tokens":(\d+)')
REQUEST = (
    "POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\n"
    "content-type: application/json\r\ncontent-length: %d\r\n\r\n"
)
BODY = (
    '{"model":"%s","stream":true,"stream_options":{"include_usage":true},"max_tokens":%d,"ignore_eos":true,'
    '"temperature":0,"messages":[{"role":"user","content":"%s"}]}'
)


class Load(msgspec.Struct):
    """What to send, where, and for how long."""

    port: int
    model: str
    connections: int
    seconds: float  # at least
    tokens: int  # of each answer
    seed: int  # prompts of different seeds are different
    filler: str = ""  # words that make prompts long; empty for short ones
    keep_texts: bool = False


class Measured(msgspec.Struct):
    """What came back in the measured time. Times are in seconds."""

    seconds: float
    answers: float
    tokens: float  # by the usage that the answers stated
    ttft_p50: float  # from sending a request to its first event with text
    ttft_p99: float
    between_p50: float  # between events that carry text, of which one may carry several tokens
    between_p99: float
    events: float  # that carry text, of an answer
    prompt_tokens: float  # on average
    wrong: int  # answers that failed or were not as asked for, at any time
    errors: list[str]  # different ones, at most three
    texts: dict[str, str]  # of the answers by their prompts, if they were to be kept


def prompt(number: int, seed: int, filler: str = "") -> str:
    """No two are alike; long ones differ from the first block of tokens on."""
    if not filler:
        return f"Tell me about topic {number} and {seed} please, in some detail."
    turn = filler.index(" ", 7919 * number % (len(filler) // 2))
    return f"{number} {seed}{filler[turn:]} {filler[:turn]}"


class Client:
    """All connections, and what they add up to."""

    def __init__(self, load: Load) -> None:
        self._load = load
        self._sent = 0
        # Connections that have no answer yet, none in the measured time, or are not closed.
        self._first = self._second = self._open = load.connections
        self._all_answered, self._round, self._all_closed = asyncio.Event(), asyncio.Event(), asyncio.Event()
        self._connecting: set[asyncio.Task[None]] = set()
        self.asking = True
        self.counting = False  # whether it is the measured time
        self.ttfts, self.gaps = array("d"), array("d")  # seconds
        self._answers = self._share = 0.0
        self._events = self._prompt_tokens = self._wrong = 0
        self._errors: list[str] = []
        self._texts: dict[str, str] = {}

    async def run(self) -> Measured:
        for _ in range(self._load.connections):
            await self.connect()
        await self._until(self._all_answered)
        self.counting, began = True, time.perf_counter()
        print("began", flush=True)
        await asyncio.sleep(self._load.seconds)
        await self._until(self._round)
        seconds = time.perf_counter() - began
        self.counting = self.asking = False
        print("ended", flush=True)
        await self._until(self._all_closed)
        if self._open:
            self.fail(f"{self._open} connections had no answer {PATIENCE_SECONDS} s later", self._open)
        return self._measured(seconds)

    async def _until(self, event: asyncio.Event) -> None:
        with suppress(TimeoutError):  # whoever has no answer is told of in the end
            await asyncio.wait_for(event.wait(), PATIENCE_SECONDS)

    async def connect(self) -> None:
        """Open a connection, which asks on its own from then on."""
        while self.asking:
            try:
                loop = asyncio.get_running_loop()
                await loop.create_connection(lambda: Connection(self), "127.0.0.1", self._load.port)
                return
            except OSError as error:
                self.fail(str(error))
                await asyncio.sleep(PAUSE_SECONDS)
        self._closed()

    def request(self) -> tuple[str, bytes]:
        """The next prompt, and the HTTP request with it."""
        text = prompt(self._sent, self._load.seed, self._load.filler)
        self._sent += 1
        body = BODY % (self._load.model, self._load.tokens, text)
        return text, f"{REQUEST % len(body)}{body}".encode()

    def answered(self, first: bool) -> None:
        """A connection has had an answer. first: it was its first one."""
        self._first -= first
        self._second -= self.counting
        if not self._first:
            self._all_answered.set()
        if not self._second:
            self._round.set()

    def lost(self) -> None:
        """A connection has ended. While there is more to ask, another one takes its place."""
        if self.asking:
            task = asyncio.ensure_future(self.connect())
            self._connecting.add(task)
            task.add_done_callback(self._connecting.discard)
        else:
            self._closed()

    def _closed(self) -> None:
        self._open -= 1
        if not self._open:
            self._all_closed.set()

    def take(self, prompt: str, answer: bytes, events: int, counted: int) -> None:
        """Check an answer that is whole, and add it up.

        events: how many carry text; counted: how many of those came in the measured time.
        """
        usage = USAGE.search(answer)
        if (
            not usage
            or not events
            or int(usage[2]) != self._load.tokens
            or b'"finish_reason":"length"' not in answer
            or b"data: [DONE]\n\n" not in answer
            or b'"error"' in answer
        ):
            self.fail(f"not {self._load.tokens} tokens: … {answer[-500:].decode(errors='replace')}")
            return
        self._answers += 1
        self._share += counted / events
        self._events += events
        self._prompt_tokens += int(usage[1])
        if self._load.keep_texts:
            self._texts[prompt] = text_of(answer)

    def fail(self, message: str, count: int = 1) -> None:
        self._wrong += count
        if message not in self._errors and len(self._errors) < 3:
            self._errors.append(message)

    def _measured(self, seconds: float) -> Measured:
        ttfts, gaps = sorted(self.ttfts), sorted(self.gaps)
        return Measured(
            seconds=seconds,
            answers=self._share,
            tokens=self._share * self._load.tokens,
            ttft_p50=percentile(ttfts, 50),
            ttft_p99=percentile(ttfts, 99),
            between_p50=percentile(gaps, 50),
            between_p99=percentile(gaps, 99),
            events=self._events / max(self._answers, 1),
            prompt_tokens=self._prompt_tokens / max(self._answers, 1),
            wrong=self._wrong,
            errors=self._errors,
            texts=self._texts,
        )


class Connection(asyncio.Protocol):
    """One connection, kept alive, with one request at a time."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._first = True
        self._waiting = False  # for an answer, or the rest of it

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._ask()

    def _ask(self) -> None:
        self._prompt, request = self._client.request()
        self._pieces: list[bytes] = []
        self._rest = b""
        self._events = self._counted = 0
        self._waiting = True
        self._last = time.perf_counter()
        self._transport.write(request)

    def data_received(self, data: bytes) -> None:
        now = time.perf_counter()
        if not self._pieces and not self._rest and not GOOD.startswith(data[: len(GOOD)]):
            asyncio.get_running_loop().call_later(PAUSE_SECONDS, self._transport.abort)  # and say what has come by then
        if self._rest:
            data, self._rest = self._rest + data, b""
        if not data.endswith(b"\r\n") or data.endswith(b"0\r\n"):  # a chunk, or the body's end, that is not all there
            self._rest = data
            return
        self._pieces.append(data)
        if texts := data.count(TEXT) - data.count(NO_TEXT):
            self._note(now, texts)
        if data.endswith(END):
            self._finish()

    def _note(self, now: float, texts: int) -> None:
        """Events with text have come, all at once."""
        if self._client.counting:
            (self._client.gaps if self._events else self._client.ttfts).append(now - self._last)
            self._client.gaps.extend([0.0] * (texts - 1))
            self._counted += texts
        self._events += texts
        self._last = now

    def _finish(self) -> None:
        self._waiting = False
        self._client.take(self._prompt, b"".join(self._pieces), self._events, self._counted)
        self._client.answered(self._first)
        self._first = False
        if self._client.asking:
            self._ask()
        else:
            self._transport.close()

    def connection_lost(self, error: Exception | None) -> None:
        if self._waiting:
            came = b"".join([*self._pieces, self._rest])[-500:].decode(errors="replace")
            self._client.fail(f"an answer broke off ({error}): … {came}")
        self._client.lost()


def text_of(answer: bytes) -> str:
    """What a streamed answer says."""
    events = [msgspec.json.decode(event) for event in EVENT.findall(answer)]
    return "".join(choice["delta"].get("content") or "" for event in events for choice in event["choices"])


def main() -> None:
    load = msgspec.json.decode(sys.stdin.buffer.read(), type=Load)
    gc.disable()  # nothing here has cycles, and a collection would look like a pause of what is measured

    async def run() -> Measured:
        return await Client(load).run()

    sys.stdout.buffer.write(msgspec.json.encode(uvloop.run(run())) + b"\n")


if __name__ == "__main__":
    main()
