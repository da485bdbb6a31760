"""The page of captions: what a decoder says of pictures, beside what people said."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from retrieval.report import page

if TYPE_CHECKING:  # what measures needs sacrebleu, what shows does not
    from retrieval.heads.captioning.evaluation import CaptionScores

_DRAWN, _ENDS = 24, 8  # pictures drawn evenly, and those of the best and of the worst
_SHOWN = 3  # references beside each
_LEGEND = (
    "Pictures in the order of the data. Below what the decoder says stands what people said; beside it its CIDEr-D, "
    "and the place at which the caption, as a query, finds its own picture among all (self hit@k)."
)
_NAMES = {"rouge_l": "ROUGE-L", "cider_d": "CIDEr-D", "different": "different captions", "words": "words a caption"}


def write_captions_page(result: CaptionScores, file: Path | None = None) -> Path:
    """Write the page of an evaluated decoder; to a temporary file when none is named."""
    return page.written(captions_page(result), file)


def captions_page(result: CaptionScores) -> str:
    """The page of :func:`write_captions_page` as text: the same for the same result."""
    pictures = page.Pictures(result.records)
    count = len(result.records)
    order = np.argsort(-result.cider_d, kind="stable")
    drawn = np.unique(np.linspace(0, count - 1, min(count, _DRAWN)).round().astype(np.int64))
    ends = min(_ENDS, count // 2)
    sections = [
        _head(result),
        page.section("Drawn evenly", _cards(result, pictures, drawn), _LEGEND),
        page.section("Nearest to what people said", _cards(result, pictures, order[:ends]), "By CIDEr-D."),
        page.section("Farthest from it", _cards(result, pictures, order[::-1][:ends]), "By CIDEr-D."),
    ]
    return page.document(f"Diptych: {result.card.name}", page.STYLE, "\n".join([*sections, pictures.store()]))


def _head(result: CaptionScores) -> str:
    facts = [
        page.text(result.card.kind),
        f"{len(result.records):,} pictures",
        "greedy" if result.beams == 1 else f"{result.beams} beams",
        f"vectors of {page.text(result.card.encoder)} ({page.text(result.card.fingerprint[:12])})",
    ]
    heads = [_name(name) for name in result.metrics]
    values = [_value(name, value) for name, value in result.metrics.items()]
    return (
        f'<header>\n<p class="quiet">Diptych · captions</p>\n<h1>{page.text(result.card.name)}</h1>\n'
        f'<p class="quiet">{" · ".join(facts)}</p>\n{page.table(heads, [values])}\n'
        "</header>"
    )


def _name(name: str) -> str:
    if name.startswith("bleu_"):
        return f"BLEU-{name.removeprefix('bleu_')}"
    return _NAMES.get(name, name.replace("_", " "))


def _value(name: str, value: float) -> str:
    return f"{value:.2f}" if name in ("cider_d", "words") else page.number(name, value)


def _cards(result: CaptionScores, pictures: page.Pictures, rows: np.ndarray[tuple[int], np.dtype[np.int64]]) -> str:
    cards = []
    for row in rows.tolist():
        said = page.text(result.captions[row], page.SENTENCE)
        place = page.rank(float(result.ranks[row]))
        others = "\n".join(
            f'<li><b></b><span class="words">{page.text(text, page.SENTENCE)}</span><span></span></li>'
            for text in result.records[row].texts[:_SHOWN]
        )
        cards.append(
            f'<div class="card">\n{pictures.tile(row)}\n<ol>\n<li class="first right"><b>says</b>'
            f'<span class="words">{said}</span><span title="CIDEr-D; rank of its own picture">'
            f"{result.cider_d[row]:.2f} · {place}</span></li>\n{others}\n</ol>\n</div>"
        )
    return '<div class="cards">\n' + "\n".join(cards) + "\n</div>"
