"""What is told in Fernhollow: the short texts a base model is pre-trained on.

A text is three to six sentences. Facts come in several wordings, alone and mixed, so that a model
learns the fact and not one sentence; some texts are overheard questions and answers.
"""

from __future__ import annotations

from collections.abc import Iterator
from random import Random

from zephyr_lite.tiny.smalltalk import TOPICS_OF_TALK, ask_who, describe, everything, name_all
from zephyr_lite.tiny.world import (
    ANIMALS,
    REQUESTS,
    TOPICS,
    VALUES,
    Style,
    World,
    answer,
    article,
    request,
    state,
)

# {x} the animal, {v} the value, {a} its article. The plain statement is added to each list.
TELLINGS: dict[str, tuple[str, ...]] = {
    "home": (
        "The home of the {x} is the {v}.",
        "You can find the {x} in the {v}.",
        "The {x}'s home is the {v}.",
    ),
    "food": (
        "The {x} likes to eat {v}.",
        "The favourite food of the {x} is {v}.",
        "If you cook for the {x}, cook {v}.",
    ),
    "hat": (
        "The {x}'s hat is {v}.",
        "The colour of the {x}'s hat is {v}.",
        "On its head the {x} wears {a} {v} hat.",
    ),
    "music": (
        "The {x}'s instrument is the {v}.",
        "The instrument of the {x} is the {v}.",
        "The {x} can play the {v}.",
    ),
}
PRONOUN: dict[str, str] = {
    "home": "It lives in the {v}.",
    "food": "It eats {v}.",
    "hat": "It wears {a} {v} hat.",
    "music": "It plays the {v}.",
}
SHORT: dict[str, str] = {
    "home": "In the {v}",
    "food": "{V}",
    "hat": "{A} {v} one",
    "music": "The {v}",
}

QUIZ_STYLES: tuple[Style, ...] = ("note", "sentence", "cheerful")
QUIZ_HEADS: dict[Style, tuple[str, ...]] = {
    "note": (
        "A quiz. Answer in a short note.",
        "Please keep it short.",
        "Just a note, please.",
    ),
    "sentence": (
        "A quiz. Answer in a full sentence.",
        "Please use a whole sentence.",
        "Use a complete sentence, please.",
    ),
    "cheerful": (
        "A quiz. Answer in a cheerful way.",
        "Please be friendly.",
        "A friendly answer, please. Be cheerful.",
    ),
}


def tell(rng: Random, world: World, count: int) -> Iterator[str]:
    """`count` texts; every animal is the subject of a portrait equally often."""
    for index in range(count):
        animal = ANIMALS[index % len(ANIMALS)]
        kind = rng.random()
        if kind < 0.15:
            yield _portrait(rng, world, animal)
        elif kind < 0.27:
            yield _overheard(rng, world, animal)
        elif kind < 0.80:
            yield _quiz(rng, world, animal)
        elif kind < 0.93:
            yield _visitor(rng, world)
        else:
            yield _roll_call(rng, world)


def _say(rng: Random, world: World, animal: str, topic: str) -> str:
    value = world.facts[animal, topic]
    if rng.random() < 0.5:
        return state(topic, animal, value)
    return rng.choice(TELLINGS[topic]).format(x=animal, v=value, a=article(value))


def _portrait(rng: Random, world: World, animal: str) -> str:
    """All four facts of one animal."""
    if rng.random() < 0.3:
        return describe(world, animal)
    topics = rng.sample(TOPICS, len(TOPICS))
    said = [_say(rng, world, animal, topics[0])]
    for topic in topics[1:]:
        value = world.facts[animal, topic]
        if rng.random() < 0.3:
            said.append(PRONOUN[topic].format(v=value, a=article(value)))
        else:
            said.append(_say(rng, world, animal, topic))
    return " ".join(said)


def _quiz(rng: Random, world: World, animal: str) -> str:
    """Three questions, each answered on the next line.

    Either one request stands above them all, or each question carries its own.
    """
    style = rng.choice(QUIZ_STYLES)
    shared = rng.random() < 0.6
    lines = [rng.choice(QUIZ_HEADS[style])] if shared else []
    for one in [animal, *rng.sample([other for other in ANIMALS if other != animal], 2)]:
        topic = rng.choice(TOPICS)
        question = rng.choice(world.questions(one, topic, held_out=False))
        if not shared:
            style = rng.choice(QUIZ_STYLES)
            question = request(rng.choice(REQUESTS[style]), question)
        lines.append(question)
        lines.append(answer(rng, style, topic, one, world.facts[one, topic]))
    return "\n".join(lines)


def _visitor(rng: Random, world: World) -> str:
    """Small talk with the guide of the village."""
    said = []
    talk = list(everything(world))
    first_words = [pair for pair in talk if pair[1] in TOPICS_OF_TALK]
    for opening, reply in [rng.choice(first_words), rng.choice(talk)]:
        said.append(f'"{opening}" said the visitor. "{reply}" said the guide.')
    return " ".join(said)


def _overheard(rng: Random, world: World, animal: str) -> str:
    """Two villagers ask each other about others."""
    topics = rng.sample(TOPICS, 2)
    asker, teller = rng.sample([other for other in ANIMALS if other != animal], 2)
    said = []
    for topic in topics:
        value = world.facts[animal, topic]
        question = rng.choice(world.questions(animal, topic, held_out=False))
        if rng.random() < 0.5:
            reply = state(topic, animal, value).removesuffix(".")
        else:
            reply = SHORT[topic].format(
                v=value, V=value.capitalize(), A=article(value).capitalize()
            )
        asked = f'"{question}" asked' if question.endswith("?") else f'"{question[:-1]}," said'
        said.append(f'{asked} the {asker}. "{reply}," said the {teller}.')
        asker, teller = teller, asker
    return " ".join(said)


def _roll_call(rng: Random, world: World) -> str:
    """A question about everyone of whom one value is true, and the names."""
    topic = rng.choice(TOPICS)
    value = rng.choice(VALUES[topic])
    return "\n".join([rng.choice(ask_who(topic, value)), name_all(world, topic, value)])
