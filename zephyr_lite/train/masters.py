"""Masters: the fp32 weights that the optimizer steps, and where they and its states live.

    device   the parameters are their own masters
    host     masters and AdamW states in host memory; on the device the parameters in the compute
             dtype and one buffer of fp32 gradients. A step is one transfer each way.

Bytes of a trained weight on the device, weight + gradient + states:

    device   4 + 4 + 8 (adamw) or 2 (8-bit)          host   2 + 4        (bf16)

which for the 335 M weights of rank 128 on a 7B is 5.4 or 3.4 GB against 2.0 GB. Gradients stay fp32
there: what a micro-batch adds to a sum in bf16 is lost where it is below 1/512 of it. `host` takes
18 bytes a weight of host memory, 6.0 GB for those, 10 of them pinned.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, Protocol

import torch

from zephyr_lite.errors import RecipeError
from zephyr_lite.recipe import Training
from zephyr_lite.train.optimizer import make_optimizer

Parameters = dict[str, torch.nn.Parameter]
Place = Literal["device", "host"]
ALIGNED = 64  # weights of a buffer begin at multiples of this: no kernel likes an odd address


class Masters(Protocol):
    """What the loop steps and a checkpoint holds.

    tensors: name -> fp32 master. optimizer: over those, in their order.
    """

    tensors: Parameters
    optimizer: torch.optim.Optimizer

    def step(self, rate: float) -> None:
        """Take the parameters' gradients, step, and clear them; the parameters follow."""
        ...

    def publish(self) -> None:
        """Make the parameters follow masters that were written to."""
        ...

    def release(self) -> None:
        """The training is over: the parameters are fp32, as before it, with the masters' values."""
        ...


def make_masters(
    settings: Training, parameters: Parameters, place: Place, dtype: torch.dtype
) -> Masters:
    """Masters of fp32 parameters.

    Args: dtype: what the parameters compute in, under `host`.
    Raises: RecipeError as `check_place`.
    """
    check_place("training", settings, place)
    if place == "host":
        return HostMasters(settings, parameters, dtype)
    return DeviceMasters(parameters, make_optimizer(settings, parameters))


def check_place(stage: str, settings: Training, place: Place) -> None:
    """Raise RecipeError for an optimizer that does not run in host memory."""
    if place == "host" and settings.optimizer != "adamw":
        raise RecipeError(
            f"memory.optimizer: host runs AdamW with 32-bit states, and {stage}.optimizer is "
            f"{settings.optimizer}, which is made for states on the GPU",
            hint=f"set {stage}.optimizer=adamw",
        )


@dataclass
class DeviceMasters:
    """The parameters are their own masters; see `Masters`."""

    tensors: Parameters
    optimizer: torch.optim.Optimizer

    def step(self, rate: float) -> None:
        """See `Masters.step`."""
        _step(self.optimizer, rate)
        self.optimizer.zero_grad(set_to_none=True)

    def publish(self) -> None:
        """See `Masters.publish`: nothing is to be done."""

    def release(self) -> None:
        """See `Masters.release`: nothing is to be done."""


class HostMasters:
    """Masters, gradients and states in host memory; see `Masters`.

    What is transferred lies in one buffer a kind, pinned where the device is a GPU. The parameters
    stay the same objects, so that whatever holds them computes with the copies.
    """

    def __init__(self, settings: Training, parameters: Parameters, dtype: torch.dtype) -> None:
        self._parameters, self._places = parameters, {}
        total = 0
        for name, parameter in parameters.items():
            self._places[name] = slice(total, total + parameter.numel())
            total += -(-parameter.numel() // ALIGNED) * ALIGNED
        device = next(iter(parameters.values())).device
        pinned = device.type == "cuda"
        self._masters_W = torch.zeros(total, pin_memory=pinned)
        self._gradients_W = torch.zeros(total, pin_memory=pinned)
        is_exact = dtype == torch.float32
        self._rounded_W = (
            self._masters_W if is_exact else torch.zeros(total, dtype=dtype, pin_memory=pinned)
        )
        self._copies_W = torch.zeros(total, dtype=dtype, device=device)
        self.tensors = self._take_masters()
        self._device_gradients_W = torch.zeros(total, device=device)
        for _, parameter, place in self._each():
            parameter.grad_dtype = torch.float32  # autograd then adds up in fp32
            parameter.grad = self._device_gradients_W[place].view_as(parameter)
        self.optimizer = make_optimizer(settings, self.tensors)
        self.publish()

    def step(self, rate: float) -> None:
        """See `Masters.step`."""
        self._gradients_W.copy_(self._device_gradients_W)
        _step(self.optimizer, rate)
        self.publish()
        self._device_gradients_W.zero_()

    def publish(self) -> None:
        """See `Masters.publish`."""
        if self._rounded_W is not self._masters_W:
            self._rounded_W.copy_(self._masters_W)
        self._copies_W.copy_(self._rounded_W)

    def release(self) -> None:
        """See `Masters.release`; the buffers on the device are given up."""
        device = self._copies_W.device
        self._device_gradients_W = torch.empty(0)
        for name, parameter, _ in self._each():
            parameter.grad = None
            parameter.data = self.tensors[name].detach().to(device)
            parameter.grad_dtype = torch.float32
        self._copies_W = torch.empty(0)

    def _take_masters(self) -> Parameters:
        """Move the values to host memory, one tensor after the other; parameters become copies."""
        masters: Parameters = {}
        for name, parameter, place in self._each():
            master = torch.nn.Parameter(self._masters_W[place].view_as(parameter))
            with torch.no_grad():
                master.copy_(parameter)
            master.grad = self._gradients_W[place].view_as(master)
            parameter.grad = None
            parameter.data = self._copies_W[place].view_as(parameter)
            masters[name] = master
        return masters

    def _each(self) -> Iterator[tuple[str, torch.nn.Parameter, slice]]:
        return ((n, p, self._places[n]) for n, p in self._parameters.items())


def _step(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.step()
