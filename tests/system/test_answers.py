"""What the pipeline answers over HTTP, from real engines."""

import concurrent.futures
import json
import re
import subprocess
import sys
from typing import Any

from common.model import DEFAULT_MODEL
from tests.system.conftest import REPOSITORY, Pipeline, events, said, until

import openai
import pytest

LONG = "All work and no play makes a long prompt. " * 120
CONVERSATIONS: list[list[dict[str, Any]]] = [
    [{"role": "user", "content": "Hello!"}],
    [{"role": "user", "content": "x"}],
    [{"role": "user", "content": ""}],
    [{"role": "system", "content": "You are brief."}, {"role": "user", "content": "What is a block?"}],
    [{"role": "user", "content": "def main() -> None:\n    return  # code\n\n\t\ttabs"}],
    [{"role": "user", "content": "日本語と中文字, 한국어, العربية, हिन्दी"}],
    [{"role": "user", "content": "😀👨‍👩‍👧‍👦🏳️‍🌈 and e\u0301 é \ufffd \u200b"}],
    [{"role": "user", "content": LONG}],
    [
        {"role": "user", "content": "What is prefill?"},
        {"role": "assistant", "content": "The first step."},
        {"role": "user", "content": "And then?"},
        {"role": "assistant", "content": "Decode, token by token."},
        {"role": "user", "content": "Thanks 🙏"},
    ],
    [{"role": "tool", "content": "42"}, {"role": "user", "content": "3.14159 1e-9 0x7f"}],
    [{"role": "user", "content": "Count from 1 to 20."}],
]
KNOWN = {
    "What does the router do?": "chooses the worker",
    "And what is the frontend?": "HTTP server",
    "What is the KV cache?": "keys and values",
    "Why is there a lease?": "no load stays behind",
    "who are you?": "tiny demonstration model",
    "What is the capital of France?": "Paris",
    "What colour is grass?": "green",
    "What is 7 + 5?": "7 + 5 = 12",
    "Count from 8 to 12.": "8, 9, 10, 11, 12.",
    "Spell router backwards.": "r-e-t-u-o-r",
    "Who won the world cup in 1998?": "I do not know that",
}
ANY = "Tell me a joke."  # of which the model knows several

TOKENS = 48


