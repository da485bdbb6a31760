"""How good a decoder is on pictures with captions: against the captions, and whether its own find their pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from indexes.vectors import Vectors
from retrieval.embedding import EmbeddingCache, Progress, cache_name, encode_pictures
from retrieval.encoders import Encoder
from retrieval.errors import DataError
from retrieval.heads import check_fingerprint
from retrieval.heads.captioning.decoders import CaptionDecoder, Card, decode_all
from retrieval.heads.captioning.scores import References, bleu, cider_d, rouge_l
from retrieval.heads.captioning.words import plain
from retrieval.metrics import KS, means_at_k
from retrieval.pairs import Record
from retrieval.ranks import rank_pairs


@dataclass(frozen=True, eq=False)
class CaptionScores:
    """What a decoder says of N pictures, and how good that is.

    Attributes:
        card: the decoder's.
        beams: of the search; 1 is greedy.
        records: the pictures with their own captions.
        captions: what was said of each.
        metrics: ``bleu_1`` to ``bleu_4`` and ``rouge_l`` (0 to 1), ``cider_d`` (0 to 10), ``self_hit@k`` (the share of
            captions that find their picture among the first k of all), ``different`` (captions by all pictures) and
            ``words`` (mean length).
        rouge_l: of each.
        cider_d: of each.
        ranks: (N,) where each caption finds its picture, from 1.
    """

    card: Card
    beams: int
    records: Sequence[Record]
    captions: Sequence[str]
    metrics: Mapping[str, float]
    rouge_l: NDArray[np.float64]
    cider_d: NDArray[np.float64]
    ranks: NDArray[np.float64]

    def to_json(self) -> dict[str, Any]:
        """Decoder, number of pictures and metrics in plain values."""
        return {
            "decoder": self.card.name,
            "kind": self.card.kind,
            "beams": self.beams,
            "pictures": len(self.records),
            "metrics": dict(self.metrics),
        }


def evaluate(
    decoder: CaptionDecoder,
    encoder: Encoder,
    records: Sequence[Record],
    *,
    beams: int | None = None,
    cached: bool = True,
    progress: Progress | None = None,
) -> CaptionScores:
    """Write a caption for each picture that has some, and compare.

    Raises:
        ModelMismatch: the decoder is of another encoder.
        DataError: no picture has a caption, or some cannot be read.
    """
    check_fingerprint("the decoder", decoder.fingerprint, encoder.fingerprint)
    known = [record for record in records if any(map(plain, record.texts))]
    if not known:
        raise DataError("no picture has a caption: there is nothing to compare with")
    cache = EmbeddingCache(cache_name(encoder), encoder.dim) if cached else None
    images = encode_pictures(encoder, [record.image for record in known], cache=cache, progress=progress)
    captions = decode_all(decoder, images, beams)
    return _scores(decoder.card, beams or decoder.card.settings.get("beams", 1), encoder, known, images, captions)


def _scores(
    card: Card, beams: int, encoder: Encoder, records: Sequence[Record], images: Vectors, captions: Sequence[str]
) -> CaptionScores:
    references: References = [record.texts for record in records]
    rouge, cider = rouge_l(captions, references), cider_d(captions, references)
    own = np.arange(len(records))
    found = rank_pairs(images, encoder.encode_texts(captions), own, own).t2i
    hits = means_at_k(found, KS)
    metrics = {
        **bleu(captions, references),
        "rouge_l": float(rouge.mean()),
        "cider_d": float(cider.mean()),
        **{f"self_{name}": value for name, value in hits.items() if name.startswith("hit@")},
        "different": len(set(captions)) / len(captions),
        "words": float(np.mean([len(caption.split()) for caption in captions])),
    }
    return CaptionScores(card, beams, records, captions, metrics, rouge, cider, found.best)
