"""What a model thinks, parted from what it answers."""

from common.text.reasoning import Reasoning
from tests.unit.test_tool_calls import parted

import pytest

THOUGHT = "Let me see: 1 < 2, and <b> is no mark.\n"
ANSWER = "\n\nIt is 2."


def thought(parser: str, prompt: str, pieces: list[str]) -> tuple[str, str]:
    reasoning = Reasoning(parser, prompt)
    parts = [*map(reasoning.add, pieces), reasoning.add("", last=True)]
    return "".join(thoughts for thoughts, _ in parts), "".join(text for _, text in parts)


@pytest.mark.parametrize(
    ("parser", "prompt", "written"),
    [
        ("qwen3", "<|im_start|>assistant\n", f"<think>{THOUGHT}</think>{ANSWER}"),
        ("qwen3", "<|im_start|>assistant\n<think>\n", f"{THOUGHT}</think>{ANSWER}"),
        ("deepseek-r1", "<|Assistant|>", f"{THOUGHT}</think>{ANSWER}"),
        ("deepseek-r1", "<|Assistant|><think>\n", f"{THOUGHT}</think>{ANSWER}"),
        ("glm45", "<|assistant|>\n", f"<think>{THOUGHT}</think>{ANSWER}"),
    ],
)
def test_thoughts_end_at_their_mark_wherever_the_text_is_parted(parser: str, prompt: str, written: str) -> None:
    for pieces in parted(written):
        assert thought(parser, prompt, pieces) == (THOUGHT, ANSWER), pieces


@pytest.mark.parametrize("parser", ["qwen3", "deepseek-r1"])
def test_a_prompt_that_has_ended_them_gets_an_answer(parser: str) -> None:
    prompt = "<|im_start|>assistant\n<think>\n\n</think>\n\n"
    for pieces in parted("It is 2."):
        assert thought(parser, prompt, pieces) == ("", "It is 2.")


def test_thoughts_that_were_cut_off_are_thoughts() -> None:
    for pieces in parted(f"<think>{THOUGHT}"):
        assert thought("qwen3", "assistant\n", pieces) == (THOUGHT, "")


def test_an_answer_without_thoughts_is_whole() -> None:
    for pieces in parted("a < b, </thin and so on"):
        assert thought("qwen3", "assistant\n", pieces) == ("", "a < b, </thin and so on")


def test_it_is_known_when_they_are_over() -> None:
    reasoning = Reasoning("qwen3", "assistant\n")
    for piece in ("<think>", "hm", "</think>"):
        reasoning.add(piece)
    assert reasoning.found
    assert not reasoning.over
    reasoning.add("\n\n")
    assert reasoning.over