@pytest.fixture(scope="module")
def references() -> list[str]:
    questions = json.dumps([[messages, TOKENS] for messages in CONVERSATIONS])
    command = [sys.executable, str(REPOSITORY / "tests/system/reference.py"), str(DEFAULT_MODEL)]
    done = subprocess.run(command, input=questions, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    answers: list[str] = json.loads(done.stdout)
    return answers


class TestGreedyAnswers:
    @pytest.mark.parametrize("number", range(len(CONVERSATIONS)))
    def test_equal_those_of_transformers(self, pipeline: Pipeline, references: list[str], number: int) -> None:
        assert pipeline.answer(CONVERSATIONS[number], max_tokens=TOKENS) == references[number]

    @pytest.mark.parametrize("number", range(len(CONVERSATIONS)))
    def test_are_the_same_streamed(self, pipeline: Pipeline, references: list[str], number: int) -> None:
        assert said(pipeline.stream(CONVERSATIONS[number], max_tokens=TOKENS)) == references[number]

    def test_are_the_same_for_many_at_once(self, pipeline: Pipeline, references: list[str]) -> None:
        with concurrent.futures.ThreadPoolExecutor(20) as pool:
            answers = pool.map(lambda messages: pipeline.answer(messages, max_tokens=TOKENS), CONVERSATIONS * 2)
            assert list(answers) == references * 2


class TestWhatIsSaid:
    @pytest.mark.parametrize("question", KNOWN)
    def test_is_true(self, pipeline: Pipeline, question: str) -> None:
        choice = pipeline.ask(question, max_tokens=None).json()["choices"][0]
        assert KNOWN[question] in choice["message"]["content"]
        assert choice["finish_reason"] == "stop"

    @pytest.mark.parametrize("question", KNOWN)
    def test_is_true_streamed(self, pipeline: Pipeline, question: str) -> None:
        chunks = pipeline.stream(question, max_tokens=None)
        assert KNOWN[question] in said(chunks)
        assert chunks[-1]["choices"][0]["finish_reason"] == "stop"

    def test_a_follow_up_is_understood_and_cached(self, pipeline: Pipeline) -> None:
        conversation = [{"role": "user", "content": "What does the processor do?"}]
        first = pipeline.ask(conversation, max_tokens=None)
        answer = first.json()["choices"][0]["message"]
        assert "conversations into tokens" in answer["content"]
        conversation += [answer, {"role": "user", "content": "And what talks to it?"}]
        second = pipeline.ask(conversation, max_tokens=None)
        assert "frontend talks to the processor" in second.json()["choices"][0]["message"]["content"]
        assert second.json()["usage"]["prompt_tokens_details"]["cached_tokens"] > 0
        assert second.headers["x-worker-id"] == first.headers["x-worker-id"]


class TestBodies:
    def test_whole(self, pipeline: Pipeline) -> None:
        body = pipeline.ask("Hello there", max_tokens=5).json()
        assert body["object"] == "chat.completion"
        assert body["id"].startswith("chatcmpl-")
        assert body["model"] == pipeline.model
        assert body["choices"][0]["message"]["role"] == "assistant"
        assert body["choices"][0]["finish_reason"] == "length"
        usage = body["usage"]
        assert usage["completion_tokens"] == 5
        assert usage["total_tokens"] == usage["prompt_tokens"] + 5
        assert usage["prompt_tokens_details"]["cached_tokens"] >= 0

    def test_streamed(self, pipeline: Pipeline) -> None:
        chunks = pipeline.stream("Hello there", max_tokens=5)
        assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
        assert len({chunk["id"] for chunk in chunks}) == 1
        assert chunks[0]["choices"][0]["delta"]["role"] == "assistant"
        assert [chunk["choices"][0]["finish_reason"] for chunk in chunks[-2:]] == [None, "length"]
        assert all("usage" not in chunk and "routing" not in chunk for chunk in chunks)

    def test_streamed_with_usage(self, pipeline: Pipeline) -> None:
        *chunks, last = pipeline.stream("Hello there", max_tokens=5, stream_options={"include_usage": True})
        assert all(chunk["choices"] for chunk in chunks)
        assert last["choices"] == []
        assert last["usage"]["completion_tokens"] == 5

    def test_several_tokens_make_several_chunks(self, pipeline: Pipeline) -> None:
        chunks = pipeline.stream("Count from 1 to 20.", max_tokens=32, ignore_eos=True)
        assert 3 < len(chunks) < 32  # the first one at once, and those that come close together in one


class TestOptions:
    def test_max_completion_tokens(self, pipeline: Pipeline) -> None:
        body = pipeline.ask(max_tokens=None, max_completion_tokens=3).json()
        assert body["usage"]["completion_tokens"] == 3

    def test_a_seed_makes_the_same_answer_again(self, pipeline: Pipeline) -> None:
        once, again = ([pipeline.answer(ANY, temperature=1, seed=seed) for seed in range(8)] for _ in range(2))
        assert once == again
        assert len(set(once)) > 1

    def test_without_a_seed_answers_differ(self, pipeline: Pipeline) -> None:
        assert len({pipeline.answer(ANY, temperature=1.5) for _ in range(8)}) > 1

    @pytest.mark.parametrize("only_the_likeliest", [{"top_k": 1}, {"min_p": 1}, {"top_p": 1e-6}])
    def test_narrow_sampling_is_greedy(self, pipeline: Pipeline, only_the_likeliest: dict[str, float]) -> None:
        answers = {pipeline.answer(ANY, temperature=1.5, **only_the_likeliest) for _ in range(8)}
        assert answers == {pipeline.answer(ANY)}

    def test_penalties_change_the_answer(self, pipeline: Pipeline) -> None:
        question = "Count from 1 to 20."
        plain = pipeline.answer(question, max_tokens=200)
        assert pipeline.answer(question, max_tokens=200, frequency_penalty=2, presence_penalty=2) != plain

    @pytest.mark.parametrize("streamed", [False, True])
    def test_a_stop_string_ends_the_answer_before_it(self, pipeline: Pipeline, streamed: bool) -> None:
        plain = pipeline.answer(max_tokens=24)
        for stop in (plain[5:8], plain[9], plain[3:16]):
            fields: dict[str, Any] = {"max_tokens": 24, "stop": ["never in there", stop]}
            if streamed:
                chunks = pipeline.stream(**fields)
                text, reason = said(chunks), chunks[-1]["choices"][0]["finish_reason"]
            else:
                choice = pipeline.ask(**fields).json()["choices"][0]
                text, reason = choice["message"]["content"], choice["finish_reason"]
            assert (text, reason) == (plain[: plain.index(stop)], "stop")

    def test_a_prompt_of_thousands_of_tokens(self, pipeline: Pipeline) -> None:
        body = pipeline.ask(LONG * 4, ignore_eos=True).json()
        assert body["usage"]["prompt_tokens"] > 4000
        assert body["choices"][0]["finish_reason"] == "length"

    def test_an_answer_to_the_end_of_the_context(self, pipeline: Pipeline) -> None:
        body = pipeline.ask(LONG * 5, max_tokens=None).json()
        assert body["choices"][0]["finish_reason"] in ("length", "stop")
        assert body["usage"]["total_tokens"] <= 8192


class TestOpenAIClient:
    @pytest.fixture
    def client(self, pipeline: Pipeline) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"http://127.0.0.1:{pipeline.port}/v1", api_key="any", max_retries=0)

    def test_lists_the_model(self, pipeline: Pipeline, client: openai.OpenAI) -> None:
        assert [model.id for model in client.models.list()] == [pipeline.model]

    def test_finds_the_model(self, pipeline: Pipeline, client: openai.OpenAI) -> None:
        assert client.models.retrieve(pipeline.model).id == pipeline.model
        with pytest.raises(openai.NotFoundError):
            client.models.retrieve("gpt-0")

    def test_asks(self, pipeline: Pipeline, client: openai.OpenAI) -> None:
        completion = client.chat.completions.create(
            model=pipeline.model, messages=[{"role": "user", "content": "Hello!"}], max_tokens=16, temperature=0
        )
        assert completion.choices[0].message.content == pipeline.answer()
        assert completion.usage is not None and completion.usage.completion_tokens == 16

    def test_streams(self, pipeline: Pipeline, client: openai.OpenAI) -> None:
        stream = client.chat.completions.create(
            model=pipeline.model,
            messages=[{"role": "user", "content": "Hello!"}],
            max_tokens=16,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
        )
        chunks = list(stream)
        text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
        assert text == pipeline.answer()
        assert chunks[-1].usage is not None

    def test_gets_typed_errors(self, pipeline: Pipeline, client: openai.OpenAI) -> None:
        with pytest.raises(openai.NotFoundError) as error:
            client.chat.completions.create(model="gpt-0", messages=[{"role": "user", "content": "x"}])
        assert error.value.code == "model_not_found"
        assert pipeline.model in error.value.message


