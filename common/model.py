"""A model's text side: its name, chat template and tokenizer. The weights are the engine's business."""

import argparse
import hashlib
import json
import os
import sys
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.chat import ChatMessage
from common.errors import InvalidRequest
from common.messages import SamplingOptions

from huggingface_hub import hf_hub_download
from tokenizers import Tokenizer
from tokenizers.pre_tokenizers import ByteLevel

DEFAULT_MODEL = Path(__file__).parent.parent / "models" / "pipeline-chat"
BLOCK_SIZE = 16  # tokens in a KV block, unless the programs are told otherwise


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options that name the model. The programs of one pipeline need the same ones."""
    parser.add_argument(
        "--model", help="folder of the model, or its name on the Hugging Face hub; default: models/pipeline-chat"
    )
    parser.add_argument("--model-name", help="what clients call it; default: the folder's name, or the name on the hub")
    parser.add_argument("--block-size", type=_positive, default=BLOCK_SIZE, help="tokens in a KV block")


def _positive(text: str) -> int:
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return number


def locate(model: str | None) -> str:
    """The folder of `model`, or its name on the Hugging Face hub. None stands for the model of this repository.

    Raises SystemExit with what to do if it is not there.
    """
    if model is None:
        return str(DEFAULT_MODEL)
    if os.path.isdir(model):
        return os.path.abspath(model)
    if model.startswith((".", "/", "~")) or model.count("/") != 1:
        raise SystemExit(f"no model at {model!r}: --model takes a folder, or a name on the hub like Qwen/Qwen3-0.6B")
    try:
        hf_hub_download(model, "config.json")
    except (OSError, ValueError) as error:
        raise SystemExit(f"{model!r} cannot be had from the hub: {str(error).splitlines()[0]}") from error
    return model


def served_name(located: str, name: str | None = None) -> str:
    """What clients call the model: `name` if given, else the folder's name or the name on the hub."""
    return name or (os.path.basename(located) if os.path.isabs(located) else located)


def tokenizer_fingerprint(located: str) -> str | None:
    """A short hash of the model's tokenizer.json: equal for equal tokenizers. None if the model has no such file, or it
    cannot be had now."""
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        file = Path(located, "tokenizer.json") if os.path.isdir(located) else hf_hub_download(located, "tokenizer.json")
        return hashlib.sha256(Path(file).read_bytes()).hexdigest()[:16]
    except (FileNotFoundError, HfHubHTTPError, LocalEntryNotFoundError):
        return None


@dataclass(slots=True, frozen=True)
class Agreement:
    """What the programs of one pipeline must agree on, or no prompt would ever be found in a cache."""

    model: str
    tokenizer: str | None  # its fingerprint; None if unknown
    block_size: int  # tokens in a KV block

    @classmethod
    def of(cls, located: str, args: argparse.Namespace) -> "Agreement":
        """What the options of `add_options` say, and the model that they name."""
        return cls(served_name(located, args.model_name), tokenizer_fingerprint(located), args.block_size)

    def misfit(self, other: "Agreement") -> str | None:
        """What is different about another program; None if nothing is."""
        if other.block_size != self.block_size:
            return f"its KV blocks have {other.block_size} tokens, this router's {self.block_size} (--block-size)"
        if other.model != self.model:
            return f"it serves {other.model}, this router {self.model} (--model)"
        if None not in (other.tokenizer, self.tokenizer) and other.tokenizer != self.tokenizer:
            return (
                f"its tokenizer has the fingerprint {other.tokenizer}, this router's {self.tokenizer}: both call their "
                f"model {self.model}, but --model names different ones"
            )
        return None


