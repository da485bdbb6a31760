"""Towers that learn: pictures and words go through them at every step, each picture cropped and coloured anew.

Pictures are bytes at the model's size: 47,000 at 260 x 260 are 9.5 GB. What is too large for the memory is decoded at
every visit (:mod:`retrieval.training.streaming`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from retrieval.embedding import Progress
from retrieval.images import Preprocessing, read_photo
from retrieval.pairs import Picture, Record
from retrieval.training.amp import autocast
from retrieval.training.classic import END, UNKNOWN
from retrieval.training.open_clip_models import OpenClipEncoder
from retrieval.training.recomputation import recomputed
from retrieval.training.streaming import PictureRows, read_rows
from retrieval.training.towers import DualEncoder

_AREA, _RATIO = (0.35, 1.0), (3 / 4, 4 / 3)  # of a crop: share of the picture, change of the sides' ratio
_JITTER = (0.6, 1.4)  # factors of brightness, contrast and colour
_GREY = (0.299, 0.587, 0.114)  # ITU-R BT.601
_MASK, _FIRST_WORD = 103, 999  # BERT's vocabulary: [MASK], and the first id that is no control token
_ALIKE = 128  # sentences of about a length that go through together; fewer are more calls than work
_FEW_TOKENS = 10  # a name in a template: without one of its words it may be no name any more


class TrainedTowers:
    """Both towers of a model in training, and the data in the form that they take."""

    def __init__(
        self,
        model: DualEncoder | OpenClipEncoder,
        preprocessing: Preprocessing,
        tokenizer_json: str,
        context_length: int,
        device: str,
        part: int,
        word_dropout: float,
        trim: bool = True,
        amp: str = "auto",
        in_memory: float = math.inf,
    ) -> None:
        """Take the model and what its pictures and sentences go through.

        ``amp``: one of :data:`retrieval.training.amp.AMP`. ``trim``: id 0 is nothing but padding, and the text tower
        takes sentences of any length without it. ``in_memory``: bytes of pictures that are held; those that do not fit
        are decoded at every visit.
        """
        from tokenizers import Tokenizer

        self.model, self.preprocessing, self.device = model, preprocessing, torch.device(device)
        self.tokenizer = Tokenizer.from_str(tokenizer_json)
        self.context_length = context_length
        unknown, end = (self.tokenizer.token_to_id(token) for token in (UNKNOWN, END))
        # Where words are tokens, a hidden one is an unknown one, and the end is the last of the control tokens.
        self.hidden = (_MASK, _FIRST_WORD) if unknown is None or end is None else (unknown, end + 1)
        self.part, self.word_dropout, self.trim, self.amp = part, word_dropout, trim, amp
        self.room = in_memory
        self.mean, self.std = (torch.tensor(v, device=device) for v in (preprocessing.mean, preprocessing.std))

    def pictures(
        self, records: Sequence[Record], progress: Progress | None = None
    ) -> tuple[list[PictureRows], Mapping[int, str]]:
        """(N, H, W, 3) uint8, as search sees them: the one view that others are drawn from; and what cannot be read."""

        def prepare(_: Picture, data: bytes) -> NDArray[np.uint8]:
            pixels: NDArray[np.uint8] = self.preprocessing.pixels([read_photo(data).image])[0]
            return pixels

        size = self.preprocessing.size
        needed = len(records) * size[0] * size[1] * 3
        held = needed <= self.room
        self.room -= needed if held else 0
        rows, unreadable = read_rows(
            [record.image for record in records],
            prepare,
            size,
            held=held,
            device=self.device,
            part=self.part,
            progress=progress,
        )
        return [rows], unreadable

    def sentences(self, texts: Sequence[str]) -> Tensor:
        """(M, context length) int64 token ids, 0 is padding."""
        whole = [text.encode("utf-8", "replace").decode("utf-8") for text in texts]  # half characters: as in search
        ids = torch.tensor([encoding.ids for encoding in self.tokenizer.encode_batch(whole)])
        return F.pad(ids, (0, self.context_length - ids.shape[1])).to(self.device)

    def image_features(self, pictures: Tensor) -> Tensor:
        """(B, H, W, 3) uint8 -> (B, F). In training each is augmented, and its gradient kept.

        More than ``part`` pictures go through in parts whose activations are computed again on the way back: the
        gradients of the whole batch in the memory of a part, as GradCache has them (Gao et al. 2021, arXiv:2101.06983).
        """
        with autocast(self.amp, self.device):
            parts = torch.split(pictures, self.part)
            return torch.cat([self._through(self._trunk, part, len(pictures)) for part in parts]).float()

    def _trunk(self, pictures: Tensor) -> Tensor:
        """Bytes to features; what is made of the bytes on the way is larger, and not kept between parts either."""
        features: Tensor = self.model.image.trunk(self._pixels(pictures))
        return features

    def _pixels(self, pictures: Tensor) -> Tensor:
        """(B, H, W, 3) uint8 -> (B, 3, H, W) as the tower takes them; in training augmented."""
        pixels = augment(pictures) if self.model.training else pictures.permute(0, 3, 1, 2).float() / 255
        pixels = (pixels - self.mean[:, None, None]) / self.std[:, None, None]
        return pixels.contiguous(memory_format=torch.channels_last)  # half the time of other orders

    def text_features(self, sentences: Tensor) -> Tensor:
        """(B, L) int64 -> (B, G). In training some words are hidden; more than ``part`` go through in parts as well."""
        if self.model.training and self.word_dropout:
            sentences = hide_words(sentences, self.word_dropout, *self.hidden)
        if not self.trim:
            return self._sentence_features(sentences)
        # Sentences of a length go together, without padding: captions are three times as long as names.
        length = (sentences != 0).sum(1)
        order = length.argsort(stable=True)
        features = []
        for rows in torch.split(order, min(self.part, _ALIKE)):
            longest = max(1, int(length[rows].max()))
            features.append(self._sentence_features(sentences[rows, :longest], len(sentences)))
        return torch.cat(features)[order.argsort()]

    def _sentence_features(self, sentences: Tensor, batch: int = 0) -> Tensor:
        """Sentences of one length to features, of a batch of so many."""
        with autocast(self.amp, self.device):
            parts = torch.split(sentences, self.part)
            return torch.cat([self._through(self.model.text.trunk, p, batch or len(sentences)) for p in parts]).float()

    def _through(self, trunk: Callable[[Tensor], Tensor], part: Tensor, batch: int) -> Tensor:
        """A part of a batch through a trunk; its activations are not kept if the batch has more parts."""
        if self.model.training and batch > self.part:
            return recomputed(trunk, part, self.model)
        return trunk(part)


def augment(pictures: Tensor) -> Tensor:
    """(B, H, W, 3) uint8 -> (B, 3, H, W) in 0 to 1: a random resized crop of each, mirrored or not, in other colours.

    The crop is Inception's (Szegedy et al. 2015, arXiv:1409.4842, section 6); of the whole size, so never scaled down.
    """
    count, height, width, _ = pictures.shape

    def draw(low: float, high: float) -> Tensor:
        return torch.empty(count, device=pictures.device).uniform_(low, high)

    area, ratio = draw(*_AREA), draw(math.log(_RATIO[0]), math.log(_RATIO[1])).exp()
    wide, high = (area * ratio).sqrt().clamp(max=1), (area / ratio).sqrt().clamp(max=1)
    to_source = torch.zeros((count, 2, 3), device=pictures.device)  # of coordinates from -1 to 1
    to_source[:, 0, 0], to_source[:, 1, 1] = wide * draw(-1, 1).sign(), high
    to_source[:, 0, 2], to_source[:, 1, 2] = draw(-1, 1) * (1 - wide), draw(-1, 1) * (1 - high)
    grid = F.affine_grid(to_source, [count, 3, height, width], align_corners=False)
    x = pictures.permute(0, 3, 1, 2).float() / 255
    x = F.grid_sample(x, grid, padding_mode="border", align_corners=False)
    brightness, contrast, colour = (draw(*_JITTER)[:, None, None, None] for _ in range(3))
    x = (x * brightness).clamp(0, 1)
    grey = (x * x.new_tensor(_GREY)[:, None, None]).sum(1, keepdim=True)
    x = torch.lerp(grey, x, colour).clamp(0, 1)
    return torch.lerp(grey.mean((2, 3), keepdim=True), x, contrast).clamp(0, 1)


def hide_words(ids: Tensor, share: float, mask: int = _MASK, first: int = _FIRST_WORD) -> Tensor:
    """(B, L) token ids with a share of the words, from ``first`` on, replaced by ``mask``; short sentences stay whole.

    Without more said, the words are BERT's, and become [MASK].
    """
    sentence = (ids != 0).sum(1, keepdim=True) > _FEW_TOKENS
    hidden = (torch.rand(ids.shape, device=ids.device) < share) & (ids >= first) & sentence
    return ids.masked_fill(hidden, mask)
