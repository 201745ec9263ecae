"""What the model's evaluation rests on: which questions the corpus can make, and which answers count as right."""

import itertools
from random import Random

from make_corpus import Conversation, Speaker, Texts, conversations, facts_in, plain, says, sections

import pytest


@pytest.fixture(scope="module")
def texts() -> Texts:
    return Texts()


class Plainly(Speaker):
    """Asks in the words of the wordings, and only for things of the corpus."""

    def say(self, question: str) -> str:
        return question

    def thing(self) -> str:
        return self.chance.choice(self.texts.lists["things"])


def test_every_question_of_the_corpus_is_known_to_be_one(texts: Texts) -> None:
    speaker = Plainly(texts, Random(1))
    for _ in range(300):
        conversation = Conversation(speaker)
        for _ in range(3):
            conversation.go_on()
        assert [turn.question for turn in conversation.turns if not texts.could_ask(turn.question)] == []


def test_no_held_out_question_is_one(texts: Texts) -> None:
    lines = [line.partition(" = ")[0] for _, _, lines in sections("heldout.txt") for line in lines]
    assert len(lines) >= 300
    assert [line for line in lines if texts.could_ask(line.split(" // ")[-1])] == []


def test_no_answer_says_the_facts_of_another(texts: Texts) -> None:
    facts = set(texts.facts.values())
    for one, other in itertools.permutations(facts, 2):
        for answer, its in itertools.product(one.answers, other.answers):
            assert not says(plain(answer), facts_in(its)), (answer, its)


def test_one_seed_makes_the_same_conversations_again(texts: Texts) -> None:
    once, again, other = (list(itertools.islice(conversations(texts, seed), 50)) for seed in (1, 1, 2))
    assert once == again != other