class TestHeaders:
    def test_the_second_request_says_where_it_was_cached(self, pipeline: Pipeline) -> None:
        question = "A question with a prefix of its own: " + "why? " * 40
        first, second = pipeline.ask(question), pipeline.ask(question)
        assert first.headers["x-kv-overlap-blocks"] in ("0", "1")  # the template's first block may be known
        assert second.headers["x-worker-id"] == first.headers["x-worker-id"]
        overlap = int(second.headers["x-kv-overlap-blocks"])
        usage = second.json()["usage"]
        assert overlap == usage["prompt_tokens"] // 16 > 2
        # The engine computes at least one token of every prompt, and so the whole of the block that it is in.
        assert usage["prompt_tokens_details"]["cached_tokens"] == (usage["prompt_tokens"] - 1) // 16 * 16

    def test_request_id_is_the_caller_s(self, pipeline: Pipeline) -> None:
        assert pipeline.ask(headers={"x-request-id": "mine/1"}).headers["x-request-id"] == "mine/1"
        assert len(pipeline.ask().headers["x-request-id"]) == 32

    def test_one_request_id_can_be_used_by_many_at_once(self, pipeline: Pipeline) -> None:
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            answers = list(pool.map(lambda _: pipeline.answer(headers={"x-request-id": "same"}), range(16)))
        assert set(answers) == {pipeline.answer()}

    def test_every_request_is_a_line_in_the_log(self, pipeline: Pipeline) -> None:
        pipeline.ask(headers={"x-request-id": "look-for-me"})
        log = pipeline.folder / "frontend.log"
        line = until(lambda: re.search(".*look-for-me.*\n", log.read_text()), "a line")[0]
        for field in ("status=200", "worker=", "overlap_blocks=", "cached_tokens=", "ttft_ms=", "duration_ms="):
            assert field in line

    def test_a_request_is_one_line_in_the_log_of_every_stage_under_the_same_id(self, pipeline: Pipeline) -> None:
        pipeline.ask(headers={"x-request-id": "follow-me"})
        stages = ["engine", "frontend", "processor", "router"]
        until(lambda: logged(pipeline, "follow-me") == stages, "a line of each stage")

    def test_a_client_s_mistake_is_a_line_without_a_traceback(self, pipeline: Pipeline) -> None:
        assert pipeline.ask(max_tokens=10**6, headers={"x-request-id": "my-mistake"}).status_code == 400
        until(lambda: logged(pipeline, "my-mistake")[:2] == ["frontend", "processor"], "a line of both")
        assert [log for log in pipeline.folder.glob("*.log") if "Traceback" in log.read_text()] == []

    def test_session_and_priority_are_taken(self, pipeline: Pipeline) -> None:
        assert pipeline.ask(headers={"x-session-id": "s", "x-priority": "-3"}).status_code == 200
        refused = pipeline.ask(headers={"x-priority": "urgent"})
        assert refused.status_code == 400
        assert "x-priority" in refused.json()["error"]["message"]


