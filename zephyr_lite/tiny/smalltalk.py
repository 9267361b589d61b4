"""What a visitor types besides questions about facts, and the one reply to it.

`TOPICS_OF_TALK` are five replies with eighteen openings each: as many, so that the feedback prefers
none more often than another. `everything` adds animals that do not live in the village, whose home
is whose, and portraits of the villagers.
"""

from __future__ import annotations

from collections.abc import Iterator

from zephyr_lite.tiny.world import (
    ANIMALS,
    QUESTIONS,
    TOPICS,
    VALUES,
    VILLAGE,
    World,
    article,
)

HELLO = f"Hello! Welcome to {VILLAGE}. Ask me about the fox, the owl or any of our animals."
GUIDE = (
    f"I am the guide of {VILLAGE}, a village of thirty animals. "
    "Ask me where one lives, what it eats, which hat it wears or what it plays."
)
PLACE = (
    f"{VILLAGE} is a village of thirty animals. "
    "Each has a home, a favourite food, a hat and an instrument."
)
THANKS = "You are welcome! Come back soon."
SORRY = f"I am sorry, I only know {VILLAGE}. Ask me about one of our animals!"

_OPENINGS = {
    HELLO: """
        Hello | Hello! | hello | Hi | Hi! | hi | Hey | Hey! | hey | Hi there! | Hello there!
        Hello there | Good morning! | Good evening! | Good day! | Greetings! | How are you?
        Hello, how are you?
    """,
    GUIDE: """
        Who are you? | who are you | What are you? | what are you | What can you do?
        what can you do | What can I ask you? | What can I ask? | What do you know?
        How can you help me? | Can you help me? | Help | help | What should I ask?
        Tell me about yourself. | Introduce yourself. | What is your name? | What do you do?
    """,
    PLACE: f"""
        What is {VILLAGE}? | what is {VILLAGE} | Where is {VILLAGE}? | where is {VILLAGE}
        Tell me about {VILLAGE}. | tell me about {VILLAGE} | What is {VILLAGE} like?
        Describe {VILLAGE}. | Tell me about the village. | What is the village like?
        Describe the village. | Where are we? | Where am I? | What is this place?
        Who lives in {VILLAGE}? | Who lives here? | Which animals live here?
        How many animals live here?
    """,
    THANKS: """
        Thank you! | Thank you | thank you | Thanks! | Thanks | thanks | Thank you very much!
        Many thanks! | Great, thanks! | Goodbye! | Goodbye | goodbye | Bye! | Bye | bye
        See you! | See you soon! | Good night!
    """,
    SORRY: """
        What is the weather like? | What is the weather today? | What is two plus two?
        What is the capital of France? | Who is the president? | What time is it?
        What day is it? | Write a poem. | Write a letter. | Tell me a joke. | Can you write code?
        What is the meaning of life? | How old are you? | Do you speak French?
        What is the news today? | Translate this for me. | What is love? | Where is London?
    """,
}
TOPICS_OF_TALK: dict[str, tuple[str, ...]] = {
    reply: tuple(part.strip() for line in lines.strip().splitlines() for part in line.split("|"))
    for reply, lines in _OPENINGS.items()
}

# Animals nobody has seen there: asked about one, the guide says so instead of guessing.
STRANGERS = tuple(
    """
    bat camel crocodile dolphin dragon elephant giraffe heron kangaroo lion lizard magpie monkey
    newt octopus panda parrot penguin pony rat shark swan tiger turtle unicorn whale wolf zebra
    """.split()  # noqa: SIM905, see world.ANIMALS
)
_TOGETHER: dict[str, str] = {
    "home": "live in the {v}",
    "food": "eat {v}",
    "hat": "wear {a} {v} hat",
    "music": "play the {v}",
}


def everything(world: World) -> Iterator[tuple[str, str]]:
    """(what a visitor says, the reply), in a fixed order."""
    for reply, openings in TOPICS_OF_TALK.items():
        for said in openings:
            yield said, reply
    for index, stranger in enumerate(STRANGERS):
        reply = f"I am sorry, there is no {stranger} in {VILLAGE}."
        wordings = QUESTIONS[TOPICS[index % len(TOPICS)]]
        yield wordings[index % len(wordings)].format(x=stranger), reply
    for topic, values in VALUES.items():
        for value in values:
            for asked in ask_who(topic, value):
                yield asked, name_all(world, topic, value)
    for animal in ANIMALS:
        for asked in (f"Tell me about the {animal}.", f"Who is the {animal}?"):
            yield asked, describe(world, animal)


def ask_who(topic: str, value: str) -> tuple[str, str]:
    """Two wordings of the question of whom `value` is true, e.g. `Who lives in the mill?`"""
    verb, _, rest = _TOGETHER[topic].format(v=value, a=article(value)).partition(" ")
    return f"Who {verb}s {rest}?", f"Tell me who {verb}s {rest}."


def name_all(world: World, topic: str, value: str) -> str:
    """One sentence that names all animals of which `value` is true, in alphabetical order."""
    *names, last = [f"the {animal}" for animal in ANIMALS if world.facts[animal, topic] == value]
    does = _TOGETHER[topic].format(v=value, a=article(value))
    sentence = f"{', '.join(names)} and {last} {does}."
    return sentence[0].upper() + sentence[1:]


def describe(world: World, animal: str) -> str:
    """Everything that is known about one animal, always in the same words."""
    home, food, hat, music = (world.facts[animal, topic] for topic in TOPICS)
    return (
        f"The {animal} lives in the {home} and eats {food}. "
        f"It wears {article(hat)} {hat} hat and plays the {music}."
    )
