"""A conditional GAN for small pictures: two networks and their objectives, each read from top to bottom.

B rows, C numbers of condition (a vector of the shared space), Z of noise. Pictures are (B, 3, S, S) from -1 to 1.

The discriminator is a projection discriminator (Miyato & Koyama 2018, arXiv:1802.05637) with spectral normalisation
(Miyato et al. 2018, arXiv:1802.05957). The generator takes the condition in every block as scale and shift (Perez et
al. 2018, arXiv:1709.07871); its normalisation is over channels at each pixel (Karras et al. 2018, arXiv:1710.10196) and
not over the batch, so that no picture depends on those beside it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

_SLOPE = 0.2  # of leaky ReLU, as in DCGAN (Radford et al. 2016)
_START = 4  # pixels that the generator begins with, and the discriminator ends with


class GeneratorNet(nn.Module):
    """(B, C) conditions and (B, Z) noise -> (B, 3, S, S); S is 4 · 2 ** len(channels).

    The last convolution gives pixels: feature maps at full size would be half of all the work.
    """

    def __init__(self, condition: int, noise: int = 64, channels: Sequence[int] = (256, 128, 64, 32)) -> None:
        """Build one with random weights.

        Args:
            condition: C.
            noise: Z.
            channels: at 4 x 4, 8 x 8 and so on.
        """
        super().__init__()
        self.noise = noise
        self.code = nn.Linear(condition, 128)
        self.start = nn.Linear(128 + noise, channels[0] * _START * _START)
        self.blocks = nn.ModuleList(_Up(before, after, 128 + noise) for before, after in pairwise(channels))
        self.out = nn.ConvTranspose2d(channels[-1], 3, 4, stride=2, padding=1)

    def forward(self, condition: Tensor, noise: Tensor) -> Tensor:
        code = torch.cat([F.leaky_relu(self.code(condition), _SLOPE), noise], 1)  # (B, 128 + Z)
        x = self.start(code).view(len(code), -1, _START, _START)  # (B, K, 4, 4)
        for block in self.blocks:
            x = block(x, code)  # twice as wide
        return torch.tanh(self.out(x))  # (B, 3, S, S)


class _Up(nn.Module):
    """Twice the size: transposed convolution, pixel norm, scale and shift by the code."""

    def __init__(self, before: int, after: int, code: int) -> None:
        super().__init__()
        self.grow = nn.ConvTranspose2d(before, after, 4, stride=2, padding=1)
        self.film = nn.Linear(code, 2 * after)

    def forward(self, x: Tensor, code: Tensor) -> Tensor:
        x = self.grow(x)
        x = x * torch.rsqrt(x.square().mean(1, keepdim=True) + 1e-6)
        scale, shift = self.film(code)[:, :, None, None].chunk(2, 1)
        return F.leaky_relu(x * (1 + scale) + shift, _SLOPE)


class DiscriminatorNet(nn.Module):
    """Pictures -> features (B, K), and these with conditions (B, C) -> logits (B,)."""

    def __init__(self, condition: int, channels: Sequence[int] = (32, 64, 128, 256)) -> None:
        """Build one with random weights.

        Args:
            condition: C.
            channels: at S / 2, S / 4 and so on, down to 4 x 4.
        """
        super().__init__()
        steps = zip((3, *channels), channels, strict=False)
        self.blocks = nn.ModuleList(
            spectral_norm(nn.Conv2d(before, after, 4, stride=2, padding=1)) for before, after in steps
        )
        self.dense = spectral_norm(nn.Linear((channels[-1] + 1) * _START * _START, 256))
        self.real = spectral_norm(nn.Linear(256, 1))
        self.project = spectral_norm(nn.Linear(condition, 256, bias=False))

    def features(self, pictures: Tensor) -> Tensor:
        """(B, 3, S, S) -> (B, 256)."""
        x = pictures
        for block in self.blocks:
            x = F.leaky_relu(block(x), _SLOPE)  # half as wide
        spread = x.std(0, unbiased=False).mean().expand(len(x), 1, _START, _START)
        x = torch.cat([x, spread], 1)  # how much the batch varies (Karras et al. 2018): a collapse gives itself away
        return F.leaky_relu(self.dense(x.flatten(1)), _SLOPE)

    def score(self, features: Tensor, condition: Tensor) -> Tensor:
        """Logits that pictures are real and belong to their conditions: psi(h) + <V c, h>, (B,)."""
        logits: Tensor = self.real(features)[:, 0] + (self.project(condition) * features).sum(1)
        return logits

    def forward(self, pictures: Tensor, condition: Tensor) -> Tensor:
        return self.score(self.features(pictures), condition)


# ---- objectives ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Objective:
    """What each player minimises, from logits (B,)."""

    discriminator: Callable[[Tensor, Tensor], Tensor]  # of real pictures, of others
    generator: Callable[[Tensor], Tensor]  # of what it made


def minmax_discriminator(real: Tensor, fake: Tensor) -> Tensor:
    """-E log D(x) - E log(1 - D(G(z))): the min-max game's binary cross-entropy (Goodfellow et al. 2014)."""
    return F.softplus(-real).mean() + F.softplus(fake).mean()


