"""How a conversation becomes a prompt, with a small tokenizer and a template like Qwen's."""

import argparse
import asyncio
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from common.errors import InvalidRequest, StartupError
from common.model import DEFAULT_MODEL, add_options, resolve_model
from common.openai_api import ChatCompletionRequest, ChatMessage
from common.text.chat_model import ChatModel, longest_token

import pytest
from huggingface_hub.errors import LocalEntryNotFoundError
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

TEMPLATE = """{%- for message in messages %}
    {%- if message.role in ("user", "system", "tool") %}
        {{- "<|im_start|>" + message.role + ":" + message.content + "<|im_end|>" }}
    {%- elif message.role == "assistant" %}
        {{- "<|im_start|>assistant:" + message.content }}
        {%- for tool_call in message.tool_calls or [] %}
            {{- "(" + tool_call.function.name + " " + tool_call.function.arguments + ")" }}
        {%- endfor %}
        {%- if message.mood == "bad" %}{{ raise_exception("no moods") }}{% endif %}
        {%- if message.mood %}{{ message.mood.a.b }}{% endif %}
    {%- endif %}
{%- endfor %}"""
CONTEXT = 64


def byte_level(**options: Any) -> Tokenizer:
    vocab = {name: number for number, name in enumerate([*sorted(pre_tokenizers.ByteLevel.alphabet()), "aa", "aaaa"])}
    tokenizer = Tokenizer(models.BPE(vocab, [("a", "a"), ("aa", "aa")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("<|im_start|>", **options), AddedToken("<|im_end|>")])
    return tokenizer


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ChatModel:
    folder = tmp_path_factory.mktemp("model")
    PreTrainedTokenizerFast(tokenizer_object=byte_level(), chat_template=TEMPLATE).save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "max_position_embeddings": CONTEXT}))
    return ChatModel(str(folder), "m")


def messages(*given: dict[str, Any]) -> Any:
    return ChatCompletionRequest.decode({"model": "m", "messages": [*given]}).messages


def test_torch_is_not_imported_nor_missed() -> None:
    """It would take seconds, and the garbage collector would look through it ever after."""
    program = f"from common.text.chat_model import ChatModel; import sys; ChatModel({str(DEFAULT_MODEL)!r}, 'm')"
    program += "; print(sys.modules['torch'])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("None\n", "")


def test_a_hub_that_cannot_be_reached_is_said_in_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: str) -> None:
        raise LocalEntryNotFoundError("no network\n\nand so on")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", fail)
    with pytest.raises(StartupError, match=r"'some/model' cannot be had from the hub: no network$"):
        resolve_model("some/model")


def test_blocks_have_at_least_a_token(capsys: pytest.CaptureFixture[str]) -> None:
    parser = argparse.ArgumentParser()
    add_options(parser)
    with pytest.raises(SystemExit):
        parser.parse_args(["--block-size", "0"])
    assert "--block-size: must be at least 1" in capsys.readouterr().err


def test_a_tool_call_is_rendered(model: ChatModel) -> None:
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    text = model.render(messages({"role": "assistant", "content": None, "tool_calls": [call]}))
    assert text == "<|im_start|>assistant:(f {})"


@pytest.mark.parametrize("mood", ["bad", "good", 5])
def test_whatever_the_template_does_not_like_is_the_caller_s_fault(model: ChatModel, mood: Any) -> None:
    with pytest.raises(InvalidRequest, match="the model's chat template: "):
        model.render(messages({"role": "assistant", "content": "x", "mood": mood}))


def test_a_template_that_knows_no_developer_sees_the_system(model: ChatModel) -> None:
    assert model.render(messages({"role": "developer", "content": "x"})) == "<|im_start|>system:x<|im_end|>"


def test_a_template_that_knows_developers_sees_them(tmp_path: Path) -> None:
    template = TEMPLATE.replace('"system"', '"system", "developer"')
    PreTrainedTokenizerFast(tokenizer_object=byte_level(), chat_template=template).save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    text = ChatModel(str(tmp_path), "m").render(messages({"role": "developer", "content": "x"}))
    assert text == "<|im_start|>developer:x<|im_end|>"


def test_what_cannot_fit_is_refused_before_it_is_tokenized(model: ChatModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model, "tokenizer", None)
    for content in ("b" * 1000, "\N{HIRAGANA LETTER A}" * 300):
        with pytest.raises(InvalidRequest, match="64 tokens") as refusal:
            model.encode(messages({"role": "user", "content": content}))
        assert refusal.value.code == "context_length_exceeded"


def test_the_longest_tokens_of_a_full_context_are_accepted(model: ChatModel) -> None:
    """The longest text that fits at all: nothing but the longest token."""
    model._check_length("<|im_start|>" * CONTEXT)
    assert len(model.tokenizer.encode("<|im_start|>" * CONTEXT, add_special_tokens=False).ids) == CONTEXT
    with pytest.raises(InvalidRequest):
        model._check_length("<|im_start|>" * CONTEXT + "a")


def test_what_counts_is_the_text_that_is_tokenized(model: ChatModel) -> None:
    """Decomposed it is over the limit, in form NFC it is not."""
    model._check_length("e\N{COMBINING ACUTE ACCENT}" * (CONTEXT * len("<|im_start|>") // 2))


def lossy() -> list[Tokenizer]:
    swallows, lowers, unigram = byte_level(lstrip=True), byte_level(), byte_level()
    lowers.normalizer = normalizers.Strip()
    unigram.model = models.Unigram([("a", 0.0)], 0, False)
    return [swallows, lowers, unigram]


@pytest.mark.parametrize("tokenizer", lossy())
def test_no_limit_is_known_where_text_can_vanish(tokenizer: Tokenizer) -> None:
    assert longest_token(tokenizer) is None


def test_longest_token() -> None:
    assert longest_token(byte_level()) == len("<|im_start|>")


def test_others_go_on_while_a_long_prompt_is_tokenized(model: ChatModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokenizing lets go of Python's lock, or a thread for it would be of no use."""
    monkeypatch.setattr(model, "context_length", 10**6)
    messages = [ChatMessage(role="user", content="many words of all kinds, 0123456789 " * 20_000)]

    async def longest_pause() -> tuple[float, float]:
        began = last = time.perf_counter()
        encoding, pause = asyncio.ensure_future(asyncio.to_thread(model.encode, messages)), 0.0
        while not encoding.done():
            await asyncio.sleep(0)
            pause, last = max(pause, time.perf_counter() - last), time.perf_counter()
        return pause, last - began

    pause, took = asyncio.run(longest_pause())
    assert pause < took / 2
