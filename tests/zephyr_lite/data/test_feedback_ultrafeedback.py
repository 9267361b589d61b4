"""UltraFeedback as published: ratings, the overall_score of 10, what the report says of each."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from zephyr_lite.data.answers import ScoredAnswers
from zephyr_lite.data.feedback import PreferencePair, load_pairs
from zephyr_lite.data.feedback_rows import parse_feedback
from zephyr_lite.data.sources import Row
from zephyr_lite.errors import DataError
from zephyr_lite.recipe import Source

Write = Callable[..., Source]


def source(path: Path) -> Source:
    return Source(path=str(path))  # type: ignore[call-arg]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write(*rows: Any) -> Source:
        file = tmp_path / "f.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return source(file)

    return write


def user() -> dict[str, str]:
    return {"role": "user", "content": "Why?"}


def only(pairs: list[PreferencePair]) -> tuple[Any, ...]:
    (pair,) = pairs
    return pair.prompt, pair.chosen, pair.rejected, pair.score_chosen, pair.score_rejected


def ultrafeedback(ratings: list[list[Any]], overall: list[Any]) -> dict[str, Any]:
    aspects = ("helpfulness", "honesty", "instruction_following", "truthfulness")
    completions = [
        {
            "model": f"m{i}",
            "custom_system_prompt": f"prompt {i}",
            "response": "abcd"[i],
            "annotations": {
                aspect: {"Rating": rating, "Rationale": "because"}
                for aspect, rating in zip(aspects, row, strict=True)
            },
            "overall_score": overall[i],
            "fine-grained_score": 99.0,
        }
        for i, row in enumerate(ratings)
    ]
    return {"instruction": "Why?", "source": "flan", "completions": completions}


def test_ultrafeedback_by_mean_and_by_overall(write: Write) -> None:
    # Means: a 4, b 4.5 over the two aspects that are rated, c 1, d not rated at all.
    ratings = [["4"] * 4, ["5", "4", "N/A", "N/A"], ["1"] * 4, ["N/A", "N/A", None, "N/A"]]
    row = ultrafeedback(ratings, [9.0, 2, "1.5", 10])
    row["completions"][3].pop("fine-grained_score")
    assert only(load_pairs([write(row)], rule="worst")[0]) == ([user()], "b", "c", 4.5, 1.0)
    chosen = load_pairs([write(row)], rule="overall")[0][0]
    assert (chosen.chosen, chosen.score_chosen, chosen.source) == ("d", 10.0, "flan")
    drawn = set()
    for seed in range(40):
        pairs, report = load_pairs([write(row)], rule="mean", seed=seed)
        drawn.add((pairs[0].chosen, pairs[0].rejected))
        assert next(iter(report.noted.values())) == {"answer_unrated": 1}
    assert drawn == {("b", "a"), ("b", "c")}


def completion(overall: Any = None, annotations: Any = None, **more: Any) -> dict[str, Any]:
    return {"response": "x", "overall_score": overall, "annotations": annotations} | more


def parse(*completions: dict[str, Any], rule: Any = "mean") -> ScoredAnswers:
    parsed = parse_feedback(
        Row("f", 1, {"instruction": "Why?", "completions": list(completions)}), rule
    )
    assert isinstance(parsed, ScoredAnswers)
    return parsed


def rated(*ratings: Any) -> dict[str, Any]:
    aspects = ("helpfulness", "honesty", "instruction_following", "truthfulness")
    return {a: {"Rating": r, "Rationale": ""} for a, r in zip(aspects, ratings, strict=False)}


LISTED = {
    "helpfulness": [{"Type": ["1", "3"], "Rationale": "", "Rating": "4"}],
    "truthfulness": [{"Type": "None", "Rationale": "", "Rating": "2", "Rationale For Rating": ""}],
}
MEANS: dict[str, tuple[dict[str, Any], float | None]] = {
    "texts": (completion(annotations=rated("4", "4.0", "5", "2")), 3.75),
    "numbers": (completion(annotations=rated(4, 4.0, 5, 2)), 3.75),
    "N/A, null": (completion(annotations=rated("4", "N/A", None, "2")), 3.0),
    "missing aspects": (completion(annotations=rated("4")), 4.0),
    "no Rating": (completion(annotations=rated("4") | {"truthfulness": {"Rationale": "x"}}), 4.0),
    "null aspects": (completion(annotations=rated("4") | {"truthfulness": None}), 4.0),
    "lists of one": (completion(annotations=LISTED), 3.0),
    "an empty list": (completion(annotations=LISTED | {"honesty": []}), 3.0),
    "no annotations": ({"response": "x"}, None),
    "null annotations": (completion(), None),
    "all N/A": (completion(annotations=rated("N/A", "N/A", "N/A", "N/A")), None),
    "fine-grained": (completion(**{"fine-grained_score": 3.25}), 3.25),
    "fine-grained as text": (completion(annotations={}, **{"fine-grained_score": "3.25"}), 3.25),
    "fine-grained is not read": (
        completion(annotations=rated("4"), **{"fine-grained_score": 1}),
        4.0,
    ),
}


@pytest.mark.parametrize("case", MEANS)
def test_the_mean_is_over_what_was_rated(case: str) -> None:
    item, mean = MEANS[case]
    (answer,) = parse(item).answers
    assert (answer.score, answer.fault, answer.note) == (mean, None, None)


MALFORMED = {
    "two in a list": ({"honesty": [{"Rating": "1"}] * 2}, "annotations.honesty` must hold one"),
    "an aspect of text": ({"honesty": "4"}, "annotations.honesty` must be an object, found str"),
    "a list of text": ({"honesty": ["4"]}, "annotations.honesty` must be an object, found str"),
    "annotations of text": ("good", "annotations` must be an object, found str"),
    "a rating in words": (rated("good"), "helpfulness.Rating` must be a finite number, found"),
    "a rating with its range": (rated("4/5"), "must be a finite number, found '4/5'"),
    "a rating that is no number": (rated(True), "must be a finite number, found True"),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_a_rating_that_cannot_be_read_names_its_place(write: Write, case: str) -> None:
    annotations, words = MALFORMED[case]
    sound = completion(annotations=rated("4"))
    row = {"instruction": "Why?", "completions": [sound, completion(annotations=annotations)]}
    with pytest.raises(DataError) as error:
        load_pairs([write(row)], on_fault="drop")
    assert str(error.value).startswith(f"{write(row).path}:1: `completions[1].annotations")
    assert words in str(error.value)


@pytest.mark.parametrize(
    ("rule", "item"),
    [
        ("mean", completion(annotations=rated("6", "4"))),
        ("mean", completion(annotations=rated("0", "4"))),
        ("mean", completion(**{"fine-grained_score": 5.5})),
        ("overall", completion(11)),
        ("overall", completion("0")),
        ("overall", completion(10, rated("9", "5"))),
    ],
)
def test_a_score_out_of_its_range_is_a_fault(write: Write, rule: Any, item: Any) -> None:
    sound = [completion(s, rated(str(s)), response=f"{s}") for s in (2, 3)]
    file = write({"instruction": "Why?", "completions": [item, *sound]})
    with pytest.raises(DataError, match=r"f\.jsonl:1: score_range"):
        load_pairs([file], rule=rule)
    pairs, report = load_pairs([file], rule=rule, on_fault="drop")
    assert only(pairs)[1:] == ("3", "2", 3.0, 2.0)
    assert report.noted[file.path]["answer_score_range"] == 1


# (overall_score, the aspects' ratings, fine-grained_score): the score that counts, and the note.
TENS: dict[str, tuple[tuple[Any, Any, Any], tuple[float | None, str | None]]] = {
    "mean 1": ((10, ("1", "1"), None), (1.0, "overall_10_repaired")),
    "mean 2": (("10", ("1", "3"), None), (1.0, "overall_10_repaired")),
    "mean above 2": ((10.0, ("2", "2", "2", "3"), None), (None, "overall_10_unrated")),
    "mean 4": (("10.0", ("4", "4"), None), (None, "overall_10_unrated")),
    "mean above 4": ((10, ("4", "4", "4", "5"), None), (10.0, "overall_10_kept")),
    "N/A left out": ((10, ("5", "N/A"), None), (10.0, "overall_10_kept")),
    "fine-grained low": ((10, (), 1.75), (1.0, "overall_10_repaired")),
    "fine-grained between": ((10, ("N/A",), "3.0"), (None, "overall_10_unrated")),
    "fine-grained high": ((10, (), 4.5), (10.0, "overall_10_kept")),
    "nothing to check by": ((10, ("N/A", None), None), (10.0, "overall_10_unchecked")),
    "not 10": ((9.5, ("1", "1"), None), (9.5, None)),
    "a true 1": ((1, ("5", "5"), None), (1.0, None)),
    "no score": (("N/A", ("1", "1"), None), (None, None)),
}


@pytest.mark.parametrize("case", TENS)
def test_an_overall_score_of_10_is_checked_against_the_ratings(case: str) -> None:
    (overall, ratings, fine), expected = TENS[case]
    item = completion(overall, rated(*ratings), **{"fine-grained_score": fine})
    (answer,) = parse(item, rule="overall").answers
    assert (answer.score, answer.note) == expected
    (answer,) = parse(item, rule="mean").answers
    assert answer.note is None


def test_a_repaired_10_changes_which_answer_is_chosen_and_is_reported(write: Write) -> None:
    items = [
        completion(10, rated("1", "1"), response="false 10"),
        completion(10, rated("3", "4"), response="unsure"),
        completion(7, rated("4", "4"), response="seven"),
        completion(10, rated("5", "5"), response="true 10"),
    ]
    first = {"instruction": "1?", "completions": items[:3]}
    second = {"instruction": "2?", "completions": items}
    file = write(first, second)
    pairs, report = load_pairs([file], rule="overall")
    assert [(p.chosen, p.score_chosen) for p in pairs] == [("seven", 7.0), ("true 10", 10.0)]
    assert (pairs[0].rejected, pairs[0].score_rejected) == ("false 10", 1.0)
    assert report.noted[file.path] == {
        "overall_10_repaired": 2,
        "overall_10_unrated": 2,
        "overall_10_kept": 1,
        "answer_unrated": 2,
    }


def test_too_few_rated_answers_name_the_rule(write: Write) -> None:
    items = [completion(10, rated("3"), response=f"{i}") for i in range(2)]
    with pytest.raises(DataError, match="0 of 2 answers can be used, 2 without a rating") as error:
        load_pairs([write({"instruction": "Why?", "completions": items})], rule="overall")
    assert "data.feedback.rule" in (error.value.hint or "")


def test_the_published_ultrafeedback_record(shared_data: Path) -> None:
    """One completion is printed in the README: rated (2 + 3 + 3 + 3) / 4, and no pair."""
    file = source(shared_data / "aif" / "ultrafeedback_raw_readme_record.json")
    with pytest.raises(DataError, match=r"json:1: too_few_responses: 1 of 1 answers can be used$"):
        load_pairs([file])
    record = json.loads(Path(file.path).read_text(encoding="utf-8"))
    record["completions"].append({"response": "no", "annotations": {"honesty": {"Rating": "2.5"}}})
    assert load_pairs([file], on_fault="drop")[1].as_dict()["dropped"] == {"too_few_responses": 1}
    parsed = parse_feedback(Row("f", 1, record), "mean")
    assert isinstance(parsed, ScoredAnswers)
    assert [answer.score for answer in parsed.answers] == [2.75, 2.5]


def test_a_rule_that_the_file_has_no_scores_for_says_so(shared_data: Path) -> None:
    file = source(shared_data / "aif" / "ultrafeedback_schema_arena_bench.jsonl")
    with pytest.raises(DataError, match="4 without a rating under rule 'mean'") as error:
        load_pairs([file])
    assert "data.feedback.rule" in (error.value.hint or "")
