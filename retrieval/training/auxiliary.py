"""What is learnt beside the objective: views of a picture, decoded features, a teacher's vectors, WordNet's nouns.

Some of it needs parameters of its own, decoders and maps to the teacher's width. They are trained with the model and
stand in the checkpoint, and are no part of the bundle.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from retrieval.errors import DataError
from retrieval.training.config import TrainConfig
from retrieval.training.data import Batch, Data, Towers, Words
from retrieval.training.features import FrozenTowers
from retrieval.training.losses import (
    cross_reconstruction,
    feature_distillation,
    info_nce,
    interactive_contrastive,
    nt_xent,
    reconstruction,
    soft_targets,
    told_apart,
)
from retrieval.training.open_clip_models import OpenClipEncoder
from retrieval.training.parameters import Group
from retrieval.training.streaming import PictureRows
from retrieval.training.towers import DualEncoder

_SCALE = 10.0  # between two views of a picture: SLIP's temperature, 0.1
_NOUN_SCALE = 20.0  # between a noun and its definition: sisters may stay close to each other
_MEASURED = 512  # rows of each source that mean and spread of the features are taken from


def check_views(config: TrainConfig, frozen: bool) -> None:
    """Refuse self-supervision on features of one view alone, before they are made: DataError says what to set."""
    if config.self_supervised and frozen and len(set(config.views)) < 2:
        raise DataError(
            "self-supervision tells a picture by two views of it, and towers that do not learn have those of the "
            'config: set views to ["clean", "crop1"] or more of them'
        )


class Decoder(nn.Module):
    """From the shared space back to a tower's features: (B, D) -> (B, F), one hidden layer of D."""

    mean: Tensor
    spread: Tensor

    def __init__(self, dim: int, features: Tensor) -> None:
        """Take (N, F) features as they are before the training, for what the layers say is in their deviations."""
        super().__init__()
        self.register_buffer("mean", features.mean(0))
        self.register_buffer("spread", features.std(0))
        self.layers = nn.Sequential(nn.Linear(dim, dim), nn.GELU(), nn.Linear(dim, features.shape[1]))

    def forward(self, vectors: Tensor) -> Tensor:
        """(B, D) -> (B, F), in the features' own unit."""
        decoded: Tensor = self.mean + self.spread * self.layers(vectors)
        return decoded


