"""Several answers to one prompt."""

from typing import Any

from tests.system.conftest import Pipeline, said

QUESTION = "What does the router do, and how does it know which worker has my prompt cached?"
FOUR: dict[str, Any] = {"n": 4, "temperature": 2, "max_tokens": 24, "seed": 7}


def test_they_differ_and_come_again_with_the_same_seed(pipeline: Pipeline) -> None:
    first, again = (pipeline.ask(QUESTION, **FOUR).json()["choices"] for _ in range(2))
    assert [choice["index"] for choice in first] == [0, 1, 2, 3]
    texts = [choice["message"]["content"] for choice in first]
    assert len(set(texts)) == 4
    assert texts == [choice["message"]["content"] for choice in again]


def test_the_first_is_what_one_alone_would_be(pipeline: Pipeline) -> None:
    alone = pipeline.ask(QUESTION, **{**FOUR, "n": 1}).json()["choices"][0]
    assert alone["message"] == pipeline.ask(QUESTION, **FOUR).json()["choices"][0]["message"]


def test_the_prompt_counts_once(pipeline: Pipeline) -> None:
    one, four = (pipeline.ask(QUESTION, max_tokens=5, n=n).json()["usage"] for n in (1, 4))
    assert four["prompt_tokens"] == one["prompt_tokens"]
    assert four["completion_tokens"] == 4 * one["completion_tokens"]


def test_they_are_on_one_worker(pipeline: Pipeline) -> None:
    response = pipeline.ask("Something that nobody asked before. " * 5, n=6, max_tokens=4)
    log = (pipeline.folder / "router.log").read_text()
    lines = [line for line in log.splitlines() if f"request_id={response.headers['x-request-id']} " in line]
    assert len(lines) == 6
    assert {f"worker={response.headers['x-worker-id']}" in line for line in lines} == {True}


def test_streamed_each_chunk_says_whose_it_is(pipeline: Pipeline) -> None:
    chunks = pipeline.stream(QUESTION, **FOUR)
    whole = pipeline.ask(QUESTION, **FOUR).json()["choices"]
    for choice in whole:
        parts = [part for chunk in chunks for part in chunk["choices"] if part["index"] == choice["index"]]
        assert said([{"choices": parts}]) == choice["message"]["content"]
