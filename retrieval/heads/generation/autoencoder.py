"""Autoencoder and beta-VAE over vectors of the shared space: of one modality, or of pictures and sentences joined.

What it is for: fewer numbers for each vector (the code), a vector without its noise, how odd a vector is beside those
that were learnt from, and one modality rebuilt from the other.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from indexes.vectors import Vectors, as_vectors
from retrieval.errors import DataError, ModelError
from retrieval.heads import Modalities
from retrieval.heads.generation.material import Centring, Material
from retrieval.heads.modalities import IMAGE, TEXT
from retrieval.heads.networks import Recipe, dropped, learn


@dataclass(frozen=True)
class AutoencoderSettings:
    """What to learn.

    Attributes:
        modalities: image, text, or both: then one is left out of most rows, and both are rebuilt.
        latent: L, numbers of the code.
        hidden: H.
        beta: of the divergence from the prior (Higgins et al. 2017); 0 is a plain autoencoder without one. The
            decoder's variance is 1 in units in which the numbers of a vector are about 1, so that a beta below 1 is
            the bound of a decoder with that variance.
        noise: length of the noise in what is encoded, at most, in the vector's own length: the clean one is to be
            rebuilt (Vincent et al. 2008).
        drop: how often either modality is left out, where both are there.
        recipe: of the training.
        seed: of every random number.
        device: of the training.
    """

    modalities: tuple[str, ...] = (IMAGE,)
    latent: int = 64
    hidden: int = 512
    beta: float = 0.0
    noise: float = 0.0
    drop: float = 0.4
    recipe: Recipe = field(default_factory=lambda: Recipe(epochs=30, batch=128, learning_rate=1e-3, weight_decay=0.01))
    seed: int = 0
    device: str = "cpu"

    def check(self) -> None:
        """Refuse what cannot be learnt: DataError."""
        if self.modalities not in ((IMAGE,), (TEXT,), (IMAGE, TEXT)):
            raise DataError(f"an autoencoder is over image, text, or image and text, not {', '.join(self.modalities)}")
        if min(self.latent, self.hidden) < 1 or min(self.beta, self.noise) < 0:
            raise DataError("a code and a hidden layer have at least 1 number; beta and noise are not negative")


def kl_divergence(mean: Tensor, log_variance: Tensor) -> Tensor:
    """(B,) nats from N(mean, variance) to N(0, 1), summed over L: Kingma & Welling 2014, appendix B."""
    return -(1 + log_variance - mean.square() - log_variance.exp()).sum(1) / 2


class AutoencoderNet(nn.Module):
    """M tables (B, M, D) -> code (B, L) -> M tables. Two layers either way."""

    def __init__(self, modalities: int, width: int, latent: int, hidden: int) -> None:
        super().__init__()
        self.shape = (modalities, width)
        self.read = nn.Linear(modalities * (width + 1), hidden)
        self.code = nn.Linear(hidden, 2 * latent)
        self.think = nn.Linear(latent, hidden)
        self.write = nn.Linear(hidden, modalities * width)
        # What a code and a vector have in common without any bend: principal components are the least to be learnt.
        self.straight_in = nn.Linear(modalities * width, latent, bias=False)
        self.straight_out = nn.Linear(latent, modalities * width, bias=False)

    def encode(self, values: Tensor, present: Tensor) -> tuple[Tensor, Tensor]:
        """Rows (B, M, D), zero where ``present`` (B, M) is: mean and logarithm of the variance, (B, L) each."""
        flat = values.flatten(1)
        mean, log_variance = self.code(F.gelu(self.read(torch.cat([flat, present], 1)))).chunk(2, 1)
        return mean + self.straight_in(flat), log_variance.clamp(-10, 10)

    def decode(self, code: Tensor) -> Tensor:
        """(B, L) -> (B, M, D)."""
        rows: Tensor = self.write(F.gelu(self.think(code))) + self.straight_out(code)
        return rows.view(len(code), *self.shape)


@dataclass(frozen=True, eq=False)
class Losses:
    """Of N rows: half the squared error, summed over a vector's numbers, averaged over what the row has; and nats."""

    reconstruction: NDArray[np.float64]
    kl: NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Autoencoder:
    """Implements :class:`retrieval.heads.Generator`: vectors -> vectors of ``target``, rebuilt.

    Attributes:
        fingerprint: of the encoder whose vectors it takes.
        encoder: how that is loaded.
        centring: of its modalities.
        network: what was learnt.
        build: its arguments.
        modalities: in order.
        beta: of the divergence; 0: none.
        source: the modality that ``generate`` is given.
        target: the one that it gives.
        share: of its vector in a query, see :func:`retrieval.heads.blended`.
        device: where it runs.
    """

    fingerprint: str
    encoder: str
    centring: Centring
    network: AutoencoderNet
    build: Mapping[str, Any]
    modalities: tuple[str, ...]
    beta: float
    source: str
    target: str
    share: float = 1.0
    device: str = "cpu"

    kind = "autoencoder"

    @property
    def dim(self) -> int:
        """D."""
        return int(self.build["width"])

    def _inputs(self, tables: Modalities) -> tuple[Tensor, Tensor]:
        """(N, M, D) centred and (N, M): NaN rows, and tables that are not given, are zeros."""
        if unknown := sorted(tables.keys() - set(self.modalities)):
            raise ModelError(f"the autoencoder is over {' and '.join(self.modalities)}, and knows no {unknown[0]!r}")
        count = max((len(table) for table in tables.values()), default=0)
        values = np.zeros((count, len(self.modalities), self.dim), np.float32)
        present = np.zeros((count, len(self.modalities)), np.float32)
        for at, name in enumerate(self.modalities):
            if name not in tables:
                continue
            if tables[name].shape != (count, self.dim):
                raise ModelError(f"{name} must be a table of {(count, self.dim)}, not {tables[name].shape}")
            there = ~np.isnan(tables[name]).any(axis=1)
            if there.any():
                values[there, at] = self.centring.apply(as_vectors(tables[name][there]), name)
            present[there, at] = 1
        return torch.from_numpy(values).to(self.device), torch.from_numpy(present).to(self.device)

    @torch.inference_mode()
    def codes(self, tables: Modalities) -> NDArray[np.float32]:
        """(N, L): the mean of what a row may be. NaN rows, and tables not given, are missing.

        Raises:
            ModelError: a table of another width, or of a modality that it does not know.
            VectorError: rows that are zero or infinite.
        """
        self.network.eval()
        codes: NDArray[np.float32] = self.network.encode(*self._inputs(tables))[0].cpu().numpy()
        return codes

    @torch.inference_mode()
    def decode(self, codes: NDArray[np.float32]) -> dict[str, Vectors]:
        """(N, L) -> (N, D) unit rows of each modality."""
        self.network.eval()
        rows = self.network.decode(torch.from_numpy(np.ascontiguousarray(codes)).to(self.device)).cpu().numpy()
        return {name: as_vectors(self.centring.undo(rows[:, at], name)) for at, name in enumerate(self.modalities)}

    def rebuild(self, tables: Modalities) -> dict[str, Vectors]:
        """All modalities from those that a row has; see :meth:`codes`."""
        return self.decode(self.codes(tables))

    @torch.inference_mode()
    def losses(self, tables: Modalities) -> Losses:
        """How well rows are rebuilt, and how far their codes lie from the prior; nothing of what a row has not."""
        self.network.eval()
        values, present = self._inputs(tables)
        mean, log_variance = self.network.encode(values, present)
        error = (self.network.decode(mean) - values).square().sum(2) / 2
        reconstruction = (error * present).sum(1) / present.sum(1).clamp(min=1)
        kl = kl_divergence(mean, log_variance) if self.beta else torch.zeros(len(mean))
        return Losses(reconstruction.double().cpu().numpy(), kl.double().cpu().numpy())

    def oddness(self, tables: Modalities) -> NDArray[np.float64]:
        """(N,) the higher, the less a row is like those that were learnt from: less the bound of its log density.

        Up to a constant, and with the code at its mean; of a plain autoencoder the reconstruction alone.
        """
        losses = self.losses(tables)
        return losses.reconstruction + self.beta * losses.kl

    def sample(self, count: int, seed: int = 0) -> dict[str, Vectors]:
        """Rows from codes drawn from the prior, (count, D) of each modality; only of a beta-VAE."""
        if not self.beta:
            raise ModelError("a plain autoencoder has no prior to draw from: fit a vae")
        return self.decode(np.random.default_rng(seed).standard_normal((count, self.build["latent"]), np.float32))

    def generate(self, vectors: Vectors, seed: int = 0) -> NDArray[np.float32]:  # noqa: ARG002 - nothing is drawn
        """(N, D) unit rows of ``source`` -> (N, D) unit rows of ``target``.

        Raises:
            ModelError, VectorError: of another width; rows that are zero, NaN or infinite.
        """
        return self.rebuild({self.source: as_vectors(vectors)})[self.target]

    def arrays(self) -> dict[str, NDArray[Any]]:
        """All that was learnt."""
        return {name: value.cpu().numpy() for name, value in self.network.state_dict().items()}


