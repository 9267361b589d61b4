"""Is the file the trained model, tensor by tensor? Without llama.cpp, by a reader that is not ours.

The `gguf` package opens the file and dequantises it; nothing that wrote the file takes part. Each
tensor W' is compared with the model's W, whose rows are put into the file's order first:

    error   |W' - W| / |W|, which for a sound tensor is its type's rounding
    kept    1 + <W' - W, D> / <D, D> for the change D = s B A of each adapter, over all its tensors:
            1 when it is there, 0 when it was forgotten. Rounding is not aligned with D, so this
            sees changes far smaller than the error

What it cannot see: whether llama.cpp splits text as the tokenizer does, and how far predictions
drift. It folds the model a second time, so it is for machines where llama.cpp is not.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Kind

from zephyr_lite.errors import StorageError
from zephyr_lite.export.check.verify import ExportMismatch
from zephyr_lite.export.gguf.architecture import Architecture
from zephyr_lite.export.gguf.mixture import FILE_TYPES, kinds
from zephyr_lite.export.gguf.vocabulary import Vocabulary
from zephyr_lite.export.weights.fold import FoldedModel

# Largest error by type. Measured: mean over the matrices of the trained tiny model; what Gaussian
# values give; what Student's t with 3 degrees of freedom gives, outliers beyond any real matrix's.
BOUNDS = {
    Kind.F32: 1e-6,  # 0
    Kind.F16: 1e-3,  # 0.00021, 0.00021, 0.00021; more only for values below 6e-5
    Kind.BF16: 0.004,  # 0.0017, 0.0017, 0.0017
    Kind.Q8_0: 0.012,  # 0.0054, 0.0054, 0.0085
    Kind.Q6_K: 0.035,  # 0.018, 0.018, 0.026
    Kind.Q5_K: 0.06,  # 0.036, 0.036, 0.047
    Kind.Q5_1: 0.06,  # 0.038, 0.038, 0.049
    Kind.Q5_0: 0.08,  # 0.043, 0.043, 0.067
    Kind.Q4_K: 0.12,  # 0.072, 0.071, 0.093
    Kind.Q4_0: 0.16,  # 0.087, 0.086, 0.129
    Kind.Q3_K: 0.23,  # 0.152, 0.151, 0.191
}
# Of 1, beside five standard errors. Weights on NF4's values with a small change round back to them:
# tiny 0.995 to 1.0, random weights 0.94 at Q3_K, a model of 6.8M at 0.03 of its change 0.87.
KEPT_WITHIN = 0.3
CHUNK = 1 << 22  # values dequantised at a time: 16 MiB


@dataclass
class Kept:
    """Sums over tensors, for one adapter: <E, D>, <D, D> and the variance of the first."""

    error_on_change: float = 0.0
    change_squared: float = 0.0
    variance: float = 0.0

    def figures(self) -> dict[str, float]:
        """The share that was kept and its standard error."""
        if self.change_squared == 0:
            return {"kept": 1.0, "standard_error": 0.0}
        error = math.sqrt(self.variance) / self.change_squared
        return {"kept": 1 + self.error_on_change / self.change_squared, "standard_error": error}


@dataclass
class _Findings:
    failures: list[str] = field(default_factory=list)
    errors: dict[str, float] = field(default_factory=dict)
    by_kind: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))


def verify_weights(
    path: Path,
    model: FoldedModel,
    architecture: Architecture,
    vocabulary: Vocabulary,
    chat_template: str | None,
    *,
    on_tensor: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Compare a GGUF file, which may still be called `.part`, with the model it was written from.

    Args:
        chat_template: what must be stored, verbatim; None where the model has none.
        on_tensor: called with (tensors compared, tensors in all).
    Returns: report: `type`, `tensors`, `worst`, `mean_error` by type, `adapters`, `passed`.
    Raises: ExportMismatch (a VerificationError, with `.report`) naming what differs; StorageError
        for a file that cannot be read; DataError as the model does.
    Memory: the largest tensor in fp32 once, beside chunks.
    """
    try:
        reader = gguf.GGUFReader(path)
    except (ValueError, IndexError, KeyError, OSError) as error:
        raise StorageError(f"{path}: is not readable as GGUF: {error}") from None
    found = _Findings()
    _compare_metadata(reader, architecture, vocabulary, chat_template, found.failures)
    planned = dict(_planned(model, architecture))
    file_type = _compare_layout(reader, planned, architecture, found.failures)
    kept = [Kept() for _ in model.adapters]
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    for done, (name, (source, shape)) in enumerate(planned.items(), start=1):
        if name in tensors and _shape(tensors[name]) == shape:
            weight = _weight(model, architecture, name, source)
            changes = _changes(model, architecture, source)
            _judge_tensor(tensors[name], _compare(tensors[name], weight, changes, kept), found)
        if on_tensor is not None:
            on_tensor(done, len(planned))
    return _judge(path, file_type, found, [k.figures() for k in kept])


