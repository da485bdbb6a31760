"""Several processes that learn as one: torchrun starts them, and each takes its share of every batch.

All of them plan the same batches from the same seed. A process puts its own share of the pictures and sentences through
the towers, and their features are gathered; the heads, and the loss over the whole batch, are computed alike in all.
So a step's gradients are those of one process with the whole batch. (Gathered features: as CLIP was trained, Radford et
al. 2021, arXiv:2103.00020, section 2.5.)

Outside of :func:`joined` there is one process, and every function here gives what it would be then.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.rendezvous import rendezvous
from torch.nn.modules.batchnorm import _BatchNorm

from retrieval.embedding import Progress
from retrieval.errors import DataError, UsageError
from retrieval.pairs import Record
from retrieval.training.config import TrainConfig
from retrieval.training.run import Checkpoint, RunFolder
from retrieval.training.streaming import PictureRows

if TYPE_CHECKING:
    from retrieval.training.data import Towers  # which asks this module for a process's share

_PATIENCE = timedelta(days=1)  # for a process that has more to read or to encode; if one ends, torchrun ends them all
_BUCKET = 1 << 23  # numbers sent at a time: 32 MB


def _launched() -> bool:
    return dist.is_torchelastic_launched() and int(os.environ["WORLD_SIZE"]) > 1


def process_count() -> int:
    """How many processes learn together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_first() -> bool:
    """Whether this process is the one that writes, measures and speaks; before and after :func:`joined` as well."""
    if dist.is_initialized():
        return dist.get_rank() == 0
    return not _launched() or int(os.environ["RANK"]) == 0


