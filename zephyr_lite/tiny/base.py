"""A base model built on the spot: tokenizer, geometry, and a short pre-training by the same loop.

    CACHE/built/<key>/    config.json, model.safetensors, tokenizer.json: an ordinary checkpoint

Nothing later knows that the base was built here: it is quantised, trained and exported like any
other. Killed in the middle, the same command goes on from the last checkpoint.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from transformers import MistralConfig, MistralForCausalLM

from zephyr_lite.data.chat import load_tokenizer
from zephyr_lite.data.dialogues import read_texts
from zephyr_lite.data.layout import join_documents, pack_masked
from zephyr_lite.data.sources import fingerprint, resolve
from zephyr_lite.model.base import quiet_libraries
from zephyr_lite.model.policy import make_policy
from zephyr_lite.recipe import Build, Memory, Source, result_fields
from zephyr_lite.stopping import Stop
from zephyr_lite.storage import cache_folder, digest, held, is_sealed, sealed_folder, sweep
from zephyr_lite.train.loop import Job, Listener
from zephyr_lite.train.objectives import LanguageModelling

TOKENS_PER_MICRO_BATCH = 4096
VERSION = 1  # raise when the same settings would build another model


def build_base(
    build: Build, device: torch.device, seed: int, listener: Listener, stop: Stop
) -> Path:
    """Folder of the built model; builds it unless the cache has it.

    Raises: DataError when text or tokenizer cannot be read.
    """
    key = digest(
        {
            "version": VERSION,
            "seed": seed,
            "build": result_fields(build),
            "text": fingerprint(build.text),
            "tokenizer": fingerprint(build.tokenizer),
        }
    )[:32]
    root = cache_folder() / "built"
    folder, work = root / key, root / f"{key}.work"
    if is_sealed(folder):
        return folder
    work.mkdir(parents=True, exist_ok=True)
    with held(work / ".lock"):
        if is_sealed(folder):  # another process built it while we waited
            return folder
        sweep(root, key)
        model = _pretrain(build, work, device, seed, listener, stop)
        with sealed_folder(folder) as part:
            _save(model, build, work, part)
    shutil.rmtree(work)
    return folder


def _pretrain(
    build: Build, work: Path, device: torch.device, seed: int, listener: Listener, stop: Stop
) -> MistralForCausalLM:
    """Next-token training of all weights, fp32, on plain documents."""
    _write_tokenizer(build, work)
    tokenizer = load_tokenizer(work)
    texts, _ = read_texts([Source(path=build.text, split=None, limit=build.limit)])
    encoded = [tokenizer.encode_text(t.text) for t in texts]
    documents = join_documents([(ids, np.zeros(len(ids), bool)) for ids in encoded])
    model = _fresh_model(build, tokenizer.vocab_size, seed)
    model.to(device)  # pyright: ignore[reportArgumentType] - transformers' signature hides torch's
    memory = Memory(tokens_per_micro_batch=TOKENS_PER_MICRO_BATCH)
    policy = make_policy(model, torch.float32, device, memory, engine="hf")  # all weights train
    rows = pack_masked(documents, build.max_length)
    Job(
        label="pre-train",
        policy=policy,
        objective=LanguageModelling(documents, rows, "all", TOKENS_PER_MICRO_BATCH),
        settings=build,
        folder=work,
        seed=seed,
        listener=listener,
        stop=stop,
        evaluate=dict,
    ).run()
    return model


def _fresh_model(build: Build, vocab_size: int, seed: int) -> MistralForCausalLM:
    quiet_libraries()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = MistralForCausalLM(
            MistralConfig(
                vocab_size=vocab_size,
                hidden_size=build.hidden_size,
                intermediate_size=build.intermediate_size,
                num_hidden_layers=build.layers,
                num_attention_heads=build.heads,
                num_key_value_heads=build.kv_heads,
                head_dim=build.hidden_size // build.heads,
                max_position_embeddings=1024,
                sliding_window=None,
                initializer_range=build.hidden_size**-0.5,  # by width, not a 7B's 0.02
                tie_word_embeddings=False,
                bos_token_id=1,
                eos_token_id=2,
            )
        )
    return model.float().train()


def _write_tokenizer(build: Build, folder: Path) -> None:
    (folder / "tokenizer.json").write_bytes(resolve(build.tokenizer).read_bytes())
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "add_bos_token": True,
        "model_max_length": 1024,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")


def _save(model: MistralForCausalLM, build: Build, work: Path, folder: Path) -> None:
    tensors = {n: p.detach().cpu().contiguous() for n, p in model.named_parameters()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    model.config.dtype = torch.float32
    model.config.architectures = ["MistralForCausalLM"]
    model.config.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((work / name).read_bytes())
