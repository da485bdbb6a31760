"""The small classic pair, from scratch: a CNN over pixels and an LSTM over word vectors, each read from top to bottom.

Joined by a projection each, they are VSE (Kiros et al. 2014, arXiv:1411.2539) and, with the hardest negative, VSE++
(Faghri et al. 2018, arXiv:1707.05612); the words may begin as word2vec's (Mikolov et al. 2013, arXiv:1301.3781).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor, nn

CLASSIC = "scratch:cnn-lstm"  # as a model to train: both towers by one name

# What the defaults, which are for pretrained towers, are replaced by: everything learns, from random weights.
CLASSIC_SETTINGS: Mapping[str, Any] = {
    "train": "all",
    "image_size": 64,  # of so small a network; a picture of 260 costs 16 times as much
    "dim": 256,  # as wide as the CNN's features
    "batch_size": 128,  # VSE++'s
    "image_tower_learning_rate": 1e-3,  # the projections' own: there is nothing to be kept
    "text_tower_learning_rate": 1e-3,
    "dropout": 0.0,  # towers that learn see no picture twice: they are cropped and coloured anew
    "image_noise": 0.0,
    "text_noise": 0.0,
    "word_dropout": 0.05,  # of longer captions; so the unknown word, which a hidden one becomes, is learnt as well
}

PADDING, UNKNOWN, END = "[PAD]", "[UNK]", "[END]"
_CONTROL = (PADDING, UNKNOWN, END)  # ids 0, 1, 2
_MOST_WORDS = 50_000  # of the captions, the most frequent; beyond it are those that occur once, of which none is learnt
_WORD = Regex(r"[\p{L}\p{M}\p{N}]+")  # a dog and "a dog." are the same search


def below(blocks: nn.ModuleList, last: int) -> list[nn.Module]:
    """A tower's blocks without the last so many."""
    return [*blocks][: max(0, len(blocks) - last)]


def above(blocks: nn.ModuleList, last: int) -> list[nn.Module]:
    """The last so many of a tower's blocks."""
    return [*blocks][max(0, len(blocks) - last) :]


class ConvBlock(nn.Module):
    """Half the size, by a convolution of 3 x 3 with batch norm (Ioffe & Szegedy 2015, arXiv:1502.03167)."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, 3, 2, 1, bias=False)
        self.norm = nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.norm(self.conv(x)))


class CNN(nn.Module):
    """Image tower: normalised pixels (B, 3, H, W) of any size to pooled features of 256 numbers."""

    features = 256

    def __init__(self) -> None:
        super().__init__()
        self.conv_stem = nn.Conv2d(3, 32, 3, 2, 1, bias=False)
        self.bn0 = nn.BatchNorm2d(32)
        self.blocks = nn.ModuleList(ConvBlock(i, o) for i, o in ((32, 64), (64, 128), (128, self.features)))

    def forward(self, pixels: Tensor) -> Tensor:
        return self.above(self.below(pixels))

    def below(self, pixels: Tensor, last: int = 0) -> Tensor:
        """What the last so many blocks take."""
        x = F.relu(self.bn0(self.conv_stem(pixels)))  # (B, 32, H/2, W/2)
        for block in below(self.blocks, last):
            x = block(x)  # (B, 64, H/4, W/4), (B, 128, H/8, W/8), (B, 256, H/16, W/16)
        return x

    def above(self, x: Tensor, last: int = 0) -> Tensor:
        """What they make of it."""
        for block in above(self.blocks, last):
            x = block(x)
        return x.mean((2, 3))  # (B, 256)


class LSTM(nn.Module):
    """Text tower: word ids (B, L) to the state after the last word, 512 numbers (Hochreiter & Schmidhuber 1997).

    Id 0 is padding, and stands behind the words alone: what is read after the last of them changes nothing before.

    ``fixed`` words do not learn, as VSE's: those of the captions would leave behind the others, which come from the
    same file and are only searched for.
    """

    features = 512

    def __init__(self, vocabulary: int, width: int = 300, fixed: bool = False) -> None:
        super().__init__()
        self.fixed = fixed
        words = torch.empty(vocabulary, width).uniform_(-0.1, 0.1)  # VSE++'s
        words[:2] = 0  # padding, and an unknown word, which says nothing
        if fixed:
            self.register_buffer("words", words)
        else:
            self.words = nn.Parameter(words)
        self.lstm = nn.LSTM(width, self.features, batch_first=True)

    def no_weight_decay(self) -> set[str]:
        """Words: those of no caption in a batch would wither."""
        return {"words"}

    def forward(self, ids: Tensor) -> Tensor:
        return self.above(self.below(ids), ids != 0)

    def below(self, ids: Tensor, last: int = 0) -> Tensor:  # noqa: ARG002 - there is one layer, which is the last
        """What the layer takes: the words' vectors."""
        return F.embedding(ids, self.words)  # (B, L, width)

    def above(self, x: Tensor, mask: Tensor, last: int = 0) -> Tensor:  # noqa: ARG002
        """What it makes of them: the state at the last word that is there, of (B, L)."""
        states, _ = self.lstm(x)  # (B, L, 512)
        end = mask.sum(1) - 1  # (B,)
        state: Tensor = states.gather(1, end[:, None, None].expand(-1, 1, self.features))[:, 0]  # (B, 512)
        return state


def split_words(text: str) -> list[str]:
    """The words of a text as the tokenizer has them: lower case, without punctuation."""
    return [word for word, _ in _SPLIT.pre_tokenize_str(_NORMAL.normalize_str(text))]


_NORMAL = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
_SPLIT = pre_tokenizers.Split(_WORD, "removed", invert=True)


def words_of(captions: Iterable[str]) -> list[str]:
    """The words of all captions, the most frequent first, of equals the first in the alphabet; 50,000 at most."""
    counts: Counter[str] = Counter()
    for caption in captions:
        counts.update(split_words(caption.encode("utf-8", "replace").decode("utf-8")))  # no half characters
    return sorted(counts, key=lambda word: (-counts[word], word))[:_MOST_WORDS]


def word_tokenizer(words: Iterable[str], context_length: int) -> Tokenizer:
    """A word is a token, its id its place in the list behind the control tokens; no text contains one of these.

    An end stands behind each sentence, so that none is empty.
    """
    numbers = {word: number for number, word in enumerate([*_CONTROL, *words])}
    tokenizer = Tokenizer(models.WordLevel(numbers, unk_token=UNKNOWN))
    tokenizer.normalizer = _NORMAL
    tokenizer.pre_tokenizer = _SPLIT
    tokenizer.post_processor = processors.TemplateProcessing(single=f"$A {END}", special_tokens=[(END, numbers[END])])
    tokenizer.enable_truncation(context_length)
    tokenizer.enable_padding(pad_id=0, pad_token=PADDING)
    return tokenizer


def put_word_vectors(tower: LSTM, words: Iterable[str], vectors: Mapping[str, Any]) -> None:
    """Give words their vectors, and the others, among them the end, random ones of the same spread.

    Args:
        tower: made for these words.
        words: in the tokenizer's order.
        vectors: (W,) of each word that has one.
    """
    places = {word: place for place, word in enumerate(words, len(_CONTROL)) if word in vectors}
    with torch.no_grad():
        rows = torch.stack([torch.as_tensor(vectors[word]) for word in places])
        tower.words[2:] = torch.randn(tower.words[2:].shape) * rows.std()
        tower.words[list(places.values())] = rows
