"""Logprobs to the last detail: they are transformers' own, and belong to the text beside which they stand."""

import json
import subprocess
import sys
from typing import Any

from common.model import DEFAULT_MODEL
from common.text.token_texts import TokenTexts
from tests.system.conftest import REPOSITORY, Pipeline, events

import pytest
from tokenizers import Tokenizer

CLOSE = 1e-3
QUESTION = "Count from 1 to 20."
MESSAGES: list[dict[str, Any]] = [{"role": "user", "content": QUESTION}]
# Tokens in no order, seldom the likeliest: of what was said before, less.
WILD: dict[str, Any] = {"temperature": 2, "seed": 11, "frequency_penalty": 2, "ignore_eos": True, "logprobs": True}

TOKENIZER = Tokenizer.from_file(str(DEFAULT_MODEL / "tokenizer.json"))
TEXTS = TokenTexts(TOKENIZER)
IDS = {TEXTS.bytes_of(token): token for token in range(TOKENIZER.get_vocab_size())}
# Only tokens that are a part of a character, which may become one or not.
PARTS = {str(IDS[bytes([byte])]): 100 for byte in "é€😀".encode()}


def completions(pipeline: Pipeline, **fields: Any) -> dict[str, Any]:
    body: dict[str, Any] = {"model": pipeline.model, "temperature": 0, "max_tokens": 16, **fields}
    with pipeline.client() as client:
        response = client.post("/v1/completions", json=body)
    assert response.status_code == 200, response.text
    found: dict[str, Any] = response.json()
    return found


def prompt_ids(pipeline: Pipeline, **text: Any) -> list[int]:
    with pipeline.client() as client:
        found: list[int] = client.post("/tokenize", json={"model": pipeline.model, **text}).json()["tokens"]
    return found


def ids_of(entries: list[dict[str, Any]]) -> list[int]:
    return [IDS[bytes(entry["bytes"])] for entry in entries]


def text_of(entries: list[dict[str, Any]]) -> str:
    return b"".join(bytes(entry["bytes"]) for entry in entries).decode(errors="replace")


