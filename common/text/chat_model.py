"""A model's text side: its chat template and tokenizer. The weights are the engine's business."""

import inspect
import json
import os
import re
import sys
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any

from common.errors import InvalidRequest, StartupError
from common.messages import SamplingOptions
from common.openai_request import ChatMessage, Tool
from common.text import sglang_parsers
from common.text.token_texts import TokenTexts

from tokenizers import Tokenizer
from tokenizers.pre_tokenizers import ByteLevel

_CUT = "\ufdd0"  # Unicode's for internal use: in no text that anybody writes


class ChatModel:
    """Turns conversations into token ids, and knows where the model's sentences end."""

    def __init__(
        self,
        resolved: str,
        name: str,
        *,
        tool_call_parser: str = sglang_parsers.AUTO,
        reasoning_parser: str = sglang_parsers.AUTO,
        allow_special_tokens: bool = False,
    ) -> None:
        """Load what is needed of a model that `resolve_model` found. Raises StartupError if it cannot chat.

        tool_call_parser, reasoning_parser: SGLang's names, "auto" or "none"; allow_special_tokens: that what clients
        write may have the special tokens by which the model tells turns apart.
        """
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
        # All that any of them names: fine-tuned models often have the end token of their base in one of the three.
        self.eos_token_ids = _ids(
            generation.eos_token_id, getattr(config, "eos_token_id", None), self._template.eos_token_id
        )
        self._longest_token = longest_token(self.tokenizer)
        parameters = inspect.signature(self._template.apply_chat_template).parameters
        self._reserved = parameters.keys() - {"documents", "kwargs"}  # no variables of templates
        self.parsers = sglang_parsers.choose(tool_call_parser, reasoning_parser, self._template)
        special = [str(token) for token in self._template.added_tokens_decoder.values() if token.special and str(token)]
        self.special_tokens = re.compile("|".join(map(re.escape, special)) or "(?!)")
        self._allow_special_tokens = allow_special_tokens
        self._sampling: Any = {
            name: getattr(generation, name, None) for name in ("temperature", "top_p", "top_k", "min_p")
        }

    @cached_property
    def texts(self) -> TokenTexts:
        """What each token stands for."""
        return TokenTexts(self.tokenizer)

    def render(
        self,
        messages: Sequence[ChatMessage],
        tools: Sequence[Tool] = (),
        variables: Mapping[str, Any] | None = None,
        *,
        answer: bool = True,
        go_on: bool = False,
    ) -> str:
        """The conversation as the model's chat template writes it. Where somebody wrote a special token into it, it is
        cut by `_CUT`, so that it is none.

        variables: of the template; answer: whether an answer follows; go_on: whether that goes on with the last
        message. Raises InvalidRequest if the template does not accept it, in the template's words.
        """
        variables = self._cut(variables or {})
        if own := variables.keys() & self._reserved:
            raise InvalidRequest(f"{min(own)} is not for clients to set", param="chat_template_kwargs")
        plain = [self._cut(message.template_form) for message in messages]
        for message in plain:
            if message["role"] == "developer" and not self._knows_developer:
                message["role"] = "system"
        try:
            text: str = self._template.apply_chat_template(
                plain,
                tools=[self._cut(tool.model_dump(exclude_none=True)) for tool in tools] or None,
                tokenize=False,
                add_generation_prompt=answer and not go_on,
                continue_final_message=go_on,
                **variables,
            )
        except Exception as error:  # a template is a program: it can fail in any way at what it did not expect
            raise InvalidRequest(f"the model's chat template: {error}", param="messages") from error
        return text

    def _cut(self, value: Any) -> Any:
        """What a client wrote, with each special token in it cut into its characters."""
        if self._allow_special_tokens:
            return value
        if isinstance(value, str):
            return self.special_tokens.sub(lambda found: _CUT.join(["", *found[0], ""]), value)
        if isinstance(value, list):
            return [self._cut(item) for item in value]
        if isinstance(value, dict):
            return {self._cut(name): self._cut(item) for name, item in value.items()}
        return value

    def sampling(self, **asked: Any) -> SamplingOptions:
        """What the client asked for, and for the rest what the model's makers recommend in generation_config.json."""
        given = {name: value for name, value in asked.items() if value is not None}
        return SamplingOptions(**(self._sampling | given))

    def encode(self, text: str, *, add_special_tokens: bool = False, param: str = "messages") -> list[int]:
        """The token ids of a text. What a template has rendered has every special token that it needs.

        Raises InvalidRequest, for the field `param`, if it cannot fit into the context.
        """
        self._check_length(text, param)
        # Of all its ways to encode, the fastest, and the one that lets go of Python's lock.
        texts = [text] if add_special_tokens else text.split(_CUT)
        pieces = self.tokenizer.encode_batch_fast(texts, add_special_tokens=add_special_tokens)
        return [token_id for piece in pieces for token_id in piece.ids]

    def _check_length(self, text: str, param: str = "messages") -> None:
        """Raises InvalidRequest for a text that cannot fit: to tokenize it would take a minute and gigabytes."""
        most = self.context_length * (self._longest_token or sys.maxsize)
        if len(text) * 4 <= most:  # no character has more bytes
            return
        size = len(unicodedata.normalize("NFC", text).encode())
        if size > most:
            raise InvalidRequest(
                f"This model's maximum context length is {self.context_length} tokens, which is {most} bytes of text "
                f"at the very most. However, yours has {size} bytes. Please reduce its length.",
                code="context_length_exceeded",
                param=param,
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


def _ids(*named: int | Iterable[int] | None) -> list[int]:
    """Token ids that several files name, each one, several or none."""
    ids: set[int] = set()
    for name in named:
        ids |= {name} if isinstance(name, int) else set(name or ())
    return sorted(ids)
