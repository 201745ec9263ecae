import json
from pathlib import Path

from benchmarks.prompts import Prompts
from benchmarks.trace import TraceRequest
from common.model import resolve_model
from common.openai_request import ChatMessage
from common.text.chat_model import ChatModel

import pytest


@pytest.fixture(scope="module")
def model() -> ChatModel:
    resolved = resolve_model(None)
    return ChatModel(resolved, Path(resolved).name)


def tokens(model: ChatModel, body: bytes) -> list[int]:
    messages = [ChatMessage(**message) for message in json.loads(body)["messages"]]
    return model.encode(model.render(messages))


def test_prompts_have_the_wanted_length_and_the_wanted_beginning(model: ChatModel) -> None:
    prompts = Prompts(model)
    first = TraceRequest(0.0, ((1, 512), (2, 512), (3, 100)), 7)
    second = TraceRequest(0.0, ((1, 512), (2, 512), (4, 1)), 7)
    body = prompts.body(first)
    one, other = tokens(model, body), tokens(model, prompts.body(second))
    assert (len(one), len(other)) == (prompts.tokens(first), prompts.tokens(second))
    before = next(index for index, pair in enumerate(zip(one, other, strict=False)) if pair[0] != pair[1])
    assert 1024 < before < 1024 + prompts.tokens(first) - first.input_tokens  # the template has written the rest
    assert json.loads(body)["max_tokens"] == 7
    assert Prompts(model).body(first) == body


def test_pieces_with_other_ids_are_other_pieces(model: ChatModel) -> None:
    prompts = Prompts(model)
    one, other = (tokens(model, prompts.body(TraceRequest(0.0, ((hash_id, 64),), 1))) for hash_id in (1, 2))
    assert one[8:24] != other[8:24]
