"""The loop that everything trained by gradients shares: the contrastive run, and the heads on stored embeddings.

`fit(step, batches, config)` is one pass over the batches, and yields after each, so that whoever calls it logs,
validates and saves as it likes. `fit_best` is the whole of it for a small model: it keeps what validates best.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor, nn

from retrieval.errors import DataError
from retrieval.training.amp import LossScale
from retrieval.training.averaging import WeightAverage
from retrieval.training.parameters import Group, train_mode

Batch = TypeVar("Batch")


def _nothing() -> None:
    pass


@dataclass(frozen=True, eq=False)
class FitConfig:
    """What learns, and how.

    Attributes:
        weights: the model; what of it is frozen stays in eval mode.
        optimizer: each of its groups has its ``peak`` learning rate beside the current one, see :func:`adamw`.
        total: steps in all: the rate ends near zero with the last (cosine).
        warmup: steps over which the rate rises to its peak; a tenth of all at most.
        begun: steps already done, where a run goes on.
        clip: the largest norm of all gradients together; 0: as they are.
        loss_scale: of the arithmetic.
        average: of the weights, updated after each step.
        hint: what else helps when the loss is no number any more, after "try a lower learning rate".
        before_step: called with the gradients there, after each backward pass.
        after_step: called with the weights changed, before they enter the average.
    """

    weights: nn.Module
    optimizer: torch.optim.Optimizer
    total: int
    warmup: int = 0
    begun: int = 0
    clip: float = 0.0
    loss_scale: LossScale = field(default_factory=lambda: LossScale("fp32", "cpu"))
    average: WeightAverage | None = None
    hint: str = ""
    before_step: Callable[[], None] = _nothing
    after_step: Callable[[], None] = _nothing


def fit(step: Callable[[Batch], Tensor], batches: Iterable[Batch], config: FitConfig) -> Iterator[tuple[int, float]]:
    """Take one optimiser step for each batch; yield (steps done, loss) after it. In eval mode at the end.

    Args:
        step: the loss of a batch, a scalar.
        batches: whatever ``step`` takes. The model is put into training mode after each is drawn.
        config: what learns, and how.

    Raises:
        DataError: the loss is no number any more.
    """
    for number, batch in enumerate(batches, config.begun + 1):
        train_mode(config.weights)  # what is frozen stays as it is in use
        for group in config.optimizer.param_groups:
            group["lr"] = rate_at(group["peak"], number, config.total, config.warmup)
        loss = step(batch)
        check_finite(loss, step=number, hint=config.hint)
        config.optimizer.zero_grad()
        config.loss_scale.backward(loss)
        config.before_step()
        if config.clip:
            config.loss_scale.unscale(config.optimizer)
            nn.utils.clip_grad_norm_(
                [weight for group in config.optimizer.param_groups for weight in group["params"]], config.clip
            )
        config.loss_scale.step(config.optimizer)
        config.after_step()
        if config.average:
            config.average.update(config.weights)
        yield number, float(loss.detach())
    config.weights.eval()


def rate_at(peak: float, step: int, total: int, warmup: int) -> float:
    """The learning rate at a step, counted from 1: a linear rise to the peak, times half a cosine down to near zero."""
    warm = min(1.0, step / max(1, min(warmup, total // 10)))
    done = step / max(total, 2)  # 0 at the end, and yet a run of a single step learns something
    return peak * warm * (1 + math.cos(math.pi * done)) / 2


def check_finite(*values: Tensor, step: int, hint: str = "") -> None:
    """Refuse what comes of a run that diverges: DataError."""
    if not all(bool(torch.isfinite(value).all()) for value in values):
        raise DataError(f"the loss is no number any more at step {step}: try a lower --lr{hint}")


def adamw(groups: Iterable[Group]) -> torch.optim.AdamW:
    """AdamW over groups with their ``peak`` rates."""
    # Fused: one pass over the weights instead of ten, which is a tenth of a small model's step on a CPU.
    return torch.optim.AdamW([dict(group) for group in groups], fused=True)


def plain_groups(model: nn.Module, learning_rate: float, weight_decay: float) -> list[Group]:
    """All that learns of a small model in two groups: matrices, which decay, and biases, norms and the like, without.

    A model of two towers has groups of its own: :func:`retrieval.training.parameters.trainable_groups`.
    """
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    parts = (
        ("weights", weight_decay, [weight for weight in trained if weight.ndim > 1]),
        ("no decay", 0.0, [weight for weight in trained if weight.ndim < 2]),
    )
    return [
        Group(params=weights, name=name, depth=None, peak=learning_rate, lr=learning_rate, weight_decay=decay)
        for name, decay, weights in parts
        if weights
    ]


def fit_best(
    step: Callable[[Batch], Tensor],
    batches: Iterable[Batch],
    config: FitConfig,
    score: Callable[[], float],
    *,
    every: int,
    patience: int = 0,
) -> tuple[int, float]:
    """Fit, and leave the model with the weights that validated best.

    Args:
        step: see :func:`fit`.
        batches: see :func:`fit`.
        config: see :func:`fit`; with an average, the averaged weights are what is scored and kept.
        score: of the model as it is, in eval mode and without gradients; higher is better. NaN never wins.
        every: steps between two scores; the last step is scored too.
        patience: end after so many scores in a row that are no better; 0: never before the last step.

    Returns:
        The step of the weights that were kept, and their score: of equal ones the first.

    Raises:
        DataError: the loss is no number any more, or no score was a number.
    """
    best, best_step, kept, without = -math.inf, 0, None, 0
    for number, _ in fit(step, batches, config):
        if number % every and number != config.total:
            continue
        config.weights.eval()
        with torch.no_grad(), config.average.applied(config.weights) if config.average else nullcontext():
            value = score()
            if value > best:
                best, best_step, without = value, number, 0
                kept = {name: weight.clone() for name, weight in config.weights.state_dict().items()}
            else:
                without += 1
        if patience and without >= patience:
            break
    if kept is None:
        raise DataError("nothing that was learnt could be validated: the score was never a number")
    config.weights.load_state_dict(kept)
    config.weights.eval()
    return best_step, best
