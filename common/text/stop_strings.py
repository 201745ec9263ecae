"""Stop strings, across the borders of tokens."""

from collections.abc import Sequence


class StopStrings:
    """Ends an answer before the first stop string in it, and gives out no part of one.

    Text that could be the beginning of a stop string waits until the next text decides; nothing else waits.
    """

    def __init__(self, strings: Sequence[str]) -> None:
        self.strings = strings
        self._waiting = ""
        self.found = False

    def add(self, text: str) -> str:
        """What of the text so far can be given out now. Sets `found` if a stop string is complete."""
        text = self._waiting + text
        ends = [end for end in map(text.find, self.strings) if end >= 0]
        if ends:
            self.found = True
            self._waiting = ""
            return text[: min(ends)]
        keep = max((_overhang(text, string) for string in self.strings), default=0)
        self._waiting = text[len(text) - keep :]
        return text[: len(text) - keep]

    def flush(self) -> str:
        """What waited for a stop string that did not come."""
        text, self._waiting = self._waiting, ""
        return text


def _overhang(text: str, string: str) -> int:
    """The length of the longest end of `text` that `string` begins with."""
    for length in range(min(len(text), len(string) - 1), 0, -1):
        if text.endswith(string[:length]):
            return length
    return 0