def fit_autoencoder(material: Material, settings: AutoencoderSettings) -> Autoencoder:
    """Learn one on the train part; kept is what rebuilds val best (with the divergence, where there is one).

    Over one modality its own rows are learnt from; over both, pairs.
    """
    settings.check()
    names = settings.modalities
    if TEXT in names:
        material.check_spoken("an autoencoder over text")
    centring = Centring.of_material(material)
    train, val = (_tables(material, part, names) for part in ("train", "val"))
    shown, held = (
        torch.from_numpy(np.stack([centring.apply(rows, name) for name, rows in tables.items()], axis=1))
        for tables in (train, val)
    )
    build = {
        "modalities": len(names),
        "width": material.images.shape[1],
        "latent": settings.latent,
        "hidden": settings.hidden,
    }
    shown, held = shown.to(settings.device), held.to(settings.device)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        network = AutoencoderNet(**build).to(settings.device)

        def loss_of(clean: Tensor, seen: Tensor, present: Tensor, draw: bool) -> Tensor:
            mean, log_variance = network.encode(seen * present[..., None], present)
            code = mean
            if draw and settings.beta:
                code = mean + torch.randn_like(mean) * (log_variance / 2).exp()
            loss: Tensor = (network.decode(code) - clean).square().sum(2).mean() / 2
            if settings.beta:
                loss = loss + settings.beta * kl_divergence(mean, log_variance).mean()
            return loss

        def step(rows: Tensor) -> Tensor:
            clean = shown[rows]
            present = dropped(torch.ones(clean.shape[:2], device=clean.device), settings.drop)
            return loss_of(clean, disturbed(clean, settings.noise), present, True)

        # To be rebuilt from everything, and from either alone: what it will be used for.
        everything = torch.ones(held.shape[:2], device=held.device)
        ways = [everything]
        if len(names) > 1:
            ways += [F.one_hot(torch.full((len(held),), i), len(names)).to(everything) for i in range(len(names))]

        def score() -> float:
            return -float(sum(loss_of(held, held, present, False) for present in ways))

        learn(network, step, score, len(shown), settings.recipe, settings.seed)
    return Autoencoder(
        material.fingerprint,
        material.encoder,
        Centring({name: centring.means[name] for name in names}),
        network,
        build,
        names,
        settings.beta,
        source=names[-1],
        target=names[0],
        device=settings.device,
    )


def _tables(material: Material, part: str, names: tuple[str, ...]) -> dict[str, Vectors]:
    if names == (IMAGE,):
        return {IMAGE: material.images[material.parts[part]]}
    images, texts = material.pairs(part)
    return {name: {IMAGE: images, TEXT: texts}[name] for name in names}


def disturbed(rows: Tensor, most: float) -> Tensor:
    """(..., D) with Gaussian noise of up to so many times its own length in each."""
    if not most:
        return rows
    noise = F.normalize(torch.randn_like(rows), dim=-1)
    moved: Tensor = rows + noise * rows.norm(dim=-1, keepdim=True) * most * torch.rand_like(rows[..., :1])
    return moved
