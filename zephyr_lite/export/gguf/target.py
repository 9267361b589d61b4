"""The trained model as a GGUF file: header, tensors by llama.cpp's mixtures, and a second look.

Everything but the tensors' values is settled before the first of them is computed: names, types,
sizes and the header, which is made by the `gguf` package and holds no date, so that the same inputs
give the same file. The values go through `PartFile`, which survives kills. Format: gguf.md of ggml.
"""

from __future__ import annotations

import re
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Kind

from zephyr_lite.errors import DataError, StorageError
from zephyr_lite.export.gguf.architecture import Architecture, read_architecture
from zephyr_lite.export.gguf.mixture import FILE_TYPES, kinds, wanted_kinds
from zephyr_lite.export.gguf.reading import LayoutReader
from zephyr_lite.export.gguf.vocabulary import Vocabulary, read_vocabulary
from zephyr_lite.export.part_file import PartFile
from zephyr_lite.export.quants.quantise import Route, byte_size, encode
from zephyr_lite.export.weights.fold import FoldedModel
from zephyr_lite.storage import FREE_SPACE, digest

ALIGNMENT = gguf.GGUF_DEFAULT_ALIGNMENT
_BASE_MODEL = re.compile(r"general\.base_model\.(\d+)\.")


@dataclass(frozen=True)
class Planned:
    """One tensor of the file, rows first, and how it is stored."""

    name: str
    shape: tuple[int, ...]
    kind: Kind

    @property
    def nbytes(self) -> int:
        """Bytes of its data, without padding."""
        return byte_size(self.shape, self.kind)


class GgufTarget:
    """A GGUF of one quantisation; a `Target` of `streaming.stream`."""

    def __init__(
        self,
        model: FoldedModel,
        tokenizer_folder: Path,
        chat_template: str,
        out: Path,
        quant: str,
        *,
        name: str,
        identity: str,
        routes: Mapping[Kind, Route],
        context_length: int | None = None,
        metadata: Mapping[str, str] | None = None,
        device: torch.device | None = None,
    ) -> None:
        """Settle the whole file but the tensors' values; nothing is written yet.

        Args:
            chat_template: Jinja, stored verbatim.
            out: the final file; until `commit` it is `out.part`.
            quant: a key of mixture.FILE_TYPES.
            name: `general.name`.
            identity: digest of what decides the values: base, adapters, code.
            routes: which code quantises each type; "torch" where a type is not named.
            context_length: what the file shall say, tokens; default: what the model was made for.
            metadata: further text by GGUF key, such as `general.license`,
                `general.base_model.0.name`.
            device: where our own code quantises; the CPU by default.
        Raises: RecipeError for what GGUF cannot say, DataError for a model or tokenizer that
            contradicts itself, StorageError for files that are missing.
        """
        self.label = quant
        self._out, self._template = out, chat_template
        shapes = {name: model.shape(name) for name in model.names()}
        self._architecture = read_architecture(model.config, shapes, context_length)
        self._names = {name: self._architecture.rename(name) for name in shapes}
        self._extra = self._architecture.extra()
        stored = {name: tuple(tensor.shape) for name, tensor in self._extra.items()}
        stored |= {self._names[name]: shape for name, shape in shapes.items()}
        self._plan, self._fallback = _planned(quant, stored, self._architecture)
        used = {t.kind for t in self._plan.values()}
        self._routes: dict[Kind, Route] = {kind: routes.get(kind, "torch") for kind in used}
        self._device = device or torch.device("cpu")
        self._parameters = sum(prod(shape) for shape in shapes.values())
        vocabulary = read_vocabulary(tokenizer_folder, self._architecture.vocab_size)
        self._notes = [*self._architecture.notes, *vocabulary.notes]
        writer = self._metadata(name, vocabulary, metadata or {})
        routes_used = sorted((kind.name, route) for kind, route in self._routes.items())
        self._file = PartFile(
            out,
            header_bytes(writer, list(self._plan.values())),
            [(t.name, t.nbytes) for t in self._plan.values()],
            digest([identity, routes_used, self._device.type]),
            alignment=ALIGNMENT,
        )

    @property
    def nbytes(self) -> int:
        """Bytes of the whole file."""
        return self._file.nbytes

    @property
    def part(self) -> Path:
        """The file until `commit`."""
        return self._file.part

    def begin(self) -> None:
        """Open or resume. Raises: LockedError, StorageError."""
        self._file.begin()
        for name, tensor in self._extra.items():
            if not self._file.has(name):
                self._file.append(name, self._encoded(name, tensor))

    def has(self, name: str) -> bool:
        """Whether a tensor, by its Hugging Face name, is stored."""
        return self._file.has(self._names[name])

    def add(self, name: str, weight: torch.Tensor) -> None:
        """Put its rows in order, quantise and store it. Raises: DataError naming it; StorageError.

        Args: weight: fp32; not changed.
        """
        stored = self._architecture.stored(name, weight)
        try:
            data = self._encoded(self._names[name], stored)
        except OverflowError as error:
            raise DataError(
                f"tensor {name} {error}", hint="write bf16 or f32, which reach further"
            ) from None
        self._file.append(self._names[name], data)

    def finish(self) -> dict[str, Any]:
        """Read the file back; its entry of the report. Raises: StorageError."""
        sha256 = self._file.finish()
        check_gguf(self.part, list(self._plan.values()), self._template)
        stored = Counter(t.kind.name for t in self._plan.values())
        return {
            "file": self._out.name,
            "quant": self.label,
            "tensors": len(self._plan),
            "parameters": self._parameters,
            "bytes": self.nbytes,
            "sha256": sha256,
            "kinds": dict(stored.most_common()),
            "fallback": self._fallback,
            "notes": self._notes,
        }

    def commit(self) -> None:
        """Give the file its final name. Raises: StorageError."""
        self._file.commit()

    def close(self) -> None:
        """Let go of the file; what is written stays."""
        self._file.close()

    def _encoded(self, name: str, tensor: torch.Tensor) -> np.ndarray:
        kind = self._plan[name].kind
        route = self._routes[kind]
        values = tensor.to(self._device) if route == "torch" else tensor
        return encode(values, kind, route=route)

    def _metadata(
        self, name: str, vocabulary: Vocabulary, metadata: Mapping[str, str]
    ) -> gguf.GGUFWriter:
        writer = gguf.GGUFWriter(None, self._architecture.name)
        writer.add_type(gguf.GGUFType.MODEL)
        writer.add_name(name)
        writer.add_size_label(gguf.size_label(self._parameters, 0, 0, 0))
        writer.add_file_type(FILE_TYPES[self.label])
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        for key, text in metadata.items():
            writer.add_string(key, text)
        if bases := {match[1] for key in metadata if (match := _BASE_MODEL.match(key))}:
            writer.add_base_model_count(len(bases))
        self._architecture.add_metadata(writer)
        vocabulary.add_to(writer)
        writer.add_chat_template(self._template)
        return writer


