"""Makes the conversations that the model learns from, out of the texts in models/training/corpus.

    python models/training/make_corpus.py [COUNT]

prints some. There is no end to them: topics, wordings and the thread of each conversation are drawn at random, from a
seed. The texts say what there is to know and in which words one can ask for it; `Texts.could_ask` tells whether a
question can come up. Questions are in lower case, as the model's chat template makes them.
"""

import argparse
import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from random import Random
from types import MappingProxyType
from typing import Any

FOLDER = Path(__file__).parent / "corpus"
LARGEST_SUMMAND = 20
LARGEST_NUMBER = 100  # to count to
MOST_TURNS = 8

Message = dict[str, str]

_CHOICE = re.compile(r"\(([^()]*)\)")
_SLOT = re.compile(r"<([a-z]+)>|\{([a-z']+)\}|([A-Z])")
_NOTHING: Mapping[str, str] = MappingProxyType({})
_GRAMMAR = {
    "is": ("is", "are"),
    "does": ("does", "do"),
    "s": ("s", ""),
    "'s": ("'s", " are"),
    "it": ("it", "they"),
    "them": ("it", "them"),
}
_DAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]
_MONTHS = [
    *("January", "February", "March", "April", "May", "June"),
    *("July", "August", "September", "October", "November", "December"),
]


@dataclass(eq=False)
class Fact:
    """Something to know: its answers, of which any will do, and wordings that ask for nothing else."""

    key: str
    text: str  # where it stands
    answers: list[str]
    wordings: list[str] = field(default_factory=list)


@dataclass(eq=False)
class Topic:
    """A thing about which one can ask several questions."""

    names: list[str]
    plural: bool = False
    facts: dict[str, Fact] = field(default_factory=dict)  # by relation


@dataclass
class Turn:
    """A question and its answer."""

    question: str
    answer: str  # with stars around the facts
    others: list[str] = field(default_factory=list)  # answers that would be as good

    @property
    def messages(self) -> list[Message]:
        return [{"role": "user", "content": self.question}, {"role": "assistant", "content": plain(self.answer)}]


def plain(answer: str) -> str:
    """An answer as it is given."""
    return answer.replace("*", "")


def facts_in(answer: str) -> list[str]:
    """What must be said for this answer to be right."""
    return re.findall(r"\*(.+?)\*", answer)


def is_computed(answer: str) -> bool:
    """Whether an answer is a sum, a count or a spelling, where no token follows from the words before it."""
    return re.search(r"\d[,+ ]|\w-\w-", answer) is not None


def says(text: str, facts: Iterable[str]) -> bool:
    """Whether a text says all the facts."""
    return all(re.search(rf"(?<!\w){re.escape(fact)}(?!\w)", text, re.IGNORECASE) for fact in facts)


def sections(name: str) -> Iterator[tuple[str, str, list[str]]]:
    """The parts of a text: what its "[key] title" says, and its lines."""
    for part in re.split(r"^(?=\[)", (FOLDER / name).read_text(), flags=re.MULTILINE)[1:]:
        header, *lines = part.splitlines()
        key, title = header[1:].split("]", 1)
        yield key, title.strip(), [line for line in lines if line]


