"""Averages of weights: over the steps of a run (EMA), and between its start and its end (WiSE-FT)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from retrieval.errors import DataError, ModelError

_SLACK = 1e-9  # of a score: a fall by exactly the loss allowed, as computers subtract


class WeightAverage:
    """The exponential moving average of what a model learns (Polyak & Juditsky 1992), for evaluation and export.

    It holds the parameters that are trained and the buffers that are saved: numbers with a fraction are averaged, in
    float32 at least; counters and other integers are the latest ones. Frozen parameters are left to the model.
    """

    def __init__(self, model: nn.Module, decay: float = 0.999) -> None:
        """Start from the model as it is.

        Args:
            model: with the parameters to train already chosen, on the device where it stays.
            decay: how much of the average stays at each step, in [0, 1); less at first, see :meth:`update`.
        """
        if not 0 <= decay < 1:
            raise DataError(f"the average's decay must be from 0 to less than 1, not {decay:g}")
        self.decay, self.updates = decay, 0
        self._average = {name: _wide(value).clone() for name, value in learnt(model).items()}

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Take in the weights after a step: average = d * average + (1 - d) * weights.

        At the t-th update, counted from 1, d is min(decay, (1 + t) / (10 + t)): so the start is forgotten within the
        first steps.
        """
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        for name, value in learnt(model, self._average).items():
            if value.is_floating_point():
                self._average[name].lerp_(_wide(value), 1 - decay)
            else:
                self._average[name].copy_(value)

    @contextmanager
    def applied(self, model: nn.Module) -> Iterator[None]:
        """Give the model the averaged weights; afterwards, and after an error, it has its own back bit for bit.

        Not for steps or updates inside: they would be lost.
        """
        live = learnt(model, self._average)
        own = {name: value.clone() for name, value in live.items()}
        _write(live, self._average)
        try:
            yield
        finally:
            _write(live, own)

    def state_dict(self) -> dict[str, Tensor]:
        """Flat, of tensors alone, as safetensors has it: ``updates``, and ``average.<name>`` of each weight."""
        state = {f"average.{name}": value.clone() for name, value in self._average.items()}
        return {"updates": torch.tensor(self.updates), **state}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from a :meth:`state_dict`, bit for bit.

        Raises:
            ModelError: it is of other weights.
        """
        values = {name.removeprefix("average."): value for name, value in state.items() if name != "updates"}
        _check_same(self._average, values)
        _write(self._average, values)
        self.updates = int(state["updates"])


@torch.no_grad()
def interpolated(start: Mapping[str, Tensor], end: Mapping[str, Tensor], share: float) -> dict[str, Tensor]:
    """A state dict between two: (1 - share) * start + share * end (WiSE-FT, Wortsman et al. 2022, arXiv:2109.01903).

    Share 0 gives the start and 1 the end, bit for bit. Integers (batch norm's counters) are the end's but at share 0.
    Merge LoRA updates first.

    Raises:
        DataError: the share is outside [0, 1].
        ModelError: the two are of different models.
    """
    if not 0 <= share <= 1:
        raise DataError(f"the share must be from 0 to 1, not {share:g}")
    _check_same(start, end)
    if share in (0, 1):
        return {name: value.clone() for name, value in (end if share else start).items()}
    return {
        name: torch.lerp(_wide(first), _wide(end[name]), share).to(first.dtype)
        if first.is_floating_point()
        else end[name].clone()
        for name, first in start.items()
    }


@dataclass(frozen=True)
class Scores:
    """How good a model is, higher is better: on what it is trained for, and on what it must not forget."""

    target: float
    held_out: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Try:
    """One share of the trained weights, and what it scored."""

    share: float
    scores: Scores
    forgets: tuple[str, ...]  # the held-out scores that fall by more than is allowed


@dataclass(frozen=True)
class Interpolation:
    """The share chosen, why, and everything that was tried, from the smallest share to the largest."""

    share: float
    reason: str
    tries: tuple[Try, ...]


def choose_interpolation(shares: Iterable[float], score: Callable[[float], Scores], max_loss: float) -> Interpolation:
    """Mix as much of the start back in as the target likes best, and as little forgetting allows.

    Chosen is the share with the highest target score among those at which no held-out score is more than ``max_loss``
    below the start's; of equal ones the smallest. The start itself, share 0, is always tried and always allowed.

    Args:
        shares: of the trained weights, from 0 to 1.
        score: of the model at a share; called once for each, the start first, then in rising order.
        max_loss: how far a held-out score may fall, in its own unit; infinity: as far as it will.

    Raises:
        DataError: a share outside [0, 1], no share besides 0, a negative ``max_loss``, or a try without one of the
            start's held-out scores.
    """
    wanted = sorted({0.0, *map(float, shares)})
    if not all(0 <= share <= 1 for share in wanted) or len(wanted) < 2 or not max_loss >= 0:
        raise DataError(
            "interpolation needs shares from 0 to 1, one of them more than 0, and a loss allowed of 0 or more"
        )
    start = score(0.0)
    tries = [Try(0.0, start, ())]
    for share in wanted[1:]:
        scores = score(share)
        tries.append(Try(share, scores, _forgotten(start.held_out, scores.held_out, max_loss)))
    allowed = [one for one in tries if not one.forgets]
    best = max(allowed, key=lambda one: -math.inf if math.isnan(one.scores.target) else one.scores.target)  # the first
    return Interpolation(best.share, _reason(best, allowed, tries, max_loss), tuple(tries))


def _forgotten(before: Mapping[str, float], after: Mapping[str, float], max_loss: float) -> tuple[str, ...]:
    missing = sorted(before.keys() - after.keys())
    if missing:
        raise DataError(f"there is no held-out score {missing[0]!r} of the mixed model to compare with the start's")
    # a score that is no number is one that fell
    return tuple(name for name, value in before.items() if not value - after[name] <= max_loss + _SLACK)


def _reason(best: Try, allowed: list[Try], tries: list[Try], max_loss: float) -> str:
    if len(allowed) == 1:
        names = ", ".join(sorted({name for one in tries for name in one.forgets}))
        return (
            f"the start: every share of the trained weights loses more than {max_loss:g} of a held-out score ({names})"
        )
    if best.share == 0:
        return "the start: no share that is allowed scores higher on the target"
    refused = len(tries) - len(allowed)
    return "the highest target score" + (f"; {refused} of {len(tries)} shares forget too much" if refused else "")


# ---- state dicts -----------------------------------------------------------------------------------------------------


def learnt(model: nn.Module, names: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """The model's own trained parameters, each under one name, and saved buffers; or those of these names."""
    state = model.state_dict()  # detached, the same memory
    if names is None:
        trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        other = {name for name, _ in model.named_parameters(remove_duplicate=False)} - trained
        return {name: value for name, value in state.items() if name not in other}
    _check_same(names, {name: value for name, value in state.items() if name in names})
    return {name: state[name] for name in names}


def _wide(value: Tensor) -> Tensor:
    """In float32 at least: in half precision an average stands still."""
    return value.to(torch.promote_types(value.dtype, torch.float32)) if value.is_floating_point() else value


@torch.no_grad()
def _write(into: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    for name, tensor in into.items():
        tensor.copy_(values[name])


def _check_same(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> None:
    odd = sorted(first.keys() ^ second.keys()) or sorted(k for k, v in first.items() if v.shape != second[k].shape)
    if odd:
        raise ModelError(f"the weights are not of one model: {odd[0]} is missing in one or of another size")
