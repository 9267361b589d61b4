"""Known GPUs: which names mean which card, amounts of memory, what of it may be used."""

from __future__ import annotations

import pytest

from zephyr_lite.errors import RecipeError
from zephyr_lite.plan.gpus import GIB, GPUS, gpu_named, memory_bytes, usable_bytes


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("4090", "RTX 4090"),
        ("rtx 4090", "RTX 4090"),
        ("RTX4090", "RTX 4090"),
        ("RTX-4090", "RTX 4090"),
        ("4090 24GB", "RTX 4090"),
        ("NVIDIA GeForce RTX 4090", "RTX 4090"),
        ("NVIDIA GeForce RTX 3060", "RTX 3060 12GB"),
        ("4060", "RTX 4060"),
        ("4060ti", "RTX 4060 Ti 16GB"),
        ("4060 Ti 16 GB", "RTX 4060 Ti 16GB"),
        ("NVIDIA A10G", "A10G"),
        ("l4", "L4"),
        ("NVIDIA RTX A6000", "A6000"),
        ("NVIDIA A100-SXM4-80GB", "A100 80GB"),
        ("NVIDIA A100 80GB PCIe", "A100 80GB"),
        ("NVIDIA A100-PCIE-40GB", "A100 40GB"),
        ("NVIDIA H100 80GB HBM3", "H100 80GB"),
        ("NVIDIA H200", "H200"),
        ("h200 141GB", "H200"),
    ],
)
def test_a_card_is_found_by_what_people_and_drivers_call_it(name: str, expected: str) -> None:
    assert gpu_named(name).name == expected


@pytest.mark.parametrize("gpu", GPUS, ids=lambda gpu: gpu.name)
def test_every_card_is_found_by_its_own_name(gpu) -> None:
    assert gpu_named(gpu.name) == gpu
    assert gpu_named(gpu.name.lower(), gpu.memory_bytes) == gpu


@pytest.mark.parametrize(
    "name",
    [
        "NVIDIA GeForce RTX 4090 Laptop GPU",  # 16 GB, and half the rate
        "RTX 4090 D",
        "RTX 4080 SUPER",
        "RTX 4070 Ti",
        "NVIDIA RTX 6000 Ada Generation",
        "NVIDIA H100 PCIe",
        "Tesla T4",
        "RTX 4090 16GB",
        "4",
        "",
    ],
)
def test_a_card_that_only_sounds_alike_is_refused_with_the_known_ones(name: str) -> None:
    with pytest.raises(RecipeError) as raised:
        gpu_named(name)
    assert repr(name) in str(raised.value) and raised.value.hint is not None
    assert all(gpu.name in raised.value.hint for gpu in GPUS)


def test_a_name_of_two_cards_asks_for_memory() -> None:
    with pytest.raises(RecipeError, match="name of 2") as raised:
        gpu_named("A100")
    assert raised.value.hint == "one of A100 40GB, A100 80GB"
    assert gpu_named("A100", int(79.25 * GIB)).name == "A100 80GB"
    with pytest.raises(RecipeError, match=r"4060 Ti.* has 8\.0 GiB"):
        gpu_named("NVIDIA GeForce RTX 4060 Ti", 8 * GIB)


def test_caps_are_those_of_the_card_classes() -> None:
    caps = [usable_bytes(gib * GIB) / GIB for gib in (24, 16, 12, 8, 80)]
    assert caps == pytest.approx([22.5, 14.5, 10.8, 7.0, 78.5])
    assert gpu_named("4090").usable_bytes == int(22.5 * GIB)
    assert gpu_named("A10G").usable_bytes == 21 * GIB, "it corrects errors in ordinary memory"


def test_each_figure_is_a_possible_one_and_says_where_it_is_from() -> None:
    for gpu in GPUS:
        assert gpu.source and 0.5 <= gpu.efficiency <= 0.9
        assert 20 < gpu.tflops < 1000 and 250 < gpu.gb_per_s < 5000
        assert 10 < gpu.pcie_gb_per_s < 64 < gpu.gb_per_s
        assert gpu.is_geforce == gpu.name.startswith("RTX ")
    assert gpu_named("L4").efficiency == 0.55 and gpu_named("H200").efficiency == 0.80


@pytest.mark.parametrize(
    ("text", "gib"),
    [("24GB", 24), ("24", 24), ("22.5GiB", 22.5), (" 8 gb ", 8), ("16g", 16), ("512MiB", 0.5)],
)
def test_memory_is_read_as_it_is_written_on_a_box(text: str, gib: float) -> None:
    assert memory_bytes(text) == int(gib * GIB)


@pytest.mark.parametrize("text", ["", "GB", "24TB", "-24GB", "24,5GB", "0GB", "1e3", "24 GB free"])
def test_what_is_no_amount_of_memory_is_refused(text: str) -> None:
    with pytest.raises(RecipeError, match="no amount of memory") as raised:
        memory_bytes(text)
    assert "22.5GiB" in (raised.value.hint or "")