class Texts:
    """What the texts say."""

    def __init__(self) -> None:
        self.wordings: dict[str, list[str]] = {}  # by relation or skill
        self.follow_ups: dict[str, list[str]] = {}
        self.lists: dict[str, list[str]] = {}
        self.tables: dict[str, dict[str, str]] = {}
        self.topics: dict[str, Topic] = {}
        self.facts: dict[str, Fact] = {}
        self.general: list[Fact] = []  # those of no topic that have wordings
        for name in ("relations.txt", "skills.txt"):
            self._read_wordings(name)
        for name in ("pipeline.txt", "chat.txt", "world.txt", "unknown.txt"):
            self._read_facts(name)
        self.unknown = self.topics.pop("unknown")

    def _read_wordings(self, name: str) -> None:
        for key, _, lines in sections(name):
            for line in lines:
                if named := re.match(r"<(\w+)> ", line):
                    self.lists[named[1]] = line[named.end() :].split("|")
                elif line.startswith("> "):
                    self.follow_ups.setdefault(key, []).append(_template(line[2:]))
                else:
                    self.wordings.setdefault(key, []).append(_template(line))

    def _read_facts(self, name: str) -> None:
        for key, title, lines in sections(name):
            if title or key in ("-", "unknown"):
                self._read_topic(name, key, title, lines)
            elif all(" = " in line for line in lines):
                self.tables[key] = dict(line.split(" = ", 1) for line in lines)
            elif key in ("questions", "systems", "words"):
                self.lists[key] = list(map(_template, lines))
            else:
                self.lists[key] = ", ".join(lines).split(", ")

    def _read_topic(self, text: str, key: str, title: str, lines: list[str]) -> None:
        topic = Topic([name for name in title.removeprefix("+").split("|") if name], plural=title.startswith("+"))
        relation = ""
        for line in lines:
            if line.startswith("? "):
                topic.facts[relation].wordings.append(_template(line[2:]))
                continue
            relations, answer = line.split(" = ", 1)
            names = {relation: relation if key == "-" else f"{key}.{relation}" for relation in relations.split(", ")}
            relation = next(iter(names))
            fact = self.facts.get(answer) or Fact(names[relation], text, answer.split(" || "))
            self.facts |= dict.fromkeys(names.values(), fact)
            topic.facts |= dict.fromkeys(names, fact)
        if key == "-":
            self.general += [fact for fact in topic.facts.values() if fact.wordings]
        else:
            self.topics[key] = topic

    def could_ask(self, question: str) -> bool:
        """Whether a question can come up, whatever its case and punctuation."""
        return any(pattern.fullmatch(_bare(question)) for pattern in self._patterns)

    @cached_property
    def _patterns(self) -> list[re.Pattern[str]]:
        names = [name for topic in self.topics.values() for name in topic.names]
        countries = [*self.tables["capitals"], *self.lists["countries"]]
        values = {
            "C": countries,
            "D": [*_DAYS, *_MONTHS],
            "N": self.lists["names"],
            "O": list(self.tables["colours"]),
            "T": list(self.tables["capitals"].values()),
            "W": [*self.lists["words"], *(thing.split()[-1] for thing in self.lists["things"])],
            "X": names,
            "Y": [name.split()[-1] for name in names],
            "Z": names,
            "countries": countries,
        }
        slots = {slot: "(?:" + "|".join(map(_bare, texts)) + ")" for slot, texts in values.items()}
        nouns = "|".join(_bare(re.sub("^(an?|the) ", "", thing)) for thing in self.lists["things"])
        slots["things"] = f"(?:a|an|the)?(?:{'|'.join(self.lists['adjectives'])})?(?:{nouns})"
        slots |= {slot: f"(?:{slots[slot]}|{slots['things']})" for slot in "OX"}
        slots |= dict.fromkeys(("A", "B", "digits", "large", "years"), r"\d+")
        templates = [*self.lists["questions"]]
        for wordings in (*self.wordings.values(), *self.follow_ups.values()):
            templates += wordings
        for fact in self.facts.values():
            templates += fact.wordings
        return [re.compile(self._pattern(f"(<before>|){template}(<after>|)", slots)) for template in templates]

    def _pattern(self, template: str, slots: Mapping[str, str]) -> str:
        """A regular expression for the texts that a template can make, letters and digits only."""

        def part(match: re.Match[str]) -> str:
            name, grammar, letter = match.groups()
            if grammar:
                return "(?:" + "|".join(map(_bare, _GRAMMAR[grammar])) + ")"
            key = name or letter
            if key not in slots:
                return "(?:" + "|".join(self._pattern(text, slots) for text in self.lists[key]) + ")"
            return slots[key]

        pieces = re.split(rf"({_SLOT.pattern.replace('(', '(?:')}|[()|])", template)
        return "".join(
            {"(": "(?:", ")": ")", "|": "|"}.get(piece) or (_SLOT.sub(part, piece) if i % 2 else _bare(piece))
            for i, piece in enumerate(pieces)
        )


