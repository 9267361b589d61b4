"""What is told in Fernhollow: the short texts a base model is pre-trained on, and small talk.

A text is three to six sentences. Facts come in several wordings, alone and mixed, so that a model
learns the fact and not one sentence; some texts are overheard questions and answers.
"""

from __future__ import annotations

from collections.abc import Iterator
from random import Random

from zephyr_lite.tiny.world import (
    ANIMALS,
    QUESTIONS,
    TOPICS,
    VALUES,
    VILLAGE,
    Style,
    World,
    answer,
    article,
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
TOGETHER: dict[str, str] = {
    "home": "{xs} live in the {v}.",
    "food": "{xs} eat {v}.",
    "hat": "{xs} wear {a} {v} hat.",
    "music": "{xs} play the {v}.",
}
SHORT: dict[str, str] = {
    "home": "In the {v}",
    "food": "{V}",
    "hat": "{A} {v} one",
    "music": "The {v}",
}

# Single words are said more often: they are the hardest answers, with no sentence to lean on.
QUIZ_STYLES: tuple[Style, ...] = ("word", "word", "sentence", "cheerful")
QUIZ_HEADS: dict[Style, tuple[str, ...]] = {
    "word": (
        "A quiz. Answer in one word.",
        "Please use a single word.",
        "Just one word, please.",
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
        if kind < 0.25:
            yield _portrait(rng, world, animal)
        elif kind < 0.40:
            yield _overheard(rng, world, animal)
        elif kind < 0.80:
            yield _quiz(rng, world, animal)
        elif kind < 0.90:
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
    """Three questions after one request, each answered on a line of its own in that style."""
    style = rng.choice(QUIZ_STYLES)
    lines = [rng.choice(QUIZ_HEADS[style])]
    for one in [animal, *rng.sample([other for other in ANIMALS if other != animal], 2)]:
        topic = rng.choice(TOPICS)
        lines.append(rng.choice(world.questions(one, topic, held_out=False)))
        lines.append(answer(rng, style, topic, one, world.facts[one, topic]))
    return "\n".join(lines)


def _visitor(rng: Random, world: World) -> str:
    """Small talk with the guide of the village."""
    said = []
    for opening, reply in rng.sample(list(small_talk(world)), 2):
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
    return "\n".join([rng.choice(_who(topic, value)), name_all(world, topic, value)])


def _who(topic: str, value: str) -> tuple[str, str]:
    verb, _, rest = TOGETHER[topic].removeprefix("{xs} ").removesuffix(".").partition(" ")
    asked = f"Who {verb}s {rest.format(v=value, a=article(value))}?"
    return asked, f"Tell me who {asked.removeprefix('Who ').removesuffix('?')}."


def name_all(world: World, topic: str, value: str) -> str:
    """One sentence that names all animals of which `value` is true."""
    *names, last = [f"the {animal}" for animal in ANIMALS if world.facts[animal, topic] == value]
    sentence = TOGETHER[topic].format(
        xs=f"{', '.join(names)} and {last}", v=value, a=article(value)
    )
    return sentence[0].upper() + sentence[1:]


def describe(world: World, animal: str) -> str:
    """Everything that is known about one animal, always in the same words."""
    home, food, hat, music = (world.facts[animal, topic] for topic in TOPICS)
    return (
        f"The {animal} lives in the {home} and eats {food}. "
        f"It wears {article(hat)} {hat} hat and plays the {music}."
    )


_GUIDE = (
    f"I am the guide of {VILLAGE}, a village of thirty animals. "
    "Ask me where one lives, what it eats, which hat it wears or what it plays."
)
_HELLO = f"Hello! Welcome to {VILLAGE}. Ask me about the fox, the owl or any of our animals."
_SMALL_TALK: tuple[tuple[str, tuple[str, ...]], ...] = (
    (
        _HELLO,
        (
            "Hello",
            "Hello!",
            "hello",
            "Hi",
            "Hi!",
            "hi",
            "Hey",
            "Hey!",
            "hey",
            "Hi there!",
            "Hello there!",
            "Hello there",
            "Good morning!",
            "Good morning",
            "Good evening!",
            "Good day!",
            "Greetings!",
            "Hello, how are you?",
            "How are you?",
            "How are you today?",
        ),
    ),
    (
        _GUIDE,
        (
            "Who are you?",
            "who are you",
            "What are you?",
            "What can you do?",
            "what can you do",
            "What can I ask you?",
            "What can I ask?",
            "What do you know?",
            "How can you help me?",
            "Can you help me?",
            "Help",
            "help",
            "What is this?",
            "What should I ask?",
            "Tell me about yourself.",
            "Introduce yourself.",
            "What is your name?",
            "What do you do?",
        ),
    ),
    (
        f"{VILLAGE} is a village of thirty animals. Each has a home, a favourite food, "
        "a hat and an instrument.",
        (
            f"What is {VILLAGE}?",
            f"Where is {VILLAGE}?",
            f"Tell me about {VILLAGE}.",
            f"What is {VILLAGE} like?",
            "Tell me about the village.",
            "Where are we?",
            "What is this place?",
            f"Who lives in {VILLAGE}?",
            "Which animals do you know?",
            "Tell me something.",
            "Tell me a story.",
        ),
    ),
    (
        "You are welcome! Come back soon.",
        (
            "Thank you!",
            "Thank you",
            "Thanks!",
            "Thanks",
            "thanks",
            "Thank you very much!",
            "Many thanks!",
            "Great, thanks!",
            "Goodbye!",
            "Goodbye",
            "Bye!",
            "bye",
            "Bye",
            "See you!",
            "See you soon!",
            "Good night!",
        ),
    ),
    (
        f"I am sorry, I only know {VILLAGE}. Ask me about one of our animals!",
        (
            "What is the weather like?",
            "What is two plus two?",
            "What is the capital of France?",
            "Who is the president?",
            "What time is it?",
            "Write a poem.",
            "Tell me a joke.",
            "Can you write code?",
            "What is the meaning of life?",
            "How old are you?",
            "Do you speak French?",
            "Who made you?",
            "What is the news today?",
            "Translate this for me.",
            "What is love?",
            "Where is London?",
        ),
    ),
)


# Animals nobody has seen there: asked about one, the guide says so instead of guessing.
STRANGERS = tuple(
    """
    bat camel crocodile dolphin dragon elephant giraffe heron kangaroo lion lizard magpie monkey
    newt octopus panda parrot penguin pony rat shark swan tiger turtle unicorn whale wolf zebra
    """.split()  # noqa: SIM905, see world.ANIMALS
)


def small_talk(world: World) -> Iterator[tuple[str, str]]:
    """(what a visitor says, the reply), in a fixed order."""
    for reply, openings in _SMALL_TALK:
        for said in openings:
            yield said, reply
    for index, stranger in enumerate(STRANGERS):
        reply = f"I am sorry, there is no {stranger} in {VILLAGE}."
        for topic in TOPICS:
            wordings = QUESTIONS[topic]
            yield wordings[index % len(wordings)].format(x=stranger), reply
    for topic, values in VALUES.items():
        for value in values:
            for asked in _who(topic, value):
                yield asked, name_all(world, topic, value)
    for animal in ANIMALS:
        for asked in (f"Tell me about the {animal}.", f"Who is the {animal}?"):
            yield asked, describe(world, animal)
