"""Networks that join modalities, each read from top to bottom. B rows, M modalities, H hidden, C outputs.

All begin with a tower for each modality, one layer into a common width, and end with one linear layer. Between them is
what the network is named after: a module from tokens (B, M, K, H) and who has what (B, M) to (B, width).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True, eq=False)
class Fused:
    """What a fusion gives: (B, width), and where it looked (B, M) if it does."""

    rows: Tensor
    attention: Tensor | None = None


class Concat(nn.Module):
    """Side by side into a layer, with a flag for each modality that is there."""

    def __init__(self, modalities: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.layer = nn.Linear(modalities * (hidden + 1), hidden)
        self.width, self.dropout = hidden, dropout

    def forward(self, tokens: Tensor, present: Tensor) -> Fused:
        flat = torch.cat([tokens.flatten(1), present], dim=1)  # (B, M (H + 1))
        return Fused(F.dropout(F.gelu(self.layer(flat)), self.dropout, self.training))  # (B, H)


class Sum(nn.Module):
    """A weighted mean of those that are there; the weights are given, or learnt."""

    weights: Tensor

    def __init__(self, modalities: int, hidden: int, dropout: float, weights: Sequence[float] = ()) -> None:
        super().__init__()
        logits = torch.tensor([math.log(max(weight, 1e-4)) for weight in weights] or [0.0] * modalities)
        if weights:
            self.register_buffer("weights", logits)
        else:
            self.weights = nn.Parameter(logits)
        self.width, self.dropout = hidden, dropout

    def forward(self, tokens: Tensor, present: Tensor) -> Fused:
        shares = torch.exp(self.weights) * present  # (B, M)
        shares = shares / shares.sum(1, keepdim=True).clamp(min=1e-9)
        rows = (tokens[:, :, 0] * shares[..., None]).sum(1)  # (B, H)
        return Fused(F.dropout(rows, self.dropout, self.training), shares)


class GMU(nn.Module):
    """Gated multimodal unit: each modality's gate sees all of them (Arevalo et al. 2017, arXiv:1702.01992)."""

    def __init__(self, modalities: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.values = nn.ModuleList(nn.Linear(hidden, hidden) for _ in range(modalities))
        self.gates = nn.Linear(modalities * (hidden + 1), modalities * hidden)
        self.width, self.dropout = hidden, dropout

    def forward(self, tokens: Tensor, present: Tensor) -> Fused:
        rows, count, _, hidden = tokens.shape
        values = torch.stack(
            [torch.tanh(layer(tokens[:, i, 0])) for i, layer in enumerate(self.values)], 1
        )  # (B, M, H)
        seen = torch.cat([tokens.flatten(1), present], dim=1)
        scores = self.gates(seen).view(rows, count, hidden)
        scores = scores.masked_fill(present[..., None] == 0, -1e4)
        gates = scores.softmax(1)  # (B, M, H); for two modalities the paper's z and 1 - z
        joined = F.dropout((gates * values).sum(1), self.dropout, self.training)
        return Fused(joined, gates.mean(2))


class Bilinear(nn.Module):
    """Every pair's outer product, with a 1 so that each stays by itself (Zadeh et al. 2017, arXiv:1707.07250)."""

    def __init__(self, modalities: int, hidden: int, dropout: float, rank: int = 24) -> None:
        super().__init__()
        self.narrow = nn.ModuleList(nn.Linear(hidden, rank) for _ in range(modalities))
        self.pairs = [(i, j) for i in range(modalities) for j in range(i + 1, modalities)] or [(0, 0)]
        self.layer = nn.Linear(len(self.pairs) * (rank + 1) ** 2, hidden)
        self.width, self.dropout = hidden, dropout

    def forward(self, tokens: Tensor, present: Tensor) -> Fused:
        one = torch.ones_like(present[:, :1])
        narrow = [
            torch.cat([torch.tanh(layer(tokens[:, i, 0])) * present[:, i : i + 1], one], 1)  # (B, R + 1)
            for i, layer in enumerate(self.narrow)
        ]
        products = [torch.einsum("bi,bj->bij", narrow[i], narrow[j]).flatten(1) for i, j in self.pairs]
        joined = F.dropout(torch.cat(products, 1), self.dropout, self.training)
        return Fused(F.dropout(F.gelu(self.layer(joined)), self.dropout, self.training))


class LowRank(nn.Module):
    """All modalities' outer product, never built: a sum of R products (Liu et al. 2018, arXiv:1806.00064)."""

    def __init__(self, modalities: int, hidden: int, dropout: float, rank: int = 8) -> None:
        super().__init__()
        self.factors = nn.ModuleList(nn.Linear(hidden, rank * hidden) for _ in range(modalities))  # the 1 is the bias
        for layer in self.factors:
            assert isinstance(layer, nn.Linear)
            nn.init.ones_(layer.bias)  # a product of numbers near 1 begins as the sum of what differs from 1
        self.mix = nn.Parameter(torch.full((rank,), 1 / rank))
        self.width, self.rank, self.dropout = hidden, rank, dropout

    def forward(self, tokens: Tensor, present: Tensor) -> Fused:
        product = torch.ones(len(tokens), self.rank, self.width, device=tokens.device)
        for i, layer in enumerate(self.factors):
            factor = layer(tokens[:, i, 0]).view(-1, self.rank, self.width)
            product = product * torch.where(present[:, i, None, None] > 0, factor, torch.ones_like(factor))
        rows = F.layer_norm(torch.einsum("brh,r->bh", product, self.mix), (self.width,))  # (B, H)
        return Fused(F.dropout(rows, self.dropout, self.training))


class CrossAttention(nn.Module):
    """Each modality's tokens ask those of all the others (Tsai et al. 2019, arXiv:1906.00295); means, side by side."""

    def __init__(self, modalities: int, hidden: int, dropout: float, heads: int = 4) -> None:
        super().__init__()
        self.ask = nn.ModuleList(
            nn.MultiheadAttention(hidden, heads, dropout, batch_first=True) for _ in range(modalities)
        )
        self.norms = nn.ModuleList(nn.LayerNorm(hidden) for _ in range(modalities))
        self.layer = nn.Linear(modalities * hidden, hidden)
        self.width, self.dropout = hidden, dropout

    def forward(self, tokens: Tensor, present: Tensor) -> Fused:
        rows, count, per, hidden = tokens.shape
        keys = tokens.reshape(rows, count * per, hidden)  # (B, M K, H)
        hidden_keys = (present == 0).repeat_interleave(per, 1)  # (B, M K)
        out, looked = [], torch.zeros_like(present)
        for i, (ask, norm) in enumerate(zip(self.ask, self.norms, strict=True)):
            own = torch.zeros_like(hidden_keys)
            own[:, i * per : (i + 1) * per] = True
            masked = hidden_keys | own
            masked = masked & ~masked.all(1, keepdim=True)  # nobody else is there: then it may ask anyone
            asked, weights = ask(tokens[:, i], keys, keys, key_padding_mask=masked)  # (B, K, H), (B, K, M K)
            out.append(norm(tokens[:, i] + asked).mean(1))
            looked = looked + weights.mean(1).view(rows, count, per).sum(2)
        joined = F.gelu(self.layer(F.dropout(torch.cat(out, 1), self.dropout, self.training)))
        return Fused(F.dropout(joined, self.dropout, self.training), looked / count)


class Transformer(nn.Module):
    """A small encoder over all modalities' tokens and one that gathers them; pre-norm, as ViT has it."""

    def __init__(self, modalities: int, hidden: int, dropout: float, heads: int = 4, layers: int = 2) -> None:
        super().__init__()
        self.gather = nn.Parameter(torch.randn(1, 1, hidden) * 0.02)
        self.kind = nn.Parameter(torch.randn(1, modalities, 1, hidden) * 0.02)
        self.blocks = nn.ModuleList(_Block(hidden, heads, dropout) for _ in range(layers))
        self.norm = nn.LayerNorm(hidden)
        self.width = hidden

    def forward(self, tokens: Tensor, present: Tensor) -> Fused:
        rows, count, per, hidden = tokens.shape
        x = (tokens + self.kind).reshape(rows, count * per, hidden)
        x = torch.cat([self.gather.expand(rows, -1, -1), x], 1)  # (B, 1 + M K, H)
        hidden_keys = F.pad((present == 0).repeat_interleave(per, 1), (1, 0))  # the gathering one is always there
        looked = present
        for block in self.blocks:
            x, weights = block(x, hidden_keys)
            looked = weights[:, 0, 1:].view(rows, count, per).sum(2)  # of the last layer, as the gathering one sees
        return Fused(self.norm(x[:, 0]), looked / looked.sum(1, keepdim=True).clamp(min=1e-9))


class _Block(nn.Module):
    def __init__(self, hidden: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(hidden), nn.LayerNorm(hidden)
        self.attention = nn.MultiheadAttention(hidden, heads, dropout, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(hidden, 2 * hidden), nn.GELU(), nn.Linear(2 * hidden, hidden))
        self.dropout = dropout

    def forward(self, x: Tensor, hidden_keys: Tensor) -> tuple[Tensor, Tensor]:
        y = self.norm1(x)
        asked, weights = self.attention(y, y, y, key_padding_mask=hidden_keys)
        x = x + F.dropout(asked, self.dropout, self.training)
        return x + F.dropout(self.mlp(self.norm2(x)), self.dropout, self.training), weights


FUSIONS: Mapping[str, Callable[..., nn.Module]] = {
    "concat": Concat,
    "sum": Sum,
    "gmu": GMU,
    "bilinear": Bilinear,
    "low-rank": LowRank,
    "cross-attention": CrossAttention,
    "transformer": Transformer,
}


class FusionNet(nn.Module):
    """A tower for each modality, one fusion, one linear layer; and a linear layer behind each tower alone."""

    def __init__(
        self,
        widths: Sequence[int],
        outputs: int,
        fusion: str,
        *,
        hidden: int = 128,
        tokens: int = 1,
        dropout: float = 0.5,
        input_dropout: float = 0.2,
        weights: Sequence[float] = (),
    ) -> None:
        """Build one with random weights.

        Args:
            widths: of the M modalities.
            outputs: C.
            fusion: one of :data:`FUSIONS`.
            hidden: H.
            tokens: K of each modality.
            dropout: before each layer behind the towers.
            input_dropout: of the towers' inputs.
            weights: of the modalities, for a sum that does not learn them.
        """
        super().__init__()
        self.towers = nn.ModuleList(nn.Linear(width, tokens * hidden) for width in widths)
        more = {"weights": weights} if weights else {}
        self.fusion = FUSIONS[fusion](len(widths), hidden, dropout if fusion != "transformer" else dropout / 2, **more)
        if tokens > 1 and fusion not in ("cross-attention", "transformer"):
            raise ValueError(f"{fusion} has one token for each modality")
        self.out = nn.Linear(hidden, outputs)
        self.alone = nn.ModuleList(nn.Linear(hidden, outputs) for _ in widths)
        self.hidden, self.tokens, self.dropout, self.input_dropout = hidden, tokens, dropout, input_dropout

    def tokens_of(self, values: Sequence[Tensor], present: Tensor) -> Tensor:
        """M tables (B, width) -> (B, M, K, H); zero where a modality is missing."""
        rows = [
            F.dropout(
                F.gelu(tower(F.dropout(table, self.input_dropout, self.training))), self.dropout, self.training
            ).view(len(table), self.tokens, self.hidden)
            for tower, table in zip(self.towers, values, strict=True)
        ]
        return torch.stack(rows, 1) * present[:, :, None, None]

    def forward(self, values: Sequence[Tensor], present: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """M tables (B, width), (B, M) ones and zeros -> (B, C) fused, (B, M, C) of each alone, (B, M) attention."""
        tokens = self.tokens_of(values, present)
        fused: Fused = self.fusion(tokens, present)
        alone = torch.stack([layer(tokens[:, i].mean(1)) for i, layer in enumerate(self.alone)], 1)
        return self.out(fused.rows), alone, fused.attention
