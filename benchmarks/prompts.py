"""Prompts of wanted lengths: texts that begin with the same tokens exactly where the trace says so."""

import random
from dataclasses import replace
from functools import lru_cache

from benchmarks.replay import Planned
from benchmarks.trace import TraceRequest
from common.openai_request import ChatMessage
from common.text.chat_model import ChatModel

import msgspec

SEED = 2026
FEWEST_WORDS = 64  # 16 tokens drawn from so many words differ from any other 16
TEMPLATE = -1  # the id of a piece that no trace has
TRIAL_LENGTHS = (1, 2, 17, 1000)  # words


class Prompts:
    """Makes request bodies for a model. A prompt is made of words that are one token each, wherever they stand."""

    def __init__(self, model: ChatModel) -> None:
        self._model = model
        self._words = _one_token_words(model)
        self._template_tokens = self._count_template_tokens()

    def body(self, request: TraceRequest) -> bytes:
        """A chat completion request, streamed, with this prompt and an answer of exactly this length."""
        return msgspec.json.encode(
            {
                "model": self._model.name,
                "messages": [{"role": "user", "content": self.text(request)}],
                "max_tokens": request.output_tokens,
                "ignore_eos": True,
                "temperature": 0,
                "stream": True,
                "stream_options": {"include_usage": True},
            }
        )

    def planned(self, request: TraceRequest) -> Planned:
        """A request that is ready to be sent."""
        return Planned(request.arrival, self.body(request), self.tokens(request), request.output_tokens)

    def text(self, request: TraceRequest) -> str:
        """The prompt itself."""
        return " ".join(word for piece in request.pieces for word in self._piece(*piece))

    def tokens(self, request: TraceRequest) -> int:
        """How long the prompt is with the chat template around it."""
        return self._template_tokens + request.input_tokens

    def wrapped(self, request: TraceRequest) -> TraceRequest:
        """What an engine gets of a request: a prompt with the tokens of the chat template, all of them at its
        beginning, which is as good for a simulation: fewer than a block, they are the same in all prompts."""
        return replace(request, pieces=((TEMPLATE, self._template_tokens), *request.pieces))

    def _count_template_tokens(self) -> int:
        """What the chat template adds, which must not depend on the text. Raises SystemExit if it does."""
        texts = [self._piece(-length, length) for length in TRIAL_LENGTHS]
        added = {self._encoded_length(" ".join(words)) - len(words) for words in texts}
        if len(added) != 1:
            raise SystemExit(
                f"the tokenizer of {self._model.name} does not keep words apart: no prompt has a known length"
            )
        return added.pop()

    def _encoded_length(self, text: str) -> int:
        return len(self._model.encode(self._model.render([ChatMessage(role="user", content=text)])))

    @lru_cache(maxsize=4096)  # noqa: B019  there is one of these in a process
    def _piece(self, hash_id: int, tokens: int) -> list[str]:
        return random.Random(f"{SEED} {hash_id}").choices(self._words, k=tokens)


def _one_token_words(model: ChatModel) -> list[str]:
    """Words that are one token both at the beginning of a text and after a space."""

    def is_one_token(text: str) -> bool:
        return len(model.tokenizer.encode(text, add_special_tokens=False).ids) == 1

    texts = {model.tokenizer.decode([token]).strip() for token in range(model.tokenizer.get_vocab_size())}
    plain = sorted(text for text in texts if len(text) > 1 and text.isascii() and text.isalpha() and text.islower())
    words = [text for text in plain if is_one_token(text) and is_one_token(f" {text}")]
    if len(words) < FEWEST_WORDS:
        raise SystemExit(f"the tokenizer of {model.name} has only {len(words)} words of one token: too few for prompts")
    return words
