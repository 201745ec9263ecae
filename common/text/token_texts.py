"""What each token stands for, alone: for logprobs, and for those who ask."""

import functools
import json
import re
from collections.abc import Sequence
from typing import Any

from common.messages import EngineOutput
from common.openai_api import TokenLogprob, TopLogprob

from tokenizers import Tokenizer

_BYTE = re.compile(r"<0x([0-9A-F]{2})>")  # a token of tokenizers that fall back to bytes


class TokenTexts:
    """The bytes of each token of a tokenizer."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        spec = json.loads(tokenizer.to_str())
        self._added = {token["id"]: token["content"] for token in spec["added_tokens"]}
        self._byte_level = "ByteLevel" in json.dumps(spec["decoder"])

    def bytes_of(self, token_id: int) -> bytes:
        """What a token adds to a text; of no whole character if that has several tokens. b"" for an unknown token."""
        if token_id in self._added:
            return str(self._added[token_id]).encode()
        piece = self._tokenizer.id_to_token(token_id) or ""
        if self._byte_level:
            return bytes(_byte_of()[character] for character in piece)
        if byte := _BYTE.fullmatch(piece):
            return bytes([int(byte[1], 16)])
        return piece.replace("\u2581", " ").encode()  # how SentencePiece writes a space

    def text_of(self, token_id: int) -> str:
        """The same as text, with \ufffd for what is no whole character."""
        return self.bytes_of(token_id).decode(errors="replace")

    def logprobs(self, output: EngineOutput, most: int) -> list[TokenLogprob]:
        """How likely each token of an engine's output was, and the `most` likeliest in its place."""
        tops: Sequence[Sequence[dict[str, Any]]] = output.top_logprobs or [[]] * len(output.token_ids)
        return [
            TokenLogprob(
                token=self.text_of(token_id),
                logprob=logprob,
                bytes=list(self.bytes_of(token_id)),
                top_logprobs=[self._top(top["token_id"], top["logprob"]) for top in likeliest[:most]],
            )
            for token_id, logprob, likeliest in zip(output.token_ids, output.log_probs or [], tops, strict=False)
        ]

    def _top(self, token_id: int, logprob: float) -> TopLogprob:
        return TopLogprob(token=self.text_of(token_id), logprob=logprob, bytes=list(self.bytes_of(token_id)))


@functools.cache
def _byte_of() -> dict[str, int]:
    """The byte behind each character of byte-level BPE: those that can be printed stand for themselves, the others for
    what follows U+0100 (GPT-2's encoder.py, `bytes_to_unicode`)."""
    printed = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printed]
    return {chr(byte): byte for byte in printed} | {chr(256 + place): byte for place, byte in enumerate(others)}
