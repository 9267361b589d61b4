"""A recipe that extends another: what is laid over what, and whose file and line is wrong."""

from __future__ import annotations

import pytest

from zephyr_lite import recipe_file
from zephyr_lite.errors import RecipeError
from zephyr_lite.recipe import Recipe, result_fields
from zephyr_lite.recipe_schema import json_schema

HEAD = "name: x\nbase: some/model\n"
DATA = "data:\n  dialogues: {train: d.jsonl}\n  feedback: {train: [p.jsonl, q.jsonl]}\n"


@pytest.fixture
def family(tmp_path, monkeypatch):
    """`family({name: text})` writes files; `.load(name)` and `.refusal(name)` read one of them."""
    monkeypatch.chdir(tmp_path)

    class Family:
        def __call__(self, files: dict[str, str]) -> Family:
            for name, text in files.items():
                (tmp_path / name).parent.mkdir(exist_ok=True)
                (tmp_path / name).write_text(text)
            return self

        def load(self, name: str, *overrides: str) -> Recipe:
            return recipe_file.load(tmp_path / name, overrides)

        def refusal(self, name: str, *overrides: str) -> tuple[str, str | None]:
            with pytest.raises(RecipeError) as caught:
                self.load(name, *overrides)
            return str(caught.value).replace(f"{tmp_path}/", ""), caught.value.hint

    return Family()


PARENT = HEAD + "seed: 5\n" + DATA + "sft: {epochs: 3, lora: {r: 8, alpha: 4}}\ndpo: {beta: 0.3}\n"
CHILD = "extends: p.yaml\nname: c\n"


def test_sections_are_merged_and_the_rest_replaces(family):
    family({"p.yaml": PARENT})
    child = CHILD + "sft: {lora: {alpha: 9}}\ndata:\n  feedback: {train: [z.jsonl], rule: worst}\n"
    got, parent = family({"c.yaml": child}).load("c.yaml"), family.load("p.yaml")
    assert (got.name, got.seed, got.dpo, got.sft.epochs) == ("c", 5, parent.dpo, 3)
    assert (got.sft.lora.r, got.sft.lora.alpha) == (8, 9)
    assert [s.path for s in got.data.feedback.train] == ["z.jsonl"]  # lists are not joined
    assert got.data.feedback.rule == "worst"
    assert got.data.dialogues == parent.data.dialogues
    assert "extends" not in got.model_dump()


def test_a_file_that_adds_nothing_is_its_parent_under_another_name(family):
    family({"p.yaml": PARENT.replace("name: x", "name: x\ndescription: mine"), "c.yaml": CHILD})
    parent, got = family.load("p.yaml"), family.load("c.yaml")
    assert got.description == ""  # it would be said of another recipe
    assert got == parent.model_copy(update={"name": "c", "description": ""})


def test_null_takes_out_what_the_parent_says(family):
    family({"p.yaml": PARENT + "expect: {dpo.eval_loss: [0, 1], sft.eval_loss: [0, 1]}\n"})
    family({"c.yaml": CHILD + "sft: null\nseed: ~\nexpect:\n  dpo.eval_loss: null\n"})
    got = family.load("c.yaml")
    assert (got.sft, got.seed) == (None, 42)
    assert got.expect == {"sft.eval_loss": (0, 1)}
    family({"d.yaml": "extends: c.yaml\nname: d\nsft: {epochs: 2}\nexpect: null\n"})
    assert (family.load("d.yaml").sft.epochs, family.load("d.yaml").sft.lora.r) == (2, 16)
    assert family.load("d.yaml").expect == {}
    family({"n.yaml": HEAD + "seed: null\n"})  # with no parent there is nothing to take out
    assert family.refusal("n.yaml")[0].startswith("n.yaml:3: seed")


def test_short_forms_are_laid_over(family):
    family({"p.yaml": PARENT})
    long = "base: {quantization: none}\ndata: {dialogues: {train: {limit: 4}}}\n"
    got = family({"c.yaml": CHILD + long}).load("c.yaml")
    assert (got.base.model, got.base.quantization) == ("some/model", "none")
    assert [(s.path, s.limit) for s in got.data.dialogues.train] == [("d.jsonl", 4)]
    family({"d.yaml": "extends: c.yaml\nname: d\nbase: other/model\n"})
    assert family.load("d.yaml").base.quantization == "nf4"  # a model of its own, as with --set


def test_parents_are_built_in_names_or_files_beside_the_child(family):
    family({"p.yaml": PARENT, "sub/c.yaml": "extends: ../p.yaml\nname: c\n"})
    assert family.load("sub/c.yaml").seed == 5
    family({"sub/t.yaml": "extends: tiny\nname: t\n", "sub/tiny": "not me"})
    assert family.load("sub/t.yaml").base == recipe_file.load("tiny").base


def test_overrides_stand_over_everything(family):
    family({"p.yaml": PARENT, "c.yaml": CHILD + "seed: 6\n"})
    assert family.load("c.yaml", "seed=7", "sft.lora.r=3").sft.lora.r == 3
    message, _ = family.refusal("c.yaml", "dpo.bta=1")
    assert message == "--set dpo.bta=1: unknown key dpo.bta"
    assert "unknown key extends" in family.refusal("c.yaml", "extends=tiny")[0]


