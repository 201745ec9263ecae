"""What a model thinks before it answers."""

from typing import Any

from common.text import sglang_parsers


class Reasoning:
    """Parts what the model thinks from what it answers, as its text comes. SGLang's parser finds the border."""

    def __init__(self, parser: str, prompt: str) -> None:
        """parser: SGLang's name for how the model marks its thoughts; prompt: as text, which may have begun them, or
        ended them before they began."""
        made = sglang_parsers.reasoning().ReasoningParser
        begin, end = _marks(made(parser).detector)
        begun = begin != "" and prompt.rstrip().endswith(begin)
        ended = end != "" and prompt.rstrip().endswith(end)
        self._parser = None if ended else made(parser, force_reasoning=begun or None)
        self.found = False  # whether it thought at all
        self.over = False  # whether the answer has begun
        self.tokens = 0  # until then, with the marks around the thoughts; whoever adds text counts them

    def add(self, text: str) -> tuple[str, str]:
        """The thoughts and the answer that `text` decides: the text of one token."""
        return self._noted(*self._parser.parse_stream_chunk(text)) if self._parser else ("", text)

    def flush(self) -> tuple[str, str]:
        """What was held back."""
        return self._noted(*self._parser.parse_stream_end()) if self._parser else ("", "")

    def _noted(self, thoughts: str | None, text: str | None) -> tuple[str, str]:
        self.found = self.found or bool(thoughts)
        self.over = self.over or bool(text)
        return thoughts or "", text or ""


def _marks(detector: Any) -> tuple[str, str]:
    """What begins and what ends thoughts; "" where that is not known."""
    return getattr(detector, "think_start_token", None) or "", getattr(detector, "think_end_token", None) or ""
