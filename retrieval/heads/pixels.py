"""A small CNN on the pixels, from scratch: what can be had of the pictures without any pretrained model.

It is only measured beside the others, and never kept: it needs the pictures themselves, not stored vectors.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from retrieval.embedding import Progress, try_all
from retrieval.errors import ImageError
from retrieval.heads.networks import Recipe, learn, loss_function, right_tensor
from retrieval.heads.problem import Problem, link
from retrieval.heads.scores import Outputs
from retrieval.heads.targets import Target
from retrieval.images import read_photo
from retrieval.pairs import Example, Picture
from retrieval.training.classic import CNN

_SIDE = 48  # pixels
_RECIPE = Recipe(epochs=12, batch=64)
_FEWEST, _PATIENCE = 200, 4  # steps; scores on val without a better one
_DROPOUT = 0.3
_GREY = 127  # where a row has no picture
_TOLD_EVERY = 64  # pictures
_PART = 512  # pictures predicted at a time

Pixels = NDArray[np.uint8]  # (N, side, side, 3)


def read_pixels(examples: Sequence[Example], progress: Progress | None = None) -> Pixels:
    """The pictures squashed to squares; grey where a row has none, or one that cannot be read."""
    out = np.full((len(examples), _SIDE, _SIDE, 3), _GREY, np.uint8)
    shown = [row for row, example in enumerate(examples) if example.image is not None]
    pixels, readable = read_squares([examples[row].image for row in shown], _SIDE, progress)  # type: ignore[misc]
    out[np.array(shown, np.int64)[readable]] = pixels[readable]
    return out


def read_squares(
    pictures: Sequence[Picture], side: int, progress: Progress | None = None
) -> tuple[Pixels, NDArray[np.bool_]]:
    """Pictures squashed to (N, side, side, 3), and which of them can be read (N,); the others are black."""
    out, readable = np.zeros((len(pictures), side, side, 3), np.uint8), np.zeros(len(pictures), np.bool_)

    def prepare(_: Picture, data: bytes) -> Pixels:
        return np.asarray(read_photo(data).image.resize((side, side), Image.Resampling.BILINEAR), np.uint8)

    for row, (_, pixels) in enumerate(try_all(prepare, pictures)):
        if not isinstance(pixels, ImageError):
            out[row], readable[row] = pixels, True
        if progress and (row + 1) % _TOLD_EVERY == 0:
            progress(row + 1, len(pictures))
    return out, readable


@dataclass(frozen=True)
class PixelCNN:
    """The CNN as a baseline."""

    stage: str = "alone"
    about: str = "A small CNN on 48 × 48 pixels, from scratch."

    def fit(self, problem: Problem, train: Pixels, val: Pixels) -> FittedCNN:
        """Train one; pictures are mirrored at random. Kept is what validates best on the way."""
        target, device = problem.target, problem.device
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(problem.seed)
            network = _Net(target.outputs).to(device)
            rights = right_tensor(target, problem.train.right, device)
            val_right = right_tensor(target, problem.val.right, device)
            loss_of = loss_function(problem, problem.train)
            pixels = torch.from_numpy(train)
            random = np.random.default_rng(problem.seed)

            def step(rows: Tensor) -> Tensor:
                shown = pixels[rows]
                mirrored = torch.from_numpy(random.random(len(rows)) < 0.5)
                shown = torch.where(mirrored[:, None, None, None], shown.flip(2), shown)
                loss: Tensor = loss_of(network(_normalised(shown, device)), rights[rows])
                return loss

            def score() -> float:
                return -float(loss_of(_logits(network, val, device), val_right))

            learn(network, step, score, len(train), _RECIPE, problem.seed, fewest=_FEWEST, patience=_PATIENCE)
        return FittedCNN(target, network, device)


@dataclass(frozen=True, eq=False)
class FittedCNN:
    """A trained CNN."""

    target: Target
    network: nn.Module
    device: str

    @property
    def parameters(self) -> int:
        """Numbers that were learnt."""
        return sum(weight.numel() for weight in self.network.parameters())

    def predict(self, pixels: Pixels) -> Outputs:
        """(N, 48, 48, 3) -> (N, C), see :class:`retrieval.heads.problem.Fitted`."""
        with torch.inference_mode():
            return link(self.target, _logits(self.network, pixels, self.device).double().cpu().numpy())


class _Net(nn.Module):
    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.trunk = CNN()
        self.out = nn.Linear(CNN.features, outputs)

    def forward(self, pixels: Tensor) -> Tensor:
        logits: Tensor = self.out(F.dropout(self.trunk(pixels), _DROPOUT, self.training))
        return logits


def _logits(network: nn.Module, pixels: Pixels, device: str) -> Tensor:
    network.eval()
    parts = [pixels[i : i + _PART] for i in range(0, len(pixels), _PART)]
    return torch.cat([network(_normalised(torch.from_numpy(part), device)) for part in parts])


def _normalised(pixels: Tensor, device: str) -> Tensor:
    """(B, H, W, 3) bytes -> (B, 3, H, W) of about mean 0 and deviation 1."""
    return (pixels.to(device).permute(0, 3, 1, 2).float() / 255 - 0.45) / 0.25
