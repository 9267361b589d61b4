"""Every tensor gets the type that llama.cpp's own quantiser gives it.

`golden_mixtures.json` holds what `llama_model_quantize` of llama-cpp-python 0.3.36 did to models
with these numbers of layers, heads and columns. When it was made, the rules here agreed with it on
all 662838 tensors of a larger grid: 332 models, 11 mixtures.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from gguf import GGML_QUANT_SIZES
from gguf import GGMLQuantizationType as Kind

from zephyr_lite.export.gguf.mixture import BULK, FILE_TYPES, kinds, wanted_kinds
from zephyr_lite.recipe import Export

GOLDEN = json.loads(Path(__file__).with_name("golden_mixtures.json").read_text())
MATRICES = GOLDEN["order"][2:]


def shapes(model: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """The tensors of a GGUF; how many rows they have decides nothing."""
    found: dict[str, tuple[int, ...]] = {"token_embd.weight": (2, model["hidden"])}
    columns = {"attn_output": model["attention"], "ffn_down": model["feed_forward"]}
    for layer in range(model["layers"]):
        for matrix in MATRICES:
            shape = (2, columns.get(matrix, model["hidden"]))
            found[f"blk.{layer}.{matrix}.weight"] = shape
        found[f"blk.{layer}.attn_norm.weight"] = (model["hidden"],)
        found[f"blk.{layer}.attn_q.bias"] = (256,)
    found["rope_freqs.weight"] = (16,)
    return found if model["tied"] else {**found, "output.weight": (2, model["hidden"])}


def facts(model: dict[str, Any]) -> dict[str, Any]:
    return {key: model[key] for key in ("layers", "heads", "kv_heads", "architecture")}


def spelt_out(row: str, layers: int, tied: bool) -> dict[str, str]:
    """A row of the golden file as types by tensor."""
    head, embedding, *matrices = row.split("; ")
    found = {"token_embd.weight": embedding} | ({} if tied else {"output.weight": head})
    for matrix, text in zip(MATRICES, matrices, strict=True):
        runs = [run.partition("*") for run in text.split()]
        types = [kind for kind, _, count in runs for _ in range(int(count or 1))]
        assert len(types) == layers
        found |= {f"blk.{layer}.{matrix}.weight": kind for layer, kind in enumerate(types)}
    return found


def described(model: dict[str, Any]) -> str:
    return "-".join(str(value) for key, value in model.items() if key != "types")


@pytest.mark.parametrize("model", GOLDEN["models"], ids=described)
def test_types_are_llama_cpps(model: dict[str, Any]) -> None:
    assert model["types"].keys() == FILE_TYPES.keys()
    for quant, row in model["types"].items():
        found = {n: k.name for n, k in kinds(quant, shapes(model), **facts(model)).items()}
        assert {found.pop(n) for n, s in shapes(model).items() if len(s) == 1} == {"F32"}
        assert found == spelt_out(row, model["layers"], model["tied"]), quant


def test_every_type_divides_its_rows_and_what_fell_back_is_known() -> None:
    model = next(m for m in GOLDEN["models"] if m["hidden"] == 96)
    found = kinds("q4_k_m", shapes(model), **facts(model))
    wanted = wanted_kinds("q4_k_m", shapes(model), **facts(model))
    for name, shape in shapes(model).items():
        assert shape[-1] % GGML_QUANT_SIZES[found[name]][0] == 0, name
    assert wanted["token_embd.weight"] == Kind.Q6_K and found["token_embd.weight"] == Kind.Q8_0
    assert wanted["blk.1.attn_q.weight"] == Kind.Q4_K and found["blk.1.attn_q.weight"] == Kind.Q5_0
    assert found["blk.1.ffn_down.weight"] == Kind.F16  # rows of 172


def test_the_recipe_offers_these_and_no_others() -> None:
    assert FILE_TYPES.keys() == BULK.keys()
    for quant in FILE_TYPES:
        assert Export.model_validate({"quants": [quant]}).quants == (quant,)
