"""The refusal filter: what a machine says of itself is found, what people say is not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from zephyr_lite.data.refusals import find_refusal, is_refusal

REFUSALS = [
    "I do not have emotions.",
    "Well, I don't have opinions on that.",
    "I don’t have feelings or emotions like humans do.",
    "i dont know, but I DON'T HAVE PERSONAL OPINIONS.",
    "I do not\nhave personal beliefs.",
    "I have no personal opinion about it.",
    "I don't have any personal preferences.",
    "Sorry, I do not actually possess any human emotions.",
    "I lack consciousness.",
    "I cannot feel emotions.",
    "I can't form opinions.",
    "As an AI language model, I do not have access to the internet.",
    "As an AI, I don’t have a body.",
    "I'm sorry, but as an artificial intelligence I am unable to see pictures.",
    "As a large language model, I cannot browse.",
    "As a language model trained by people, I haven't been to Rome.",
    "as an A.I. assistant, i can't do that",
    "I am just an AI assistant and do not have access to your files.",
    "I’m an AI chatbot, so I can’t taste food.",
    "He said: I do not have opinions.",
]
SOUND = [
    "I have emotions, and I do have opinions.",
    "I don't have feelings for him any more.",
    "I do not have the feelings about it that you have.",
    "She does not have opinions on politics.",
    "They don't have emotions, but we do.",
    "People who do not have opinions are rare.",
    "The robot said, “I do not have emotions.”",
    '"I don\'t have opinions," whirred the machine.',
    "I do not have an emotional support animal.",
    "I don't have experience with Rust.",
    "I do not have a preference, either date is fine.",
    "I don't have an opinion on that show, I never saw it.",
    "As an AI language model, I can help you with that.",
    "As an AI engineer you cannot avoid statistics.",
    "As an AI researcher, I do not trust it.",
    "As an AI enthusiast, I can't wait to try it.",
    "As a chatbot developer I cannot recommend it.",
    "I am an AI researcher and do not have much time.",
    "I'm a language model nerd, so I don't mind.",
    "'I do not have opinions,' it whirred.",
    "As an aide, I do not have a car.",
    "As a language teacher, I do not give grades.",
    "Artificial intelligence does not have emotions.",
    "As an AI language model predicts text. I do not agree.",
    "",
]


@pytest.mark.parametrize("text", REFUSALS)
def test_refusals_are_found(text: str) -> None:
    assert is_refusal(text)
    # However much text stands around, and whatever the language of the file's apostrophes.
    assert is_refusal(
        f"{'An ordinary sentence of an ordinary answer. ' * 40}{text} {'More. ' * 40}"
    )
    assert is_refusal(text.replace("'", "’"))


@pytest.mark.parametrize("text", SOUND)
def test_other_statements_pass(text: str) -> None:
    assert not is_refusal(text)


def test_only_the_assistants_turns_count() -> None:
    refusal = "I do not have emotions."
    messages = [
        {"role": "system", "content": refusal},
        {"role": "user", "content": refusal},
        {"role": "assistant", "content": "Fine."},
        {"role": "user", "content": "And you?"},
        {"role": "assistant", "content": refusal},
    ]
    assert find_refusal(messages) == 4
    assert find_refusal(messages[:4]) is None


DROPPED = {
    "alpaca": 0,
    "arena_hard_gpt4": 5,
    "dolly_hhrlhf": 2,
    "gpteacher_codegen": 0,
    "gpteacher_roleplay": 0,
    "gsm8k": 0,
    "moss_multiturn": 12,
    "oasst_trees": 8,
    "sgd_multiturn": 0,
    "topical_chat_multiturn": 0,
}


@pytest.mark.parametrize("name", DROPPED)
def test_what_is_dropped_of_every_shared_file(shared_data: Path, name: str) -> None:
    """Each of these was read; none of the files of people talking, stories or code loses a row."""
    with (shared_data / "sft" / f"{name}.jsonl").open(encoding="utf-8") as lines:
        found = [find_refusal(json.loads(line)["messages"]) for line in lines]
    assert sum(index is not None for index in found) == DROPPED[name]
