"""A base and the adapter's own GGUF are, in llama.cpp, the trained model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch

from zephyr_lite.errors import RecipeError
from zephyr_lite.export.check.llama_cpp import LlamaCppModel
from zephyr_lite.export.gguf.adapter_alone import write_gguf_adapter
from zephyr_lite.export.gguf.architecture import Architecture, read_architecture
from zephyr_lite.export.gguf.target import GgufTarget
from zephyr_lite.export.part_file import PartFile
from zephyr_lite.export.streaming import stream
from zephyr_lite.export.weights.fold import FoldedModel

IDS = torch.randint(3, 500, (40,), generator=torch.Generator().manual_seed(3)).tolist()
Q0 = "blk.0.attn_q.weight"


class WithAdapter(LlamaCppModel):
    """A base with an adapter beside it, as `llama-server -m BASE --lora ADAPTER` runs them."""

    def __init__(self, path: Path, adapter: Path, **options: Any) -> None:
        super().__init__(path, **options)
        self._adapter = adapter

    def _parameters(self) -> Any:
        parameters = super()._parameters()
        info = self._package.CommonAdapterLoraInfo(str(self._adapter), 1.0)
        parameters.lora_adapters = [info]
        return parameters


def architecture_of(model: FoldedModel) -> Architecture:
    return read_architecture(model.config, {name: model.shape(name) for name in model.names()})


def write(model: FoldedModel, out: Path, identity: str = "one") -> dict[str, Any]:
    return write_gguf_adapter(model, architecture_of(model), out, name="fable", identity=identity)


def base_gguf(base: Path, tokenizer_folder: Path, out: Path) -> Path:
    """The base alone, in F32."""
    target = GgufTarget(
        FoldedModel(base, None),
        tokenizer_folder,
        "t",
        out,
        "f32",
        name="base",
        identity="",
        routes={},
    )
    stream(FoldedModel(base, None), [target])
    target.commit()
    return out


def kl(truth_TV: torch.Tensor, file_TV: torch.Tensor) -> float:
    p, q = truth_TV.double(), file_TV.double()
    return float((p.exp() * (p - q)).sum(dim=-1).mean())


def stored(path: Path) -> dict[str, torch.Tensor]:
    return {t.name: torch.from_numpy(t.data.copy()) for t in gguf.GGUFReader(path).tensors}


@pytest.fixture
def two_adapters(make_adapter: Callable[..., Path], nf4_base: Path, tmp_path: Path) -> list[Path]:
    """Adapters of other ranks, scales and modules, one on top of the other."""
    first = make_adapter(nf4_base, r=8, lora_alpha=12, rank_pattern={"v_proj": 3})
    first.rename(tmp_path / "first")
    targets = ["q_proj", "k_proj", "down_proj", "lm_head"]
    second = make_adapter(
        nf4_base,
        r=5,
        lora_alpha=40,
        use_rslora=True,
        alpha_pattern={"k_.*": 3},
        target_modules=targets,
    )
    return [tmp_path / "first", second]


def test_base_and_adapter_are_the_trained_model_in_llama_cpp(
    nf4_base: Path,
    two_adapters: list[Path],
    tokenizer_folder: Path,
    folded_model: Callable[[FoldedModel], torch.nn.Module],
    as_truth: Callable[[torch.nn.Module], Callable[[list[int]], torch.Tensor]],
    tmp_path: Path,
) -> None:
    pytest.importorskip("xllamacpp")
    model = FoldedModel(nf4_base, two_adapters)
    write(model, tmp_path / "lora.gguf")
    base = base_gguf(nf4_base, tokenizer_folder, tmp_path / "base.gguf")
    truth_TV = as_truth(folded_model(model))(IDS)[7:-1]
    with WithAdapter(base, tmp_path / "lora.gguf", exact=True, threads=1) as running:
        with_adapter = kl(truth_TV, running.log_probs_along(IDS[:8], IDS[8:]))
    with LlamaCppModel(base, exact=True, threads=1) as running:
        without = kl(truth_TV, running.log_probs_along(IDS[:8], IDS[8:]))
    assert abs(with_adapter) < 1e-6  # seen 1e-7
    assert without > 0.1  # the adapters are big enough to be seen: 0.88


def test_an_adapted_embedding_in_llama_cpp(
    plain_base: Path,
    make_adapter: Callable[..., Path],
    tokenizer_folder: Path,
    folded_model: Callable[[FoldedModel], torch.nn.Module],
    as_truth: Callable[[torch.nn.Module], Callable[[list[int]], torch.Tensor]],
    tmp_path: Path,
) -> None:
    pytest.importorskip("xllamacpp")
    model = FoldedModel(plain_base, make_adapter(plain_base, target_modules=["embed_tokens"]))
    write(model, tmp_path / "lora.gguf")
    base = base_gguf(plain_base, tokenizer_folder, tmp_path / "base.gguf")
    truth_TV = as_truth(folded_model(model))(IDS)[7:-1]
    with WithAdapter(base, tmp_path / "lora.gguf", exact=True, threads=1) as running:
        assert abs(kl(truth_TV, running.log_probs_along(IDS[:8], IDS[8:]))) < 1e-6  # seen 1e-7


def test_the_product_is_the_change_of_every_weight(
    plain_base: Path, two_adapters: list[Path], tmp_path: Path
) -> None:
    model, base = FoldedModel(plain_base, two_adapters), FoldedModel(plain_base, None)
    report = write(model, tmp_path / "lora.gguf")
    architecture, factors = architecture_of(model), stored(tmp_path / "lora.gguf")
    changed = 0
    for name in model.names():
        delta = architecture.stored(name, model.tensor(name) - base.tensor(name))
        key = architecture.rename(name)
        if f"{key}.lora_a" not in factors:
            assert not delta.any(), name
            continue
        product = factors[f"{key}.lora_b"] @ factors[f"{key}.lora_a"]
        assert (product - delta).abs().max() < 1e-6 * max(1.0, float(delta.abs().max()))
        changed += 1
    assert report["tensors"] == 2 * changed == len(factors)
    assert factors[f"{Q0}.lora_a"].shape == (13, 256)
    assert report["rank"] == 13
    assert report["parameters"] == sum(factor.numel() for factor in factors.values())


def test_the_header_says_lora_and_leaves_the_scale_alone(
    plain_base: Path, adapter: Path, tmp_path: Path
) -> None:
    report = write(FoldedModel(plain_base, adapter), tmp_path / "lora.gguf")
    reader = gguf.GGUFReader(tmp_path / "lora.gguf")
    said = {key: field.contents() for key, field in reader.fields.items()}
    assert said["general.type"] == "adapter"
    assert said["general.architecture"] == "llama"
    assert said["general.name"] == "fable"
    assert said["adapter.type"] == "lora"
    assert said["adapter.lora.alpha"] == 0.0
    assert report["bytes"] == (tmp_path / "lora.gguf").stat().st_size
    assert report["quant"] == "lora"


def test_an_embedding_is_looked_up_with_its_factors_exchanged(
    plain_base: Path, make_adapter: Callable[..., Path], tmp_path: Path
) -> None:
    model = FoldedModel(plain_base, make_adapter(plain_base, target_modules=["embed_tokens"]))
    write(model, tmp_path / "lora.gguf")
    factors = stored(tmp_path / "lora.gguf")
    name = "model.embed_tokens.weight"
    delta = model.tensor(name) - FoldedModel(plain_base, None).tensor(name)
    a_VR, b_DR = factors["token_embd.weight.lora_a"], factors["token_embd.weight.lora_b"]
    assert a_VR.shape == (512, 8)
    assert delta.any()
    assert (a_VR @ b_DR.T - delta).abs().max() < 1e-6


def test_a_kill_costs_nothing_and_the_bytes_are_the_same(
    plain_base: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, out = FoldedModel(plain_base, adapter), tmp_path / "lora.gguf"
    write(model, tmp_path / "whole.gguf")
    appended: list[str] = []
    append = PartFile.append

    def until_killed(file: PartFile, name: str, data: Any) -> None:
        if len(appended) == 5:  # behind the A of a matrix, before its B
            raise KeyboardInterrupt
        appended.append(name)
        append(file, name, data)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(PartFile, "append", until_killed)
        write(model, out)
    assert not out.exists()

    def not_again(file: PartFile, name: str, data: Any) -> None:
        assert name not in appended
        append(file, name, data)

    monkeypatch.setattr(PartFile, "append", not_again)
    write(model, out)
    assert out.read_bytes() == (tmp_path / "whole.gguf").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["lora.gguf", "whole.gguf"]


def test_another_identity_starts_afresh(plain_base: Path, adapter: Path, tmp_path: Path) -> None:
    model, out = FoldedModel(plain_base, adapter), tmp_path / "lora.gguf"
    first = write(model, out)
    out.rename(tmp_path / "lora.gguf.part")
    assert write(model, out, identity="two")["sha256"] == first["sha256"]


def test_what_a_lora_cannot_say_is_refused_by_name(
    plain_base: Path, tied_base: Path, make_adapter: Callable[..., Path], tmp_path: Path
) -> None:
    out = tmp_path / "lora.gguf"
    whole = make_adapter(plain_base, modules_to_save=["lm_head"])
    with pytest.raises(RecipeError, match=r"lm_head\.weight was trained whole"):
        write(FoldedModel(plain_base, whole), out)
    with pytest.raises(RecipeError, match="no adapter"):
        write(FoldedModel(plain_base, None), out)
    alone = make_adapter(tied_base, target_modules=["q_proj", "lm_head"])
    with pytest.raises(RecipeError, match=r"lm_head\.weight is tied"):
        write(FoldedModel(tied_base, alone), out)
    assert not list(tmp_path.glob("lora*"))


def test_an_adapter_inside_a_tied_model_is_written(
    tied_base: Path, make_adapter: Callable[..., Path], tmp_path: Path
) -> None:
    model = FoldedModel(tied_base, make_adapter(tied_base, target_modules=["q_proj"]))
    assert write(model, tmp_path / "lora.gguf")["tensors"] == 4
