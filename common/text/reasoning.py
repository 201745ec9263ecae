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

    def add(self, text: str, *, last: bool = False) -> tuple[str, str]:
        """The thoughts and the answer that `text` decides, that of one token. After the last, nothing is held back."""
        if not self._parser:
            return "", text
        thoughts, answer = (part or "" for part in self._parser.parse_stream_chunk(text))
        if last:
            more, rest = self._parser.parse_stream_end()
            thoughts, answer = thoughts + (more or ""), answer + (rest or "")
        self.found = self.found or thoughts != ""
        self.over = self.over or answer != ""
        return thoughts, answer
