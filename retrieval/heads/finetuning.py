"""Fine-tuning: a fusion network's gradients sent on into the last blocks of the towers whose vectors it takes.

It begins with a network that was fitted on cached vectors and with the towers as they are (probe first, then tune:
Kumar et al. 2022, arXiv:2202.10054). What validates best on the way is kept, and written as a bundle.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from retrieval.bundle import Bundle
from retrieval.embedding import Progress
from retrieval.encoders import Precision, find_bundle
from retrieval.heads.modalities import FURTHEST, IMAGE, TEXT, Scaling
from retrieval.heads.networks import FittedNetwork, Objective, Recipe, learn, right_tensor, tensors
from retrieval.heads.problem import Part, Problem
from retrieval.pairs import Example, Record
from retrieval.training.activations import PartlyFrozenTowers
from retrieval.training.data import Towers
from retrieval.training.fit import plain_groups
from retrieval.training.models import StartModel, described, software, start_from
from retrieval.training.parameters import summary, trainable_groups
from retrieval.training.pictures import TrainedTowers
from retrieval.training.streaming import PictureRows
from retrieval.training.towers import DualEncoder

PRECISION: Precision = "fp16"  # of the stored weights: vectors are those of fp32 to three digits, in half the room
_RECIPE = Recipe(epochs=8, batch=64, learning_rate=3e-4)  # the network has learnt already
_HEAD_RATE, _IMAGE_RATE, _TEXT_RATE = 1e-4, 1e-4, 3e-5  # of the projections, and of each tower's blocks
_FEWEST, _PATIENCE = 40, 2  # steps; passes without a better one
_HELD = 4e9  # bytes of activations and pictures
_PART = 64  # rows scored at a time


@dataclass(frozen=True, eq=False)
class Finetuned:
    """A network, and the towers that belong to it.

    Attributes:
        fitted: the network.
        bundle: the towers, as they were written.
        parameters: numbers that learnt.
    """

    fitted: FittedNetwork
    bundle: Bundle
    parameters: int


def finetune(
    spec: str,
    start: FittedNetwork,
    problem: Problem,
    scaling: Scaling,
    train: Sequence[Example],
    val: Sequence[Example],
    folder: Path,
    *,
    name: str,
    blocks: int = 1,
    recipe: Recipe = _RECIPE,
    progress: Progress | None = None,
) -> Finetuned:
    """Train a network and the last blocks of its towers; write these into a new folder.

    Where it can be, what lies below the blocks is computed once and held, and pictures are seen as they are; else (the
    towers are open_clip's, or there is no room) whole towers are computed at each step, and pictures are cropped and
    coloured anew. Treatments of rare classes that draw or make up rows are class weights here.

    Args:
        spec: the model whose vectors the network has learnt from.
        start: the network to begin with; it stays as it is.
        problem: what it was fitted to; image and text are computed anew from the examples.
        scaling: of its inputs.
        train: the rows of ``problem.train``.
        val: those of ``problem.val``.
        folder: where the bundle goes; it must not exist.
        name: of the bundle.
        blocks: how many of each tower, from the top.
        recipe: passes, batch, the network's rate, and decay.
        progress: called with (done, in all) of the pictures first, then of the steps.

    Raises:
        DataError: the loss is no number any more, or pictures cannot be read any more.
        ModelError: the model has no towers that can be trained, or too few blocks.
    """
    with torch.random.fork_rng(devices=[]):  # networks are made at random before they get their weights
        model = start_from(spec)
    model.model.to(problem.device)
    groups = trainable_groups(
        model.model.trained,
        f"last-{blocks}",
        learning_rate=_HEAD_RATE,
        weight_decay=recipe.weight_decay,
        image_learning_rate=_IMAGE_RATE,
        text_learning_rate=_TEXT_RATE,
    )
    network = copy.deepcopy(start.network).to(problem.device)
    towers = _towers(model, blocks, problem.device, len(train) + len(val))
    joint = _Joint(model, network, towers, problem.train.inputs.names, scaling, problem.device)
    sets = {}
    for split, examples, part in (("train", train, problem.train), ("val", val, problem.val)):
        sets[split] = joint.rows(examples, part, problem, progress)
    treatment = problem.treatment if problem.treatment in ("none", "focal") else "class-weights"
    objective = Objective(network, replace(problem, treatment=treatment), problem.train, recipe)
    done = 0

    def step(rows: Tensor) -> Tensor:
        nonlocal done
        done += 1
        if progress:
            progress(done, max(_FEWEST, recipe.epochs * max(1, len(train) // recipe.batch)))
        batch = sets["train"]
        return objective.loss(joint.values(batch, rows), batch.present[rows], batch.right[rows])

    def score() -> float:
        batch = sets["val"]
        parts = torch.split(torch.arange(len(val)), _PART)
        logits = torch.cat([network(joint.values(batch, rows), batch.present[rows])[0] for rows in parts])
        return -float(objective.fused(logits, batch.right))

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(problem.seed)
        learn(
            joint,
            step,
            score,
            len(train),
            recipe,
            problem.seed,
            fewest=_FEWEST,
            patience=_PATIENCE,
            before_step=objective.slow_down,
            groups=[*groups, *plain_groups(network, recipe.learning_rate, recipe.weight_decay)],
        )
    counts = summary(model.model.trained)
    learnt = counts.image.trained + counts.text.trained + sum(weight.numel() for weight in network.parameters())
    first = find_bundle(spec)
    folder.mkdir()
    bundle = model.write(
        folder,
        name,
        PRECISION,
        licence=Bundle.load(first).licence if first else "",
        training={"start": described(spec), "blocks": blocks, "settings": vars(recipe), "software": software()},
    )
    return Finetuned(FittedNetwork(start.target, network.cpu().eval(), start.build), bundle, learnt)


def _towers(model: StartModel, blocks: int, device: str, count: int) -> Towers:
    """Those that hold what lies below the blocks, where that can be done."""
    if isinstance(model.model, DualEncoder):
        cut = PartlyFrozenTowers(model, blocks, device)
        if cut.needed(count, count) <= _HELD:
            return cut
    return TrainedTowers(
        model.model,
        model.preprocessing,
        model.tokenizer_json,
        model.context_length,
        device,
        _PART,
        0.0,
        trim=isinstance(model.model, DualEncoder),
        in_memory=_HELD,
    )


@dataclass(frozen=True, eq=False)
class _Set:
    """Rows as the network and the towers take them."""

    tables: Mapping[str, Tensor]  # of columns
    present: Tensor  # (N, M)
    right: Tensor
    kept: Mapping[str, PictureRows]  # of image and text: rows of the towers
    place: Mapping[str, NDArray[np.int64]]  # (N,) each row's among them, -1 without


class _Joint(nn.Module):
    """A network on the vectors of two towers: everything that learns in one place."""

    def __init__(
        self,
        model: StartModel,
        network: nn.Module,
        towers: Towers,
        names: tuple[str, ...],
        scaling: Scaling,
        device: str,
    ) -> None:
        super().__init__()
        self.encoder, self.network = model.model, network
        self.towers, self.names, self.dim = towers, names, model.dim
        self.mean = {name: torch.from_numpy(scaling.mean[name]).to(device) for name in names}
        self.std = {name: torch.from_numpy(scaling.std[name]).to(device) for name in names}

    def rows(self, examples: Sequence[Example], part: Part, problem: Problem, progress: Progress | None) -> _Set:
        """Prepare rows. A picture that cannot be read now is missing, though the cache may have its vector."""
        values, present = tensors(part.inputs, problem.device)
        kept: dict[str, PictureRows] = {}
        place = {}
        for i, name in enumerate(self.names):
            if name not in (IMAGE, TEXT):
                continue
            there = np.flatnonzero(part.inputs.present[:, i])
            if name == IMAGE and len(there):
                records = [Record(image) for row in there.tolist() if (image := examples[row].image) is not None]
                (kept[name],), unreadable = self.towers.pictures(records, progress)
                present[there[[*unreadable]], i] = 0
                there = np.delete(there, [*unreadable])
            elif len(there):
                kept[name] = self.towers.sentences([examples[row].text for row in there.tolist()])
            place[name] = np.full(len(examples), -1, np.int64)
            place[name][there] = np.arange(len(there))
        tables = {name: table for name, table in zip(self.names, values, strict=True) if name not in place}
        right = right_tensor(problem.target, part.right, problem.device)
        return _Set(tables, present, right, kept, place)

    def values(self, batch: _Set, rows: Tensor) -> list[Tensor]:
        """The M standardised tables of some rows, as :meth:`Scaling.apply` makes them of stored vectors."""
        return [
            batch.tables[name][rows] if name in batch.tables else self._vectors(name, batch, rows)
            for name in self.names
        ]

    def _vectors(self, name: str, batch: _Set, rows: Tensor) -> Tensor:
        place = batch.place[name][rows.numpy()]
        there = torch.from_numpy(place >= 0)
        out = torch.zeros((len(rows), self.dim), device=batch.present.device)
        if not there.any():
            return out
        kept = batch.kept[name][place[place >= 0]]
        if name == IMAGE:
            vectors = self.encoder.image.head(self.towers.image_features(kept))
        else:
            vectors = self.encoder.text.head(self.towers.text_features(kept))
        scaled = ((vectors - self.mean[name]) / self.std[name]).clamp(-FURTHEST, FURTHEST)
        return out.index_put((there.nonzero()[:, 0].to(out.device),), scaled)
