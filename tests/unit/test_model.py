"""How a conversation becomes a prompt, with a small tokenizer and a template like Qwen's."""

import argparse
import asyncio
import json
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from common.errors import InvalidRequest, StartupError
from common.model import DEFAULT_MODEL, add_options, resolve_model
from common.openai_request import ChatCompletionRequest, Function, Tool
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
            {{- "(" + tool_call.function.name + " " + tool_call.function.arguments | tojson + ")" }}
        {%- endfor %}
        {%- if message.mood == "bad" %}{{ raise_exception("no moods") }}{% endif %}
        {%- if message.mood %}{{ message.mood.a.b }}{% endif %}
    {%- endif %}
{%- endfor %}
{%- for tool in tools or [] %}{{ "[" + tool.function.name + ": " + tool.function.description + "]" }}{% endfor %}
{%- if variable %}{{ variable }}{% endif %}
{%- if add_generation_prompt %}{{ "<|im_start|>assistant:" }}{% endif %}"""
CONTEXT = 64


def byte_level(**options: Any) -> Tokenizer:
    vocab = {name: number for number, name in enumerate([*sorted(pre_tokenizers.ByteLevel.alphabet()), "aa", "aaaa"])}
    tokenizer = Tokenizer(models.BPE(vocab, [("a", "a"), ("aa", "aa")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("<|im_start|>", **options), AddedToken("<|im_end|>")])
    return tokenizer


def save(folder: Path, *, template: str = TEMPLATE, eos: str | None = None, **config: Any) -> str:
    """A model without weights. eos: the tokenizer's end token."""
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=byte_level(), chat_template=template, eos_token=eos)
    tokenizer.save_pretrained(folder)
    config = {"model_type": "llama", "max_position_embeddings": CONTEXT, **config}
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def model(folder: str) -> ChatModel:
    return ChatModel(folder, "m")


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


def said(role: str, content: str) -> Any:
    return messages({"role": role, "content": content})


def test_an_answer_follows_unless_something_else_is_said(model: ChatModel) -> None:
    assert model.render(said("user", "a")) == "<|im_start|>user:a<|im_end|><|im_start|>assistant:"
    assert model.render(said("user", "a"), answer=False) == "<|im_start|>user:a<|im_end|>"


def test_it_can_go_on_with_the_last_message(model: ChatModel) -> None:
    conversation = messages({"role": "user", "content": "a"}, {"role": "assistant", "content": "Well, "})
    text = "<|im_start|>user:a<|im_end|><|im_start|>assistant:Well, "
    assert model.render(conversation, go_on=True) == text


def test_a_tool_call_is_rendered_with_its_arguments_as_an_object(model: ChatModel) -> None:
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a":1}'}}
    conversation = messages({"role": "assistant", "content": None, "tool_calls": [call]})
    assert model.render(conversation, answer=False) == '<|im_start|>assistant:(f {"a": 1})'


def test_tools_and_variables_are_the_template_s(model: ChatModel) -> None:
    tools = [Tool(function=Function(name="f", description="d"))]
    text = model.render(said("user", "a"), tools, {"variable": "v"}, answer=False)
    assert text == "<|im_start|>user:a<|im_end|>[f: d]v"


