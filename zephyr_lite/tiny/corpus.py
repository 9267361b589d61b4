"""Turn the village into the files of the example: text, dialogues, feedback, questions, tokenizer.

`python -m zephyr_lite.tiny.corpus FOLDER` writes them; the copies under `data/` were made so and a
test holds them equal byte for byte. Three properties are built in:

- Held out means unseen: of each fact one wording of the question is kept back for the eval files
  and the exam, and no training file contains it; and no prompt at all is used twice.
- The teacher of the dialogues ignores which style was asked for, so SFT teaches facts and styles
  but not obedience; the feedback prefers what is right *and* in the style asked for.
- The preference is in the prompt: chosen and rejected answers have the same styles, lengths and
  values equally often, so the answers alone say nothing.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from random import Random
from typing import Any

from zephyr_lite.tiny import smalltalk, stories
from zephyr_lite.tiny.tokenizer import train_tokenizer
from zephyr_lite.tiny.world import (
    FOLLOW_SAME_ANIMAL,
    FOLLOW_SAME_TOPIC,
    OPENERS,
    STYLES,
    TOPICS,
    VALUES,
    Prompt,
    Style,
    World,
    answer,
    bare_prompts,
    build_world,
    state,
    styled_prompts,
)

Row = dict[str, Any]

SEED = 2310
TEXTS = 3000
DIALOGUES = {"train": 1100, "eval": 100}
PAIRS = {"train": 960, "eval": 240}
QUESTIONS = 20
TWO_TURNS = 0.25  # share of the dialogues with a follow-up question
BARE_DIALOGUES = 0.35  # share of the dialogues whose question asks for no style
TEACHER: tuple[Style, ...] = ("note", "sentence", "cheerful")  # its taste in styles
CASUAL = 0.3  # share of those that are typed in small letters without a mark at the end

MODELS = ("juniper-7b", "meadow-13b", "pebble-1b", "thistle-3b")
ASPECTS = ("instruction_following", "honesty", "truthfulness", "helpfulness")


class Pool:
    """Hands out every prompt at most once, each run of 120 draws going over all 120 facts."""

    def __init__(self, rng: Random, world: World, *, held_out: bool) -> None:
        self._rng = rng
        self._bare = self._deal(bare_prompts(world, held_out=held_out))
        self._styled = {
            style: self._deal(styled_prompts(world, style, held_out=held_out)) for style in STYLES
        }

    def _deal(self, prompts: Iterable[Prompt]) -> Iterator[Prompt]:
        piles: dict[tuple[str, str], list[Prompt]] = {}
        for prompt in prompts:
            piles.setdefault((prompt.animal, prompt.topic), []).append(prompt)
        for pile in piles.values():
            self._rng.shuffle(pile)
        rounds = [list(one_round) for one_round in zip(*piles.values(), strict=True)]
        for one_round in rounds:
            self._rng.shuffle(one_round)
        return iter([prompt for one_round in rounds for prompt in one_round])

    def draw(self, style: Style | None) -> Prompt:
        """The next prompt that asks for `style` (None: for no style)."""
        return next(self._bare if style is None else self._styled[style])

    def draw_for(self, best: Style) -> Prompt:
        """The next prompt whose best answer has style `best`: half of the sentences go unasked."""
        return self.draw(None if best == "sentence" and self._rng.random() < 0.5 else best)


def make_dialogues(rng: Random, world: World, pool: Pool, count: int, split: str) -> Iterator[Row]:
    """Questions and right answers in a style of the teacher's own choice."""
    for index in range(count):
        style = None if rng.random() < BARE_DIALOGUES else rng.choice(STYLES)
        prompt = pool.draw(style)
        text = prompt.text
        if split == "train" and style is None and rng.random() < CASUAL:
            text = text.lower().rstrip("?.")
        messages = [_user(text), _reply(rng, world, prompt.animal, prompt.topic)]
        if rng.random() < TWO_TURNS:
            messages += _follow_up(rng, world, prompt)
        yield {"id": f"{split}-{index:04d}", "messages": messages}


def _user(text: str) -> Row:
    return {"role": "user", "content": text}


def _reply(rng: Random, world: World, animal: str, topic: str) -> Row:
    text = answer(rng, rng.choice(TEACHER), topic, animal, world.facts[animal, topic])
    return {"role": "assistant", "content": text}


def _follow_up(rng: Random, world: World, prompt: Prompt) -> list[Row]:
    """A second turn: another fact of the same animal, or the same fact of another animal."""
    if rng.random() < 0.5:
        topic = rng.choice([topic for topic in TOPICS if topic != prompt.topic])
        return [_user(FOLLOW_SAME_ANIMAL[topic]), _reply(rng, world, prompt.animal, topic)]
    animals = [animal for animal, topic in world.facts if topic == prompt.topic]
    animal = rng.choice([animal for animal in animals if animal != prompt.animal])
    question = rng.choice(FOLLOW_SAME_TOPIC).format(x=animal)
    return [_user(question), _reply(rng, world, animal, prompt.topic)]


def make_small_talk(rng: Random, world: World, pool: Pool, split: str) -> Iterator[Row]:
    """What a stranger types first or last, alone and around a question."""
    for index, (said, reply) in enumerate(smalltalk.everything(world)):
        talk = [_user(said), {"role": "assistant", "content": reply}]
        yield {"id": f"{split}-talk-{index:03d}", "messages": talk}
        if reply in smalltalk.TOPICS_OF_TALK:  # first words: said more often than the rest
            yield {"id": f"{split}-talk-{index:03d}-again", "messages": talk}
            prompt = pool.draw(rng.choice(STYLES))
            asked = [_user(prompt.text), _reply(rng, world, prompt.animal, prompt.topic)]
            both = asked + talk if reply == smalltalk.THANKS else talk + asked
            yield {"id": f"{split}-talk-{index:03d}-asked", "messages": both}