def _template(line: str) -> str:
    """A wording with (x|) for x?."""
    return re.sub(r"([a-z,])\?", r"(\1|)", line.replace(")?", "|)"))


def _bare(text: str) -> str:
    return "".join(filter(str.isalnum, text.lower()))


def capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def with_adjective(thing: str, adjective: str) -> str:
    article = re.match(r"(?:an?|the) |", thing)
    assert article
    return f"{article[0]}{adjective} {thing[article.end() :]}"


class Speaker:
    """Puts questions into words."""

    def __init__(self, texts: Texts, chance: Random) -> None:
        self.texts = texts
        self.chance = chance

    def word(self, template: str, values: Mapping[str, str], *, plural: bool = False) -> str:
        """One of the texts that a template can make."""
        return " ".join(self._fill(template, values, plural).split())

    def _fill(self, template: str, values: Mapping[str, str], plural: bool) -> str:
        def fill(match: re.Match[str]) -> str:
            name, grammar, letter = match.groups()
            if grammar:
                return _GRAMMAR[grammar][plural]
            return values[letter] if letter else self._one_of(name)

        return _SLOT.sub(fill, self.choose(template))

    def choose(self, template: str) -> str:
        """A template with its choices made."""
        while match := _CHOICE.search(template):
            choice = self.chance.choice(match[1].split("|"))
            template = template[: match.start()] + choice + template[match.end() :]
        return template

    def say(self, question: str) -> str:
        """A question as people type it."""
        chance = self.chance
        if chance.random() < 0.2:
            question = chance.choice(self.texts.lists["before"]) + question
        if chance.random() < 0.12:
            question += chance.choice(self.texts.lists["after"])
        if chance.random() < 0.25:
            question = question.replace("'", "")
        return question.lower() + chance.choices(("?", "", ".", "!", " ?", "??"), (55, 35, 4, 2, 2, 2))[0]

    def thing(self) -> str:
        """Something that the model knows nothing about."""
        chance, thing = self.chance.random(), self.chance.choice(self.texts.lists["things"])
        if chance < 0.12:
            return self.chance.choice(("", "", "a ", "the ")) + self._invent()
        if chance < 0.3:
            return with_adjective(thing, self.chance.choice(self.texts.lists["adjectives"]))
        return thing

    def _one_of(self, name: str) -> str:
        match name:
            case "things":
                return self.thing()
            case "digits":
                return str(self.chance.randint(0, 99))
            case "large":
                return str(self.chance.randint(LARGEST_SUMMAND + 1, 999))
            case "countries":
                return self.chance.choice([*self.texts.lists["countries"], *self.texts.tables["capitals"]])
            case "years":
                return str(self.chance.randint(1000, 2030))
        return self._fill(self.chance.choice(self.texts.lists[name]), _NOTHING, False)

    def _invent(self) -> str:
        parts = ("bcdfghjklmnprstvwz", "aeiou", ("", "n", "r", "x"))
        return "".join(self.chance.choice(part) for part in parts * self.chance.randint(2, 3))


