"""Stop strings end an answer wherever the borders of tokens fall, and nothing else is held back."""

import random

from common.text.stop_strings import StopStrings

import pytest


def given_out(strings: list[str], texts: list[str]) -> tuple[list[str], bool]:
    stops = StopStrings(strings)
    out = []
    for text in texts:
        out.append(stops.add(text))
        if stops.found:
            return out, True
    return [*out, stops.flush()], False


@pytest.mark.parametrize(
    ("strings", "texts", "out", "found"),
    [
        ([], ["a", "b"], ["a", "b", ""], False),
        (["END"], ["one END two"], ["one "], True),
        (["END"], ["one E", "N", "D two"], ["one ", "", ""], True),
        (["END"], ["one EN", "tire"], ["one ", "ENtire", ""], False),
        (["END"], ["E", "END"], ["", "E"], True),
        (["END"], ["one EN"], ["one ", "EN"], False),
        (["aab"], ["a", "a", "a", "b"], ["", "", "a", ""], True),
        (["later", "now"], ["x now later"], ["x "], True),
        (["abc", "b"], ["ab"], ["a"], True),
        (["\n\n"], ["line\n", "\n", "more"], ["line", ""], True),
        (["。"], ["好。的"], ["好"], True),
    ],
)
def test_examples(strings: list[str], texts: list[str], out: list[str], found: bool) -> None:
    assert given_out(strings, texts) == (out, found)


def test_any_cut_gives_the_same_text() -> None:
    chance = random.Random(1)
    for _ in range(2000):
        text = "".join(chance.choices("ab", k=chance.randrange(30)))
        strings = ["".join(chance.choices("ab", k=chance.randrange(1, 5))) for _ in range(chance.randrange(1, 4))]
        cuts = sorted(chance.sample(range(len(text) + 1), min(4, len(text) + 1)))
        texts = [text[start:end] for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True)]
        out, found = given_out(strings, texts)
        # A stop string is acted on with the first text that completes one.
        seen = next((end for end in [*cuts, len(text)] if any(string in text[:end] for string in strings)), len(text))
        first = min((text[:seen].find(string) for string in strings if string in text[:seen]), default=len(text))
        assert "".join(out) == text[:first]
        assert found == (first < len(text) or any(string in text for string in strings))