@pytest.mark.parametrize(
    ("parent", "child", "message"),
    [
        ("dpo: {bta: 1}\n", "dpo: {beta: 1}\n", "p.yaml:6: unknown key dpo.bta"),
        ("dpo: {beta: 1}\n", "\ndpo: {bta: 1}\n", "c.yaml:4: unknown key dpo.bta"),
        ("seed: -1\n", "", "p.yaml:6: seed: must be greater"),
        ("seed: 1\n", "seed: -1\n", "c.yaml:3: seed: must be greater"),
        ("dpo:\n  loss: robust\n", "", "p.yaml:6: dpo: loss: robust needs label_smoothing"),
        ("dpo: {beta: 1}\n", "dpo:\n  loss: robust\n", "c.yaml:3: dpo: loss: robust needs"),
        ("sft: {}\n", "data: {dialogues: null}\n", "c.yaml:1: sft needs data.dialogues"),
        ("data: 3\n", "", "p.yaml:6: not YAML: the key 'data' stands twice"),
        ("", "seed: 1\nseed: 2\n", "c.yaml:4: not YAML: the key 'seed' stands twice"),
        ("seed: [1\n", "", "p.yaml:7: not YAML"),
        (
            "",
            "data:\n  dialogues:\n    train:\n      - {limit: 3}\n",
            "c.yaml:6: key data.dialogues.train.0.path is missing",
        ),
    ],
)
def test_an_error_names_the_file_that_is_wrong(family, parent, child, message):
    family({"p.yaml": HEAD + DATA + parent, "c.yaml": CHILD + child})
    assert family.refusal("c.yaml")[0].startswith(message)


@pytest.mark.parametrize(
    ("text", "message", "hint"),
    [
        ("extends: zephyr-7c\n", "c.yaml:2: extends: 'zephyr-7c' is no built-in", "zephyr-7b?"),
        ("extends: none.yaml\n", "c.yaml:2: extends: 'none.yaml' is no built-in", "tiny"),
        ("extends: .\n", "c.yaml:2: extends: '.' is no built-in recipe", "built-in: "),
        ("extends: 3\n", "c.yaml:2: extends: must be a name (got 3)", "its file"),
        ("extends: [tiny]\n", "c.yaml:2: extends: must be a name (got ['tiny'])", "one other"),
        ("extends:\n", "c.yaml:2: extends: must be a name (got None)", "its file"),
    ],
)
def test_a_parent_that_is_none(family, text, message, hint):
    found = family({"c.yaml": "name: c\n" + text}).refusal("c.yaml")
    assert found[0].startswith(message)
    assert hint in found[1]


def test_an_extending_recipe_has_a_name_of_its_own(family):
    """Else it would go on in its parent's run folder."""
    family({"p.yaml": PARENT, "c.yaml": "\nextends: p.yaml\n"})
    assert family.refusal("c.yaml")[0] == "c.yaml:2: key name is missing"


def test_circles_are_refused(family):
    family({"a.yaml": "extends: b.yaml\nname: a\n", "b.yaml": "name: b\nextends: sub/../a.yaml\n"})
    family({"sub/x": "", "s.yaml": "name: s\nextends: s.yaml\n"})
    message, _ = family.refusal("a.yaml")
    assert message.startswith("b.yaml:2: extends: these recipes extend each other: a.yaml > b.yaml")
    assert family.refusal("s.yaml")[0].startswith("s.yaml:2: extends: these recipes extend each")


@pytest.mark.parametrize("name", [n for n in recipe_file.built_in() if n.startswith("ablations/")])
def test_a_copy_of_an_extending_recipe_still_works(name, tmp_path):
    copy = tmp_path / "elsewhere.yaml"
    copy.write_text(recipe_file.find(name).read_text(encoding="utf-8"))
    assert recipe_file.load(copy) == recipe_file.load(name)


def test_the_ablations_change_what_they_say_and_nothing_else():
    def differing(name: str, parent: str) -> set[str]:
        ours, theirs = (result_fields(recipe_file.load(n)) for n in (name, parent))
        keys = {k for k in ours | theirs if ours.get(k) != theirs.get(k)}
        return {k.split(".")[0] for k in keys} - {"name", "description"}

    for prefix, parent in (("", "zephyr-7b"), ("tiny-", "tiny")):
        assert differing(f"ablations/{prefix}dsft-ddpo", parent) == set()
        assert differing(f"ablations/{prefix}dsft", parent) == {"dpo"}
        assert differing(f"ablations/{prefix}ddpo", parent) - {"expect"} == {"sft"}
        second = recipe_file.load(f"ablations/{prefix}dsft-2")
        assert differing(f"ablations/{prefix}dsft-2", parent) - {"expect"} == {"dpo"}
        assert (second.dpo.loss, second.dpo.adapter, second.dpo.sft_weight) == (
            "sft",
            "continue",
            0,
        )
        assert second.dpo.learning_rate == second.sft.learning_rate
        assert second.dpo.optimizer == second.sft.optimizer


def test_the_schema_accepts_extending_files():
    schema = json_schema()
    assert "extends" in schema["properties"]
    assert schema["anyOf"] == [{"required": ["name", "base"]}, {"required": ["name", "extends"]}]
    assert not any("required" in section for section in schema["$defs"].values())
