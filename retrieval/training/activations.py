"""Towers of which only the last blocks learn: what these take is computed once, and held in float16.

At every step only the blocks that learn are computed, and what stands behind them: with one block of the built-in image
tower 94 of its 858 million multiplications. In exchange each picture is seen as it is, and never cropped or coloured.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import cast

import torch
from torch import Tensor

from retrieval.embedding import Progress
from retrieval.pairs import Record
from retrieval.training.models import StartModel
from retrieval.training.pictures import TrainedTowers
from retrieval.training.streaming import PictureRows, parts
from retrieval.training.towers import DualEncoder, ImageTrunk, TextTrunk

_PART = 32  # pictures computed at a time
_DECODED = 256  # pictures decoded at a time


class PartlyFrozenTowers(TrainedTowers):
    """What is kept of a picture or a sentence is what its tower's last blocks take. Implements :class:`data.Towers`.

    A sentence's row is (L, W + 1): W numbers of each token, and whether there is one, 1 or 0.
    """

    def __init__(self, start: StartModel, last: int, device: str) -> None:
        """Take a model whose last so many blocks are to learn, in each tower. TypeError for one that cannot be cut."""
        if not isinstance(start.model, DualEncoder):
            raise TypeError("only the built-in kind of towers can be cut")
        super().__init__(
            start.model, start.preprocessing, start.tokenizer_json, start.context_length, device, _PART, 0.0
        )
        self.last = last
        self.image, self.text = cast("ImageTrunk", start.model.image.trunk), cast("TextTrunk", start.model.text.trunk)

    @torch.no_grad()
    def needed(self, pictures: int, sentences: int) -> int:
        """How many bytes so many rows take, at most."""
        self.model.eval()
        blank = torch.zeros((1, *self.preprocessing.size, 3), dtype=torch.uint8, device=self.device)
        words = torch.ones((1, self.context_length), dtype=torch.int64, device=self.device)
        image = self.image.below(self._pixels(blank), self.last)
        return 2 * (pictures * image.numel() + sentences * self._rows_of(words).numel())

    @torch.no_grad()
    def pictures(
        self, records: Sequence[Record], progress: Progress | None = None
    ) -> tuple[list[PictureRows], Mapping[int, str]]:
        """(N, C, H, W) float16 of the pictures that can be read; and the others, by their place."""
        self.model.eval()
        rows: list[Tensor] = []
        unreadable: dict[int, str] = {}
        for first in range(0, len(records), _DECODED):
            (decoded,), bad = super().pictures(records[first : first + _DECODED])
            unreadable |= {first + place: reason for place, reason in bad.items()}
            rows += [
                self.image.below(self._pixels(part), self.last).half()
                for portion in parts(decoded)
                for part in torch.split(portion, _PART)
            ]
            if progress:
                progress(min(first + _DECODED, len(records)), len(records))
        return [torch.cat(rows) if rows else torch.empty(0)], unreadable

    @torch.no_grad()
    def sentences(self, texts: Sequence[str]) -> Tensor:
        """(M, L, W + 1) float16; L is the longest sentence's."""
        self.model.eval()
        ids = super().sentences(texts)
        ids = ids[:, : max(1, int((ids != 0).sum(1).max()))]
        return torch.cat([self._rows_of(part) for part in torch.split(ids, _PART)])

    def _rows_of(self, ids: Tensor) -> Tensor:
        below = self.text.below(ids, self.last)
        return torch.cat([below, (ids != 0)[..., None].to(below.dtype)], dim=2).half()

    def image_features(self, pictures: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, F), through the blocks that learn."""
        features: Tensor = self.image.above(pictures.float().contiguous(memory_format=torch.channels_last), self.last)
        return features

    def text_features(self, sentences: Tensor) -> Tensor:
        """(B, L, W + 1) -> (B, G), through the blocks that learn."""
        there = sentences[..., -1] > 0
        longest = max(1, int(there.sum(1).max()))
        features: Tensor = self.text.above(sentences[:, :longest, :-1].float(), there[:, :longest], self.last)
        return features