def header_bytes(writer: gguf.GGUFWriter, tensors: Sequence[Planned]) -> bytes:
    """Everything before the tensors' data, padding included, of a writer that has its metadata.

    Raises: StorageError, for the folder of temporary files.
    """
    for t in tensors:
        writer.add_tensor_info(t.name, t.shape, np.dtype(np.float32), t.nbytes, raw_dtype=t.kind)
    try:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "header")
            writer.write_header_to_file(path)
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            writer.close()
            header = path.read_bytes()
    except OSError as error:
        place = tempfile.gettempdir()
        raise StorageError(f"{place}: cannot be written: {error}", hint=FREE_SPACE) from error
    return header + bytes(-len(header) % ALIGNMENT)


def check_gguf(path: Path, plan: Sequence[Planned], chat_template: str) -> None:
    """Re-read a file: names, shapes, types, alignment, overlaps, end; and the template's text.

    Raises: StorageError naming the first thing that is not as planned.
    """
    reader = LayoutReader.opened(path)
    if len(reader.tensors) != len(plan):
        raise StorageError(f"{path}: holds {len(reader.tensors)} tensors, planned {len(plan)}")
    end = reader.data_offset
    for planned, found in zip(plan, reader.tensors, strict=True):
        shape = tuple(int(n) for n in reversed(found.shape))
        same = (found.name, shape, found.tensor_type) == (planned.name, planned.shape, planned.kind)
        if not same or found.data_offset != end or int(found.n_bytes) != planned.nbytes:
            raise StorageError(f"{path}: tensor {found.name} is not where or what was planned")
        end += planned.nbytes + -planned.nbytes % ALIGNMENT
    if path.stat().st_size != end:
        raise StorageError(f"{path}: has {path.stat().st_size} bytes, planned {end}")
    stored = reader.get_field(gguf.Keys.Tokenizer.CHAT_TEMPLATE)
    if stored is None or stored.contents() != chat_template:
        raise StorageError(f"{path}: the chat template was not stored verbatim")


def _planned(
    quant: str, shapes: Mapping[str, tuple[int, ...]], architecture: Architecture
) -> tuple[dict[str, Planned], dict[str, str]]:
    """Every tensor in the order of the file, and the types that rows too short forced on some."""
    facts = {
        "layers": architecture.layers,
        "heads": architecture.heads,
        "kv_heads": architecture.kv_heads,
    }
    found = kinds(quant, shapes, **facts, architecture=architecture.name)
    wanted = wanted_kinds(quant, shapes, **facts, architecture=architecture.name)
    plan = {name: Planned(name, shape, found[name]) for name, shape in shapes.items()}
    return plan, {name: k.name for name, k in found.items() if k != wanted[name]}
