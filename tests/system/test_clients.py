"""Every body and every event is what OpenAI's own client has a type for, without a field that it does not know."""

import json
import re
from collections.abc import Iterator
from typing import Any, Literal, TypeVar

from tests.system.conftest import Pipeline, events
from tests.system.scripted_worker import script, turn

import openai
import pytest
from openai.types import Completion, CompletionChoice, ErrorObject, Model
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from pydantic import BaseModel

Typed = TypeVar("Typed", bound=BaseModel)

OURS = {"reasoning_content"}  # which OpenAI does not have, and everybody else does
FUNCTION = {"name": "f", "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}}}
CALL = '<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>'
TEXT = "Hello there, you two! 😀"
# By what is asked for: the model, what it says, how that ends, and the fields of the request.
CHATS: dict[str, tuple[str, str, str, dict[str, Any]]] = {
    "text": ("hermes", TEXT, "stop", {}),
    "no text": ("hermes", "", "stop", {}),
    "a limit": ("hermes", TEXT, "length", {"max_tokens": 100}),
    "two answers": ("hermes", TEXT, "stop", {"n": 2}),
    "logprobs": ("hermes", TEXT, "stop", {"logprobs": True}),
    "top logprobs of two": ("hermes", TEXT, "stop", {"logprobs": True, "top_logprobs": 3, "n": 2}),
    "a stop string": ("hermes", TEXT, "stop", {"stop": ["you"], "logprobs": True}),
    "a call": ("hermes", CALL, "tool_calls", {"tools": [{"type": "function", "function": FUNCTION}]}),
    "text and two calls": (
        "hermes",
        f"Well.\n{CALL}\n{CALL}",
        "tool_calls",
        {"tools": [{"type": "function", "function": FUNCTION}], "logprobs": True, "n": 2},
    ),
    "an old call": ("hermes", CALL, "function_call", {"functions": [FUNCTION]}),
    "thoughts": ("thinker", f"<think>Who?</think>{TEXT}", "stop", {"logprobs": True}),
    "thoughts and a call": (
        "thinker",
        f"<think>Who?</think>{CALL}",
        "tool_calls",
        {"tools": [{"type": "function", "function": FUNCTION}]},
    ),
}
TEXTS: dict[str, dict[str, Any]] = {
    "text": {},
    "two answers": {"n": 2},
    "logprobs": {"logprobs": 3},
    "an echo": {"echo": True},
    "a stop string": {"stop": "you", "logprobs": 0},
}


class TextEventChoice(CompletionChoice):
    """OpenAI's type says that every event has a finish_reason; OpenAI's events have null until the last one."""

    finish_reason: Literal["stop", "length", "content_filter"] | None  # type: ignore[assignment]


class TextEvent(Completion):
    choices: list[TextEventChoice]  # type: ignore[assignment]


def typed(kind: type[Typed], body: str | dict[str, Any]) -> Typed:
    """The body as OpenAI's client would like it."""
    text = body if isinstance(body, str) else json.dumps(body)
    value = kind.model_validate_json(text, strict=True)
    assert not [name for name in unknown(value) if name not in OURS], text
    return value


def unknown(value: Any) -> Iterator[str]:
    """The names of the fields that a type does not have."""
    if isinstance(value, BaseModel):
        yield from value.model_extra or ()
        value = [getattr(value, name) for name in type(value).model_fields]
    if isinstance(value, list):
        for item in value:
            yield from unknown(item)


def finished(choices: list[Any]) -> list[tuple[int, str]]:
    return sorted((choice.index, choice.finish_reason) for choice in choices if choice.finish_reason)


def failing(text: str) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The events of a stream that fails, and its error."""
    blocks = text.split("\n\n")
    assert blocks.pop() == ""
    bodies = [json.loads(block.removeprefix("data: ")) for block in blocks]
    return bodies[:-1], bodies[-1]["error"]


class TestChat:
    @pytest.mark.parametrize("case", CHATS)
    def test_whole(self, scripted: Pipeline, case: str) -> None:
        model, text, reason, fields = CHATS[case]
        said = turn(text, end="length" if reason == "length" else "stop")
        body = typed(ChatCompletion, scripted.ask(script(said), model=model, **{"max_tokens": None, **fields}).text)
        assert finished(body.choices) == [(index, reason) for index in range(fields.get("n", 1))]
        assert body.usage is not None
        assert body.model == model

    @pytest.mark.parametrize("usage", [False, True], ids=["", "with usage"])
    @pytest.mark.parametrize("case", CHATS)
    def test_streamed(self, scripted: Pipeline, case: str, usage: bool) -> None:
        model, text, reason, fields = CHATS[case]
        said = turn(text, end="length" if reason == "length" else "stop")
        options = {"stream_options": {"include_usage": True}} if usage else {}
        stream = scripted.stream(script(said), model=model, **{"max_tokens": None, **fields, **options})
        chunks = [typed(ChatCompletionChunk, event) for event in stream]
        answers = range(fields.get("n", 1))
        choices = [choice for chunk in chunks for choice in chunk.choices]
        assert finished(choices) == [(index, reason) for index in answers]
        for index in answers:
            first, *_, last = (choice for choice in choices if choice.index == index)
            assert (first.delta.role, last.finish_reason) == ("assistant", reason)
        assert [choice.delta.role for choice in choices].count("assistant") == len(answers)
        assert len({(chunk.id, chunk.created, chunk.model, chunk.system_fingerprint) for chunk in chunks}) == 1
        assert [chunk.usage is not None for chunk in chunks] == [False] * (len(chunks) - usage) + [True] * usage
        assert [chunk for chunk in chunks if not chunk.choices] == chunks[len(chunks) - usage :]

    @pytest.mark.parametrize("case", CHATS)
    def test_streamed_it_says_the_same_as_whole(self, scripted: Pipeline, case: str) -> None:
        model, text, _, fields = CHATS[case]
        given = {"model": model, "max_tokens": None, **fields}
        content = script(turn(text))
        message, *_ = (choice["message"] for choice in scripted.ask(content, **given).json()["choices"])
        deltas = [choice["delta"] for chunk in scripted.stream(content, **given) for choice in chunk["choices"]
                  if choice["index"] == 0]  # fmt: skip
        for field in ("content", "reasoning_content"):
            assert "".join(delta.get(field) or "" for delta in deltas) == (message.get(field) or "")
        calls = [call for delta in deltas for call in delta.get("tool_calls", ())]
        for index, call in enumerate(message.get("tool_calls", ())):
            parts = [part["function"] for part in calls if part["index"] == index]
            assert parts[0]["name"] == call["function"]["name"]
            assert "".join(part.get("arguments", "") for part in parts) == call["function"]["arguments"]

    @pytest.mark.parametrize("case", ["text", "two answers", "logprobs", "a call", "thoughts"])
    @pytest.mark.parametrize("end", ["error", "silence"])
    def test_an_error_in_the_middle_is_the_last_event(self, scripted: Pipeline, case: str, end: str) -> None:
        model, text, _, fields = CHATS[case]
        response = scripted.ask(script(turn(text, end=end)), model=model, stream=True, **fields)
        chunks, error = failing(response.text)
        assert response.status_code == 200
        assert not finished([choice for chunk in chunks for choice in typed(ChatCompletionChunk, chunk).choices])
        assert typed(ErrorObject, error).type == "server_error"
        if end == "error":
            assert "the script says so" in error["message"]

    def test_an_error_of_a_whole_answer_has_a_status(self, scripted: Pipeline) -> None:
        response = scripted.ask(script(turn(TEXT, end="error")), model="hermes")
        assert response.status_code == 500
        assert typed(ErrorObject, response.json()["error"]).type == "server_error"

    def test_the_client_raises_what_comes_in_the_middle(self, scripted: Pipeline) -> None:
        said: list[str] = []
        with scripted.openai() as client, pytest.raises(openai.APIError, match="the script says so"):
            for chunk in client.chat.completions.create(
                model="hermes", messages=[{"role": "user", "content": script(turn(TEXT, end="error"))}], stream=True
            ):
                said += [choice.delta.content or "" for choice in chunk.choices]
        assert TEXT.startswith("".join(said)) and any(said)


class TestText:
    @pytest.mark.parametrize("case", TEXTS)
    def test_whole(self, scripted: Pipeline, case: str) -> None:
        given = {"model": "hermes", "prompt": script(turn(TEXT)), **TEXTS[case]}
        with scripted.client() as client:
            body = typed(Completion, client.post("/v1/completions", json=given).text)
        assert finished(body.choices) == [(index, "stop") for index in range(TEXTS[case].get("n", 1))]
        assert body.usage is not None

    @pytest.mark.parametrize("usage", [False, True], ids=["", "with usage"])
    @pytest.mark.parametrize("case", TEXTS)
    def test_streamed(self, scripted: Pipeline, case: str, usage: bool) -> None:
        given = {"model": "hermes", "prompt": script(turn(TEXT)), "stream": True, **TEXTS[case]}
        if usage:
            given["stream_options"] = {"include_usage": True}
        with scripted.client() as client:
            bodies = [typed(TextEvent, event) for event in events(client.post("/v1/completions", json=given).text)]
        choices = [choice for body in bodies for choice in body.choices]
        assert finished(choices) == [(index, "stop") for index in range(TEXTS[case].get("n", 1))]
        assert [body.usage is not None for body in bodies] == [False] * (len(bodies) - usage) + [True] * usage
        text = "".join(choice.text for choice in choices if choice.index == 0)
        said = TEXT.partition("you")[0] if "stop" in given else TEXT
        assert text == (given["prompt"] + said if "echo" in given else said)

    def test_the_offsets_of_tokens_are_theirs_in_the_text(self, scripted: Pipeline) -> None:
        given = {"model": "hermes", "prompt": script(turn("one two three")), "logprobs": 1}
        with scripted.client() as client:
            (choice,) = client.post("/v1/completions", json=given).json()["choices"]
        logprobs = choice["logprobs"]
        places = zip(logprobs["text_offset"], logprobs["tokens"], strict=True)
        assert all(choice["text"].startswith(token, offset) for offset, token in places)

    def test_an_error_in_the_middle_is_the_last_event(self, scripted: Pipeline) -> None:
        given = {"model": "hermes", "prompt": script(turn(TEXT, end="error")), "stream": True}
        with scripted.client() as client:
            bodies, error = failing(client.post("/v1/completions", json=given).text)
        assert not finished([choice for body in bodies for choice in typed(TextEvent, body).choices])
        assert typed(ErrorObject, error).type == "server_error"


class TestOtherBodies:
    def test_models_have_one_field_more(self, scripted: Pipeline) -> None:
        with scripted.client() as client:
            cards = client.get("/v1/models").json()["data"]
        for card in cards:
            assert [*unknown(Model.model_validate_json(json.dumps(card), strict=True))] == ["context_length"]

    @pytest.mark.parametrize(
        ("fields", "status"),
        [
            ({"model": "gpt-0"}, 404),
            ({"temperature": 3}, 400),
            ({"messages": []}, 400),
            ({"tool_choice": "required"}, 400),
            ({"top_logprobs": 2}, 400),
            ({"max_tokens": 10**6}, 400),
        ],
        ids=str,
    )
    def test_refusals(self, scripted: Pipeline, fields: dict[str, Any], status: int) -> None:
        response = scripted.ask(script(turn(TEXT)), **{"model": "hermes", **fields})
        assert response.status_code == status
        assert typed(ErrorObject, response.json()["error"]).type == "invalid_request_error"


class TestUnknownFields:
    def test_are_ignored_and_named(self, scripted: Pipeline) -> None:
        fields: dict[str, Any] = {"colour": "red", "stream_options": {"include_usage": True, "sound": 1}, "x y/z": []}
        response = scripted.ask(script(turn(TEXT)), model="hermes", stream=True, **fields)
        assert response.headers["x-ignored-fields"].split(",") == ["colour", "x%20y%2Fz", "stream_options.sound"]
        plain = scripted.ask(script(turn(TEXT)), model="hermes")
        assert "x-ignored-fields" not in plain.headers

    def test_of_messages_are_for_the_template(self, scripted: Pipeline) -> None:
        message = {"role": "user", "content": script(turn(None)), "mood": "calm"}
        response = scripted.ask([message], model="hermes")
        assert "x-ignored-fields" not in response.headers
        asked = json.loads(bytes.fromhex(response.json()["choices"][0]["message"]["content"]))
        assert '"mood": "calm"' in asked["prompt"]

    def test_that_would_change_the_answer_are_refused(self, scripted: Pipeline) -> None:
        for field in ({"audio": {"voice": "x"}}, {"use_beam_search": True}, {"prompt_logprobs": 1}):
            response = scripted.ask(script(turn(TEXT)), model="hermes", **field)
            assert response.status_code == 400
            assert "not supported" in response.json()["error"]["message"]


class TestSimulatedEngines:
    """Their tokens are made up: what needs a model is refused, and the rest is answered."""

    @pytest.fixture(scope="class")
    @classmethod
    def simulated(cls, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pipeline]:
        pipeline = Pipeline(tmp_path_factory.mktemp("simulated"))
        try:
            pipeline.start("engine", "--backend", "mocker", "--mocker-speedup", "100")
            for program in ("router", "processor", "frontend"):
                pipeline.start(program)
            pipeline.wait_for_instances(processor=1, router=1, engine=1)
            yield pipeline
        finally:
            pipeline.close()

    @pytest.mark.parametrize("stream", [False, True])
    @pytest.mark.parametrize(
        "fields",
        [
            {"logprobs": True},
            {"logit_bias": {"5": 1}},
            {"response_format": {"type": "json_object"}},
            {"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "null"}}}},
            {"guided_regex": "a"},
            {"guided_choice": ["a"]},
            {"tools": [{"type": "function", "function": FUNCTION}], "tool_choice": "required"},
            {"functions": [FUNCTION], "function_call": {"name": "f"}},
        ],
        ids=str,
    )
    def test_refuse_in_words(self, simulated: Pipeline, fields: dict[str, Any], stream: bool) -> None:
        response = simulated.ask(stream=stream, **fields)
        assert response.status_code == 400
        assert re.search("is simulated: .*start engines with --backend sglang", response.json()["error"]["message"])

    @pytest.mark.parametrize("fields", [{"logprobs": 1}, {"best_of": 2}, {"regex": "a"}], ids=str)
    def test_refuse_it_of_text_completions_too(self, simulated: Pipeline, fields: dict[str, Any]) -> None:
        with simulated.client() as client:
            response = client.post("/v1/completions", json={"model": simulated.model, "prompt": "Hi", **fields})
        assert response.status_code == 400
        assert "is simulated" in response.json()["error"]["message"]

    def test_answer_the_rest(self, simulated: Pipeline) -> None:
        tools = [{"type": "function", "function": FUNCTION}]
        body = typed(ChatCompletion, simulated.ask(n=3, max_tokens=7, tools=tools, stop="never there").text)
        assert finished(body.choices) == [(0, "length"), (1, "length"), (2, "length")]
        one = simulated.ask(max_tokens=7).json()["usage"]
        assert body.usage is not None
        assert body.usage.completion_tokens == 21
        assert body.usage.prompt_tokens == one["prompt_tokens"]

    def test_stream_the_rest(self, simulated: Pipeline) -> None:
        stream = simulated.stream(n=2, max_tokens=7, stream_options={"include_usage": True})
        chunks = [typed(ChatCompletionChunk, event) for event in stream]
        assert finished([choice for chunk in chunks for choice in chunk.choices]) == [(0, "length"), (1, "length")]
        assert chunks[-1].usage is not None and chunks[-1].usage.completion_tokens == 14

    def test_complete_texts(self, simulated: Pipeline) -> None:
        given = {"model": simulated.model, "prompt": ["Hi", "Ho"], "max_tokens": 4, "n": 2}
        with simulated.client() as client:
            body = typed(Completion, client.post("/v1/completions", json=given).text)
        assert finished(body.choices) == [(index, "length") for index in range(4)]
        assert body.usage is not None and body.usage.completion_tokens == 16
