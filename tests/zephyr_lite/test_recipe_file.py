"""Reading recipes: every error names its place and the way out, and nothing is silently taken."""

from __future__ import annotations

import json

import pytest

from zephyr_lite import recipe_file
from zephyr_lite.errors import RecipeError, StorageError
from zephyr_lite.recipe import Recipe
from zephyr_lite.recipe_schema import json_schema

HEAD = "name: x\nbase: some/model\n"
DATA = "data:\n  dialogues: {train: d.jsonl}\n  feedback: {train: [p.jsonl, q.jsonl]}\n"


@pytest.fixture
def load(tmp_path):
    """`load(text, *overrides)` reads a recipe file of that text."""

    def read(text: str | bytes, *overrides: str) -> Recipe:
        file = tmp_path / "r.yaml"
        file.write_bytes(text if isinstance(text, bytes) else text.encode())
        return recipe_file.load(file, overrides)

    return read


@pytest.fixture
def refusal(load, tmp_path):
    """`refusal(text, *overrides)` -> (message without the folder, hint)."""

    def read(text: str | bytes, *overrides: str) -> tuple[str, str | None]:
        with pytest.raises(RecipeError) as caught:
            load(text, *overrides)
        assert caught.value.exit_code == 2
        message = str(caught.value)
        assert "\n" not in message
        return message.replace(f"{tmp_path}/", ""), caught.value.hint

    return read


@pytest.mark.parametrize("name", recipe_file.built_in())
def test_every_built_in_recipe_loads(name):
    loaded = recipe_file.load(name)
    assert loaded.name == name.rpartition("/")[2]
    assert loaded.description


def test_shipped_recipes_are_the_repositorys(root):
    files = sorted((root / "recipes").rglob("*.yaml"))
    assert files
    assert sorted(recipe_file.built_in().values()) == files


# ---------------------------------------------------------------- wrong keys and values


@pytest.mark.parametrize(
    ("text", "place", "hint"),
    [
        ("sed: 3\n", "r.yaml:3: unknown key sed", "did you mean seed?"),
        ("dpo:\n  bta: 1\n" + DATA, "r.yaml:4: unknown key dpo.bta", "did you mean dpo.beta?"),
        ("sft:\n\n  lora: {rr: 1}\n" + DATA, "r.yaml:5: unknown key sft.lora.rr", "sft.lora.r?"),
        ("sft: {lr: 1}\n" + DATA, "r.yaml:3: unknown key sft.lr", "sft.learning_rate?"),
        ("data: {dialogues: {trian: d}}\n", "r.yaml:3: unknown key data.dialogues.trian", "train?"),
        (
            "data:\n  dialogues:\n    train:\n      - {path: d}\n      - {pth: e}\n",
            "r.yaml:7: unknown key data.dialogues.train.1.pth",
            "path?",
        ),
        (
            "data:\n  dialogues:\n    train: {pth: e}\n",
            "r.yaml:5: unknown key data.dialogues.train.0.pth",
            "path?",
        ),
        ("zzzz: 1\n", "r.yaml:3: unknown key zzzz", "known: name, description, seed"),
        ("<<: {seed: 1}\n", "r.yaml:3: unknown key <<", "known:"),
    ],
)
def test_unknown_key_names_line_and_nearest(refusal, text, place, hint):
    message, found = refusal(HEAD + text)
    assert message == place
    assert hint in found


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seed: abc\n", "r.yaml:3: seed: must be a valid integer (got 'abc')"),
        ("\n\nseed: -1\n", "r.yaml:5: seed: must be greater than or equal to 0 (got -1)"),
        ("dpo: 3\n", "r.yaml:3: dpo must be a section of keys (got 3)"),
        ("base: {quantization: nf4}\n", "r.yaml:2: key base.model is missing"),
        ("sft: {epochs: .inf}\n" + DATA, "r.yaml:3: sft.epochs: must be a finite number (got inf)"),
        ("dpo:\n  loss: rubbish\n" + DATA, "r.yaml:4: dpo.loss: must be 'sigmoid', 'ipo'"),
        ("dpo:\n  loss: robust\n" + DATA, "r.yaml:3: dpo: loss: robust needs label_smoothing > 0"),
        ("sft: {}\n", "r.yaml:1: sft needs data.dialogues"),
        ("1: 2\n", "r.yaml:3: 1: Keys should be strings (got 1)"),
    ],
)
def test_wrong_value_names_line_and_what_was_seen(refusal, text, message):
    head = "name: x\n" if text.startswith("base") else HEAD
    assert refusal(head + text)[0].startswith(message)


