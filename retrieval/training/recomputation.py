"""Activations that are computed again on the way back, instead of kept (Chen et al. 2016, arXiv:1604.06174)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint


def recomputed(function: Callable[[Tensor], Tensor], rows: Tensor, model: nn.Module) -> Tensor:
    """``function(rows)``, of which nothing but the rows is kept until its gradient is asked for.

    The second time it draws the same random numbers, and the batch norms of ``model`` do not take the rows into their
    running statistics once more.
    """

    def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        return nullcontext(), _statistics_kept(model)

    result: Tensor = checkpoint(function, rows, use_reentrant=False, context_fn=contexts)
    return result


@contextmanager
def _statistics_kept(model: nn.Module) -> Iterator[None]:
    """Batch norms normalise by the batch, as in training, and their running statistics stay as they are.

    By a momentum of zero: without `track_running_stats` they would keep fewer tensors than the first time, which torch
    does not take for the same computation.
    """
    norms = [norm for norm in model.modules() if isinstance(norm, _BatchNorm) and norm.training]
    before = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm in norms:
        norm.momentum = 0.0
        if norm.num_batches_tracked is not None:
            norm.num_batches_tracked = norm.num_batches_tracked.clone()
    try:
        yield
    finally:
        for norm, (momentum, count) in zip(norms, before, strict=True):
            norm.momentum, norm.num_batches_tracked = momentum, count
