"""GPUs that a plan can be made for without having one: memory, rates, where figures are from.

    usable bytes   memory less a tenth of it, of which at least 1.0 and at most 1.5 GiB
                   24 -> 22.5   16 -> 14.5   12 -> 10.8   8 -> 7.0 GiB

which is the room for a CUDA context, what the allocator cannot use, and a quiet desktop. Memory is
what the driver reports; where a card corrects errors in ordinary memory that is less than the box
says. Rates are dense bf16 products that sum in fp32, which GeForce cards run at half the rate of
fp16 sums. Cards without bf16 (T4, V100, the 20 series) are left out: nothing here computes in fp16.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from zephyr_lite.errors import RecipeError

GIB = 2**30
MIB = 2**20
_NOTED = "rates as this project's study of the physical limit took them; memory and bus recalled"
_HALF_RECALLED = "bandwidth as in that study; product rate, memory and bus recalled"
_RECALLED = "recalled from NVIDIA's tables, not looked up again"
_SHADERS = "twice its fp32 shader rate as listed publicly, which is a 4090's; the rest recalled"
_PUBLISHED = "one was published to reach 769 to 798 of 989 TFLOP/s, 4300 GB/s; the rest recalled"
# What names a maker, a line of products or a socket, and tells no card from another.
_NOISE = {"nvidia", "geforce", "rtx", "gpu", "sxm", "sxm4", "sxm5", "hbm3", "hbm3e"}
_ALIASES = {"a100pcie": "a100"}
_SCALES = {"": GIB, "g": GIB, "gb": GIB, "gib": GIB, "m": MIB, "mb": MIB, "mib": MIB}


@dataclass(frozen=True)
class Gpu:
    """One card.

    memory_bytes: as the driver reports it. tflops: dense bf16 with fp32 sums, peak, 1e12 FLOP/s.
    gb_per_s: memory, peak, 1e9 bytes/s. pcie_gb_per_s: one way, what copies of pinned memory
    reach. efficiency: share of `tflops` that large products reach. source: where figures are from.
    """

    name: str
    memory_bytes: int
    tflops: float
    gb_per_s: float
    pcie_gb_per_s: float
    source: str
    efficiency: float = 0.85

    @property
    def is_geforce(self) -> bool:
        """Whether fp16 sums run at twice `tflops`; elsewhere both sums run at one rate."""
        return self.name.startswith("RTX")

    @property
    def usable_bytes(self) -> int:
        """What one process may plan with; see the module."""
        return usable_bytes(self.memory_bytes)


def _gpu(
    name: str,
    gib: float,
    tflops: float,
    gb_per_s: float,
    bus: float,
    source: str,
    efficiency: float = 0.85,
) -> Gpu:
    return Gpu(name, int(gib * GIB), tflops, gb_per_s, bus, source, efficiency)


# name, GiB, TFLOP/s, GB/s of memory, GB/s of the bus, source, efficiency where it is not 0.85: an
# L4 cannot hold its clock in 72 W.
GPUS = (
    _gpu("RTX 3060 12GB", 12.0, 25.5, 360, 25.0, _RECALLED),
    _gpu("RTX 3070", 8.0, 40.6, 448, 25.0, _RECALLED),
    _gpu("RTX 3090", 24.0, 71.0, 936, 25.0, _NOTED),
    _gpu("RTX 4060", 8.0, 30.2, 272, 12.5, _SHADERS),
    _gpu("RTX 4060 Ti 16GB", 16.0, 44.1, 288, 12.5, _SHADERS),
    _gpu("RTX 4070", 12.0, 58.3, 504, 25.0, _RECALLED),
    _gpu("RTX 4080", 16.0, 97.5, 717, 25.0, _RECALLED),
    _gpu("RTX 4090", 24.0, 165.2, 1008, 25.0, _NOTED),
    _gpu("RTX 5090", 32.0, 209.5, 1792, 50.0, _HALF_RECALLED),
    _gpu("A10G", 22.5, 70.0, 600, 25.0, _HALF_RECALLED),
    _gpu("L4", 22.5, 121.0, 300, 25.0, _HALF_RECALLED, 0.55),
    _gpu("A6000", 48.0, 154.8, 768, 25.0, _RECALLED),
    _gpu("A100 40GB", 39.4, 312.0, 1555, 25.0, _RECALLED),
    _gpu("A100 80GB", 79.2, 312.0, 2039, 25.0, _RECALLED),
    _gpu("H100 80GB", 79.2, 989.0, 3350, 50.0, _RECALLED, 0.80),
    _gpu("H200", 139.8, 989.0, 4800, 50.0, _PUBLISHED, 0.80),
)

# Rates that only rank the cuts of a machine whose own are not known: of a CPU, of another card.
CPU = _gpu("CPU", 0.0, 0.1, 20.0, 20.0, "assumed, to rank cuts")
UNKNOWN = GPUS[2]


def usable_bytes(memory: int) -> int:
    """Of a card's memory, bytes, what one process may plan with; see the module."""
    return memory - int(min(max(memory / 10, GIB), 1.5 * GIB))


def gpu_named(name: str, memory: int | None = None) -> Gpu:
    """The card called so: `4090`, `rtx 4090`, or as `torch.cuda.get_device_name` has it.

    Args: memory: its bytes where they are known, which tell an A100 of 40 GB from one of 80.
    Raises: RecipeError, listing the known ones, for a card that is not among them, and for a name
        that several have. A laptop's card is another one than the desktop's.
    """
    model, size = _read(name)
    found = [gpu for gpu in GPUS if _read(gpu.name)[0] == model]
    size = size or memory
    if size is not None:
        found = [gpu for gpu in found if 0.9 <= size / gpu.memory_bytes <= 1.1]
    if len(found) == 1:
        return found[0]
    if found:
        raise RecipeError(f"{name!r} is the name of {len(found)} GPUs", hint=_one_of(found))
    with_memory = f" and has {size / GIB:.1f} GiB" if size else ""
    raise RecipeError(f"no known GPU is called {name!r}{with_memory}", hint=_one_of(GPUS))


def memory_bytes(text: str) -> int:
    """Bytes of `24GB`, `22.5GiB`, `24` (GiB) or `512MiB`.

    GB are GiB, as on a card's box: the `24 GB` of a 4090 are 24 * 2**30 bytes.
    Raises: RecipeError for anything else, and for nothing.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", text.lower())
    if match is None or match[2] not in _SCALES or float(match[1]) == 0:
        raise RecipeError(f"{text!r} is no amount of memory", hint="for example 24GB or 22.5GiB")
    return int(float(match[1]) * _SCALES[match[2]])


def _one_of(gpus: Iterable[Gpu]) -> str:
    return "one of " + ", ".join(gpu.name for gpu in gpus)


def _read(name: str) -> tuple[str, int | None]:
    """(what tells the model, bytes of memory if the name has them)."""
    name, size = re.sub(r"rtx(?=\d)", "rtx ", name.lower()), None
    if match := re.search(r"\b\d+\s*gi?b?\b", name):
        size = memory_bytes(match[0])
        name = name.replace(match[0], " ")
    words = re.split(r"[^a-z0-9]+", name)
    model = "".join(word for word in words if word and word not in _NOISE)
    return _ALIASES.get(model, model), size