class Auxiliary:
    """The losses beside the objective that a config gives a weight, and what they learn for themselves.

    Attributes:
        learnt: decoders and maps by their names; empty where nothing of the kind is asked for.
    """

    def __init__(self, config: TrainConfig, model: DualEncoder | OpenClipEncoder, towers: Towers, data: Data) -> None:
        self.config, self.model, self.towers = config, model, towers
        # Without pictures of their own, those of the pairs.
        self.pictures: list[list[PictureRows]] = data.unlabelled or [source.views for source in data.sources]
        self.views = [config.views.index(view) for view in dict.fromkeys(config.views)]  # one may be drawn more often
        self.learnt = nn.ModuleDict()
        if config.reconstruct:
            images, texts = self._features(data, _MEASURED)
            dim = self._dim(images)
            self.learnt["image_decoder"], self.learnt["text_decoder"] = Decoder(dim, images), Decoder(dim, texts)
        if data.teacher and (config.distil_features or config.distil_interactive):
            dim = self._dim(self._features(data, 1)[0])
            if dim != data.teacher.dim:
                self.learnt["image_map"] = nn.Linear(dim, data.teacher.dim)
                self.learnt["text_map"] = nn.Linear(dim, data.teacher.dim)
        self.learnt.to(config.device)

    @torch.no_grad()
    def _features(self, data: Data, count: int) -> tuple[Tensor, Tensor]:
        """(N, F) and (N, G) unit rows of pictures and sentences from all over each source, about ``count`` of each."""
        self.model.eval()

        def spread(rows: PictureRows) -> Tensor:
            return rows[np.arange(0, len(rows), max(1, len(rows) // count))]

        images = [self.towers.image_features(spread(source.views[0])) for source in data.sources]
        texts = [self.towers.text_features(spread(source.texts)) for source in data.sources]
        return F.normalize(torch.cat(images), dim=1), F.normalize(torch.cat(texts), dim=1)

    @torch.no_grad()
    def _dim(self, images: Tensor) -> int:
        return int(self.model.image.head(images[:1]).shape[1])

    def groups(self) -> list[Group]:
        """For the optimiser: at the projections' rate, biases without decay."""
        rate, decay = self.config.learning_rate, self.config.weight_decay
        weights, biases = ([p for p in self.learnt.parameters() if (p.ndim > 1) is matrix] for matrix in (True, False))
        if not weights:
            return []
        return [
            Group(name="auxiliary", params=weights, lr=rate, peak=rate, weight_decay=decay, depth=None),
            Group(name="auxiliary, no decay", params=biases, lr=rate, peak=rate, weight_decay=0.0, depth=None),
        ]

    def loss(
        self,
        batch: Batch,
        features: tuple[Tensor, Tensor],
        vectors: tuple[Tensor, Tensor],
        random: np.random.Generator,
    ) -> Tensor:
        """The weighted sum of all that is asked for; 0 if nothing is.

        Args:
            batch: what meets.
            features: (B, F) and (B, G) of its pairs, as the projections take them.
            vectors: (B, D) unit rows each, what the projections make of them.
            random: to draw pictures and views with.
        """
        config, loss = self.config, vectors[0].new_zeros(())
        if config.self_supervised:
            loss = loss + config.self_supervised * self._self_supervision(len(batch.pictures), random)
        if config.reconstruct:
            loss = loss + config.reconstruct * self._reconstruction(features, vectors)
        if batch.words is not None:
            loss = loss + self._lexicon(batch.words, vectors)
        if batch.taught and (config.distil_features or config.distil_interactive):
            loss = loss + self._distillation(batch.taught, batch.owner, vectors)
        return loss

    def _self_supervision(self, count: int, random: np.random.Generator) -> Tensor:
        """NT-Xent between two views of as many pictures as the batch has (SLIP, Mu et al. 2022, arXiv:2112.12750).

        On the vectors that are searched: a projection of its own, as SLIP has, would be all that learns from it where
        the towers do not. As in a batch, only pictures of one set are each other's negatives.
        """
        sizes = np.array([len(views[0]) for views in self.pictures])
        views = self.pictures[random.choice(len(sizes), p=sizes / sizes.sum())]
        rows = random.choice(len(views[0]), min(count, len(views[0])), replace=False)
        if isinstance(self.towers, FrozenTowers):
            first, second = random.choice(self.views, 2, replace=False)
        else:
            first = second = 0  # and each picture is augmented twice
        features = self.towers.image_features(torch.cat([views[first][rows], views[second][rows]]))
        one, other = self.model.image.head(features).chunk(2)
        return nt_xent(one, other, _SCALE)

    def _reconstruction(self, features: tuple[Tensor, Tensor], vectors: tuple[Tensor, Tensor]) -> Tensor:
        """Each side's features decoded from its own vectors, plus from the other's (Corr-Full-AE, Feng et al. 2014)."""
        images, texts = (F.normalize(rows, dim=1) for rows in features)
        image, text = self.learnt["image_decoder"], self.learnt["text_decoder"]
        assert isinstance(image, Decoder)
        assert isinstance(text, Decoder)
        own = reconstruction(images, image(vectors[0]), image.spread) + reconstruction(
            texts, text(vectors[1]), text.spread
        )
        spreads = image.spread, text.spread
        return own / 2 + cross_reconstruction(images, texts, image(vectors[1]), text(vectors[0]), spreads)

    def _lexicon(self, words: Words, vectors: tuple[Tensor, Tensor]) -> Tensor:
        """Nouns find the pictures of their kin and their definitions, and are found by no other picture."""
        settings, scale = self.config.lexicon, self.model.scale()
        assert settings is not None  # or there are no words
        both = self.model.text.head(self.towers.text_features(torch.cat([words.names, words.definitions])))
        names, definitions = both.chunk(2)
        loss = settings.unlike * told_apart(*vectors, names, words.wrong, scale)
        if len(words.targets) and words.targets.shape[1]:
            pictures = vectors[0][words.classed]
            finds = [soft_targets(said[words.placed], pictures, words.targets, scale) for said in (names, definitions)]
            loss = loss + settings.related * (finds[0] + finds[1]) / 2
        return loss + settings.defined * info_nce(names, definitions, _NOUN_SCALE)

    def _distillation(self, taught: tuple[Tensor, Tensor], owner: Tensor, vectors: tuple[Tensor, Tensor]) -> Tensor:
        """The teacher's vectors themselves (FD and ICL of CLIP-KD, Yang et al. 2024, arXiv:2307.12732)."""
        count, loss = len(taught[0]), vectors[0].new_zeros(())
        images, texts = (rows[:count] for rows in vectors)
        if "image_map" in self.learnt:
            images = F.normalize(self.learnt["image_map"](images), dim=1)
            texts = F.normalize(self.learnt["text_map"](texts), dim=1)
        if self.config.distil_features:
            both = feature_distillation(images, taught[0]) + feature_distillation(texts, taught[1])
            loss = loss + self.config.distil_features * both
        if self.config.distil_interactive:
            scale = self.model.scale()
            loss = loss + self.config.distil_interactive * interactive_contrastive(
                images, texts, *taught, scale, owner[:count]
            )
        return loss