def own_share(count: int) -> range:
    """Which of so many rows are this process's; shares differ by one row at most, and may be empty."""
    if not dist.is_initialized():
        return range(count)
    rank, processes = dist.get_rank(), dist.get_world_size()
    return range(count * rank // processes, count * (rank + 1) // processes)


@contextmanager
def joined(device: str) -> Iterator[None]:
    """In the block, be one of the processes that torchrun started; on CUDA, with the GPU of its number.

    Nothing happens where torchrun started none, or where the caller has made a process group of its own.

    Raises:
        UsageError: a device with a number, or fewer GPUs than processes.
    """
    if dist.is_initialized() or not _launched():
        yield
        return
    cuda = torch.device(device).type == "cuda"
    if cuda:
        number = int(os.environ["LOCAL_RANK"])
        if torch.device(device).index is not None:
            raise UsageError(f"device {device} is one GPU, and each process takes its own: say cuda")
        if number >= torch.cuda.device_count():
            raise UsageError(f"there are {torch.cuda.device_count()} GPUs: start as many processes")
        torch.cuda.set_device(number)  # what "cuda" means from now on
    dist.init_process_group("nccl" if cuda else "gloo", timeout=_PATIENCE)
    yield  # a group that a process leaves by an error is left as it is: to take it down, it would wait for the others
    dist.destroy_process_group()


@contextmanager
def one_voice() -> Iterator[None]:
    """Of errors in several of torchrun's processes, let the first that happens through; the others exit silently.

    Mostly it is one mistake, seen by all of them; or it is one process's, and the others miss it.
    """
    if not _launched():
        yield
        return
    store, _, _ = next(iter(rendezvous("env://", timeout=_PATIENCE)))
    try:
        yield
    except BaseException:
        try:
            spoken = store.add("diptych: errors", 1) > 1
        except RuntimeError:  # the process that held the store has ended, and not for nothing
            spoken = True
        if spoken:
            raise SystemExit(1) from None
        raise


def _sum(values: Tensor) -> Tensor:
    """Of all processes' values, in place; bit for bit the same in each."""
    if process_count() > 1:
        try:
            dist.all_reduce(values)
        except RuntimeError as error:
            reason = str(error).partition("\n")[0]
            raise DataError(f"another process of this run has ended, or cannot be reached: {reason}") from error
    return values


def wait_for_all() -> None:
    """Go on when every process has come here."""
    if process_count() > 1:
        _sum(torch.zeros((), device="cuda" if dist.get_backend() == "nccl" else "cpu")).item()


def check_alike(digest: Tensor) -> None:
    """DataError if the processes have read different data. ``digest``: (n,) uint8."""
    device = "cuda" if process_count() > 1 and dist.get_backend() == "nccl" else "cpu"
    own = digest.to(device, torch.int64)
    # Not the sum alone, which may be right by chance where every number is not.
    if not torch.equal(_sum(own.clone()), own * process_count()) or not torch.equal(
        _sum(own.square()), own.square() * process_count()
    ):
        raise DataError("the processes have read different pictures or captions: give all of them the same data")


class _Gather(torch.autograd.Function):
    """Rows of all processes; on the way back, the gradient of the own ones.

    Times the number of processes, for all gradients are averaged in the end: those of what every process computes alike
    stay what they are, and those of the towers become the sum over the shares.
    """

    @staticmethod
    def forward(context: Any, rows: Tensor, own: range, count: int) -> Tensor:
        context.own = own
        whole = rows.new_zeros((count, *rows.shape[1:]))
        whole[own.start : own.stop] = rows
        return _sum(whole)

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return gradient[context.own.start : context.own.stop] * process_count(), None, None


class SharedTowers:
    """Towers of which each process passes its own share of the rows, and gets the features of all.

    A share draws random numbers of its own (augmentation, hidden words, dropout in a tower). What comes behind draws
    the same in every process, so that all compute the same loss, and a checkpoint of the first is one of all.
    """

    def __init__(self, towers: Towers) -> None:
        self.towers = towers

    def pictures(
        self, records: Sequence[Record], progress: Progress | None = None
    ) -> tuple[list[PictureRows], Mapping[int, str]]:
        """Of all records, in every process: batches are drawn from all of them."""
        return self.towers.pictures(records, progress)

    def sentences(self, texts: Sequence[str]) -> Tensor:
        """Of all texts, in every process."""
        return self.towers.sentences(texts)

    def image_features(self, pictures: Tensor) -> Tensor:
        """Rows as kept -> (B, F). Those that are not the process's own are only counted."""
        return self._shared(self.towers.image_features, pictures)

    def text_features(self, sentences: Tensor) -> Tensor:
        """Rows as kept -> (B, G)."""
        return self._shared(self.towers.text_features, sentences)

    def _shared(self, features: Callable[[Tensor], Tensor], rows: Tensor) -> Tensor:
        own = own_share(len(rows))
        # Where there are fewer rows than processes, one goes through for nothing: its gradients are zeros, not missing.
        mine = rows[own.start : own.stop] if own else rows[:1]
        seed = int(torch.randint(1 << 62, ()))  # the same in every process
        with torch.random.fork_rng([torch.cuda.current_device()] if rows.is_cuda else []):
            torch.manual_seed(seed + own.start)
            passed = features(mine)[: len(own)]
        whole: Tensor = _Gather.apply(passed, own, len(rows))
        return whole


def average_gradients(optimizer: torch.optim.Optimizer) -> None:
    """Give every process the mean of all processes' gradients, and so the same weights after the step."""
    if process_count() == 1:
        return
    weights = (weight for group in optimizer.param_groups for weight in group["params"])
    _average([weight.grad for weight in weights if weight.grad is not None])


def average_statistics(model: nn.Module) -> None:
    """The same for the running statistics of batch norms that learn; each process has taken in those of its share."""
    if process_count() == 1:
        return
    norms = (norm for norm in model.modules() if isinstance(norm, _BatchNorm) and norm.training)
    _average([value for norm in norms for value in (norm.running_mean, norm.running_var) if value is not None])


@torch.no_grad()
def _average(values: Sequence[Tensor]) -> None:
    for bucket in _buckets(values):
        flat = _sum(torch.cat([value.flatten() for value in bucket])) / process_count()
        for value, mean in zip(bucket, torch.split(flat, [value.numel() for value in bucket]), strict=True):
            value.copy_(mean.view_as(value))


def _buckets(values: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """Few messages instead of many, and yet no copy of everything."""
    bucket: list[Tensor] = []
    for value in values:
        if bucket and sum(one.numel() for one in bucket) + value.numel() > _BUCKET:
            yield bucket
            bucket = []
        bucket.append(value)
    if bucket:
        yield bucket


class FollowedFolder(RunFolder):
    """The run folder as the processes see it that do not write: the log is in memory, and nothing else is kept."""

    def __init__(self, path: Path, config: TrainConfig) -> None:
        super().__init__(path, config)
        self.lines: list[dict[str, Any]] = []

    def log(self, line: Mapping[str, Any]) -> None:
        """Keep a line in memory."""
        self.lines.append(dict(line))

    def read_log(self) -> list[dict[str, Any]]:
        """All lines so far."""
        return [*self.lines]

    def save(self, step: int, tensors: Mapping[str, Tensor], random: np.random.Generator) -> None:
        """Nothing: the first process does."""

    def load(self) -> Checkpoint | None:
        """Read the checkpoint, which is the first process's as well."""
        checkpoint = self.read_checkpoint()
        self.lines = super().read_log()[: checkpoint.log] if checkpoint else []
        return checkpoint

    def discard_unless_begun(self) -> None:
        """Nothing: the first process does."""
