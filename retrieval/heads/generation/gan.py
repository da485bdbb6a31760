"""The game of a conditional GAN on a collection's own pictures, and the generator that comes out of it.

It learns from the pictures' own vectors, disturbed a little, and from sentences where there are any, so that pictures
without a word are enough (LAFITE, Zhou et al. 2022, arXiv:2111.13792). This is a small research head: 64 x 64 pixels.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from indexes.manifest import replacing
from indexes.vectors import Vectors, as_vectors, check_width
from retrieval.embedding import Progress
from retrieval.errors import DataError
from retrieval.heads.generation.adversarial import (
    OBJECTIVES,
    DiscriminatorNet,
    GeneratorNet,
    augment,
    gradient_penalty,
    layout_loss,
)
from retrieval.heads.generation.material import Centring
from retrieval.heads.modalities import IMAGE, TEXT
from retrieval.heads.pixels import Pixels
from retrieval.training.averaging import WeightAverage
from retrieval.training.fit import check_finite
from retrieval.training.run import load_optimizer, optimizer_tensors

CHECKPOINT, LOG = "checkpoint.safetensors", "log.jsonl"
_SAVED_SECONDS = 60.0  # that a kill costs at most
_PENALTY_EVERY = (
    16  # steps: lazy regularisation (Karras et al. 2020, arXiv:1912.04958); it costs a second backward pass
)
_LOGGED_EVERY = 50
_MOST_LOGGED = 16  # pictures whose diversity the log has
_BETAS = (0.5, 0.99)
_PART = 128  # pictures made at a time
_LAYOUT_SIDE = 8


@dataclass(frozen=True)
class GANSettings:
    """How the game is played.

    Attributes:
        side: S, of the pictures in pixels: 4 times a power of 2.
        noise: Z.
        width: channels of the largest feature maps of either network; each smaller map has twice as many.
        objective: one of :data:`retrieval.heads.generation.adversarial.OBJECTIVES`.
        steps: of both players.
        batch: pictures.
        learning_rate: of both players, with Adam.
        average: decay of the generator's averaged weights, which are what is kept.
        penalty: of the discriminator's gradient by real pictures (R1); 0: none.
        mismatched: of real pictures with another one's condition among what the discriminator is to refuse (Reed et
            al. 2016, arXiv:1605.05396): costs no pass through its trunk.
        layout: of :func:`retrieval.heads.generation.adversarial.layout_loss`, which steadies the first thousand steps.
        spoken: share of the conditions that are sentences, where a picture has any.
        disturbed: length of the noise in a picture's vector as a condition, in its own length: what tells a picture
            from a sentence about it is about as long.
        seed: of every random number.
    """

    side: int = 64
    noise: int = 64
    width: int = 32
    objective: str = "min-max"
    steps: int = 6000
    batch: int = 64
    learning_rate: float = 4e-4
    average: float = 0.998
    penalty: float = 0.05
    mismatched: float = 0.5
    layout: float = 5.0
    spoken: float = 0.5
    disturbed: float = 0.5
    seed: int = 0

    def check(self) -> None:
        """Refuse what cannot be played: DataError."""
        if self.objective not in OBJECTIVES:
            raise DataError(f"there is no objective {self.objective!r}: there are {', '.join(OBJECTIVES)}")
        if self.side < 8 or self.side & (self.side - 1):
            raise DataError(f"pictures are 8, 16, 32, 64, … pixels wide, not {self.side}")
        if min(self.steps, self.noise, self.width) < 1 or self.batch < 2:
            raise DataError("steps, noise and width must be at least 1, a batch at least 2 pictures")

    @property
    def channels(self) -> list[int]:
        """Of the generator from 4 x 4 up."""
        doublings = self.side.bit_length() - 4
        return [self.width << i for i in range(doublings, -1, -1)]


@dataclass(frozen=True, eq=False)
class PictureGenerator:
    """Implements :class:`retrieval.heads.Generator`: vectors -> pictures.

    Attributes:
        fingerprint: of the encoder whose vectors it takes.
        encoder: how that is loaded.
        centring: of both modalities.
        network: what was learnt.
        build: its arguments.
        source: the modality of the vectors that it is given, text or image.
        device: where it runs.
    """

    fingerprint: str
    encoder: str
    centring: Centring
    network: GeneratorNet
    build: Mapping[str, Any]
    source: str = TEXT
    target: str = "picture"
    device: str = "cpu"

    kind = "gan"

    @torch.inference_mode()
    def generate(self, vectors: Vectors, seed: int = 0) -> NDArray[np.float32]:
        """(N, D) unit rows -> (N, S, S, 3) from 0 to 1. Row n is the same whatever rows follow it.

        Raises:
            VectorError: of another width, or rows that are zero, NaN or infinite.
        """
        unit = as_vectors(vectors)
        check_width(unit, len(self.centring.means[self.source]))
        self.network.eval()
        noise = np.random.default_rng(seed).standard_normal((len(unit), self.network.noise), np.float32)
        condition = self.centring.apply(unit, self.source)
        side = 4 << len(self.build["channels"])
        out = np.empty((len(unit), side, side, 3), np.float32)
        for begin in range(0, len(unit), _PART):
            part = slice(begin, begin + _PART)
            made = self.network(*(torch.from_numpy(rows[part]).to(self.device) for rows in (condition, noise)))
            out[part] = (made.permute(0, 2, 3, 1).cpu().numpy() + 1) / 2
        return out

    def arrays(self) -> dict[str, NDArray[Any]]:
        """All that was learnt."""
        return {name: value.cpu().numpy() for name, value in self.network.state_dict().items()}


class Game:
    """The two players, and all else that decides how the game goes on."""

    def __init__(
        self,
        settings: GANSettings,
        pixels: Pixels,
        images: Vectors,
        texts: Vectors,
        owner: NDArray[np.int64],
        centring: Centring,
        device: str = "cpu",
    ) -> None:
        """Set the players up, with random weights.

        Args:
            settings: how to play.
            pixels: (N, S, S, 3) real pictures.
            images: (N, D) their vectors.
            texts: (M, D) sentences about them; may be none.
            owner: (M,) the picture of each.
            centring: of both.
            device: where to play.
        """
        settings.check()
        self.settings, self.device, self.step, self.whole = settings, device, 0, True
        self.real = torch.from_numpy(pixels)
        self.images = torch.from_numpy(centring.apply(images, IMAGE))
        self.texts = torch.from_numpy(centring.apply(texts, TEXT))
        order = np.argsort(owner, kind="stable")
        self.said = np.split(order, np.searchsorted(owner[order], np.arange(1, len(images))))  # sentences of each
        self.build = {"condition": images.shape[1], "noise": settings.noise, "channels": settings.channels}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(settings.seed)
            self.generator = GeneratorNet(**self.build).to(device)
            widths = [max(8, 3 * width // 4) for width in settings.channels[::-1]]
            self.discriminator = DiscriminatorNet(images.shape[1], widths).to(device)
        self.players = {
            name: torch.optim.Adam(player.parameters(), settings.learning_rate, _BETAS)
            for name, player in (("generator", self.generator), ("discriminator", self.discriminator))
        }
        self.average = WeightAverage(self.generator, settings.average)
        self.random = np.random.default_rng(settings.seed)
        self.torch_random = torch.Generator().manual_seed(settings.seed)
        self.shown = np.random.default_rng(settings.seed).permutation(len(images))[:_MOST_LOGGED]

    def batch(self) -> tuple[Tensor, Tensor]:
        """Real pictures (B, 3, S, S) from -1 to 1, and their conditions (B, C)."""
        count, settings = len(self.real), self.settings
        rows = self.random.choice(count, settings.batch, replace=count < settings.batch)
        pictures = self.real[rows].permute(0, 3, 1, 2).float() / 127.5 - 1
        mirrored = torch.from_numpy(self.random.random(len(rows)) < 0.5)
        pictures = torch.where(mirrored[:, None, None, None], pictures.flip(3), pictures)
        condition = self.images[rows]
        noise = torch.randn(condition.shape, generator=self.torch_random)
        long = settings.disturbed * condition.norm(dim=1, keepdim=True) / noise.norm(dim=1, keepdim=True)
        condition = condition + noise * long
        for at, (row, draw) in enumerate(zip(rows.tolist(), self.random.random((len(rows), 2)).tolist(), strict=True)):
            said = self.said[row]
            if len(said) and draw[0] < settings.spoken:
                condition[at] = self.texts[said[int(draw[1] * len(said))]]
        return pictures.to(self.device), condition.to(self.device)

    def play(self) -> dict[str, float]:
        """One step of each player, on the same batch: what each lost, and how sure the discriminator was."""
        settings, objective = self.settings, OBJECTIVES[self.settings.objective]
        self.step, self.whole = self.step + 1, False
        self.generator.train()
        self.discriminator.train()
        real, condition = self.batch()
        noise = torch.randn(len(real), settings.noise, generator=self.torch_random).to(self.device)
        made = self.generator(condition, noise)
        critic = self.discriminator

        features = critic.features(augment(real, self.torch_random))
        on_real = critic.score(features, condition)
        on_fake = critic(augment(made.detach(), self.torch_random), condition)
        loss = objective.discriminator(on_real, on_fake)
        if settings.mismatched:
            on_other = critic.score(features, condition.roll(1, 0))
            loss = loss + settings.mismatched * objective.discriminator(on_real, on_other) / 2
        if settings.penalty and self.step % _PENALTY_EVERY == 1:
            pictures = real.clone().requires_grad_()
            loss = loss + settings.penalty * _PENALTY_EVERY * gradient_penalty(critic(pictures, condition), pictures)
        self._update("discriminator", loss)

        critic.requires_grad_(False)  # its weights need no gradients of the other's loss
        fooled = objective.generator(critic(augment(made, self.torch_random), condition))
        critic.requires_grad_(True)
        layout = layout_loss(made, real, min(_LAYOUT_SIDE, settings.side))
        self._update("generator", fooled + settings.layout * layout)
        self.average.update(self.generator)
        self.whole = True
        sure = ((on_real > 0).float().mean() + (on_fake < 0).float().mean()) / 2
        return {
            "discriminator": float(loss.detach()),
            "generator": float(fooled.detach()),
            "layout": float(layout.detach()),
            "right": float(sure),
        }

    def _update(self, player: str, loss: Tensor) -> None:
        check_finite(loss, step=self.step)
        self.players[player].zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        self.players[player].step()

    @torch.no_grad()
    def diversity(self) -> float:
        """How much the generator's pictures of different conditions differ, as a share of how much real ones do.

        Mean absolute difference of the pixels of each two among a few; near zero is a collapse.
        """
        condition = self.images[self.shown].to(self.device)
        noise = torch.randn(len(condition), self.settings.noise, generator=torch.Generator().manual_seed(0))
        with self.average.applied(self.generator):
            made = self.generator(condition, noise.to(self.device)).flatten(1)
        real = self.real[self.shown].flatten(1).float() / 127.5 - 1
        return float(torch.pdist(made.cpu(), 1).mean() / torch.pdist(real, 1).mean().clamp(min=1e-6))

    # ---- checkpoints ----

    def save(self, folder: Path, about: Mapping[str, Any]) -> None:
        """Write all of it to ``checkpoint.safetensors``, whole or not at all; OSError where that is not possible."""
        tensors = {
            **_named("generator", self.generator.state_dict()),
            **_named("discriminator", self.discriminator.state_dict()),
            **_named("averaged", self.average.state_dict()),
            "random": self.torch_random.get_state(),
        }
        for name, optimizer in self.players.items():
            tensors |= _named(f"{name}'s", optimizer_tensors(optimizer))
        state = {
            **about,
            "step": self.step,
            "settings": asdict(self.settings),
            "random": self.random.bit_generator.state,
        }
        data = save(
            {name: value.detach().cpu().contiguous() for name, value in tensors.items()}, {"state": json.dumps(state)}
        )
        with replacing(folder / CHECKPOINT) as file:
            file.write(data)

    def restore(self, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
        """Go on from what :meth:`save` has written, bit for bit on the same machine with as many threads."""
        self.generator.load_state_dict(_unnamed("generator", tensors))
        self.discriminator.load_state_dict(_unnamed("discriminator", tensors))
        self.average.load_state_dict(_unnamed("averaged", tensors))
        for name, optimizer in self.players.items():
            load_optimizer(optimizer, _unnamed(f"{name}'s", tensors))
        self.torch_random.set_state(tensors["random"])
        self.random.bit_generator.state = state["random"]
        self.step = int(state["step"])


def train(game: Game, folder: Path, about: Mapping[str, Any], progress: Progress | None = None) -> None:
    """Play to the end, with a log and a checkpoint in a folder that is there; Ctrl-C keeps what was done.

    Raises:
        DataError: the losses are no numbers any more, or the folder cannot be written.
    """
    began = saved = time.monotonic()
    lately: list[dict[str, float]] = []
    try:
        _cut_log(folder / LOG, game.step)
        while game.step < game.settings.steps:
            lately.append(game.play())
            if game.step % _LOGGED_EVERY == 0:
                means = {name: sum(one[name] for one in lately) / len(lately) for name in lately[0]}
                line = {"step": game.step, **means, "diversity": game.diversity(), "seconds": time.monotonic() - began}
                with (folder / LOG).open("a", encoding="utf-8") as log:
                    log.write(json.dumps({name: round(value, 5) for name, value in line.items()}) + "\n")
                lately = []
            if time.monotonic() - saved > _SAVED_SECONDS:
                game.save(folder, about)
                saved = time.monotonic()
            if progress:
                progress(game.step, game.settings.steps)
    except KeyboardInterrupt:
        if game.whole:  # else one player has moved and the other has not: the last checkpoint is a minute old
            game.save(folder, about)
        raise
    except OSError as error:
        raise DataError(f"{folder} cannot be written ({error.strerror}): make room, then go on") from error


def _cut_log(file: Path, step: int) -> None:
    """Leave out what is going to be played again."""
    if file.is_file():
        lines = [line for line in file.read_text("utf-8").splitlines() if json.loads(line)["step"] <= step]
        file.write_text("".join(f"{line}\n" for line in lines), "utf-8")


def _named(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {f"{prefix}/{name}": value for name, value in tensors.items()}


def _unnamed(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(f"{prefix}/"): value for name, value in tensors.items() if name.startswith(f"{prefix}/")}


def read_checkpoint(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and the state that :meth:`Game.save` wrote. DataError where there is none, or it is damaged."""
    file = folder / CHECKPOINT
    if not file.is_file():
        raise DataError(f"{folder} holds no training that could go on: it has no {CHECKPOINT}")
    try:
        with safe_open(str(file), "pt") as stored:
            state = json.loads(stored.metadata()["state"])
            return {name: stored.get_tensor(name) for name in stored.keys()}, state  # noqa: SIM118 - no mapping
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{file} is damaged ({error}): begin anew in another folder") from error