class Compared:
    """Answers, to be compared with transformers in one go: it takes long to start."""

    def __init__(self) -> None:
        self._pairs: list[tuple[list[int], list[int]]] = []
        self._ours: list[list[dict[str, Any]]] = []

    def note(self, prompt: list[int], entries: list[dict[str, Any]]) -> None:
        assert len(entries) > 3
        self._pairs.append((prompt, ids_of(entries)))
        self._ours.append(entries)

    def compare(self) -> None:
        command = [sys.executable, str(REPOSITORY / "tests/system/reference.py"), str(DEFAULT_MODEL)]
        done = subprocess.run(command, input=json.dumps(self._pairs), capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        for entries, theirs in zip(self._ours, json.loads(done.stdout), strict=True):
            assert [entry["logprob"] for entry in entries] == pytest.approx(theirs["logprobs"], abs=CLOSE)
            for entry, top_ids, top in zip(entries, theirs["top_ids"], theirs["top_logprobs"], strict=True):
                ours = entry["top_logprobs"][: len(top)]
                assert [one["logprob"] for one in ours] == pytest.approx(top, abs=CLOSE)
                # In any order: some are as likely as each other.
                assert all(one["logprob"] <= top[-1] + CLOSE for one in ours if ids_of([one])[0] not in top_ids)


class TestEqualThoseOfTransformers:
    def test_in_chat_and_in_completions(self, pipeline: Pipeline) -> None:
        compared = Compared()
        self._chat(pipeline, compared)
        self._completions(pipeline, compared)
        compared.compare()

    def _chat(self, pipeline: Pipeline, compared: Compared) -> None:
        """Greedy and sampled, whole and streamed."""
        prompt = prompt_ids(pipeline, messages=MESSAGES)
        sampled: dict[str, Any] = {"temperature": 2, "seed": 5, "max_tokens": 40}
        kinds: list[dict[str, Any]] = [{}, sampled, {**sampled, "n": 2}, {"stop": ["5"], "max_tokens": 40}]
        for fields in kinds:
            asked = {"logprobs": True, "top_logprobs": 3, **fields}
            for choice in pipeline.ask(QUESTION, **asked).json()["choices"]:
                compared.note(prompt, choice["logprobs"]["content"])
            chunks = [choice for chunk in pipeline.stream(QUESTION, **asked) for choice in chunk["choices"]]
            for index in {choice["index"] for choice in chunks}:
                parts = [part["logprobs"]["content"] for part in chunks if part["index"] == index and part["logprobs"]]
                assert max(map(len, parts)) > 1, "several tokens in one chunk"
                compared.note(prompt, [entry for part in parts for entry in part])

    def _completions(self, pipeline: Pipeline, compared: Compared) -> None:
        """Whose form is an older one."""
        text = "The router"
        for choice in completions(pipeline, prompt=text, logprobs=3, n=2)["choices"]:
            given = choice["logprobs"]
            assert "".join(given["tokens"]) == choice["text"]
            assert all(
                choice["text"].startswith(*place) for place in zip(given["tokens"], given["text_offset"], strict=True)
            )
            compared.note(
                prompt_ids(pipeline, prompt=text),
                [
                    {
                        "bytes": [*token.encode()],
                        "logprob": logprob,
                        "top_logprobs": [{"bytes": [*one.encode()], "logprob": value} for one, value in top.items()],
                    }
                    for token, logprob, top in zip(
                        given["tokens"], given["token_logprobs"], given["top_logprobs"], strict=True
                    )
                ],
            )


class TestBelongToTheText:
    @pytest.mark.parametrize("seed", range(4))
    def test_their_bytes_joined_are_the_text_however_many_make_a_character(self, pipeline: Pipeline, seed: int) -> None:
        fields = {**WILD, "seed": seed, "max_tokens": 60, "logit_bias": PARTS}
        choice = pipeline.ask(QUESTION, **fields).json()["choices"][0]
        entries = choice["logprobs"]["content"]
        assert len(entries) == 60
        assert all(len(entry["bytes"]) == 1 for entry in entries)
        assert text_of(entries) == choice["message"]["content"]

    def test_none_is_lost_or_told_twice_where_a_character_waits_for_its_last_token(self, pipeline: Pipeline) -> None:
        fields = {**WILD, "max_tokens": 60, "logit_bias": PARTS}
        whole = pipeline.ask(QUESTION, **fields).json()["choices"][0]["logprobs"]["content"]
        chunks = [choice for chunk in pipeline.stream(QUESTION, **fields) for choice in chunk["choices"]]
        streamed = [entry for choice in chunks if choice["logprobs"] for entry in choice["logprobs"]["content"]]
        assert ids_of(streamed) == ids_of(whole)

    @pytest.mark.parametrize("streamed", [False, True])
    def test_they_end_with_the_stop_string(self, pipeline: Pipeline, streamed: bool) -> None:
        fields: dict[str, Any] = {"max_tokens": 40, "logprobs": True, "stop": [", 7"]}
        if streamed:
            choices = [choice for chunk in pipeline.stream(QUESTION, **fields) for choice in chunk["choices"]]
            entries = [entry for choice in choices if choice["logprobs"] for entry in choice["logprobs"]["content"]]
            text = "".join(choice["delta"].get("content") or "" for choice in choices)
        else:
            choice = pipeline.ask(QUESTION, **fields).json()["choices"][0]
            entries, text = choice["logprobs"]["content"], choice["message"]["content"]
        assert text_of(entries) == text + ", 7"

    def test_the_end_token_has_none(self, pipeline: Pipeline) -> None:
        choice = pipeline.ask("What is 7 + 5?", max_tokens=40, logprobs=True).json()["choices"][0]
        assert choice["finish_reason"] == "stop"
        assert text_of(choice["logprobs"]["content"]) == choice["message"]["content"]


class TestTheLikeliest:
    @pytest.mark.parametrize("count", [0, 1, 5, 20])
    def test_are_as_many_as_asked_for_the_likeliest_first(self, pipeline: Pipeline, count: int) -> None:
        fields: dict[str, Any] = {"logprobs": True, "top_logprobs": count, "max_tokens": 6}
        for entry in pipeline.ask(QUESTION, **fields).json()["choices"][0]["logprobs"]["content"]:
            top = entry["top_logprobs"]
            logprobs = [one["logprob"] for one in top]
            assert len({bytes(one["bytes"]) for one in top}) == len(top) == count
            assert logprobs == sorted(logprobs, reverse=True)
            if top:  # the greedy choice is the likeliest
                assert (top[0]["bytes"], top[0]["logprob"]) == (entry["bytes"], entry["logprob"])

    def test_what_was_sampled_need_not_be_among_them(self, pipeline: Pipeline) -> None:
        fields = {**WILD, "top_logprobs": 2, "max_tokens": 30}
        entries = pipeline.ask(QUESTION, **fields).json()["choices"][0]["logprobs"]["content"]
        among = [entry["bytes"] in [one["bytes"] for one in entry["top_logprobs"]] for entry in entries]
        assert not all(among)
        assert all(
            entry["logprob"] <= entry["top_logprobs"][-1]["logprob"] + CLOSE
            for entry, inside in zip(entries, among, strict=True)
            if not inside
        )

    def test_there_are_none_unless_asked_for(self, pipeline: Pipeline) -> None:
        assert pipeline.ask(QUESTION).json()["choices"][0]["logprobs"] is None
        assert all(choice["logprobs"] is None for chunk in pipeline.stream(QUESTION) for choice in chunk["choices"])
        assert completions(pipeline, prompt=QUESTION)["choices"][0]["logprobs"] is None


class TestCompletions:
    def test_each_prompt_counts_once_and_answers_come_in_their_order(self, pipeline: Pipeline) -> None:
        prompts = ["The router", "The engine chooses", "Tokens"]
        alone = [completions(pipeline, prompt=prompt) for prompt in prompts]
        body = completions(pipeline, prompt=prompts, n=2)
        texts = [choice["text"] for choice in body["choices"]]
        assert [choice["index"] for choice in body["choices"]] == [*range(6)]
        assert texts == [one["choices"][0]["text"] for one in alone for _ in range(2)]
        assert body["usage"]["prompt_tokens"] == sum(one["usage"]["prompt_tokens"] for one in alone)
        assert body["usage"]["completion_tokens"] == 2 * sum(one["usage"]["completion_tokens"] for one in alone)

    def test_an_echo_is_of_each_answer_s_own_prompt(self, pipeline: Pipeline) -> None:
        ids = prompt_ids(pipeline, prompt="Tokens, é 😀")
        for prompts in (["The router", "Tokens, é 😀"], [prompt_ids(pipeline, prompt="The router"), ids]):
            texts = [choice["text"] for choice in completions(pipeline, prompt=prompts, echo=True)["choices"]]
            assert texts[0].startswith("The router")
            assert texts[1].startswith("Tokens, é 😀")

    def test_an_echo_is_streamed_first(self, pipeline: Pipeline) -> None:
        prompts = ["The", "A"]
        body = {"model": pipeline.model, "prompt": prompts, "echo": True, "stream": True, "max_tokens": 3}
        with pipeline.client() as client:
            chunks = events(client.post("/v1/completions", json=body).text)
        for index, prompt in enumerate(prompts):
            texts = [choice["text"] for chunk in chunks for choice in chunk["choices"] if choice["index"] == index]
            assert texts[0].startswith(prompt)

    def test_the_best_of_several_are_the_likeliest_ones_and_all_are_counted(self, pipeline: Pipeline) -> None:
        fields: dict[str, Any] = {"prompt": "The router", "temperature": 2, "max_tokens": 8, "seed": 5, "logprobs": 0}
        several = completions(pipeline, n=6, **fields)

        def mean(choice: dict[str, Any]) -> float:
            logprobs: list[float] = choice["logprobs"]["token_logprobs"]
            return sum(logprobs) / len(logprobs)

        best = completions(pipeline, n=2, best_of=6, **fields)
        ranked = sorted(several["choices"], key=mean, reverse=True)
        assert [choice["text"] for choice in best["choices"]] == [choice["text"] for choice in ranked[:2]]
        assert [choice["index"] for choice in best["choices"]] == [0, 1]
        assert best["usage"] == several["usage"] | {"prompt_tokens_details": best["usage"]["prompt_tokens_details"]}

    def test_the_best_need_not_be_reported_with_their_logprobs(self, pipeline: Pipeline) -> None:
        (choice,) = completions(pipeline, prompt="The router", temperature=1, best_of=3)["choices"]
        assert choice["logprobs"] is None

    @pytest.mark.parametrize(
        ("fields", "says"),
        [
            ({"echo": True, "logprobs": 1}, "echo"),
            ({"best_of": 2, "stream": True}, "best_of"),
            ({"best_of": 1, "n": 2}, "best_of"),
            ({"logprobs": 21}, "logprobs"),
            ({"prompt": []}, "prompt"),
            ({"prompt": ["a", []]}, "prompt"),
            ({"prompt": [10**6]}, "token ids"),
            ({"prompt": [-1]}, "token ids"),
            ({"prompt": [[]]}, "prompt"),
            ({"prompt": ""}, "prompt"),
            ({"suffix": "x"}, "suffix"),
            ({"n": 128, "prompt": ["a"] * 9}, "answers"),
        ],
        ids=str,
    )
    def test_what_cannot_be_had_is_refused(self, pipeline: Pipeline, fields: dict[str, Any], says: str) -> None:
        with pipeline.client() as client:
            response = client.post("/v1/completions", json={"model": pipeline.model, "prompt": "x", **fields})
        assert response.status_code == 400
        assert says in response.json()["error"]["message"]
