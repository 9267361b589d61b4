"""What both sides of a parity test are given, and how what comes out of them is compared.

One random fp32 Mistral per tokenizer; our own trainings are recorded step by step, TRL's by its
log. TRL's loss, rewards and log-probs carry the names that our metrics took from it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer

from zephyr_lite.data.chat import ChatTokenizer
from zephyr_lite.model.adapters import add_adapter, save_adapter
from zephyr_lite.model.base import BaseFiles, load_base, quiet_libraries
from zephyr_lite.recipe import Base, Lora

PINNED = "1.16.0"
# Relative, of every figure of every step: the project's promise. Seen (`pytest -s` prints it): 8e-6
# of a loss, 2e-5 of a reward. Adapters at the end are held to less: AdamW moves an element whose
# gradient is rounding noise by a full learning rate, either way. Seen: 8e-5.
LIMIT, ADAPTER_LIMIT = 1e-4, 1e-3
# What is 0 at the start is measured by the largest of its run, the rest by its own value.
BY_LARGEST = ("rewards/chosen", "rewards/rejected", "rewards/margins")


@dataclass(frozen=True)
class Ground:
    """A base and its tokenizer as both sides load them."""

    folder: Path
    tokenizer: ChatTokenizer
    sft_adapter: Path

    def model(self) -> torch.nn.Module:
        """Our frozen fp32 base, not quantised."""
        base = Base(model=str(self.folder), quantization="none", dtype="float32")
        return load_base(BaseFiles(self.folder, {}), base, torch.device("cpu"))

    def rival_model(self) -> Any:
        """The same weights as TRL's users load them."""
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM.from_pretrained(self.folder, dtype=torch.float32)

    def rival_tokenizer(self) -> Any:
        """The same tokenizer.json as transformers' class."""
        from transformers import PreTrainedTokenizerFast

        names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
        file = str(self.folder / "tokenizer.json")
        return PreTrainedTokenizerFast(tokenizer_file=file, **names)


@dataclass
class Trace:
    """A training from outside: metrics of each step and what the adapter came to."""

    records: list[dict[str, Any]] = field(default_factory=list)
    weights: dict[str, torch.Tensor] = field(default_factory=dict)

    # As a listener of our loop.
    def start(self, label: str, total: int, done: int) -> None: ...
    def note(self, text: str) -> None: ...
    def end(self) -> None: ...
    def step(self, record: dict[str, Any]) -> None:
        self.records.append(record)


@pytest.fixture(scope="session")
def trace() -> type[Trace]:
    """The class of traces."""
    return Trace


@pytest.fixture(scope="session")
def trl(one_thread: None) -> Any:
    """The rival; importing it takes seconds, so only a test that needs it does."""
    trl = pytest.importorskip("trl", reason="TRL comes with the extra `dev`")
    from datasets.utils.logging import disable_progress_bar

    disable_progress_bar()
    return trl


@pytest.fixture(scope="session")
def pinned_trl(trl: Any) -> Any:
    """TRL at the version whose defects are stated here."""
    if trl.__version__ != PINNED:
        pytest.skip(f"a statement about TRL {PINNED}; found {trl.__version__}")
    return trl


@pytest.fixture(scope="session")
def tiny_ground(root: Path, tmp_path_factory: pytest.TempPathFactory, one_thread: None) -> Ground:
    """The tokenizer that the package brings, 1,024 tokens."""
    file = root / "zephyr_lite" / "tiny" / "data" / "tokenizer.json"
    return make_ground(file, tmp_path_factory.mktemp("tiny-ground"))


@pytest.fixture(scope="session")
def mistral_ground(
    shared_data: Path, tmp_path_factory: pytest.TempPathFactory, one_thread: None
) -> Ground:
    """Mistral's own tokenizer, 32,000 tokens."""
    file = shared_data / "models" / "mistral-7b-v0.1-tokenizer" / "tokenizer.json"
    return make_ground(file, tmp_path_factory.mktemp("mistral-ground"))


def make_ground(tokenizer: Path, folder: Path) -> Ground:
    """A random Mistral of two layers for a tokenizer, and an SFT adapter that does something."""
    from transformers import MistralConfig, MistralForCausalLM

    quiet_libraries()
    (folder / "tokenizer.json").write_bytes(tokenizer.read_bytes())
    chat = ChatTokenizer(Tokenizer.from_file(str(tokenizer)), bos="<s>", eos="</s>")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = MistralConfig(
            vocab_size=chat.vocab_size,
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=1024,
            sliding_window=None,
            initializer_range=0.12,
        )
        MistralForCausalLM(config).save_pretrained(folder)
    ground = Ground(folder, chat, folder / "sft-adapter")
    model = add_adapter(ground.model(), "sft", Lora(r=4, alpha=8), seed=5)
    generator = torch.Generator().manual_seed(5)
    for name, parameter in model.named_parameters():
        if ".sft." in name:
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.data.copy_(0.2 * noise / parameter.shape[-1] ** 0.5)
    ground.sft_adapter.mkdir()
    save_adapter(model, ["sft"], ground.sft_adapter, str(folder))
    return ground


