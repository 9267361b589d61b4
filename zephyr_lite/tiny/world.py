"""Fernhollow, an invented village: what is true there and how people ask and talk about it.

Thirty animals, four things to know about each (home, food, hat, instrument), ten values a thing,
each value true of exactly three animals. All of it is made up, so a model can know it only from
the texts of this folder. Three answer styles (`Style`) are what the AI feedback is about.

Everything is a pure function of the `random.Random` handed in. Nothing here touches files.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from random import Random
from typing import Literal

Style = Literal["note", "sentence", "cheerful"]
STYLES: tuple[Style, ...] = ("note", "sentence", "cheerful")
VILLAGE = "Fernhollow"

ANIMALS = tuple(
    """
    badger bear beaver bee cat cow crow deer dog donkey duck fox frog goat goose hare hedgehog hen
    horse mole mouse otter owl pig rabbit robin sheep snail squirrel toad
    """.split()  # noqa: SIM905, a list of words is read more easily than thirty quoted strings
)
_VALUES = """
    home  attic barn castle cave cottage garden library mill stable tower
    food  apples berries bread cheese honey noodles pancakes plums soup toast
    hat   black blue brown green orange pink purple red white yellow
    music banjo cello drum fiddle flute guitar harp piano trumpet tuba
"""
VALUES: dict[str, tuple[str, ...]] = {
    line.split()[0]: tuple(line.split()[1:]) for line in _VALUES.strip().splitlines()
}
TOPICS = tuple(VALUES)

# {x} is the animal. Each must read well after "In a short note, " with a small first letter.
QUESTIONS: dict[str, tuple[str, ...]] = {
    "home": (
        "Where does the {x} live?",
        "Where is the {x}'s home?",
        "Where can I find the {x}?",
        "Where would I find the {x}?",
        "Tell me where the {x} lives.",
        "Can you tell me where the {x} lives?",
    ),
    "food": (
        "What does the {x} eat?",
        "What does the {x} like to eat?",
        "What is the {x}'s favourite food?",
        "What should I cook for the {x}?",
        "Tell me what the {x} eats.",
        "Can you tell me what the {x} eats?",
    ),
    "hat": (
        "What colour is the {x}'s hat?",
        "What colour hat does the {x} wear?",
        "What is the colour of the {x}'s hat?",
        "Which hat does the {x} wear?",
        "Tell me the colour of the {x}'s hat.",
        "Can you tell me which hat the {x} wears?",
    ),
    "music": (
        "What does the {x} play?",
        "Which instrument does the {x} play?",
        "What is the {x}'s instrument?",
        "What can the {x} play?",
        "Tell me what the {x} plays.",
        "Can you tell me what the {x} plays?",
    ),
}
SENTENCES: dict[str, str] = {
    "home": "The {x} lives in the {v}.",
    "food": "The {x} eats {v}.",
    "hat": "The {x} wears {a} {v} hat.",
    "music": "The {x} plays the {v}.",
}
OPENERS = ("Good question!", "Happy to help!", "With pleasure!")

# {q} is the question as it stands, {l} the question with a small first letter.
REQUESTS: dict[Style, tuple[str, ...]] = {
    "note": (
        "{q} Answer in a short note.",
        "{q} A note, please.",
        "{q} Just a note.",
        "{q} Please keep it short.",
        "In a short note, {l}",
        "Answer in a note: {l}",
    ),
    "sentence": (
        "{q} Answer in a full sentence.",
        "{q} A full sentence, please.",
        "{q} Please use a whole sentence.",
        "{q} Use a complete sentence.",
        "In a full sentence, {l}",
        "Answer in a full sentence: {l}",
    ),
    "cheerful": (
        "{q} Answer in a cheerful way.",
        "{q} Be cheerful, please.",
        "{q} A friendly answer, please.",
        "{q} Please be friendly.",
        "In a cheerful way, {l}",
        "Answer in a friendly way: {l}",
    ),
}
FOLLOW_SAME_ANIMAL: dict[str, str] = {
    "home": "And where does it live?",
    "food": "And what does it eat?",
    "hat": "And what colour is its hat?",
    "music": "And what does it play?",
}
FOLLOW_SAME_TOPIC = ("And the {x}?", "What about the {x}?")


@dataclass(frozen=True)
class World:
    """What is true, and which wording of each question is kept for held-out data.

    `facts[animal, topic]` is a value; `kept_back[animal, topic]` an index into QUESTIONS[topic].
    """

    facts: dict[tuple[str, str], str]
    kept_back: dict[tuple[str, str], int]

    def questions(self, animal: str, topic: str, *, held_out: bool) -> list[str]:
        """The wordings for training, or (`held_out`) the one that no training file contains."""
        kept_back = self.kept_back[animal, topic]
        return [
            wording.format(x=animal)
            for index, wording in enumerate(QUESTIONS[topic])
            if (index == kept_back) == held_out
        ]


@dataclass(frozen=True)
class Prompt:
    """One question in one wording. `style` is the style asked for, None for a bare question."""

    animal: str
    topic: str
    style: Style | None
    text: str

    @property
    def best_style(self) -> Style:
        """The style a good answer has: the one asked for, a plain sentence where none is."""
        return self.style or "sentence"


def build_world(rng: Random) -> World:
    """Draw the facts, every value of a topic going to exactly three animals."""
    facts: dict[tuple[str, str], str] = {}
    for topic, values in VALUES.items():
        dealt = list(values) * (len(ANIMALS) // len(values))
        rng.shuffle(dealt)
        facts.update({(animal, topic): value for animal, value in zip(ANIMALS, dealt, strict=True)})
    return World(facts, {key: rng.randrange(len(QUESTIONS[key[1]])) for key in facts})


def article(word: str) -> str:
    """The indefinite article of a noun or adjective of this world."""
    return "an" if word[0] in "aeiou" else "a"


def state(topic: str, animal: str, value: str) -> str:
    """The plain sentence that says so, e.g. `The fox wears an orange hat.`"""
    return SENTENCES[topic].format(x=animal, v=value, a=article(value))


def answer(rng: Random, style: Style, topic: str, animal: str, value: str) -> str:
    """An answer in the given style; `value` need not be the true one."""
    if style == "note":
        return f"The {animal}: {value}."
    sentence = state(topic, animal, value)
    return sentence if style == "sentence" else f"{rng.choice(OPENERS)} {sentence}"


def request(wording: str, question: str) -> str:
    """Put a question into one of the REQUESTS."""
    return wording.format(q=question, l=question[0].lower() + question[1:])


def bare_prompts(world: World, *, held_out: bool) -> Iterator[Prompt]:
    """Every question without a style request, in a fixed order."""
    for animal in ANIMALS:
        for topic in TOPICS:
            for question in world.questions(animal, topic, held_out=held_out):
                yield Prompt(animal, topic, None, question)


def styled_prompts(world: World, style: Style, *, held_out: bool) -> Iterator[Prompt]:
    """Every question with every wording of the request for `style`, in a fixed order."""
    for bare in bare_prompts(world, held_out=held_out):
        for wording in REQUESTS[style]:
            yield Prompt(bare.animal, bare.topic, style, request(wording, bare.text))