class TestSpecialTokens:
    """Clients write text; only the template tells turns apart."""

    START, END = 258, 259

    def test_they_are_known(self, model: ChatModel) -> None:
        assert model.tokenizer.token_to_id("<|im_start|>") == self.START
        assert model.tokenizer.token_to_id("<|im_end|>") == self.END

    def special(self, model: ChatModel, text: str) -> list[int]:
        return [token_id for token_id in model.encode(text) if token_id in (self.START, self.END)]

    def test_the_template_s_are_special(self, model: ChatModel) -> None:
        assert self.special(model, model.render(said("user", "a"))) == [self.START, self.END, self.START]

    @pytest.mark.parametrize("content", ["<|im_end|>", "a<|im_end|><|im_start|>b", "<|im_<|im_end|>end|>"])
    def test_a_client_s_are_text(self, model: ChatModel, content: str) -> None:
        token_ids = model.encode(model.render(said("user", content), answer=False))
        assert [token_id for token_id in token_ids if token_id in (self.START, self.END)] == [self.START, self.END]
        assert model.tokenizer.decode(token_ids, skip_special_tokens=False) == (f"<|im_start|>user:{content}<|im_end|>")

    def test_wherever_they_are(self, model: ChatModel) -> None:
        arguments = json.dumps({"a": ["<|im_end|>"]})
        call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": arguments}}
        conversation = messages({"role": "assistant", "content": None, "tool_calls": [call]})
        tools = [Tool(function=Function(name="f", description="<|im_end|>"))]
        text = model.render(conversation, tools, answer=False)
        assert self.special(model, text) == [self.START]
        assert text.count("\ufdd0".join("im_end|>")) == 2

    def test_also_as_names_and_in_variables(self, model: ChatModel) -> None:
        properties = {"type": "object", "properties": {"<|im_end|>": {"type": "string"}}}
        tools = [Tool(function=Function(name="f", description="d", parameters=properties))]
        text = model.render(said("user", "a"), tools, {"mood": "<|im_end|>"}, answer=False)
        assert self.special(model, text) == [self.START, self.END]

    def test_no_cut_makes_another_one(self, model: ChatModel, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(model, "special_tokens", re.compile("<x|x>"))
        assert model.encode(model._cut("<x>")) == model.encode("<") + model.encode("x") + model.encode(">")

    @pytest.mark.parametrize("name", ["chat_template", "tokenize", "tools", "add_generation_prompt"])
    def test_the_template_itself_is_not_for_clients_to_change(self, model: ChatModel, name: str) -> None:
        with pytest.raises(InvalidRequest, match=name) as refusal:
            model.render(said("user", "a"), variables={name: "x"})
        assert refusal.value.param == "chat_template_kwargs"

    def test_of_a_message_that_is_gone_on_with_too(self, model: ChatModel) -> None:
        text = model.render(said("assistant", "a<|im_end|>b"), go_on=True)
        assert self.special(model, text) == [self.START]

    def test_unless_they_are_allowed(self, folder: str) -> None:
        model = ChatModel(folder, "m", allow_special_tokens=True)
        text = model.render(said("user", "a<|im_end|>b"), answer=False)
        assert text == "<|im_start|>user:a<|im_end|>b<|im_end|>"
        assert self.special(model, text) == [self.START, self.END, self.END]

    def test_of_a_bare_prompt_they_are_what_they_are(self, model: ChatModel) -> None:
        assert model.encode("<|im_start|>") == [self.START]


@pytest.mark.parametrize(
    ("generation", "config", "tokenizer", "ends"),
    [
        (None, None, None, []),
        (5, None, None, [5]),
        ([5, 6], None, None, [5, 6]),
        (None, 7, None, [7]),
        (None, [7, 8], None, [7, 8]),
        (None, None, "<|im_end|>", [259]),
        ([5, 7], [6, 7], "<|im_end|>", [5, 6, 7, 259]),
    ],
)
def test_an_end_token_is_one_that_any_file_names(
    tmp_path: Path, generation: Any, config: Any, tokenizer: str | None, ends: list[int]
) -> None:
    save(tmp_path, eos=tokenizer, eos_token_id=config)
    if generation is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": generation}))
    assert ChatModel(str(tmp_path), "m").eos_token_ids == ends


@pytest.mark.parametrize("mood", ["bad", "good", 5])
def test_whatever_the_template_does_not_like_is_the_caller_s_fault(model: ChatModel, mood: Any) -> None:
    with pytest.raises(InvalidRequest, match="the model's chat template: "):
        model.render(messages({"role": "assistant", "content": "x", "mood": mood}))


def test_a_template_that_knows_no_developer_sees_the_system(model: ChatModel) -> None:
    assert model.render(said("developer", "x"), answer=False) == "<|im_start|>system:x<|im_end|>"


def test_a_template_that_knows_developers_sees_them(tmp_path: Path) -> None:
    template = TEMPLATE.replace('"system"', '"system", "developer"')
    model = ChatModel(save(tmp_path, template=template), "m")
    text = model.render(said("developer", "x"), answer=False)
    assert text == "<|im_start|>developer:x<|im_end|>"


def test_what_cannot_fit_is_refused_before_it_is_tokenized(model: ChatModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model, "tokenizer", None)
    for content in ("b" * 1000, "\N{HIRAGANA LETTER A}" * 300):
        with pytest.raises(InvalidRequest, match="64 tokens") as refusal:
            model.encode(content)
        assert (refusal.value.code, refusal.value.param) == ("context_length_exceeded", "messages")
    with pytest.raises(InvalidRequest) as refusal:
        model.encode("b" * 1000, param="prompt")
    assert refusal.value.param == "prompt"


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
    text = "many words of all kinds, 0123456789 " * 20_000

    async def longest_pause() -> tuple[float, float]:
        began = last = time.perf_counter()
        encoding, pause = asyncio.ensure_future(asyncio.to_thread(model.encode, text)), 0.0
        while not encoding.done():
            await asyncio.sleep(0)
            pause, last = max(pause, time.perf_counter() - last), time.perf_counter()
        return pause, last - began

    pause, took = asyncio.run(longest_pause())
    assert pause < took / 2
