"""A model's text side: its chat template and tokenizer. The weights are the engine's business."""

import json
import os
import sys
import unicodedata
from collections.abc import Sequence
from typing import Any

from common.errors import InvalidRequest, StartupError
from common.messages import SamplingOptions
from common.openai_api import ChatMessage

from tokenizers import Tokenizer
from tokenizers.pre_tokenizers import ByteLevel


class ChatModel:
    """Turns conversations into token ids, and knows where the model's sentences end."""

    def __init__(self, resolved: str, name: str) -> None:
        """Load what is needed of a model that `resolve_model` found. Raises StartupError if it cannot chat."""
        # Imported here: it takes a second, for which --help should not wait. It would import torch if there is one: two
        # more seconds, and 270,000 objects for each garbage collection to look through. So we say that it is not.
        sys.modules.setdefault("torch", None)  # type: ignore[arg-type]
        os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # about that
        from transformers import AutoConfig, AutoTokenizer, GenerationConfig

        self.name = name
        self._template: Any = AutoTokenizer.from_pretrained(resolved)
        if not self._template.chat_template:
            raise StartupError(f"{resolved} has no chat template, so it cannot chat")
        if not self._template.is_fast:
            raise StartupError(f"{resolved} has no tokenizer.json, which incremental detokenization needs")
        self._knows_developer = "developer" in str(self._template.chat_template)
        self.tokenizer: Tokenizer = self._template.backend_tokenizer
        config = AutoConfig.from_pretrained(resolved).get_text_config()
        self.context_length: int = config.max_position_embeddings
        try:
            generation = GenerationConfig.from_pretrained(resolved)
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
        # Of all its ways to encode, the fastest, and the one that lets go of Python's lock.
        ids: list[int] = self.tokenizer.encode_batch_fast([text], add_special_tokens=False)[0].ids
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