class Conversation:
    """A conversation in the making: what is being talked about, and what has been said of it."""

    def __init__(self, speaker: Speaker) -> None:
        self._speaker = speaker
        self._texts = speaker.texts
        self._chance = speaker.chance
        self._topic: Topic | None = None
        self._relation = "what"
        self._told: set[str] = set()
        self._skill = ""
        self.turns: list[Turn] = []

    def go_on(self) -> None:
        """Add a turn, which takes up the thread or begins another one."""
        chance = self._chance.random()
        if self._topic and chance < (0.6 if self._topic.names else 0.1):
            turn = self._follow_up(self._topic)
        elif self._skill in self._texts.follow_ups and chance < 0.4:
            turn = self._use_skill(self._texts.follow_ups)
        else:
            begin: list[Callable[[], Turn]] = [self._ask, self._chat, self._begin_skill, self._ask_unknown, self._meet]
            turn = self._chance.choices(begin, (40, 26, 17, 18, 5))[0]()
        turn.question = self._speaker.say(turn.question)
        self.turns.append(turn)

    def _ask(self) -> Turn:
        topic = self._begin(self._pick_topic())
        relation = self._chance.choice(list(topic.facts))
        wordings = topic.facts[relation].wordings
        if not wordings or self._chance.random() < 0.6:
            wordings = self._texts.wordings[relation]
        return self._tell(topic, relation, wordings)

    def _follow_up(self, topic: Topic) -> Turn:
        kind = self._chance.choices(("relation", "more", "again", "other"), (55, 15, 5, 25))[0]
        others = [relation for relation in topic.facts if relation != self._relation]
        if kind == "other":
            asked = self._relation
            topic = self._begin(self._pick_topic())
            relation = asked if asked in topic.facts else "what"
            return self._tell(topic, relation, self._texts.follow_ups["other"])
        if kind == "again":
            return self._tell(topic, self._relation, self._texts.follow_ups["again"])
        if kind == "more" or not others:
            tellable = [relation for relation in ("how", "why", "what") if relation in topic.facts]
            untold = [relation for relation in tellable if relation not in self._told]
            return self._tell(topic, (untold or tellable)[0], self._texts.follow_ups["more"])
        relation = self._chance.choice(others)
        return self._tell(topic, relation, self._texts.follow_ups[relation])

    def _tell(self, topic: Topic, relation: str, wordings: list[str]) -> Turn:
        self._relation = relation
        self._told.add(relation)
        name = self._chance.choice(topic.names) if topic.names else self._speaker.thing()
        values = {"X": name, "Z": name, "Y": name.split()[-1]}
        return self._answer(self._word(wordings, values, plural=topic.plural), topic.facts[relation])

    def _chat(self) -> Turn:
        fact = self._chance.choice(self._texts.general)
        if fact.key not in ("thanks", "praise", "ok"):
            self._begin(None)
        return self._answer(self._word(fact.wordings), fact)

    def _ask_unknown(self) -> Turn:
        topic = self._begin(self._texts.unknown)
        if self._chance.random() < 0.08:
            values = {"C": self._chance.choice(self._texts.lists["countries"]), "O": self._speaker.thing()}
            wordings = self._texts.wordings[self._chance.choice(("capital", "colour"))]
            return self._answer(self._word(wordings, values), topic.facts["what"])
        relation = self._chance.choice(("what", "why", "how", "file", "start", "dies", "production"))
        wordings = self._texts.wordings[relation] if self._chance.random() < 0.25 else self._texts.lists["questions"]
        return self._tell(topic, "what", wordings)

    def _meet(self) -> Turn:
        if self._chance.random() < 0.3:
            fact = self._texts.facts["name.asked"]
            return self._answer(self._word(fact.wordings), fact)
        name = self._chance.choice(self._texts.lists["names"])
        answer = self._texts.facts["name.given"].answers[0].replace("N*", f"{name}*")
        return Turn(self._word(self._texts.wordings["name"], {"N": name}), answer)

    def _begin_skill(self) -> Turn:
        self._begin(None)
        self._skill = self._chance.choices(list(_SKILLS), [weight for weight, _ in _SKILLS.values()])[0]
        return self._use_skill(self._texts.wordings)

    def _use_skill(self, wordings: Mapping[str, list[str]]) -> Turn:
        template = self._speaker.choose(self._chance.choice(wordings[self._skill]))
        _, answer = _SKILLS[self._skill]
        values, text = answer(self._speaker, template)
        return Turn(self._speaker.word(template, values), text)

    def _pick_topic(self) -> Topic:
        """One of the things, the more often the more there is to know of it."""
        topics = list(self._texts.topics.values())
        return self._chance.choices(topics, [1 + len(set(topic.facts.values())) for topic in topics])[0]

    def _begin(self, topic: Topic | None) -> Any:
        self._topic, self._relation, self._told, self._skill = topic, "what", set(), ""
        return topic

    def _word(self, wordings: list[str], values: Mapping[str, str] = _NOTHING, *, plural: bool = False) -> str:
        return self._speaker.word(self._chance.choice(wordings), values, plural=plural)

    def _answer(self, question: str, fact: Fact) -> Turn:
        return Turn(question, self._chance.choice(fact.answers), fact.answers)


# What the model computes. Each makes the values of a wording, and the answer.


