"""Asks the model questions and prints how many it answers right: all the facts must be in the answer.

    python models/training/evaluate.py [FOLDER]

The held-out questions (models/training/corpus/heldout.txt) are in words that the corpus cannot make, which is checked
here; the seen ones are drawn from it. Answers are greedy. The questions that were answered wrong are printed too.
"""

import argparse
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

from make_corpus import Conversation, Message, Speaker, Texts, facts_in, says, sections
from train import FOLDER

import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

BATCH = 32
MAX_TOKENS = 400
SEEN = 400


@dataclass
class Question:
    """Questions to ask one after the other, of which the last one counts, and the facts that answer it: one of the
    lists must be in the answer."""

    group: str
    asked: list[str]
    right: list[list[str]]
    messages: list[Message] = field(default_factory=list)  # the conversation so far
    ended: bool = True  # all answers, by themselves

    @property
    def is_right(self) -> bool:
        return any(says(self.messages[-1]["content"], facts) for facts in self.right)


def held_out(texts: Texts) -> Iterator[Question]:
    for key, _, lines in sections("heldout.txt"):
        facts = [texts.facts[name] for name in key.split("|") if name in texts.facts]
        for line in lines:
            text, _, given = line.partition(" = ")
            asked = text.split(" // ")
            assert not texts.could_ask(asked[-1]), f"the corpus has {asked[-1]!r}"
            answers = [facts_in(answer) for fact in facts for answer in fact.answers]
            group = "follow-ups" if len(asked) > 1 else facts[0].text if facts else "world"
            yield Question(group, asked, [[one] for one in given.split("|")] if given else answers)


def seen(texts: Texts, seed: int = -1) -> Iterator[Question]:
    speaker = Speaker(texts, Random(seed))
    while True:
        conversation = Conversation(speaker)
        for _ in range(speaker.chance.choice((1, 1, 2, 3))):
            conversation.go_on()
        *before, last = conversation.turns
        messages = [message for turn in before for message in turn.messages]
        right = [facts_in(answer) for answer in (last.answer, *last.others)]
        yield Question("seen wordings", [last.question], right, messages)


class Model:
    """The model, answering as the engine does: greedily, in float32."""

    def __init__(self, folder: Path) -> None:
        self._tokenizer: Any = AutoTokenizer.from_pretrained(folder, padding_side="left")
        self._model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        self._model.generation_config.update(do_sample=False, temperature=None, top_p=None)

    def ask(self, questions: list[Question]) -> None:
        """Ask the questions, and write down the answers."""
        batches = [questions[start : start + BATCH] for start in range(0, len(questions), BATCH)]
        for batch in tqdm(batches):
            for number in range(max(len(question.asked) for question in batch)):
                self._ask_next([question for question in batch if number < len(question.asked)], number)

    def _ask_next(self, questions: list[Question], number: int) -> None:
        for question in questions:
            question.messages.append({"role": "user", "content": question.asked[number]})
        prompts = self._tokenizer.apply_chat_template(
            [question.messages for question in questions],
            add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True,
        )  # fmt: skip
        outputs = self._model.generate(**prompts, max_new_tokens=MAX_TOKENS)
        for question, output in zip(questions, outputs[:, prompts["input_ids"].shape[1] :], strict=True):
            answer = self._tokenizer.decode(output, skip_special_tokens=True)
            question.messages.append({"role": "assistant", "content": answer})
            question.ended = question.ended and self._tokenizer.eos_token_id in output


def report(questions: list[Question]) -> None:
    """Print what went wrong, and the table."""
    for question in questions:
        if not (question.is_right and question.ended):
            print(f"{question.group}: {' // '.join(question.asked)}\n    {question.messages[-1]['content'][:160]}")
    print("\n| questions | number | right | ended |\n|---|---|---|---|")
    groups = {question.group: [other for other in questions if other.group == question.group] for question in questions}
    groups["all held-out"] = [question for question in questions if question.group != "seen wordings"]
    for group, members in groups.items():
        right, ended = (sum(values) for values in ([q.is_right for q in members], [q.ended for q in members]))
        print(f"| {group} | {len(members)} | {right / len(members):.1%} | {ended / len(members):.1%} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", default=FOLDER)
    args = parser.parse_args()
    texts = Texts()
    questions = [*held_out(texts), *itertools.islice(seen(texts), SEEN)]
    Model(args.folder).ask(questions)
    report(questions)


if __name__ == "__main__":
    main()