@pytest.fixture(scope="session")
def rival_settings() -> Callable[..., dict[str, Any]]:
    """`rival_settings(ours, folder, batch)`: TRL's arguments for one of our trainings.

    batch: (rows of one forward, forwards of one step).
    """

    def translate(ours: Any, folder: Path, batch: tuple[int, int]) -> dict[str, Any]:
        assert batch[0] * batch[1] == ours.batch_size
        return {
            "output_dir": str(folder),
            "per_device_train_batch_size": batch[0],
            "gradient_accumulation_steps": batch[1],
            "num_train_epochs": 1,  # the rows of all steps are handed over in our order
            "train_sampling_strategy": "sequential",
            "learning_rate": ours.learning_rate,
            "lr_scheduler_type": {"constant": "constant_with_warmup"}.get(
                ours.schedule, ours.schedule
            ),
            "warmup_steps": ours.warmup_ratio,  # below 1 it is a share of the steps
            "weight_decay": ours.weight_decay,
            "max_grad_norm": ours.max_grad_norm,
            "optim": "adamw_torch_fused",
            "bf16": False,
            "use_cpu": True,
            "gradient_checkpointing": False,
            "logging_steps": 1,
            "report_to": "none",
            "save_strategy": "no",
            "disable_tqdm": True,
        }

    return translate


@pytest.fixture(scope="session")
def adapter_weights() -> Callable[..., dict[str, torch.Tensor]]:
    """`adapter_weights(model, "dpo")`: tensors of an adapter by names that do not say its own."""
    return weights_of


def weights_of(model: Any, adapter: str) -> dict[str, torch.Tensor]:
    found = {
        name.replace(f".{adapter}.", "."): parameter
        for name, parameter in model.named_parameters()
        if f".{adapter}." in name
    }
    assert found, f"no adapter {adapter}"
    return found


@pytest.fixture(scope="session")
def start_alike() -> Callable[..., None]:
    """`start_alike(trainer, initial)`: TRL's fresh adapter begins as ours did."""

    def copy(trainer: Any, initial: dict[str, torch.Tensor]) -> None:
        theirs = weights_of(trainer.model, "default")
        assert theirs.keys() == initial.keys()
        with torch.no_grad():
            for name, parameter in theirs.items():
                parameter.copy_(initial[name])

    return copy


@pytest.fixture(scope="session")
def rival_trace() -> Callable[[Any], Trace]:
    """`rival_trace(trainer)` lets TRL train and gives the trace of it."""

    from transformers import PrinterCallback

    def run(trainer: Any) -> Trace:
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        records = [record for record in trainer.state.log_history if "loss" in record]
        weights = weights_of(trainer.model, "default")
        return Trace(records, {n: p.detach().clone() for n, p in weights.items()})

    return run


@pytest.fixture
def alike(request: pytest.FixtureRequest, record_property: Callable) -> Callable[..., None]:
    """`alike(ours, theirs, names)`: every figure of every step, and the adapter at the end.

    Raises: AssertionError with all the differences when one is above its limit.
    """

    def check(ours: Trace, theirs: Trace, names: Sequence[str]) -> None:
        assert len(ours.records) == len(theirs.records)
        worst = {name: _difference(ours, theirs, name) for name in names}
        worst |= {"adapter": _weight_difference(ours, theirs)}
        for name, value in worst.items():
            record_property(name, value)
        text = ", ".join(f"{name} {value:.1e}" for name, value in worst.items())
        print(f"\n{request.node.name}: {text}")
        limits = {"adapter": ADAPTER_LIMIT}
        above = sorted(n for n, value in worst.items() if not value <= limits.get(n, LIMIT))
        assert not above, f"further apart than {LIMIT}: {above}; {text}"

    return check


def _difference(ours: Trace, theirs: Trace, name: str) -> float:
    """Largest relative difference of a figure over the steps."""
    mine, his = (torch.tensor([r[name] for r in t.records]).double() for t in (ours, theirs))
    size = his.abs().max() if name in BY_LARGEST else his.abs().clamp(min=1e-12)
    return ((mine - his).abs() / size).max().item()


def _weight_difference(ours: Trace, theirs: Trace) -> float:
    """Largest relative difference of an adapter tensor."""
    assert ours.weights.keys() == theirs.weights.keys()
    pairs = [(ours.weights[n].double(), theirs.weights[n].double()) for n in theirs.weights]
    return max(((a - b).norm() / b.norm()).item() for a, b in pairs)
