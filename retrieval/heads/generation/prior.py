"""A vector of one modality from one of the other: what a prior does between a sentence and a picture.

Two kinds: a regression, which gives the mean of what may be meant, and a conditional VAE (Sohn et al. 2015), which
knows that a sentence may mean many pictures and draws among them. (By diffusion: Ramesh et al. 2022, arXiv:2204.06125.)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from indexes.vectors import Vectors, as_vectors, check_width
from retrieval.errors import DataError
from retrieval.heads import Translator, blended
from retrieval.heads.generation.autoencoder import Autoencoder, disturbed, kl_divergence
from retrieval.heads.generation.material import Centring, Material
from retrieval.heads.modalities import IMAGE, TEXT
from retrieval.heads.networks import Recipe, learn
from retrieval.metrics import evaluate_retrieval

SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)  # of the translated vector in a query, that are tried on val
_DRAWS = 8  # of a conditional VAE, whose mean is given


@dataclass(frozen=True)
class PriorSettings:
    """What to learn.

    Attributes:
        source: the modality that is given, image or text; the other one is made.
        hidden: H.
        latent: L, of what the source does not say; 0 is a regression.
        beta: of the divergence from the prior.
        noise: see :class:`retrieval.heads.generation.autoencoder.AutoencoderSettings`.
        recipe: of the training.
        seed: of every random number.
        device: of the training.
    """

    source: str = TEXT
    hidden: int = 512
    latent: int = 0
    beta: float = 1.0
    noise: float = 0.3
    recipe: Recipe = field(default_factory=lambda: Recipe(epochs=8, batch=256, learning_rate=1e-3, weight_decay=0.05))
    seed: int = 0
    device: str = "cpu"

    def check(self) -> None:
        """Refuse what cannot be learnt: DataError."""
        if self.source not in (IMAGE, TEXT):
            raise DataError(f"a prior goes from text to image or from image to text, not from {self.source!r}")
        if self.hidden < 1 or min(self.latent, self.beta, self.noise) < 0:
            raise DataError("a hidden layer has at least 1 number; latent, beta and noise are not negative")


class PriorNet(nn.Module):
    """Source (B, D) and, where L is not 0, what it does not say (B, L) -> target (B, D), beside the source itself."""

    def __init__(self, width: int, hidden: int, latent: int) -> None:
        super().__init__()
        self.latent = latent
        self.read = nn.Linear(width + latent, hidden)
        self.think = nn.Linear(hidden, hidden)
        self.write = nn.Linear(hidden, width)
        if latent:
            self.look = nn.Linear(2 * width, hidden)
            self.code = nn.Linear(hidden, 2 * latent)

    def encode(self, source: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """What the target says beyond the source: mean and logarithm of the variance, (B, L) each."""
        mean, log_variance = self.code(F.gelu(self.look(torch.cat([source, target], 1)))).chunk(2, 1)
        return mean, log_variance.clamp(-10, 10)

    def forward(self, source: Tensor, code: Tensor) -> Tensor:
        x = F.gelu(self.read(torch.cat([source, code], 1)))  # (B, H)
        x = x + F.gelu(self.think(F.dropout(x, 0.2, self.training)))
        made: Tensor = source + self.write(F.dropout(x, 0.2, self.training))  # in one space, they are much alike
        return made  # (B, D)


@dataclass(frozen=True, eq=False)
class Prior:
    """Implements :class:`retrieval.heads.Generator`: vectors of ``source`` -> vectors of ``target``.

    Attributes:
        fingerprint: of the encoder whose vectors it takes.
        encoder: how that is loaded.
        centring: of both modalities.
        network: what was learnt.
        build: its arguments.
        source: the modality that it is given.
        target: the one that it gives.
        share: of its vector in a query, see :func:`retrieval.heads.blended`.
        draws: of a conditional VAE, whose mean is given.
        device: where it runs.
    """

    fingerprint: str
    encoder: str
    centring: Centring
    network: PriorNet
    build: Mapping[str, Any]
    source: str
    target: str
    share: float = 1.0
    draws: int = _DRAWS
    device: str = "cpu"

    kind = "prior"

    @torch.inference_mode()
    def generate(self, vectors: Vectors, seed: int = 0) -> NDArray[np.float32]:
        """(N, D) unit rows -> (N, D) unit rows. Row n is the same whatever rows follow it.

        Raises:
            VectorError: of another width, or rows that are zero, NaN or infinite.
        """
        unit = as_vectors(vectors)
        check_width(unit, int(self.build["width"]))
        self.network.eval()
        source = torch.from_numpy(self.centring.apply(unit, self.source)).to(self.device)
        latent, draws = self.network.latent, self.draws if self.network.latent else 1
        random = np.random.default_rng(seed)
        made = torch.zeros_like(source)
        for _ in range(draws):
            code = random.standard_normal((1, latent), np.float32).repeat(len(unit), 0)
            made += self.network(source, torch.from_numpy(code).to(self.device)) / draws
        return as_vectors(self.centring.undo(made.cpu().numpy(), self.target))

    def arrays(self) -> dict[str, NDArray[Any]]:
        """All that was learnt."""
        return {name: value.cpu().numpy() for name, value in self.network.state_dict().items()}


def fit_prior(material: Material, settings: PriorSettings) -> Prior:
    """Learn one on the pairs of train; kept is what comes nearest on val. Raises DataError without sentences."""
    settings.check()
    material.check_spoken("a prior")
    target = IMAGE if settings.source == TEXT else TEXT
    centring = Centring.of_material(material)
    data = {}
    for part in ("train", "val"):
        images, texts = material.pairs(part)
        rows = {IMAGE: centring.apply(images, IMAGE), TEXT: centring.apply(texts, TEXT)}
        data[part] = [torch.from_numpy(rows[name]).to(settings.device) for name in (settings.source, target)]
    build = {"width": material.images.shape[1], "hidden": settings.hidden, "latent": settings.latent}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        network = PriorNet(**build).to(settings.device)

        def step(rows: Tensor) -> Tensor:
            source, right = disturbed(data["train"][0][rows], settings.noise), data["train"][1][rows]
            divergence, code = torch.zeros(()), source[:, :0]
            if settings.latent:
                mean, log_variance = network.encode(source, right)
                code = mean + torch.randn_like(mean) * (log_variance / 2).exp()
                divergence = kl_divergence(mean, log_variance).mean()
            error: Tensor = (network(source, code) - right).square().sum(1).mean() / 2
            return error + settings.beta * divergence

        def score() -> float:
            source, right = data["val"]
            if not settings.latent:
                return -float((network(source, source[:, :0]) - right).square().sum(1).mean())
            mean, log_variance = network.encode(source, right)
            error = (network(source, mean) - right).square().sum(1).mean() / 2
            return -float(error + settings.beta * kl_divergence(mean, log_variance).mean())

        learn(network, step, score, len(data["train"][0]), settings.recipe, settings.seed)
    return Prior(
        material.fingerprint,
        material.encoder,
        centring,
        network,
        build,
        settings.source,
        target,
        device=settings.device,
    )


# ---- what it is used for ---------------------------------------------------------------------------------------------


def choose_share(translator: Translator, material: Material) -> tuple[float, dict[str, float]]:
    """The share of :data:`SHARES` with the best hit@10 on val, and that of each: of sentences that look for pictures.

    Of equal shares the smallest: what is not needed is left out.
    """
    measured = {str(share): hits(translator, material, "val", share)["t2i_hit@10"] for share in SHARES}
    best = max(SHARES, key=lambda share: (measured[str(share)], -share))
    return best, measured


def hits(translator: Translator | None, material: Material, part: str, share: float | None = None) -> dict[str, float]:
    """hit@k of a part's sentences that look for its pictures, as they are or translated (cosines, exact)."""
    rows, spoken = material.parts[part], material.spoken(part)
    texts = material.texts[spoken]
    if translator is not None:
        texts = blended(translator, texts, share)
    place = np.searchsorted(np.sort(rows), material.owner[spoken])
    scores = evaluate_retrieval(material.images[np.sort(rows)], texts, place).metrics
    return {name: scores[name] for name in ("t2i_hit@1", "t2i_hit@5", "t2i_hit@10", "t2i_mrr")}


def between(generator: object, source: str, target: str) -> Translator | None:
    """A generator as one from ``source`` to ``target``; None where it is none. One over both goes any way."""
    if isinstance(generator, Autoencoder) and {source, target} <= set(generator.modalities):
        return replace(generator, source=source, target=target)
    if isinstance(generator, Prior) and (generator.source, generator.target) == (source, target):
        return generator
    return None