def _capital_of(speaker: Speaker, wording: str) -> tuple[dict[str, str], str]:
    country, city = speaker.chance.choice(list(speaker.texts.tables["capitals"].items()))
    return {"C": country}, f"The capital of {country} is *{city}*."


def _country_of(speaker: Speaker, wording: str) -> tuple[dict[str, str], str]:
    country, city = speaker.chance.choice(list(speaker.texts.tables["capitals"].items()))
    return {"T": city}, f"{city} is the capital of *{country}*."


def _colour_of(speaker: Speaker, wording: str) -> tuple[dict[str, str], str]:
    thing, colour = speaker.chance.choice(list(speaker.texts.tables["colours"].items()))
    return {"O": thing}, f"{capital(thing)} is *{colour}*."


def _after(speaker: Speaker, wording: str) -> tuple[dict[str, str], str]:
    name, following = _neighbours(speaker.chance)
    return {"D": name}, f"*{following} comes after {name}*."


def _before(speaker: Speaker, wording: str) -> tuple[dict[str, str], str]:
    preceding, name = _neighbours(speaker.chance)
    return {"D": name}, f"*{preceding} comes before {name}*."


def _neighbours(chance: Random) -> tuple[str, str]:
    """Two days or months, one after the other."""
    names = chance.choice((_DAYS, _MONTHS))
    at = chance.randrange(len(names))
    return names[at], names[(at + 1) % len(names)]


def _sum(speaker: Speaker, wording: str) -> tuple[dict[str, str], str]:
    one, other = (speaker.chance.randint(0, LARGEST_SUMMAND) for _ in range(2))
    return {"A": str(one), "B": str(other)}, f"*{one} + {other} = {one + other}*."


def _count(speaker: Speaker, wording: str) -> tuple[dict[str, str], str]:
    # To stop is what is hard to learn: long counts are among small numbers only.
    largest, length = speaker.chance.choices(((20, 20), (LARGEST_NUMBER, 10)), (60, 40))[0]
    first = speaker.chance.randint(0, largest - 2) if "A" in wording else 1
    last = speaker.chance.randint(first + 1, min(first + length, largest)) if "B" in wording else 10
    numbers = ", ".join(map(str, range(first, last + 1)))
    return {"A": str(first), "B": str(last)}, f"From {first} to {last}: *{numbers}.*"


def _backwards(speaker: Speaker, wording: str) -> tuple[dict[str, str], str]:
    words = speaker.texts.lists["words"]
    other = speaker.thing().split()[-1]
    if speaker.chance.random() < 0.15 and other not in words:
        return {"W": other}, speaker.texts.facts["backwards.unknown"].answers[0]
    word = speaker.chance.choice(words)
    return {"W": word}, f"{word} backwards is *{'-'.join(reversed(word))}*."


_SKILLS: dict[str, tuple[int, Callable[[Speaker, str], tuple[dict[str, str], str]]]] = {  # with how often
    "capital": (15, _capital_of),
    "country": (6, _country_of),
    "colour": (8, _colour_of),
    "after": (7, _after),
    "before": (7, _before),
    "sum": (24, _sum),
    "count": (16, _count),
    "count.ten": (2, _count),
    "backwards": (18, _backwards),
}


def conversations(texts: Texts, seed: int) -> Iterator[list[Message]]:
    """Conversations without end, many of them with more than one turn."""
    chance = Random(seed)
    speaker = Speaker(texts, chance)
    while True:
        conversation = Conversation(speaker)
        for _ in range(chance.choices(range(1, MOST_TURNS + 1), (60, 18, 10, 5, 3, 2, 1, 1))[0]):
            conversation.go_on()
        messages = []
        if chance.random() < 0.15:
            messages.append({"role": "system", "content": chance.choice(texts.lists["systems"])})
        yield messages + [message for turn in conversation.turns for message in turn.messages]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("count", type=int, nargs="?", default=10)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    for messages in itertools.islice(conversations(Texts(), args.seed), args.count):
        for message in messages:
            print(f"{message['role']:>9}: {message['content']}")
        print()


if __name__ == "__main__":
    main()
