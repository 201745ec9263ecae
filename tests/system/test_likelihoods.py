"""How likely tokens were, and several answers to one prompt."""

import json
import math
import subprocess
import sys
from typing import Any

from common.model import DEFAULT_MODEL
from tests.system.conftest import Pipeline, said

import pytest

QUESTION = "What does the router do, and how does it know which worker has my prompt cached?"


def post(pipeline: Pipeline, path: str, **body: Any) -> Any:
    with pipeline.client() as client:
        response = client.post(path, json={"model": pipeline.model, **body})
    assert response.status_code == 200, response.text
    return response.json()


def tokens(pipeline: Pipeline, **text: Any) -> list[int]:
    found: list[int] = post(pipeline, "/tokenize", **text)["tokens"]
    return found


def by_transformers(*pairs: tuple[list[int], list[int]]) -> Any:
    """For each prompt and answer, the answer's logprobs, and the two likeliest tokens at each place."""
    command = [sys.executable, "-W", "ignore", "-m", "tests.system.logprobs", str(DEFAULT_MODEL)]
    done = subprocess.run(command, input=json.dumps(pairs), capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


class TestLogprobs:
    @pytest.mark.parametrize("temperature", [0, 0.7])
    def test_they_are_those_of_the_model_whatever_the_temperature(self, pipeline: Pipeline, temperature: float) -> None:
        answer = pipeline.ask(
            QUESTION, max_tokens=24, logprobs=True, top_logprobs=2, temperature=temperature, seed=3
        ).json()["choices"][0]
        entries = answer["logprobs"]["content"]
        assert "".join(entry["token"] for entry in entries) == answer["message"]["content"]
        prompt = tokens(pipeline, messages=[{"role": "user", "content": QUESTION}])
        spelt = [tokens(pipeline, prompt=entry["token"], add_special_tokens=False) for entry in entries]
        assert all(len(ids) == 1 for ids in spelt)
        ((logprobs, likeliest),) = by_transformers((prompt, [ids[0] for ids in spelt]))
        assert [entry["logprob"] for entry in entries] == pytest.approx(logprobs, abs=1e-3)
        for entry, top in zip(entries, likeliest, strict=True):
            texts = [post(pipeline, "/detokenize", tokens=[token])["prompt"] for token in top]
            assert [one["token"] for one in entry["top_logprobs"]] == texts
            assert entry["top_logprobs"][0]["logprob"] >= entry["top_logprobs"][1]["logprob"]

    def test_streamed_or_not_they_are_the_same(self, pipeline: Pipeline) -> None:
        options: dict[str, Any] = {"max_tokens": 40, "logprobs": True, "top_logprobs": 1}
        whole = pipeline.ask(QUESTION, **options).json()["choices"][0]["logprobs"]["content"]
        chunks = [choice for chunk in pipeline.stream(QUESTION, **options) for choice in chunk["choices"]]
        parts = [part["logprobs"]["content"] for part in chunks if part["logprobs"]]
        streamed = [entry for part in parts for entry in part]
        assert [entry["token"] for entry in streamed] == [entry["token"] for entry in whole]
        assert [entry["logprob"] for entry in streamed] == pytest.approx(
            [entry["logprob"] for entry in whole], abs=1e-3
        )

    def test_tokens_that_are_no_whole_character_have_their_bytes(self, pipeline: Pipeline) -> None:
        halves = tokens(pipeline, prompt="\u00ef", add_special_tokens=False)
        assert len(halves) == 2
        choice = pipeline.ask("hi", max_tokens=2, logprobs=True, logit_bias={str(halves[0]): 100}).json()["choices"][0]
        assert [entry["bytes"] for entry in choice["logprobs"]["content"]] == [[0xC3], [0xC3]]

    def test_what_follows_a_stop_string_has_none(self, pipeline: Pipeline) -> None:
        choice = pipeline.ask(QUESTION, max_tokens=40, logprobs=True, stop=[" for"]).json()["choices"][0]
        text = "".join(entry["token"] for entry in choice["logprobs"]["content"])
        assert text.startswith(choice["message"]["content"])
        assert text.endswith(" for")

    def test_completions_have_them_in_their_own_form(self, pipeline: Pipeline) -> None:
        body = {"prompt": "The router", "max_tokens": 12, "logprobs": 2, "temperature": 0}
        choice = post(pipeline, "/v1/completions", **body)["choices"][0]
        logprobs = choice["logprobs"]
        assert "".join(logprobs["tokens"]) == choice["text"]
        assert [choice["text"][offset:].startswith(token) for offset, token in zip(
            logprobs["text_offset"], logprobs["tokens"], strict=True)] == [True] * len(logprobs["tokens"])  # fmt: skip
        for token, logprob, top in zip(
            logprobs["tokens"], logprobs["token_logprobs"], logprobs["top_logprobs"], strict=True
        ):
            assert top[token] == logprob == max(top.values())
            assert len(top) == 2


FOUR: dict[str, Any] = {"n": 4, "temperature": 2, "max_tokens": 24, "seed": 7}


class TestSeveral:
    def test_they_differ_and_come_again_with_the_same_seed(self, pipeline: Pipeline) -> None:
        first, again = (pipeline.ask(QUESTION, **FOUR).json()["choices"] for _ in range(2))
        assert [choice["index"] for choice in first] == [0, 1, 2, 3]
        texts = [choice["message"]["content"] for choice in first]
        assert len(set(texts)) == 4
        assert texts == [choice["message"]["content"] for choice in again]

    def test_the_first_is_what_one_alone_would_be(self, pipeline: Pipeline) -> None:
        alone = pipeline.ask(QUESTION, **{**FOUR, "n": 1}).json()["choices"][0]
        assert alone["message"] == pipeline.ask(QUESTION, **FOUR).json()["choices"][0]["message"]

    def test_the_prompt_counts_once(self, pipeline: Pipeline) -> None:
        one, four = (pipeline.ask(QUESTION, max_tokens=5, n=n).json()["usage"] for n in (1, 4))
        assert four["prompt_tokens"] == one["prompt_tokens"]
        assert four["completion_tokens"] == 4 * one["completion_tokens"]

    def test_they_are_on_one_worker(self, pipeline: Pipeline) -> None:
        response = pipeline.ask("Something that nobody asked before. " * 5, n=6, max_tokens=4)
        log = (pipeline.folder / "router.log").read_text()
        lines = [line for line in log.splitlines() if f"request_id={response.headers['x-request-id']} " in line]
        assert len(lines) == 6
        assert {f"worker={response.headers['x-worker-id']}" in line for line in lines} == {True}

    def test_streamed_each_chunk_says_whose_it_is(self, pipeline: Pipeline) -> None:
        chunks = pipeline.stream(QUESTION, **FOUR)
        whole = pipeline.ask(QUESTION, **FOUR).json()["choices"]
        for choice in whole:
            parts = [part for chunk in chunks for part in chunk["choices"] if part["index"] == choice["index"]]
            assert said([{"choices": parts}]) == choice["message"]["content"]


class TestCompletions:
    def test_prompts_can_be_text_or_tokens_one_or_several(self, pipeline: Pipeline) -> None:
        ids = [tokens(pipeline, prompt=prompt) for prompt in ("The router", "The engine")]
        prompts: list[Any] = ["The router", ["The router", "The engine"], ids[0], ids]
        answers = [post(pipeline, "/v1/completions", prompt=prompt, temperature=0, max_tokens=6) for prompt in prompts]
        texts = [[choice["text"] for choice in answer["choices"]] for answer in answers]
        assert texts[0] == texts[2] == texts[1][:1]
        assert texts[1] == texts[3]
        assert len(texts[1]) == 2

    def test_the_prompt_can_begin_the_answer_or_be_all_of_it(self, pipeline: Pipeline) -> None:
        body: dict[str, Any] = {"prompt": "The router", "temperature": 0, "max_tokens": 6}
        plain = post(pipeline, "/v1/completions", **body)["choices"][0]["text"]
        assert post(pipeline, "/v1/completions", **body, echo=True)["choices"][0]["text"] == f"The router{plain}"
        nothing = post(pipeline, "/v1/completions", **{**body, "max_tokens": 0}, echo=True)
        assert nothing["choices"][0]["text"] == "The router"
        assert nothing["usage"]["completion_tokens"] == 0

    def test_of_several_the_likeliest(self, pipeline: Pipeline) -> None:
        body: dict[str, Any] = {"prompt": "The router", "temperature": 2, "max_tokens": 8, "seed": 1, "logprobs": 0}
        several = post(pipeline, "/v1/completions", **body, n=5)["choices"]
        means = {choice["text"]: _mean(choice["logprobs"]["token_logprobs"]) for choice in several}
        best = post(pipeline, "/v1/completions", **body, best_of=5)["choices"]
        assert [choice["text"] for choice in best] == [max(means, key=lambda text: means[text])]


def _mean(logprobs: list[float]) -> float:
    return math.fsum(logprobs) / len(logprobs)