class ChatModel:
    """Turns conversations into token ids, and knows where the model's sentences end."""

    def __init__(self, located: str, name: str) -> None:
        # Imported here: it takes seconds, and the programs that only need a name should not wait for it.
        from transformers import AutoConfig, AutoTokenizer, GenerationConfig

        self.name = name
        self._template: Any = AutoTokenizer.from_pretrained(located)
        if not self._template.chat_template:
            raise SystemExit(f"{located} has no chat template, so it cannot chat")
        if not self._template.is_fast:
            raise SystemExit(f"{located} has no tokenizer.json, which incremental detokenization needs")
        self._knows_developer = "developer" in str(self._template.chat_template)
        self.tokenizer: Tokenizer = self._template.backend_tokenizer
        config = AutoConfig.from_pretrained(located).get_text_config()
        self.context_length: int = config.max_position_embeddings
        try:
            generation = GenerationConfig.from_pretrained(located)
        except OSError:  # the model came without one
            generation = GenerationConfig()
        ends = generation.eos_token_id if generation.eos_token_id is not None else self._template.eos_token_id
        self.eos_token_ids: list[int] = sorted({ends} if isinstance(ends, int) else set(ends or ()))
        self._longest_token = longest_token(self.tokenizer)
        self._sampling: Any = {
            name: getattr(generation, name, None) for name in ("temperature", "top_p", "top_k", "min_p")
        }

    def render(self, messages: Sequence[ChatMessage]) -> str:
        """The conversation as the model's chat template writes it, ready for the answer.

        Raises InvalidRequest if the template does not accept it, in the template's words.
        """
        plain = [{**message.model_dump(exclude_none=True), "content": message.text} for message in messages]
        for message in plain:
            if message["role"] == "developer" and not self._knows_developer:
                message["role"] = "system"
        try:
            text: str = self._template.apply_chat_template(plain, tokenize=False, add_generation_prompt=True)
        except Exception as error:  # a template is a program: it can fail in any way at what it did not expect
            raise InvalidRequest(f"the model's chat template: {error}", param="messages") from error
        return text

    def sampling(self, **asked: float | int | None) -> SamplingOptions:
        """What the client asked for, and for the rest what the model's makers recommend in generation_config.json."""
        given: Any = {name: value for name, value in asked.items() if value is not None}
        return SamplingOptions(**(self._sampling | given))

    def encode(self, messages: Sequence[ChatMessage]) -> list[int]:
        """The prompt's token ids. The template has written every special token, so none is added."""
        text = self.render(messages)
        self._check_length(text)
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def _check_length(self, text: str) -> None:
        """Raises InvalidRequest for a text that cannot fit: to tokenize it would take a minute and gigabytes."""
        most = self.context_length * (self._longest_token or sys.maxsize)
        if len(text) * 4 <= most:  # no character has more bytes
            return
        size = len(unicodedata.normalize("NFC", text).encode())
        if size > most:
            raise InvalidRequest(
                f"This model's maximum context length is {self.context_length} tokens, which is {most} bytes of text "
                f"at the very most. However, your messages have {size} bytes. Please reduce their length.",
                code="context_length_exceeded",
                param="messages",
            )


def longest_token(tokenizer: Tokenizer) -> int | None:
    """Bytes of text, in Unicode's form NFC, that one token can stand for. None if that has no limit or none is known:
    it is for byte-level BPE that no byte of a text gets lost on the way to its tokens."""
    spec = json.loads(tokenizer.to_str())
    added, vocab = spec["added_tokens"], spec["model"].get("vocab", {})
    keeps_every_byte = (
        spec["model"]["type"] == "BPE"
        and (spec["decoder"] or {}).get("type") == "ByteLevel"
        and spec["normalizer"] in (None, {"type": "NFC"})
        and "Removed" not in json.dumps(spec["pre_tokenizer"])
        and set(ByteLevel.alphabet()) <= vocab.keys()
        and not any(token["lstrip"] or token["rstrip"] or not token["content"].isascii() for token in added)
    )
    if not keeps_every_byte:
        return None
    return max(map(len, [*vocab, *(token["content"] for token in added)]))
