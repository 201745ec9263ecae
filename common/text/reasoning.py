"""What a model thinks before it answers."""

from common.text.sglang_parsers import REASONING, module


class Reasoning:
    """Parts what the model thinks from what it answers, as its text comes. SGLang's parser finds the border."""

    def __init__(self, parser: str, prompt: str) -> None:
        """parser: SGLang's name for how the model marks its thoughts; prompt: as text, which may have begun them, or
        ended them before they began."""
        made = module(REASONING).ReasoningParser
        detector, prompt = made(parser).detector, prompt.rstrip()
        begin: str = getattr(detector, "think_start_token", None) or ""  # some parsers do not say
        end: str = getattr(detector, "think_end_token", None) or ""
        begun = begin != "" and prompt.endswith(begin)
        ended = end != "" and prompt.endswith(end)
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
