"""`zephyr-lite plan`, and trainings that follow one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from zephyr_lite.recipe_file import built_in, load

CARDS = {"24GB": "3090", "16gb": "4060 Ti", "12gb": "3060", "8gb": "4060"}


@pytest.fixture
def plan(command: Any, tmp_path: Path):
    """`plan("zephyr-7b", "--gpu", "4090")`: exit code and output."""

    def call(*words: str) -> tuple[int, str]:
        status, text = command.run("plan", *words, "--offline", home=tmp_path)
        assert "Traceback" not in text
        return status, text

    return call


def figures(text: str) -> dict[str, Any]:
    return json.loads(next(line for line in text.splitlines() if line.startswith("{")))


def card_of(name: str) -> str:
    return next((card for size, card in CARDS.items() if name.endswith(size)), CARDS["24GB"])


LARGE = [
    name for name in built_in() if "/" in load(name).base.model and load(name).base.build is None
]


@pytest.mark.parametrize("name", [n for n in LARGE if "/" not in n])
def test_a_recipe_fits_the_card_that_it_names(plan, name):
    status, text = plan(name, "--gpu", card_of(name), "--json")
    assert status == 0, text
    found = figures(text)
    for stage in found["stages"].values():
        assert stage["fits"]
        assert stage["chosen"]["bytes"]["total"] <= found["budget_bytes"]
        assert stage["seconds"] > 3600 and not stage["is_measured"]


def test_the_table_fits_a_terminal_and_says_what_is_projected(plan):
    status, text = plan("zephyr-7b", "--gpu", "4090")
    assert status == 0, text
    assert "PROJECTED" in text and "estimated: 207,865 dialogues" in text
    assert "W weights" in text and "kept for the backward" in text
    assert max(map(len, text.splitlines())) <= 90
    body = text[: text.index("run it:")]
    assert max(map(len, body.splitlines()[2:])) < 80


def test_what_cannot_fit_exits_3_with_the_way_out(plan):
    status, text = plan("zephyr-7b", "--gpu", "4060")
    assert status == 3
    assert "dpo takes at least" in text and "may be used" in text
    hint = text[text.index("hint:") :]
    assert "dpo.lora.r=32 fits" in hint and "dpo.lora.r=128" not in hint
    status, text = plan("zephyr-7b", "--gpu", "4060", "--set", "dpo.lora.r=32")
    assert status == 0, "what the hint says is true"


@pytest.mark.parametrize(
    ("words", "status", "said"),
    [
        (("--gpu", "4091"), 2, "no known GPU"),
        (("--vram", "much"), 2, "no amount of memory"),
        ((), 3, "--gpu 4090"),
        (("--gpu", "4090", "--probe"), 3, "there is none here"),
        (("--gpu", "4090", "--set", "memory.reserve=16"), 3, "takes at least"),
        (("--gpu", "4090", "--set", "memory.reserve=30"), 3, "nothing is left"),
        (("--vram", "1GB"), 3, "nothing is left"),
    ],
)
def test_what_is_refused(plan, words, status, said):
    found, text = plan("zephyr-7b", *words)
    assert found == status, text
    assert said in text


def test_a_desktop_on_the_same_card_is_left_alone(plan):
    whole = figures(plan("zephyr-7b", "--gpu", "3090", "--json")[1])
    less = figures(plan("zephyr-7b", "--gpu", "3090", "--json", "--set", "memory.reserve=2")[1])
    assert whole["budget_bytes"] - less["budget_bytes"] == 2 * 10**9


def test_another_engine_is_not_planned_and_that_is_said(plan):
    status, text = plan("zephyr-7b", "--gpu", "3090", "--json", "--set", "engine=hf")
    assert status == 0 and "it takes more" in text
    assert "it takes more" not in plan("zephyr-7b", "--gpu", "3090", "--json")[1]


# ---------------------------------------------------------------- the adapter under dDPO's

START = ("--gpu", "4090", "--json", "--set")


@pytest.fixture
def adapter(tmp_path: Path):
    """`adapter(r=, ...)`: a folder as PEFT saves one; a plan reads nothing of its weights."""

    def make(**fields: Any) -> Path:
        folder = tmp_path / "adapter"
        folder.mkdir()
        config = {"peft_type": "LORA", "lora_alpha": 8, "target_modules": ["q_proj"], **fields}
        (folder / "adapter_config.json").write_text(json.dumps(config))
        (folder / "adapter_model.safetensors").write_bytes(b"")
        return folder

    return make


def dpo_bytes(plan: Any, *words: str) -> tuple[dict[str, int], str]:
    """Bytes of dDPO by part, and all that was said."""
    status, text = plan("zephyr-7b", *START, *words)
    assert status == 0, text
    return figures(text)["stages"]["dpo"]["chosen"]["bytes"], text


def test_an_adapter_to_start_from_is_counted_by_its_own_rank(plan, adapter):
    recipes, text = dpo_bytes(plan, "sft.lora.r=64")
    assert "rank" not in text
    taken, text = dpo_bytes(plan, f"sft.from={adapter(r=64)}")
    assert taken == recipes
    assert taken["adapters"] > dpo_bytes(plan, "sft.lora.r=16")[0]["adapters"]
    assert "rank" not in text


def test_a_model_to_start_from_has_no_adapter_beside_it(plan, tiny_mistral):
    without = dpo_bytes(plan, "sft=null")[0]
    assert dpo_bytes(plan, f"sft.from={tiny_mistral}")[0] == without


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"r": 4, "rank_pattern": {"q_proj": 64}}, "rank_pattern is not supported"),
        ({"r": "many"}, "is 'many', not a rank"),
        (None, "somebody/zephyr-sft is not on this machine"),
    ],
    ids=["a pattern of ranks", "no rank", "on the hub"],
)
def test_where_its_rank_cannot_be_read_the_recipes_is_taken_and_that_is_said(
    plan, adapter, fields, said
):
    name = "somebody/zephyr-sft" if fields is None else adapter(**fields)
    taken, text = dpo_bytes(plan, f"sft.from={name}")
    assert taken == dpo_bytes(plan, "sft.lora.r=16")[0]
    (line,) = [line for line in text.splitlines() if "sft.lora.r=16" in line]
    assert said in line and line.count("sft.from") == 1
    assert line.endswith("its rank is taken to be the recipe's, sft.lora.r=16")


# ---------------------------------------------------------------- trainings on a CPU, by plan

AUTO = ("--set", "memory.tokens_per_micro_batch=auto", "--set", "memory.checkpointing=auto")


def trained(command: Any, micro: str, home: Path, folder: Path, *words: str) -> tuple[int, str]:
    return command.run("dpo", micro, "--run", str(folder), "--fresh", *words, home=home)


@pytest.mark.parametrize("probe", [False, True])
def test_a_small_recipe_is_planned_for_a_cpu(plan, micro, probe):
    status, text = plan(micro, *(["--probe"] if probe else []), *AUTO)
    assert status == 0, text
    assert "on this CPU" in text
    assert ("from two measured steps" in text) == probe
    assert ("not known" in text) != probe


def test_a_training_stays_inside_its_plan_and_ends_in_the_same_bytes(
    command, micro, plan, tmp_path
):
    """Under a budget that not all layers fit, the manifest says how many keep, and what was
    computed is what it would have been."""
    roomy = figures(plan(micro, "--vram", "1GB", "--json", *AUTO)[1])["stages"]
    assert all(stage["chosen"]["keep_layers"] == 2 for stage in roomy.values())
    most = max(stage["chosen"]["bytes"]["total"] for stage in roomy.values())
    budget = ("--set", f"memory.budget={(most - 100_000) / 2**20}MiB")
    runs = {name: tmp_path / name for name in ("roomy", "tight")}
    for name, words in (("roomy", ("--set", "memory.budget=1GB")), ("tight", budget)):
        status, text = trained(command, micro, tmp_path / "home", runs[name], *AUTO, *words)
        assert status == 0, text
        said = [line for line in text.splitlines() if "layers keep activations" in line]
        assert len(said) == 2 and all("plans with" in line for line in said), said
    stages = json.loads((runs["tight"] / "manifest.json").read_text())["stages"]
    kept = {name: stages[name]["plan"]["chosen"]["keep_layers"] for name in ("sft", "dpo")}
    assert min(kept.values()) < 2
    for name in kept:
        plan_of = stages[name]["plan"]
        assert plan_of["chosen"]["bytes"]["total"] <= plan_of["budget_bytes"]
        assert "notches" not in stages[name]
        machine = stages[name]["machine"]
        assert (machine["engine"], machine["kernels"]) == ("native", "torch"), "of the copy, too"
        again = plan_of["chosen"]["checkpointing"]
        assert (again == "none") == (kept[name] == 2) and again in ("none", "full", "offload")
    same = [
        json.loads((run / "manifest.json").read_text())["stages"]["sft"]["plan"]["chosen"][
            "tokens_per_micro_batch"
        ]
        for run in runs.values()
    ]
    if same[0] == same[1]:
        adapters = [
            (run / "sft" / "adapter" / "adapter_model.safetensors").read_bytes()
            for run in runs.values()
        ]
        assert adapters[0] == adapters[1]


def test_what_cannot_fit_is_refused_before_a_step(command, micro, tmp_path):
    words = (*AUTO, "--set", "memory.budget=1MiB")
    status, text = trained(command, micro, tmp_path / "home", tmp_path / "run", *words)
    assert status == 3, text
    assert "sft takes at least" in text
    assert "plans with" not in text
    assert not (tmp_path / "run" / "sft" / "metrics.jsonl").exists()


def test_a_run_is_refused_for_its_last_training_before_the_first_begins(command, micro, tmp_path):
    words = (*AUTO, "--set", "memory.budget=4MiB", "--set", "dpo.lora.r=64")
    words = (*words, "--set", "dpo.lora.alpha=64")
    status, text = command.run(
        "run", micro, "--run", str(tmp_path / "run"), *words, home=tmp_path / "home"
    )
    assert status == 3, text
    assert "dpo takes at least" in text and "dpo.lora.r=" in text
    assert not (tmp_path / "run" / "sft").exists()


def test_a_run_is_refused_for_the_adapter_that_it_starts_from(command, micro, adapter, tmp_path):
    """By its own rank, before a base is made; the recipe's rank has no say either way."""
    words = (*AUTO, "--set", "memory.budget=4MiB", "--set", f"sft.from={adapter(r=512)}")
    words = ("run", micro, "--run", str(tmp_path / "run"), *words, "--set", "data.dialogues=null")
    status, text = command.run(*words, home=tmp_path / "home")
    assert status == 3, text
    assert "dpo takes at least" in text
    assert not (tmp_path / "run" / "reference").exists()


REAL = """
name: real
base: {base}
data:
  dialogues: {{train: {{path: {dialogues}, limit: 60}}}}
  on_fault: drop
sft: {{max_steps: 1, max_length: 128, batch_size: 2, optimizer: adamw, lora: {{r: 2}}}}
"""


def test_lengths_are_the_datas_own_once_it_is_tokenised(command, shared_data, tmp_path):
    file = tmp_path / "real.yaml"
    base, rows = shared_data / "models/stories260k-mistral", shared_data / "sft/alpaca.jsonl"
    file.write_text(REAL.format(base=base, dialogues=rows))
    words = ("--run", str(tmp_path / "run"), "--offline")
    status, before = command.run("plan", str(file), *words, home=tmp_path)
    assert status == 0 and "data: estimated: 60 dialogues" in before
    assert not (tmp_path / "run").exists(), "a plan writes nothing"
    assert command.run("sft", str(file), *words, home=tmp_path)[0] == 0
    status, after = command.run("plan", str(file), *words, home=tmp_path)
    assert status == 0 and "dialogues of this run in" in after