def _planned(
    model: FoldedModel, architecture: Architecture
) -> Iterator[tuple[str, tuple[str | None, tuple[int, ...]]]]:
    """GGUF name -> (name in the model, or None for what only the file has; shape)."""
    for name, tensor in architecture.extra().items():
        yield name, (None, tuple(tensor.shape))
    for source in model.names():
        yield architecture.rename(source), (source, model.shape(source))


def _weight(
    model: FoldedModel, architecture: Architecture, name: str, source: str | None
) -> torch.Tensor:
    if source is None:
        return architecture.extra()[name]
    return architecture.stored(source, model.tensor(source))


def _changes(
    model: FoldedModel, architecture: Architecture, source: str | None
) -> list[tuple[torch.Tensor, torch.Tensor] | None]:
    """(A, s B with its rows in the file's order) of each adapter; None where it changes nothing."""
    found: list[tuple[torch.Tensor, torch.Tensor] | None] = []
    for adapter in model.adapters:
        if source is None or source not in adapter.low_rank:
            found.append(None)
        else:
            a_RI, b_OR, scale = adapter.factors(source)
            found.append((a_RI, architecture.stored(source, b_OR * scale)))
    return found


def _compare(
    tensor: Any,
    weight: torch.Tensor,
    changes: list[tuple[torch.Tensor, torch.Tensor] | None],
    kept: list[Kept],
) -> float:
    """Relative error of one tensor; adds to `kept` what it says of each adapter."""
    error_squared = weight_squared = 0.0
    along = [[0.0, 0.0] for _ in changes]
    rows = max(1, CHUNK // max(1, weight[0].numel()))
    for start in range(0, len(weight), rows):
        part = slice(start, start + rows)
        values = gguf.quants.dequantize(tensor.data[part], tensor.tensor_type)
        expected = weight[part]
        error = torch.tensor(values).reshape(expected.shape) - expected
        error_squared += float(error.double().square().sum())
        weight_squared += float(expected.double().square().sum())
        for sums, change in zip(along, changes, strict=True):
            if change is not None:
                delta = change[1][part] @ change[0]
                sums[0] += float((error * delta).sum(dtype=torch.float64))
                sums[1] += float(delta.square().sum(dtype=torch.float64))
    for total, (dot, squared) in zip(kept, along, strict=True):
        total.error_on_change += dot
        total.change_squared += squared
        total.variance += error_squared / weight.numel() * squared
    tiny = float(np.finfo(np.float32).tiny)
    return math.sqrt(error_squared / max(weight_squared, tiny))


def _judge_tensor(tensor: Any, error: float, found: _Findings) -> None:
    kind = Kind(tensor.tensor_type)
    found.errors[tensor.name] = error
    found.by_kind[kind.name].append(error)
    if not error <= BOUNDS.get(kind, 0.0):  # NaN fails too
        found.failures.append(f"{tensor.name} ({kind.name}) is {error:.2g} away, relative")


def _compare_layout(
    reader: Any,
    planned: dict[str, tuple[str | None, tuple[int, ...]]],
    architecture: Architecture,
    failures: list[str],
) -> str:
    """Names, shapes and types. Returns: name of the file type."""
    shapes = {name: shape for name, (_, shape) in planned.items()}
    stored = {tensor.name: tensor for tensor in reader.tensors}
    failures += [f"{name} is missing" for name in sorted(shapes.keys() - stored.keys())]
    failures += [f"{name} is foreign" for name in sorted(stored.keys() - shapes.keys())]
    there = {name: stored[name] for name in shapes if name in stored}
    failures += [
        f"{name} has shape {list(_shape(tensor))}, the model {list(shapes[name])}"
        for name, tensor in there.items()
        if _shape(tensor) != shapes[name]
    ]
    number = reader.get_field(gguf.Keys.General.FILE_TYPE)
    quants = {int(kind): quant for quant, kind in FILE_TYPES.items()}
    quant = None if number is None else quants.get(int(number.contents()))
    if quant is None:
        failures.append("general.file_type is missing or none that is written here")
        return "unknown"
    facts = {
        "layers": architecture.layers,
        "heads": architecture.heads,
        "kv_heads": architecture.kv_heads,
    }
    wanted = kinds(quant, shapes, **facts, architecture=architecture.name)
    failures += [
        f"{name} is {Kind(tensor.tensor_type).name}, of a {quant} file {wanted[name].name}"
        for name, tensor in there.items()
        if tensor.tensor_type != wanted[name]
    ]
    return FILE_TYPES[quant].name


def _compare_metadata(
    reader: Any,
    architecture: Architecture,
    vocabulary: Vocabulary,
    chat_template: str | None,
    failures: list[str],
) -> None:
    """Every key of the architecture and the tokenizer, none missing, none more."""
    writer = gguf.GGUFWriter(None, architecture.name)
    architecture.add_metadata(writer)
    vocabulary.add_to(writer)
    if chat_template is not None:
        writer.add_chat_template(chat_template)
    expected = {key: entry.value for entries in writer.kv_data for key, entry in entries.items()}
    prefixes = (f"{architecture.name}.", "tokenizer.")
    stored = {key for key in reader.fields if key.startswith(prefixes)}
    failures += [f"{key} is missing" for key in sorted(expected.keys() - reader.fields.keys())]
    failures += [f"{key} is foreign" for key in sorted(stored - expected.keys())]
    failures += [
        f"{key} is another"
        for key, value in expected.items()
        if key in reader.fields and not _is_stored(value, reader.fields[key].contents())
    ]


def _is_stored(value: Any, stored: Any) -> bool:
    if isinstance(value, (list, tuple)):
        pairs = zip(value, stored, strict=False)
        return len(value) == len(stored) and all(_is_stored(*pair) for pair in pairs)
    if isinstance(value, float):
        return np.float32(value) == np.float32(stored)
    return value == stored


def _shape(tensor: Any) -> tuple[int, ...]:
    return tuple(int(n) for n in reversed(tensor.shape))


def _judge(
    path: Path, file_type: str, found: _Findings, adapters: list[dict[str, float]]
) -> dict[str, Any]:
    failures = found.failures
    for nth, figures in enumerate(adapters):
        if not abs(figures["kept"] - 1) <= KEPT_WITHIN + 5 * figures["standard_error"]:
            failures.append(f"adapter {nth} is there to {figures['kept']:.1%}")
    worst = max(found.errors, key=found.errors.__getitem__, default=None)
    report: dict[str, Any] = {
        "file": path.name.removesuffix(".part"),
        "type": file_type,
        "tensors": len(found.errors),
        "worst": None if worst is None else {"tensor": worst, "error": found.errors[worst]},
        "mean_error": {kind: sum(e) / len(e) for kind, e in sorted(found.by_kind.items())},
        "adapters": adapters,
        "passed": not failures,
        "failures": failures,
    }
    if failures:
        more = f"; and {len(failures) - 5} more" if len(failures) > 5 else ""
        raise ExportMismatch(
            f"{report['file']} is not the trained model: {'; '.join(failures[:5])}{more}",
            report,
            hint="export again; if it stays, report it with export/report.json",
        )
    return report