def test_a_name_that_yaml_reads_as_false(refusal):
    message, hint = refusal("name: no\nbase: m\n")
    assert message == "r.yaml:1: name: must be a valid string (got False)"
    assert "quotes" in hint


# ---------------------------------------------------------------- YAML


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seed: 1\nseed: 2\n", "r.yaml:4: not YAML: the key 'seed' stands twice, first in line 3"),
        ("sft: {epochs: 1, epochs: 2}\n", "r.yaml:3: not YAML: the key 'epochs' stands twice"),
        ("data: &d\n  dialogues: {train: x}\n", "r.yaml:3: not YAML: anchors"),
        ("seed: *d\n", "r.yaml:3: not YAML: anchors"),
        ("\tseed: 1\n", "r.yaml:3: not YAML: found character '\\t'"),
        ("seed: [1\n", "r.yaml:4: not YAML: expected ',' or ']'"),
        ("---\nseed: 1\n", "r.yaml:3: not YAML: but found another document"),
        ("seed: !!python/name:os.system\n", "r.yaml:3: not YAML: could not determine a constr"),
        ("seed: !!int abc\n", "r.yaml: not YAML: invalid literal"),
        ("description: \a\n", "r.yaml: not YAML: special characters are not allowed"),
        ("seed: " + "[" * 3000 + "]" * 3000, "r.yaml: not YAML: nested too deeply"),
        ("? [a, b]\n: 3\n", "r.yaml:3: not YAML: found unhashable key"),
        ("description: \xff".encode("latin-1"), "r.yaml: not UTF-8 at byte"),
    ],
)
def test_what_yaml_would_take_or_die_of_is_refused(refusal, text, message):
    head = HEAD.encode() if isinstance(text, bytes) else HEAD
    assert refusal(head + text)[0].startswith(message)


@pytest.mark.parametrize("text", ["", "# nothing\n", "- a\n", "text\n"])
def test_what_is_no_mapping_is_no_recipe(refusal, text):
    assert refusal(text)[0] == "r.yaml: a recipe is a mapping of keys to values"


def test_aliases_cannot_multiply(refusal):
    laughs = "a: &a [x, x]\n" + "".join(
        f"{b}: &{b} [*{a}, *{a}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
    )
    assert "anchors" in refusal(HEAD + laughs)[0]


def test_a_large_file_is_not_read(refusal):
    assert "larger than" in refusal(HEAD + "#" * recipe_file.MAX_BYTES)[0]


def test_ampersands_and_stars_in_text_are_text(load):
    text = "Q&A, R &D, *bold* & 5 *6: [no anchor]"
    assert load(HEAD + f"description: '{text}'\n").description == text
    assert load(HEAD + "description: R &D *now*\n").description == "R &D *now*"


@pytest.mark.parametrize(
    ("written", "value"),
    [("5e-6", 5e-6), ("5E-6", 5e-6), ("1e0", 1.0), ("2.5e3", 2500.0), (".5e-2", 0.005), ("1", 1.0)],
)
def test_numbers_are_numbers(load, written, value):
    text = HEAD + DATA + f"sft: {{learning_rate: {written}}}\n"
    assert load(text).sft.learning_rate == value
    override = f"sft.learning_rate={written}"
    assert load(HEAD + DATA + "sft: {}\n", override).sft.learning_rate == value


def test_dates_marks_and_line_ends_are_no_trouble(load):
    assert load(HEAD + "description: 2024-13-45\n").description == "2024-13-45"
    assert load("\ufeff" + HEAD).name == "x"
    assert load(HEAD.replace("\n", "\r\n")).name == "x"


# ---------------------------------------------------------------- --set


def test_set_reaches_every_depth(load):
    loaded = load(
        HEAD + DATA,
        "seed=7",
        "dpo.lora.r=8",  # there is no dpo section yet
        "sft={epochs: 2}",
        "export.quants=[f16, f32]",
        "sft.max_steps=null",
        "description=a b",
    )
    assert (loaded.seed, loaded.dpo.lora.r, loaded.sft.epochs) == (7, 8, 2.0)
    assert loaded.export.quants == ("f16", "f32")
    assert loaded.sft.max_steps is None
    assert loaded.description == "a b"


def test_set_opens_short_forms(load):
    loaded = load(
        HEAD + DATA,
        "base.quantization=none",
        "data.dialogues.train.limit=5",
        "data.feedback.train.1.limit=6",
    )
    assert (loaded.base.model, loaded.base.quantization) == ("some/model", "none")
    assert [(s.path, s.limit) for s in loaded.data.dialogues.train] == [("d.jsonl", 5)]
    assert [(s.path, s.limit) for s in loaded.data.feedback.train] == [
        ("p.jsonl", None),
        ("q.jsonl", 6),
    ]


