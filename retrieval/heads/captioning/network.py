"""The network that writes captions: a small causal transformer that begins with a prefix made of the embedding.

After ClipCap (Mokady et al. 2021, arXiv:2111.09734), with the language model trained along: a vector becomes K places
in front of the words, and each place says which piece comes next.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from retrieval.errors import DataError


@dataclass(frozen=True)
class NetworkSettings:
    """How large it is; the reason stands beside each default."""

    dim: int  # of the embeddings
    pieces: int  # that there are
    width: int = 256  # with 4 layers and 4,000 pieces 4.7 million weights: 9.5 MB as they are stored
    layers: int = 4
    heads: int = 8
    prefix: int = 4  # places that an embedding takes up
    length: int = 24  # pieces a caption has at most; of Flickr8k's one in a hundred has more
    dropout: float = 0.1

    def __post_init__(self) -> None:
        if min(self.dim, self.pieces, self.width, self.layers, self.heads, self.prefix, self.length) < 1:
            raise DataError("width, layers, heads, prefix and length must be at least 1")
        if self.width % self.heads:
            raise DataError(f"width must be a multiple of heads, {self.heads}, not {self.width}")

    def to_json(self) -> dict[str, Any]:
        """As a mapping."""
        return asdict(self)


class Block(nn.Module):
    """Attention to what came before, and an MLP; norms first (Xiong et al. 2020)."""

    def __init__(self, settings: NetworkSettings) -> None:
        super().__init__()
        width = settings.width
        self.heads, self.drop = settings.heads, nn.Dropout(settings.dropout)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor, past: tuple[Tensor, Tensor], seen: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        batch, new, width = x.shape
        qkv = self.qkv(self.norm1(x)).view(batch, new, 3, self.heads, width // self.heads)  # (B, T, 3, H, h)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # (B, H, T, h) each
        k, v = torch.cat([past[0], k], 2), torch.cat([past[1], v], 2)  # (B, H, P + T, h)
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=seen)  # (B, H, T, h)
        x = x + self.drop(self.out(mixed.transpose(1, 2).reshape(batch, new, width)))
        x = x + self.drop(self.down(F.gelu(self.up(self.norm2(x)))))  # (B, T, W)
        return x, (k, v)


class CaptionNet(nn.Module):
    """Vectors and pieces of words -> scores of the next piece at each place."""

    def __init__(self, settings: NetworkSettings) -> None:
        super().__init__()
        self.settings = settings
        self.scale = settings.dim**0.5  # unit rows become numbers of about 1
        self.project = nn.Linear(settings.dim, settings.prefix * settings.width)
        self.pieces = nn.Embedding(settings.pieces, settings.width)  # the output layer too (Press & Wolf 2017)
        self.places = nn.Embedding(settings.prefix + settings.length, settings.width)
        self.drop = nn.Dropout(settings.dropout)
        self.blocks = nn.ModuleList(Block(settings) for _ in range(settings.layers))
        self.norm = nn.LayerNorm(settings.width)
        for name, weight in self.named_parameters():
            if weight.ndim > 1:
                last = name.endswith(("out.weight", "down.weight"))
                nn.init.normal_(weight, std=0.02 / (2 * settings.layers) ** 0.5 if last else 0.02)  # GPT-2's
        nn.init.normal_(self.project.weight, std=settings.dim**-0.5 / 4)

    def forward(self, vectors: Tensor, pieces: Tensor, past: Tensor) -> tuple[Tensor, Tensor]:
        """Go on from what is known.

        Args:
            vectors: (B, M, D) unit rows: M = 1 at the beginning of the captions, 0 after it.
            pieces: (B, T) those that come next.
            past: (2 layers, B, heads, P, width / heads) of the P places before; see :meth:`nothing`.

        Returns:
            Of each place (B, M K + T, pieces) the scores of what follows it; and the past with these places in it.
        """
        settings = self.settings
        batch, many = vectors.shape[0], vectors.shape[1]
        prefix = self.project(vectors * self.scale)  # (B, M, K W)
        prefix = prefix.view(batch, many * settings.prefix, settings.width)
        x = torch.cat([prefix, self.pieces(pieces)], 1)  # (B, T, W)
        before, new = past.shape[3], x.shape[1]
        own = torch.arange(new, device=x.device) + before  # (T,)
        x = self.drop(x + self.places(own))
        seen = torch.arange(before + new, device=x.device)[None, :] <= own[:, None]  # (T, P + T)
        present = []
        for i, block in enumerate(self.blocks):
            x, known = block(x, (past[2 * i], past[2 * i + 1]), seen)
            present += known
        return self.norm(x) @ self.pieces.weight.T, torch.stack(present)

    def nothing(self, batch: int) -> Tensor:
        """The past of a caption that has not begun: (2 layers, B, heads, 0, width / heads)."""
        settings, device = self.settings, self.places.weight.device
        shape = (2 * settings.layers, batch, settings.heads, 0, settings.width // settings.heads)
        return torch.zeros(shape, device=device)

    def begin(self, vectors: Tensor, pieces: Tensor) -> Tensor:
        """(B, D) and the captions (B, T) -> (B, T + 1, pieces): the scores of each piece, and of what follows all."""
        scores, _ = self.forward(vectors[:, None], pieces, self.nothing(len(vectors)))
        return scores[:, self.settings.prefix - 1 :]