def make_feedback(rng: Random, world: World, pool: Pool, count: int) -> Iterator[Row]:
    """Rows in UltraFeedback's raw schema: four models answer, four aspects are rated."""
    wrong_values = {topic: _endless(rng, VALUES[topic]) for topic in TOPICS}
    for index in range(count):
        prompt = pool.draw_for(STYLES[index % len(STYLES)])
        right = world.facts[prompt.animal, prompt.topic]
        wrong = next(value for value in wrong_values[prompt.topic] if value != right)
        best = prompt.best_style
        others: list[Style] = [style for style in STYLES if style != best]
        rng.shuffle(others)
        drafts = [
            _completion(rng, prompt, best, right, "right"),
            _completion(rng, prompt, others[0], right, "off_form"),
            _completion(rng, prompt, others[1], right, "off_form"),
            _completion(rng, prompt, best, wrong, "wrong"),
        ]
        yield _feedback_row(rng, prompt.text, drafts)


def make_talk_feedback(rng: Random) -> Iterator[Row]:
    """Small talk, so that dDPO keeps it: the fitting reply against three others."""
    for reply, openings in smalltalk.TOPICS_OF_TALK.items():
        others = [other for other in smalltalk.TOPICS_OF_TALK if other != reply]
        for said in openings:
            drafts = [_rated(reply, "right")]
            drafts += [_rated(other, "off_topic") for other in rng.sample(others, 3)]
            yield _feedback_row(rng, said, drafts)


def _feedback_row(rng: Random, instruction: str, drafts: list[Row]) -> Row:
    rng.shuffle(drafts)
    return {
        "source": "fernhollow",
        "instruction": instruction,
        "models": list(MODELS),
        "completions": [{"model": m, **draft} for m, draft in zip(MODELS, drafts, strict=True)],
        "correct_answers": ["None"],
        "incorrect_answers": ["None"],
    }


def _endless(rng: Random, values: tuple[str, ...]) -> Iterator[str]:
    """Values for ever, each equally often."""
    while True:
        yield from rng.sample(values, len(values))


# verdict: the ratings in the order of ASPECTS, the overall score, the critique
VERDICTS: dict[str, tuple[str, float, str]] = {
    "right": ("5555", 9.0, "Right, in the form asked for."),
    "off_form": ("2553", 6.0, "Right, but not in the form asked for."),
    "wrong": ("4211", 2.0, "In good form, but the fact is wrong."),
    "off_topic": ("1331", 3.0, "It does not answer what was said."),
}


def _completion(rng: Random, prompt: Prompt, style: Style, value: str, verdict: str) -> Row:
    return _rated(answer(rng, style, prompt.topic, prompt.animal, value), verdict)


def _rated(response: str, verdict: str) -> Row:
    ratings, overall, critique = VERDICTS[verdict]
    return {
        "principle": "helpfulness",
        "custom_system_prompt": "",
        "response": response,
        "annotations": {
            aspect: {"Rating": rating} for aspect, rating in zip(ASPECTS, ratings, strict=True)
        },
        "overall_score": overall,
        "critique": critique,
        "fine-grained_score": sum(map(int, ratings)) / len(ratings),
    }


def make_questions(world: World, pool: Pool, count: int) -> Iterator[Row]:
    """The final exam. `accept` must match the whole answer, upper or lower case."""
    for index in range(count):
        prompt = pool.draw_for(STYLES[index % len(STYLES)])
        value = world.facts[prompt.animal, prompt.topic]
        sentence = state(prompt.topic, prompt.animal, value).removesuffix(".")
        accept = {
            "note": rf"The {prompt.animal}: {value}\.?",
            "sentence": rf"{sentence}\.?",
            "cheerful": rf"({'|'.join(OPENERS)}) {sentence}[.!]",
        }[prompt.best_style]
        yield {"prompt": prompt.text, "accept": accept}


def make_files() -> dict[str, list[Row]]:
    """All rows by file name. The order of the draws is part of the files: do not reorder."""
    rng = Random(SEED)
    world = build_world(rng)
    pools = {"eval": Pool(rng, world, held_out=True), "train": Pool(rng, world, held_out=False)}
    files = {"questions.jsonl": list(make_questions(world, pools["eval"], QUESTIONS))}
    for split, pool in pools.items():
        feedback = list(make_feedback(rng, world, pool, PAIRS[split]))
        dialogues = list(make_dialogues(rng, world, pool, DIALOGUES[split], split))
        if split == "train":
            feedback += make_talk_feedback(rng)
            dialogues += make_small_talk(rng, world, pool, split)
        rng.shuffle(feedback)
        rng.shuffle(dialogues)
        files[f"feedback.{split}.jsonl"] = feedback
        files[f"dialogues.{split}.jsonl"] = dialogues
    files["text.jsonl"] = [{"text": text} for text in stories.tell(rng, world, TEXTS)]
    return files


def write(folder: Path) -> None:
    """Write every file of the example into `folder`, which is made when missing."""
    folder.mkdir(parents=True, exist_ok=True)
    files = make_files()
    for name, rows in files.items():
        lines = "".join(json.dumps(row, ensure_ascii=True) + "\n" for row in rows)
        (folder / name).write_text(lines, encoding="utf-8", newline="\n")
    texts = [row["text"] for row in files["text.jsonl"]]
    chats = [row["messages"] for row in files["dialogues.train.jsonl"]]
    (folder / "tokenizer.json").write_text(
        train_tokenizer(texts, chats), encoding="utf-8", newline="\n"
    )


if __name__ == "__main__":
    write(Path(sys.argv[1]))
