import argparse
import asyncio

from benchmarks.comparison import OURS, RATES, THEIRS, Comparison, Point, Result, Turn
from benchmarks.load import Client, Load, Measured, prompt
from benchmarks.throughput import load

import pytest

HEAD = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"
ANSWER = [
    b'{"choices":[{"delta":{"role":"assistant","content":"Hello"},"finish_reason":null}]}',
    b'{"choices":[{"delta":{"content":" \\"error\\""},"finish_reason":null}]}',
    b'{"choices":[{"delta":{"content":""},"finish_reason":"length"}]}',
    b'{"choices":[],"usage":{"prompt_tokens":9,"completion_tokens":2,"total_tokens":11}}',
    b"[DONE]",
]


def stream(events: list[bytes]) -> bytes:
    """The response with these events, each of which is a chunk."""
    chunks = [b"data: " + event + b"\n\n" for event in events]
    return HEAD + b"".join(b"%x\r\n%b\r\n" % (len(chunk), chunk) for chunk in [*chunks, b""])


def measure(response: bytes, piece: int = 10_000, tokens: int = 2) -> Measured:
    """What the client measures of a server that gives this response, in pieces of so many bytes."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            try:
                head = await reader.readuntil(b"\r\n\r\n")
            except (asyncio.IncompleteReadError, ConnectionError):
                writer.close()
                return
            await reader.readexactly(int(head.rpartition(b"content-length: ")[2]))
            for start in range(0, len(response), piece):
                writer.write(response[start : start + piece])
                await asyncio.sleep(0)

    async def run() -> Measured:
        async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
            port = server.sockets[0].getsockname()[1]
            load = Load(port=port, model="m", connections=3, seconds=0.2, tokens=tokens, seed=1, keep_texts=True)
            return await Client(load).run()

    return asyncio.run(run())


@pytest.mark.parametrize("piece", [10_000, 7, 1])
def test_answers_are_measured_however_they_are_cut(piece: int) -> None:
    measured = measure(stream(ANSWER), piece)
    assert (measured.wrong, measured.errors) == (0, [])
    assert (measured.events, measured.prompt_tokens) == (2, 9)
    assert measured.tokens == 2 * measured.answers > 0
    assert measured.texts[prompt(0, 1)] == 'Hello "error"'


@pytest.mark.parametrize(
    ("response", "tokens"),
    [
        (stream(ANSWER), 3),
        (stream([*ANSWER[:-2], ANSWER[-1]]), 2),
        (stream(ANSWER[:-1]), 2),
        (stream([*ANSWER[:2], b'{"error":{"message":"no"}}', *ANSWER[2:]]), 2),
        (b'HTTP/1.1 503 Service Unavailable\r\ncontent-length: 14\r\n\r\n{"error":"no"}', 2),
    ],
)
def test_wrong_answers_are_counted_and_said(response: bytes, tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.load.PATIENCE_SECONDS", 1.0)
    measured = measure(response, tokens=tokens)
    assert measured.wrong > 0
    assert measured.answers == 0
    assert response[-20:].decode() in measured.errors[0]


def test_prompts_differ_from_the_first_word_on() -> None:
    words = [f"word{number}" for number in range(50)]
    prompts = [prompt(number, 5, " ".join(words)) for number in range(100)]
    assert len({text.split()[0] for text in prompts}) == 100
    assert {tuple(sorted(text.split()[2:])) for text in prompts} == {tuple(sorted(words))}


def turn(side: str, tokens: float, text: str = "Hello", wrong: int = 0) -> Turn:
    measured = Measured(5, 1, 100, 0.01, 0.02, 0, 0.01, 100, 30, wrong, ["no"] * wrong, {"Hello?": text})
    cpu = {"frontend": 0.1, "router": 0.02} if side == OURS else {"dynamo.frontend": 0.03}
    memory = {"frontend": 2**20, "processor": 2**21, "router": 2**20} if side == OURS else {"dynamo.frontend": 2**22}
    result = Result(Point("simulated", 1000), side, tokens / 100, tokens, {**cpu, "client": 0.01}, 0.2, 0.01, measured)
    return Turn("simulated", side, memory, [result])


def test_ratios_are_those_of_turns_that_followed_each_other() -> None:
    both = ((100, 400), (300, 600), (200, 1000))
    comparison = Comparison([one for mine, other in both for one in (turn(OURS, mine), turn(THEIRS, other))])
    row = "| simulated | 1,000 | 2 | 6 | 0.25 (0.20 to 0.50) | 200 | 600 | 0.25 (0.20 to 0.50) |"
    assert comparison.figures(RATES).splitlines()[-1] == row
    assert comparison.cpu().splitlines()[-2].startswith("| simulated, 1,000 | ours | 100 |  | 20 |  | 0 |")
    assert comparison.memory().splitlines()[-1] == "| simulated | 1 | 2 | 1 | 4 | 4 | 1 |"
    assert (comparison.faults(), comparison.doubts(), comparison.different_texts()) == ([], [], (5, 0))


def test_faults_are_found() -> None:
    faults = Comparison([turn(OURS, 1, wrong=2), turn(THEIRS, 1, "Goodbye")]).faults()
    assert faults == [
        "simulated, 1,000, ours: 2 wrong answers: no; no",
        "1 of 1 texts differ from the first for the same prompt",
    ]


def test_loads_are_read() -> None:
    assert load("simulated:1,16") == ("simulated", [1, 16])
    with pytest.raises(argparse.ArgumentTypeError, match="no such load: fast; there are simulated"):
        load("fast:1")