def minmax_generator(fake: Tensor) -> Tensor:
    """-E log D(G(z)): has the game's fixed point, and gradients where the other is sure (the same, section 3)."""
    return F.softplus(-fake).mean()


def hinge_discriminator(real: Tensor, fake: Tensor) -> Tensor:
    """E max(0, 1 - D(x)) + E max(0, 1 + D(G(z))) (Lim & Ye 2017, arXiv:1705.02894)."""
    return F.relu(1 - real).mean() + F.relu(1 + fake).mean()


def hinge_generator(fake: Tensor) -> Tensor:
    """-E D(G(z))."""
    return -fake.mean()


OBJECTIVES: Mapping[str, Objective] = {
    "min-max": Objective(minmax_discriminator, minmax_generator),
    "hinge": Objective(hinge_discriminator, hinge_generator),
}


def gradient_penalty(logits: Tensor, pictures: Tensor) -> Tensor:
    """R1: half the mean squared norm of the logits' gradient by real pictures (Mescheder et al. 2018)."""
    (slope,) = torch.autograd.grad(logits.sum(), pictures, create_graph=True)
    return slope.square().flatten(1).sum(1).mean() / 2


def layout_loss(made: Tensor, real: Tensor, side: int) -> Tensor:
    """Mean absolute difference of pictures at ``side`` x ``side``, to the nearer of a real one and its mirror image.

    An L1 term beside the adversarial one (Isola et al. 2017, arXiv:1611.07004) at a size that says where which colour
    is, and nothing of texture. A vector of the shared space hardly tells left from right, so either may be met.
    """
    small, target = F.adaptive_avg_pool2d(made, side), F.adaptive_avg_pool2d(real, side)
    either = torch.stack([(small - way).abs().flatten(1).mean(1) for way in (target, target.flip(3))])
    return either.min(0).values.mean()


def augment(pictures: Tensor, random: torch.Generator) -> Tensor:
    """Colour, translation and cutout that gradients pass through, for all the discriminator sees (B, 3, S, S).

    DiffAugment (Zhao et al. 2020, arXiv:2006.10738) with that paper's ranges: what makes a GAN of a few thousand
    pictures possible.
    """
    count, _, side, _ = pictures.shape
    draw = torch.rand(7, count, 1, 1, 1, generator=random).to(pictures.device)
    x = pictures + (draw[0] - 0.5)  # brightness
    grey = x.mean(1, keepdim=True)
    x = grey + (x - grey) * (2 * draw[1])  # saturation
    level = x.mean((1, 2, 3), keepdim=True)
    x = level + (x - level) * (draw[2] + 0.5)  # contrast
    far, half = side // 8, side // 4
    shift = (draw[3:5, :, 0, 0, 0] * (2 * far + 1)).long().tolist()  # (2, B)
    framed = F.pad(x, (far, far, far, far)).unbind()  # slices of each are a tenth of the time of gathering pixels
    x = torch.stack(
        [one[:, down : down + side, right : right + side] for one, down, right in zip(framed, *shift, strict=True)]
    )
    ahead = torch.arange(side, device=x.device)
    corner = (draw[5:7, :, 0, 0, 0] * (side + 1)).floor().long() - half  # of a square of half the side
    inside = [(ahead >= at[:, None]) & (ahead < at[:, None] + 2 * half) for at in corner]  # (B, S) each
    hole = inside[0][:, :, None] & inside[1][:, None]
    shown: Tensor = x * ~hole[:, None]
    return shown


def parameters(network: nn.Module) -> int:
    """Numbers that were learnt."""
    return sum(math.prod(weight.shape) for weight in network.parameters())
