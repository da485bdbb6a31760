"""The arithmetic of towers in training: automatic mixed precision (Micikevicius et al. 2018, arXiv:1710.03740).

Weights, optimiser, heads and loss are float32 throughout; what is chosen is how the towers multiply.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from retrieval.errors import DataError

AMP: Mapping[str, torch.dtype | None] = {
    "auto": None,  # bf16 on CUDA, fp32 elsewhere: on most CPUs less gains nothing
    "fp32": None,
    "bf16": torch.bfloat16,  # has fp32's range, so that nothing needs scaling
    "fp16": torch.float16,  # has not: see `LossScale`
}


def autocast(amp: str, device: torch.device) -> torch.autocast:
    """The context in which a tower computes; ``amp`` is one of :data:`AMP`."""
    dtype = torch.bfloat16 if amp == "auto" and device.type == "cuda" else AMP[amp]
    return torch.autocast(device.type, dtype or torch.bfloat16, enabled=dtype is not None)


class LossScale:
    """Keeps fp16's small gradients from becoming zero: the loss is scaled up, the gradients down again.

    Gradients that overflow cost a step, not the run: it is left out, and the scale is halved. With any other
    arithmetic than fp16 nothing is scaled, and no step is left out.
    """

    def __init__(self, amp: str, device: str) -> None:
        self._scaler = torch.amp.GradScaler(torch.device(device).type, enabled=amp == "fp16")

    def backward(self, loss: Tensor) -> None:
        """``loss.backward()``, with the gradients scaled up."""
        self._scaler.scale(loss).backward()  # type: ignore[no-untyped-call]

    def unscale(self, optimizer: torch.optim.Optimizer) -> None:
        """Scale the gradients down again before the step: to be called once, by who wants to see or clip them."""
        self._scaler.unscale_(optimizer)

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        """Take the optimiser's step, unless the gradients are no numbers.

        Raises:
            DataError: they overflow at a scale of 1 as well. That is a divergence; left out for ever, its steps would
                look like a model that learns nothing more.
        """
        self._scaler.step(optimizer)
        self._scaler.update()
        if self._scaler.get_scale() < 1:
            raise DataError("the gradients are no numbers any more, at any scale: try a lower --lr, or --amp bf16")

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint has to hold, by name; empty if nothing is scaled."""
        state = self._scaler.state_dict()
        return {f"amp.{name}": torch.tensor(state[name], dtype=torch.float64) for name in state}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Go on from a :meth:`state`. KeyError when it is not among these tensors."""
        state = self._scaler.state_dict()
        self._scaler.load_state_dict({name: type(state[name])(tensors[f"amp.{name}"].item()) for name in state})