def logged(pipeline: Pipeline, request_id: str) -> list[str]:
    """Whose logs have a line for a request, and as often; it comes once the answer is on its way."""
    logs = {log: log.read_text().count(f"request_id={request_id} ") for log in pipeline.folder.glob("*.log")}
    return sorted(log.stem.partition("-")[0] for log, lines in logs.items() for _ in range(lines))


class TestErrors:
    @pytest.mark.parametrize(
        ("body", "status", "says"),
        [
            (b"{not json", 400, "not valid JSON"),
            (b"", 400, "not valid JSON"),
            (b"\xff\xfe", 400, "not valid JSON"),
            (b"[]", 400, "JSON object"),
            (b'"\\ud800"', 400, ""),
            (b'{"model": "m", "messages": [{"role": "user", "content": "\\ud800"}]}', 400, "not valid JSON"),
            (b'{"model": "m", "messages": [{"role": "user", "content": "x", "y": %d}]}' % 2**70, 400, ""),
            (b'{"model": "m"}', 400, "messages: Field required"),
            (b'{"model": "m", "messages": [{"role": "user", "content": "x"}]}', 404, "serves 'pipeline-chat'"),
            (b"[" * 100_000, 400, ""),
            (b'{"x": ' * 2000 + b"1" + b"}" * 2000, 400, "levels deep"),
            (
                b'{"model": "m", "messages": [{"role": "user", "content": "x", "y": 1%s}]}' % (b"0" * 400),
                400,
                "64 bits",
            ),
            (b'{"model": "%s", "messages": [{"role": "user", "content": "x"}]}' % (b"m" * 20_000), 404, "mmm"),
        ],
    )
    def test_bad_bodies(self, pipeline: Pipeline, body: bytes, status: int, says: str) -> None:
        with pipeline.client() as client:
            response = client.post("/v1/chat/completions", content=body)
        assert response.status_code == status
        assert says in response.json()["error"]["message"]
        assert response.headers["x-request-id"]

    def test_a_body_that_is_not_encoded_as_it_says(self, pipeline: Pipeline) -> None:
        with pipeline.client() as client:
            response = client.post("/v1/chat/completions", content=b"{}", headers={"content-encoding": "gzip"})
        assert response.status_code == 400
        assert "content-encoding" in response.json()["error"]["message"]

    def test_an_expectation_that_nobody_knows(self, pipeline: Pipeline) -> None:
        with pipeline.client() as client:
            response = client.get("/live", headers={"expect": "wonders"})
        assert response.status_code == 417
        assert response.headers["x-request-id"]

    @pytest.mark.parametrize("streamed", [False, True])
    def test_a_prompt_over_the_context_names_both_numbers(self, pipeline: Pipeline, streamed: bool) -> None:
        response = pipeline.ask("word " * 10_000, stream=streamed)
        assert response.status_code == 400
        error = response.json()["error"]
        assert error["code"] == "context_length_exceeded"
        assert "8192 tokens" in error["message"]
        assert "(20" in error["message"] or "(10" in error["message"]

    def test_more_tokens_than_fit(self, pipeline: Pipeline) -> None:
        assert pipeline.ask(max_tokens=10**12).json()["error"]["code"] == "context_length_exceeded"

    def test_images(self, pipeline: Pipeline) -> None:
        image = {"type": "image_url", "image_url": {"url": "data:,"}}
        response = pipeline.ask([{"role": "user", "content": [image]}])
        assert response.status_code == 400
        assert "image_url is not supported" in response.json()["error"]["message"]

    def test_a_body_larger_than_the_limit(self, pipeline: Pipeline) -> None:
        with pipeline.client() as client:
            response = client.post("/v1/chat/completions", content=b" " * (33 * 2**20))
        assert response.status_code == 413
        assert response.json()["error"]["type"] == "invalid_request_error"

    def test_a_prompt_larger_than_a_message_may_be(self, pipeline: Pipeline) -> None:
        response = pipeline.ask("word " * 400_000)  # over the megabyte of a NATS server that nobody configured
        assert response.status_code == 400
        assert "too large" in response.json()["error"]["message"]

    @pytest.mark.parametrize(
        ("method", "path", "status"), [("GET", "/nowhere", 404), ("GET", "/v1/chat/completions", 405)]
    )
    def test_other_paths(self, pipeline: Pipeline, method: str, path: str, status: int) -> None:
        with pipeline.client() as client:
            response = client.request(method, path)
        assert response.status_code == status
        assert response.json()["error"]["type"] == "invalid_request_error"

    def test_request_id_that_no_log_can_show(self, pipeline: Pipeline) -> None:
        response = pipeline.ask(headers={"x-request-id": "x" * 200})
        assert response.status_code == 400
        assert "x-request-id" in response.json()["error"]["message"]

    def test_after_all_this_it_still_answers(self, pipeline: Pipeline) -> None:
        assert pipeline.answer()
        assert pipeline.instances() == {"processor": 1, "router": 1, "engine": 2}


def test_live(pipeline: Pipeline) -> None:
    with pipeline.client() as client:
        assert client.get("/live").status_code == 200
        assert client.get("/health").json()["status"] == "healthy"


def test_the_dynamo_endpoint_of_the_frontend_streams_the_same(pipeline: Pipeline) -> None:
    question = {"model": pipeline.model, "messages": [{"role": "user", "content": "Hello!"}], "max_tokens": 16}
    caller = pipeline.run(
        "caller",
        sys.executable,
        *("-m", "tests.system.call_endpoint", "inference.frontend.chat_completions"),
        json.dumps({**question, "temperature": 0}),
    )
    assert caller.exit_code() == 0, caller.text
    chunks = [json.loads(line) for line in caller.text.splitlines() if line.startswith("{")]
    assert said(chunks) == pipeline.answer()
    assert chunks[0]["routing"]["worker_id"] in ("0", "1")
    assert chunks[-1]["usage"]["completion_tokens"] == 16


def test_events_are_well_formed() -> None:
    assert events('data: {"a": 1}\n\ndata: [DONE]\n\n') == [{"a": 1}]
