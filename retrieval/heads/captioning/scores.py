"""How good captions are: BLEU, ROUGE-L and CIDEr-D as COCO's caption evaluation has them, without its Java.

Captions are compared as :func:`retrieval.heads.captioning.words.plain` writes them: lower case, letters, digits and
apostrophes. COCO's own tokenizer leaves out punctuation likewise, and differs in a few words with hyphens.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from retrieval.errors import DataError, MissingExtra
from retrieval.heads.captioning.words import plain

_ORDER = 4  # n-grams up to this long
_BETA = 1.2  # of ROUGE-L: recall counts for more
_SIGMA = 6.0  # of CIDEr-D: words by which a caption may be longer or shorter

References = Sequence[Sequence[str]]  # of each caption, one or more
Counts = Counter[tuple[str, ...]]


def bleu(said: Sequence[str], references: References) -> dict[str, float]:
    """Corpus BLEU-1 to 4 (Papineni et al. 2002), by sacrebleu: from 0 to 1.

    Raises:
        DataError: there is no caption, or one without references.
        MissingExtra: sacrebleu is not installed.
    """
    try:
        from sacrebleu.metrics.bleu import BLEU
    except ImportError as error:
        raise MissingExtra("BLEU", "'diptych[heads]'") from error
    ours, theirs = _checked(said, references)
    most = max(map(len, theirs))
    # sacrebleu takes one list for the first reference of each caption, one for the second, …; None where there is none.
    streams: Any = [[own[i] if i < len(own) else None for own in theirs] for i in range(most)]
    scores = {}
    for order in range(1, _ORDER + 1):
        metric = BLEU(lowercase=False, tokenize="none", max_ngram_order=order, force=True)
        scores[f"bleu_{order}"] = float(metric.corpus_score(ours, streams).score) / 100
    return scores


def rouge_l(said: Sequence[str], references: References) -> NDArray[np.float64]:
    """(N,) ROUGE-L of each caption (Lin 2004), as COCO has it: from 0 to 1.

    Precision and recall are those of the longest common subsequence, each the best over the references.
    """
    ours, theirs = _checked(said, references)
    scores = np.zeros(len(ours))
    for i, (caption, own) in enumerate(zip(ours, theirs, strict=True)):
        words = caption.split()
        common = [(_common(words, other.split()), len(other.split())) for other in own]
        precision = max(length / max(1, len(words)) for length, _ in common)
        recall = max(length / max(1, whole) for length, whole in common)
        if precision and recall:
            scores[i] = (1 + _BETA**2) * precision * recall / (recall + _BETA**2 * precision)
    return scores


def cider_d(said: Sequence[str], references: References) -> NDArray[np.float64]:
    """(N,) CIDEr-D of each caption (Vedantam et al. 2015, arXiv:1411.5726), as COCO has it: from 0 to 10.

    The weights of n-grams come from the references given, so it is comparable only over the same set. As in COCO's
    code, the length that a caption is punished for is counted in pairs of words.
    """
    ours, theirs = _checked(said, references)
    counts = [[_ngrams(other) for other in own] for own in theirs]
    pictures: Counts = Counter(ngram for own in counts for ngram in set().union(*own))
    whole = np.log(float(len(ours)))
    scores = np.zeros(len(ours))
    for i, (caption, own) in enumerate(zip(ours, counts, strict=True)):
        mine = _Weighted(_ngrams(caption), pictures, whole)
        scores[i] = 10 * np.mean([mine.likeness(_Weighted(other, pictures, whole)) for other in own])
    return scores


class _Weighted:
    """A caption's n-grams, weighted by how rare they are (tf-idf), those of each length apart."""

    def __init__(self, counts: Counts, pictures: Counts, whole: float) -> None:
        self.weights: list[dict[tuple[str, ...], float]] = [{} for _ in range(_ORDER)]
        for ngram, count in counts.items():
            self.weights[len(ngram) - 1][ngram] = count * (whole - np.log(max(1, pictures[ngram])))
        self.norms = [float(np.sqrt(sum(value**2 for value in own.values()))) for own in self.weights]
        self.length = sum(count for ngram, count in counts.items() if len(ngram) == 2)

    def likeness(self, other: _Weighted) -> float:
        """Mean cosine over the lengths of n-grams, none counted more often than the reference has it."""
        cosines = []
        for own, theirs, norm, norm_other in zip(self.weights, other.weights, self.norms, other.norms, strict=True):
            product = sum(min(value, theirs[ngram]) * theirs[ngram] for ngram, value in own.items() if ngram in theirs)
            cosines.append(product / (norm * norm_other) if norm and norm_other else product)
        off = self.length - other.length
        return float(np.mean(cosines) * np.exp(-(off**2) / (2 * _SIGMA**2)))


def _ngrams(caption: str) -> Counts:
    words = caption.split()
    return Counter(tuple(words[i : i + order]) for order in range(1, _ORDER + 1) for i in range(len(words) - order + 1))


def _common(one: Sequence[str], other: Sequence[str]) -> int:
    """Length of the longest common subsequence."""
    row = [0] * (len(other) + 1)
    for word in one:
        longer = [0]
        for j, (before, above) in enumerate(pairwise(row)):
            longer.append(before + 1 if word == other[j] else max(above, longer[j]))
        row = longer
    return row[-1]


def _checked(said: Sequence[str], references: References) -> tuple[list[str], list[list[str]]]:
    """Captions and references as they are compared; references without a word are left out."""
    if len(said) != len(references) or not len(said):
        raise DataError(f"{len(said)} captions cannot be compared with references of {len(references)} pictures")
    theirs = [[text for text in map(plain, own) if text] for own in references]
    if empty := [i for i, own in enumerate(theirs) if not own]:
        raise DataError(f"{len(empty)} of {len(said)} captions have no reference to be compared with")
    return [plain(text) for text in said], theirs
