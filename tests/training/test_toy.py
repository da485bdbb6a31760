"""A toy set is learned by every objective that has negatives; without negatives, everything becomes one point."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import torch.nn.functional as F  # noqa: E402 - torch first
from torch import nn  # noqa: E402

from retrieval.metrics import evaluate_retrieval  # noqa: E402
from retrieval.training.losses import OBJECTIVES  # noqa: E402
from tests.training.drawings import COLOURS, SHAPES, draw_at  # noqa: E402

WORDS = {word: i for i, word in enumerate(("a", "drawing", "of", *COLOURS, *SHAPES))}
NAMES = [(colour, shape) for colour in COLOURS for shape in SHAPES]
CAPTIONS = ("a {} {}", "a drawing of a {} {}")
PICTURES = 64  # of each name, to learn from


def small(colour: str, shape: str, random: np.random.Generator) -> np.ndarray:
    """(3, 32, 32) from -1 to 1, somewhere near the middle, larger or smaller."""
    (x, y), r = random.integers(13, 20, 2).tolist(), int(random.integers(9, 13))
    return np.asarray(draw_at(colour, shape, 32, (x, y), r, 4), np.float32).transpose(2, 0, 1) / 127.5 - 1


@pytest.fixture(scope="module")
def toy():
    """Drawings to learn from, and one of each name that is not among them."""
    random = np.random.default_rng(0)
    drawn = np.stack([[small(*name, random) for _ in range(PICTURES + 1)] for name in NAMES])
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # so little work that sharing it costs more than it gains
    yield SimpleNamespace(train=torch.from_numpy(drawn[:, 1:]), test=torch.from_numpy(drawn[:, 0]))
    torch.set_num_threads(threads)


class Towers(nn.Module):
    """A small convolutional network, a bag of words, and the scale and bias between them."""

    def __init__(self, objective) -> None:
        super().__init__()
        self.image = nn.Sequential(
            nn.Conv2d(3, 16, 3, 2, 1),
            nn.ReLU(),
            nn.Conv2d(16, 32, 3, 2, 1),
            nn.ReLU(),
            nn.Conv2d(32, 48, 3, 2, 1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(48 * 4 * 4, 32),
        )
        self.words = nn.EmbeddingBag(len(WORDS), 32, mode="sum")
        self.text = nn.Sequential(nn.ReLU(), nn.Linear(32, 32))
        self.log_scale = nn.Parameter(torch.tensor(objective.scale).log())
        self.bias = nn.Parameter(torch.tensor(objective.bias))

    def images(self, pixels):
        return F.normalize(self.image(pixels), dim=1)

    def texts(self, captions):
        bags = [[WORDS[word] for word in caption.split()] for caption in captions]
        starts = np.cumsum([0, *map(len, bags[:-1])])
        ids = torch.tensor([word for bag in bags for word in bag])
        return F.normalize(self.text(self.words(ids, torch.from_numpy(starts))), dim=1)


def train(objective, toy, steps=300, rate=3e-3, wrong=0.0):
    """Train on batches of two drawings of each name with a caption each, a share of these with a name drawn at random.

    Returns unit rows of the drawings that it has not seen, and of their names.
    """
    torch.manual_seed(0)
    random = np.random.default_rng(0)
    model = Towers(objective)
    optimizer = torch.optim.Adam(model.parameters())
    owner = torch.arange(len(NAMES)).repeat(2)
    for step in range(steps):
        pixels = toy.train[owner, torch.from_numpy(random.integers(PICTURES, size=len(owner)))]
        said = np.where(random.random(len(owner)) < wrong, random.integers(len(NAMES), size=len(owner)), owner)
        texts = model.texts([CAPTIONS[random.integers(len(CAPTIONS))].format(*NAMES[i]) for i in said])
        loss = objective(model.images(pixels), texts, owner, model.log_scale.exp(), model.bias)
        for group in optimizer.param_groups:
            group["lr"] = rate * (1 - step / steps)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        return model.images(toy.test), model.texts([CAPTIONS[0].format(*name) for name in NAMES])


def hits(images, texts):
    """How often the right one stands first; tied with a wrong one, it does not."""
    scores = evaluate_retrieval(images.numpy(), texts.numpy(), np.arange(len(NAMES)))
    return scores["t2i_hit@1"], scores["i2t_hit@1"]


def mean_cosine(*rows):
    rows = torch.cat(rows)
    return float((rows @ rows.T).mean())


@pytest.mark.parametrize("name", [name for name, objective in OBJECTIVES.items() if objective.negatives])
def test_drawings_are_learned(toy, name):
    images, texts = train(OBJECTIVES[name], toy)
    assert hits(images, texts) == (1.0, 1.0)
    assert mean_cosine(images, texts) < 0.5


def test_without_negatives_everything_becomes_one_point(toy):
    """Captions that say something of the picture, but not all: as captions do, these are wrong now and then.

    Where each side follows from the other without a doubt, nothing punishes a difference, and some of it survives the
    collapse; that is a toy's privilege.
    """
    settings = {"rate": 1e-2, "wrong": 0.3}
    images, texts = train(OBJECTIVES["infonce"], toy, **settings)
    assert min(hits(images, texts)) >= 0.9
    assert mean_cosine(images, texts) < 0.7
    images, texts = train(OBJECTIVES["distance"], toy, **settings)
    assert float(OBJECTIVES["distance"](images, texts)) < 1e-3  # nearly the least there is
    assert mean_cosine(images, texts) > 0.999
    assert sum(hits(images, texts)) / 2 <= 0.3  # by chance 0.05, and 1.0 with negatives


@pytest.mark.parametrize("name", OBJECTIVES)
def test_one_point_is_best_only_without_negatives(name):
    """Aligned and at right angles against all the same: what each objective prefers, and what it finds."""
    objective = OBJECTIVES[name]
    aligned, point = torch.eye(len(NAMES)), torch.eye(len(NAMES))[:1].expand(len(NAMES), -1)
    losses = [float(objective(rows, rows, None, 20.0, -10.0)) for rows in (aligned, point)]
    assert losses[0] < losses[1] if objective.negatives else losses == [0.0, 0.0]
    assert hits(aligned, aligned) == (1.0, 1.0)
    assert hits(point, point) == (0.0, 0.0)