def test_the_last_set_wins_and_the_file_is_not_touched(load, tmp_path):
    assert load(HEAD, "seed=1", "seed=2").seed == 2
    assert (tmp_path / "r.yaml").read_text() == HEAD


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("dpo.beta", "--set dpo.beta: not of the form a.b=value"),
        ("=4", "--set =4: not of the form a.b=value"),
        ("dpo..beta=4", "--set dpo..beta=4: not of the form a.b=value"),
        ("seed=[1", "--set seed=[1: the value is not YAML: expected ',' or ']'"),
        ("seed=*a", "--set seed=*a: the value is not YAML: anchors"),
        ("seed=abc", "--set seed=abc: seed: must be a valid integer"),
        ("name.x=4", "--set name.x=4: name is 'x', not a section"),
        ("seed.x=4", "--set seed.x=4: seed: must be a valid integer"),
        ("dpo.bta=4", "--set dpo.bta=4: unknown key dpo.bta"),
        ("dpo.loss=robust", "--set dpo.loss=robust: dpo: loss: robust needs label_smoothing"),
        ("data.dialogues=null", "--set data.dialogues=null: sft needs data.dialogues"),
        ("data.feedback.train.limit=1", "--set data.feedback.train.limit=1: a list has no 'limit'"),
        ("data.feedback.train.2.limit=1", "--set data.feedback.train.2.limit=1: a list has no '2'"),
        ("data.feedback.train.0.limt=1", "--set data.feedback.train.0.limt=1: unknown key"),
    ],
)
def test_an_error_of_set_names_the_argument_not_a_line(refusal, override, message):
    found, _ = refusal(HEAD + DATA + "sft: {}\ndpo: {}\n", "description=fine", override)
    assert found.startswith(message)
    assert "r.yaml" not in found


def test_every_set_that_is_needed_for_an_error_is_named(refusal):
    message, _ = refusal(HEAD + DATA, "dpo.loss=ipo", "seed=1", "dpo.label_smoothing=0.1")
    assert message.startswith("--set dpo.loss=ipo --set dpo.label_smoothing=0.1: dpo: label_smo")


def test_an_error_of_the_file_is_not_blamed_on_set(refusal):
    assert refusal(HEAD + "seed: -1\n", "description=x")[0].startswith("r.yaml:3: seed")
    assert refusal(HEAD + "sft: {}\n", "seed=1")[0].startswith("r.yaml:1: sft needs")
    assert refusal(HEAD + "seed: -1\n", "seed=-2")[0].startswith("--set seed=-2: seed")


# ---------------------------------------------------------------- finding the file


def test_unknown_names_get_the_nearest(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RecipeError, match="no recipe named 'zephyr-7c'") as caught:
        recipe_file.find("zephyr-7c")
    assert caught.value.hint == "did you mean zephyr-7b?"
    with pytest.raises(RecipeError) as caught:
        recipe_file.find("qqq")
    assert "zephyr-7b" in caught.value.hint


def test_missing_file_folder_and_shadow(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RecipeError, match=r"none\.yaml does not exist"):
        recipe_file.find("none.yaml")
    (tmp_path / "folder.yaml").mkdir()
    with pytest.raises(RecipeError, match="is not a file"):
        recipe_file.find("folder.yaml")
    (tmp_path / "zephyr-7b").mkdir()  # a run folder or a clone must not hide the built-in
    assert recipe_file.load("zephyr-7b").name == "zephyr-7b"


def test_a_file_that_cannot_be_read_is_an_io_error(tmp_path, monkeypatch):
    file = tmp_path / "r.yaml"
    file.write_text(HEAD)
    open_file = type(file).open

    def refuse(self, *args, **kwargs):
        if self == file:
            raise PermissionError(13, "Permission denied", str(self))
        return open_file(self, *args, **kwargs)

    monkeypatch.setattr(type(file), "open", refuse)  # root may read everything: chmod is no test
    with pytest.raises(StorageError, match="cannot be read: Permission denied"):
        recipe_file.load(file)


def test_the_shipped_schema_is_the_recipe_s(root):
    shipped = json.loads((root / "recipes" / "recipe.schema.json").read_text(encoding="utf-8"))
    assert shipped == json.loads(json.dumps(json_schema())), (
        "zephyr-lite recipes schema > recipes/recipe.schema.json"
    )
