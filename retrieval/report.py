"""HTML pages, each one self-contained file: to be looked at rather than read. Charts: :mod:`retrieval.charts`."""

from __future__ import annotations

import base64
import html
import io
import math
import os
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from indexes.vectors import Vectors, cosines, exact_search
from retrieval.charts import (
    SHARES,
    STYLE,
    Axis,
    Curve,
    Dot,
    axis_labels,
    curves,
    group,
    heat_map,
    histogram,
    row,
    rows,
    share_bar,
    whiskers,
)
from retrieval.errors import ImageError, UsageError
from retrieval.evaluation import ClassificationDetails, Comparison, Evaluation, RetrievalDetails
from retrieval.images import read_photo
from retrieval.library import Match
from retrieval.pairs import Picture, Record
from retrieval.ranks import Ranks, Rows

_PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
  :root {{ color-scheme: light dark; font: 16px/1.4 system-ui, sans-serif; }}
  body {{ max-width: 76rem; margin: 2rem auto; padding: 0 1rem; }}
  figure {{ margin: 0; }}
{style}</style>
{body}
</html>
"""


def _page(title: str, style: str, body: str) -> str:
    return _PAGE.format(title=_text(title), style=style, body=body)


def _written(page: str, file: Path | None) -> Path:
    """Write a page; to a temporary file when none is named."""
    if file is None:
        handle, name = tempfile.mkstemp(prefix="diptych-", suffix=".html")
        os.close(handle)
        file = Path(name)
    try:
        file.write_text(page, "utf-8", "backslashreplace")
    except OSError as error:
        raise UsageError(f"{file} cannot be written: {error.strerror}") from error
    return file


def _text(words: str, most: int = 0) -> str:
    """Anything a user gave, as HTML; cut if there is a limit."""
    return html.escape(_plain(words, most))


def _plain(words: str, most: int = 0) -> str:
    """Anything a user gave, as text that can be written: a file name need not be UTF-8."""
    if most and len(words) > most:
        words = words[: most - 1] + "…"
    return words.encode("utf-8", "backslashreplace").decode("utf-8")


def _jpeg(picture: Picture, side: int) -> tuple[str, tuple[int, int]] | None:
    """A thumbnail in base64, no longer than that many pixels, and its size; None if the picture cannot be read."""
    try:
        image = read_photo(picture if isinstance(picture, Path) else picture.read_bytes()).image
    except (ImageError, OSError):  # gone or damaged since: the rest of the page is still worth having
        return None
    image.thumbnail((side, side), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=82)
    return base64.b64encode(buffer.getvalue()).decode("ascii"), image.size


# ---- pictures found --------------------------------------------------------------------------------------------------

_THUMBNAIL = 320  # pixels of the longer side: sharp in a 200-pixel column on a dense screen
_RESULTS_STYLE = """
  h1 { font-size: 1.1rem; font-weight: 600; opacity: .7; }
  h2 { font-size: 1.35rem; margin: 2.2rem 0 .8rem; overflow-wrap: anywhere; }
  .found { display: grid; grid-template-columns: repeat(auto-fill, minmax(11rem, 1fr)); gap: 1rem; }
  img { width: 100%; aspect-ratio: 4 / 3; object-fit: cover; border-radius: .5rem; background: #8883; }
  figcaption { font-size: .82rem; display: flex; gap: .6rem; justify-content: space-between; }
  figcaption span:first-child { overflow: hidden; text-overflow: ellipsis; white-space: nowrap; }
  .score { font-variant-numeric: tabular-nums; opacity: .7; }
  .none { opacity: .7; }
"""


def write_results_page(results: Sequence[tuple[str, Sequence[Match]]], file: Path | None = None) -> Path:
    """Write a page with the pictures found for each query, best first; to a temporary file when none is named.

    The pictures on it are thumbnails inside the page, linked to the files.
    """
    return _written(results_page(results), file)


def results_page(results: Sequence[tuple[str, Sequence[Match]]]) -> str:
    """The page of :func:`write_results_page` as text."""
    title = f"Diptych: {results[0][0] if len(results) == 1 else f'{len(results)} searches'}"
    sections = [f"<h1>{_text(title)}</h1>"]
    for query, matches in results:
        figures = "\n".join(_match(match) for match in matches)
        found = f'<div class="found">\n{figures}\n</div>' if figures else '<p class="none">Nothing found.</p>'
        sections.append(f"<h2>{_text(query)}</h2>\n{found}")
    return _page(title, _RESULTS_STYLE, "\n".join(sections))


def _match(match: Match) -> str:
    name = _text(match.path)
    link = "file://" + quote(os.fsencode(match.file))
    thumbnail = _jpeg(match.file, _THUMBNAIL)
    image = (
        f'<img src="data:image/jpeg;base64,{thumbnail[0]}" alt="{name}">'
        if thumbnail
        else f'<img alt="{name} (unreadable)">'
    )
    return (
        f'<figure><a href="{link}" title="{name}">{image}</a>'
        f'<figcaption><span>{name}</span><span class="score">{match.score:.3f}</span></figcaption></figure>'
    )


# ---- an evaluation ---------------------------------------------------------------------------------------------------

_SMALL = 200  # pixels of a thumbnail: some eighty of them make a page of a megabyte
_WORST, _BEST, _SHOWN = 8, 4, 4  # examples of a direction, and what is shown of the answer to each
_PROBED = 5000  # queries among which the best are looked for
_BINS = (1, 3, 5, 10, 20, 50, 100)  # of ranks: the last one of each bin
_CURVE = 1000  # the largest k of the curves
_MAP = 30  # classes of a confusion matrix; one that has up to _WHOLE is shown whole
_WHOLE = 40
_CLASSES = 15  # worst and best
_CONFUSED = 12  # pairs
_Z = 1.96
_SENTENCE, _NAME = 280, 60  # letters
_MEASURES = {"map": "mAP", "mrr": "MRR", "r_precision": "R-precision", "mean_per_class": "mean per class"}
_WAYS = {"t2i": "Text → image", "i2t": "Image → text"}

_EVALUATION_STYLE = """
  :root { --paper: #fff; --ink: #1b1f24; --quiet: #66707b; --line: #dfe3e8; --card: #f6f7f9; --t2i: #2563c4;
    --i2t: #c2570c; --good: #15803d; --bad: #b91c1c; }
  @media (prefers-color-scheme: dark) {
    :root { --paper: #14171b; --ink: #e4e7eb; --quiet: #98a2ae; --line: #30363e; --card: #1c2026; --t2i: #78aaff;
      --i2t: #f29a52; --good: #4ec27a; --bad: #f4797a; }
  }
  body { background: var(--paper); color: var(--ink); }
  h1 { font-size: 1.9rem; line-height: 1.2; margin: .2rem 0 .5rem; overflow-wrap: anywhere; }
  h2 { font-size: 1.25rem; margin: 3rem 0 .3rem; }
  h3 { font-size: 1rem; margin: 0; }
  p { margin: 0; }
  .quiet, .said .where { color: var(--quiet); font-size: .85rem; overflow-wrap: anywhere; }
  h2 + .quiet, h3 + .quiet { margin-bottom: 1rem; }
  .panels { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)); gap: 1.25rem;
    margin-top: 1rem; align-items: start; }
  .panel { background: var(--card); border: 1px solid var(--line); border-radius: .6rem; padding: 1rem 1.2rem;
    min-width: 0; }
  .panels + .quiet { margin-top: .6rem; }
  .panel > .quiet + div { margin-top: .7rem; }
  .panel h3 + div { margin-top: .8rem; }
  .whole { grid-column: 1 / -1; }
  .number { font-size: 1.65rem; font-weight: 650; letter-spacing: -.01em; font-variant-numeric: tabular-nums;
    white-space: nowrap; }
  .name { display: inline-block; color: var(--quiet); }
  .legend { margin-bottom: .5rem; display: flex; flex-wrap: wrap; gap: .2rem 1.4rem; font-size: .85rem; }
  .legend svg { display: inline-block; vertical-align: middle; margin-right: .45rem; }
  .legend path { stroke: currentColor; stroke-width: 2; } .legend .dashed { stroke-dasharray: 6 4; }
  .legend .dotted { stroke-dasharray: 1.5 3; }
  .case { display: grid; grid-template-columns: minmax(0, 1fr) repeat(5, min(7.4rem, 11.5%)); gap: .7rem;
    padding: .8rem 0; border-top: 1px solid var(--line); align-items: start; break-inside: avoid; }
  .case.first { grid-template-columns: minmax(0, 1fr) repeat(4, min(7.4rem, 11.5%)); }
  .case.heads { padding: 0 0 .3rem; border: 0; font-size: .8rem; color: var(--quiet); }
  .words { display: -webkit-box; -webkit-box-orient: vertical; -webkit-line-clamp: 4; overflow: hidden;
    overflow-wrap: anywhere; }
  .tile { display: block; width: 100%; aspect-ratio: 1; overflow: hidden; background: var(--line);
    border-radius: .35rem; }
  .right .tile { outline: 3px solid var(--good); outline-offset: 1px; }
  figcaption { font-size: .76rem; color: var(--quiet); margin-top: .25rem; font-variant-numeric: tabular-nums;
    overflow-wrap: anywhere; }
  .right figcaption b, .card li.right b { color: var(--good); }
  .tiles { display: grid; grid-template-columns: repeat(auto-fill, minmax(7.4rem, 1fr)); gap: 1.1rem .9rem; }
  .tiles figure { max-width: 11rem; break-inside: avoid; } .tiles b { color: var(--ink); }
  .cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 27rem), 1fr)); gap: 0 2rem; }
  .card { display: grid; grid-template-columns: 7.4rem minmax(0, 1fr); gap: 1rem; padding: .9rem 0; align-items: start;
    border-top: 1px solid var(--line); break-inside: avoid; }
  .card ol { list-style: none; margin: 0; padding: 0; font-size: .88rem; line-height: 1.3; }
  .card li { display: grid; grid-template-columns: 3.4rem minmax(0, 1fr) auto; gap: .5rem; padding: .12rem 0; }
  .card li b { font-weight: 600; color: var(--quiet); font-variant-numeric: tabular-nums; }
  .card li span:last-child { color: var(--quiet); font-variant-numeric: tabular-nums; }
  .card li .words { -webkit-line-clamp: 2; }
  .card li.first { border-bottom: 1px solid var(--line); padding-bottom: .35rem; margin-bottom: .3rem; }
  details { margin: 3rem 0 2rem; }
  summary { font-size: 1.25rem; font-weight: 700; cursor: pointer; }
  .scroll { overflow-x: auto; }
  table { border-collapse: collapse; font-size: .85rem; margin: 1rem 0; font-variant-numeric: tabular-nums; }
  th, td { text-align: right; padding: .22rem .8rem; border-bottom: 1px solid var(--line); white-space: nowrap; }
  th:first-child, td:first-child { text-align: left; padding-left: 0; }
  .store { position: absolute; width: 0; height: 0; }
  @media (max-width: 44rem) {
    .case { grid-template-columns: repeat(5, minmax(0, 1fr)); gap: .35rem; }
    .case.first { grid-template-columns: repeat(4, minmax(0, 1fr)); } .said { grid-column: 1 / -1; }
    .case.heads { display: none; } .panel { padding: .8rem .8rem; }
    .number { font-size: 1.35rem; } .card { grid-template-columns: 5.6rem minmax(0, 1fr); gap: .7rem; }
  }
  @media print {
    body { margin: 0; max-width: none; } .panel { break-inside: avoid; } h2, h2 + .quiet, .heads { break-after: avoid; }
    .quiet { break-inside: avoid; }
    details::details-content { content-visibility: visible; block-size: auto; }
    .scroll { overflow: visible; } table { font-size: .6rem; } th, td { padding: .15rem .3rem; white-space: normal; }
  }
"""


def write_evaluation_page(result: Evaluation, file: Path | None = None) -> Path:
    """Write a page that shows an evaluation; to a temporary file when none is named.

    Numbers with their intervals as charts, and the best and the worst answers with thumbnails of the pictures. It
    needs no network and no script.
    """
    return _written(evaluation_page(result), file)


def evaluation_page(result: Evaluation) -> str:
    """The page of :func:`write_evaluation_page` as text: the same for the same result."""
    pictures = _Pictures(result.details.records)
    if isinstance(result.details, RetrievalDetails):
        sections = _retrieval(result, result.details, pictures)
    else:
        sections = _classification(result, result.details, pictures)
    body = "\n".join([_head(result), *sections, _tables(result), pictures.store()])
    return _page(f"Diptych: {result.model}, {result.task}", STYLE + _EVALUATION_STYLE, body)


class _Pictures:
    """Thumbnails: each that is shown is in the page once, and drawn wherever it is wanted."""

    def __init__(self, records: Sequence[Record]) -> None:
        self.records = records
        self.names: dict[str, str] = {}  # of thumbnails, by their data
        self.rows: dict[int, str | None] = {}
        self.symbols: list[str] = []

    def tile(self, row: int) -> str:
        """A square that shows the whole picture of a row."""
        if row not in self.rows:
            self.rows[row] = self._add(row)
        name, label = self.rows[row], _text(self.records[row].image.name, 200)
        if name is None:
            unreadable = '<text x="50" y="54" text-anchor="middle">unreadable</text>'
            return f'<svg class="tile" role="img" viewBox="0 0 100 100"><title>{label}</title>{unreadable}</svg>'
        return (
            f'<svg class="tile" role="img" viewBox="0 0 1 1"><title>{label}</title>'
            f'<use href="#{name}" width="1" height="1"/></svg>'
        )

    def _add(self, row: int) -> str | None:
        made = _jpeg(self.records[row].image, _SMALL)
        if made is None:
            return None
        data, (width, height) = made
        if data not in self.names:
            self.names[data] = f"p{len(self.names)}"
            self.symbols.append(
                f'<symbol id="{self.names[data]}" viewBox="0 0 {width} {height}">'
                f'<image width="{width}" height="{height}" href="data:image/jpeg;base64,{data}"/></symbol>'
            )
        return self.names[data]

    def store(self) -> str:
        """What the tiles refer to."""
        return '<svg class="store" aria-hidden="true">\n' + "\n".join(self.symbols) + "\n</svg>"


# ---- numbers as they are written -------------------------------------------------------------------------------------


def _is_share(name: str) -> bool:
    return not name.endswith("_rank") and name != "rsum"


def _number(name: str, value: float) -> str:
    """A measure: a share as per cent with one decimal, rsum with three, a median with as many as it needs."""
    if not math.isfinite(value):
        return "–"
    if _is_share(name):
        return f"{100 * value:.1f}\xa0%"
    if name == "rsum":
        return f"{value:.3f}"
    return f"{value:,.1f}" if name.endswith("mean_rank") else _rank(value)


def _interval(name: str, ends: tuple[float, float] | None) -> str:
    if ends is None or not all(map(math.isfinite, ends)):
        return ""
    return "–".join(_number(name, end).removesuffix("\xa0%") for end in ends)


def _difference(name: str, value: float) -> str:
    """With a sign; of shares in points."""
    if not math.isfinite(value):
        return "–"
    text = f"{100 * value:+.1f}" if _is_share(name) else f"{value:+.3f}" if name == "rsum" else f"{value:+,.1f}"
    return text.replace("-", "−")


def _rank(value: float) -> str:
    return f"{value:,.1f}".removesuffix(".0")


def _score(value: float) -> str:
    return f"{value:.3f}".replace("-", "−")


def _several(count: int, one: str, many: str) -> str:
    return f"{count:,} {one if count == 1 else many}"


# ---- sections that all evaluations have ------------------------------------------------------------------------------


def _section(title: str, content: str, note: str = "") -> str:
    return f"<section>\n<h2>{_text(title)}</h2>\n{_quiet(note)}{content}\n</section>"


def _panel(content: str, title: str = "", note: str = "", kind: str = "") -> str:
    head = f"<h3>{_text(title)}</h3>\n" if title else ""
    return f'<div class="panel {kind}">\n{head}{_quiet(note)}{content}\n</div>'


def _quiet(note: str) -> str:
    return f'<p class="quiet">{note}</p>\n' if note else ""


def _panels(panels: Iterable[str]) -> str:
    return '<div class="panels">\n' + "\n".join(panels) + "\n</div>"


def _head(result: Evaluation) -> str:
    captions = ("caption", "captions") if result.task == "retrieval" else ("class", "classes")
    facts = [
        _several(result.images, "picture", "pictures"),
        _several(result.texts, *captions),
        f"data {_text(result.checksum[:12])}",
        f"model {_text(result.fingerprint[:12])}",
        "95 % intervals: bootstrap over pictures" if result.intervals else "no intervals were asked for",
    ]
    if result.ties == "mean":
        facts.append("ties share the middle place")
    if result.note:
        facts.append(_text(result.note))
    against = f" against {_text(result.comparison.other.model)}" if result.comparison else ""
    return (
        f'<header>\n<p class="quiet">Diptych · {_text(result.task)}</p>\n<h1>{_text(result.model)}{against}</h1>\n'
        f'<p class="quiet">{" · ".join(facts)}</p>\n</header>'
    )


def _headline(result: Evaluation, names: Mapping[str, str], kind: str, axis: Axis = SHARES) -> str:
    """Measures, large, with their intervals, and the other model's as hollow dots. ``names``: what each is called."""
    other = result.comparison.other if result.comparison else None
    width = max(map(len, names.values()), default=0) + 1
    lines = []
    for name, called in names.items():
        value, ends = result.metrics[name], result.intervals.get(name)
        dots = [Dot(value, ends, kind)]
        if other:
            dots.append(Dot(other.metrics[name], other.intervals.get(name), f"{kind} other", lane=1))
        called = f'<span class="name" style="min-width:{width}ch">{_text(called)}</span>'
        label = f'{called} <b class="number">{_number(name, value)}</b>'
        lines.append(row(label, whiskers(dots, axis), f"<span>{_interval(name, ends)}</span>"))
    return rows(lines, axis_labels(axis, plain=axis is not SHARES))


def _filled_or_hollow(result: Evaluation) -> str:
    if not result.comparison:
        return ""
    return f"Filled: {_text(result.model)}. Hollow: {_text(result.comparison.other.model)}."


def _slice_chart(result: Evaluation, shown: Mapping[str, str]) -> str:
    """One row for each slice with the measures that it has; ``shown``: measures and the colours of their dots."""
    found = [
        (part.metrics[name], part.intervals.get(name))
        for part in result.slices
        for name in shown
        if name in part.metrics
    ]
    guide = next(result.metrics[name] for name in shown if name in result.metrics)
    axis = Axis.around([guide, *(end for value, ends in found for end in (value, *(ends or ())))], 0, 1)
    lines: list[str] = []
    column = None
    for part in result.slices:
        name_of_column, _, called = part.name.partition("=")
        if name_of_column != column:
            column = name_of_column
            lines.append(group(_text(column, _NAME)))
        present = [name for name in shown if name in part.metrics]
        dots = [Dot(part.metrics[name], part.intervals.get(name), shown[name], i) for i, name in enumerate(present)]
        facts = [f'<b class="{shown[name]}">{_number(name, part.metrics[name])}</b>' for name in present]
        facts += [_several(part.images, "picture", "pictures")] if part.images else []
        facts += [_several(part.texts, "caption", "captions")] if part.texts and result.task == "retrieval" else []
        value = " ".join(f"<span>{fact}</span>" for fact in facts)
        lines.append(row(_text(called, _NAME), whiskers(dots, axis, guide), value))
    return rows(lines, axis_labels(axis))


def _difference_chart(comparison: Comparison, metrics: Mapping[str, float]) -> str:
    """Differences of shares around zero: better or worse where the interval leaves 0 out, grey where it does not."""
    found, intervals = comparison.differences, comparison.intervals
    names = _distinct(metrics, found)
    axis = Axis.around([0, *(value for name in names for value in (found[name], *intervals.get(name, ())))], -1, 1)
    lines = []
    for name in names:
        ends = intervals.get(name)
        kind = "good" if ends and ends[0] > 0 else "bad" if ends and ends[1] < 0 else "even"  # NaN: even
        value = f'<span><b class="{kind}">{_difference(name, found[name])}</b></span>'
        if ends:
            value += f" <span>{_difference(name, ends[0])} to {_difference(name, ends[1])}</span>"
        lines.append(row(_text(_called(name)), whiskers([Dot(found[name], ends, kind)], axis, 0), value))
    return rows(lines, axis_labels(axis, signed=True))


def _distinct(metrics: Mapping[str, float], found: Mapping[str, float]) -> list[str]:
    """Shares, without those equal to another of their direction: recall@k is hit@k where one answer is right."""
    seen: dict[tuple[str, float, float], str] = {}
    for name in found:
        if _is_share(name):
            seen.setdefault((_way_of(name), metrics[name], found[name]), name)
    return list(seen.values())


def _way_of(name: str) -> str:
    way = name.partition("_")[0]
    return way if way in _WAYS else ""


def _called(name: str) -> str:
    """A measure in words."""
    way = _way_of(name)
    measure = name.removeprefix(f"{way}_")
    measure = _MEASURES.get(measure, measure.replace("ndcg", "nDCG").replace("top", "top-"))
    return f"{_WAYS[way]} {measure}" if way else measure


def _comparison(result: Evaluation) -> list[str]:
    if not result.comparison:
        return []
    note = (
        f"{_text(result.model)} less {_text(result.comparison.other.model)}, in percentage points. "
        "Paired intervals: green is better, red worse; grey lines hold 0, so the two cannot be told apart there."
    )
    if not result.comparison.intervals:
        note = note.partition(". ")[0] + ". Without intervals nobody knows which of these are more than chance."
    chart = _difference_chart(result.comparison, result.metrics)
    return [_section("Difference", _panel(chart), note)]


def _tables(result: Evaluation) -> str:
    """Every number there is."""
    heads = ["measure", "value", "95 % interval"]
    other = result.comparison
    if other:
        heads += [_text(other.other.model, _NAME), "difference", "paired interval"]
    lines = []
    for name, value in result.metrics.items():
        cells = [name, _number(name, value), _interval(name, result.intervals.get(name))]
        if other:
            ends = other.intervals.get(name)
            cells += [
                _number(name, other.other.metrics[name]),
                _difference(name, other.differences[name]),
                " to ".join(_difference(name, end) for end in ends) if ends else "",
            ]
        lines.append(cells)
    tables = [_table(heads, lines)]
    if result.slices:
        heads = ["measure", "all", *(_text(part.name, _NAME) for part in result.slices)]
        of_all = [result.metrics, *(part.metrics for part in result.slices)]
        tables.append(
            _table(
                heads,
                [[name, *(_number(name, of.get(name, math.nan)) for of in of_all)] for name in result.metrics],
            )
        )
    return "<details>\n<summary>All numbers</summary>\n" + "\n".join(tables) + "\n</details>"


def _table(heads: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{cell}</th>" for cell in heads)
    body = "\n".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in line) + "</tr>" for line in lines)
    return f'<div class="scroll"><table>\n<tr>{head}</tr>\n{body}\n</table></div>'


# ---- retrieval -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Way:
    """One direction: Q queries, among the items of the other side."""

    name: str  # t2i or i2t
    ranks: Ranks
    asked: Vectors  # of all texts, or of all images
    items: Vectors
    query_of: Rows  # (P,) of each pair
    item_of: Rows

    def right(self, query: int) -> Rows:
        """The right items of a query."""
        chosen: Rows = self.item_of[self.query_of == query]
        return chosen


@dataclass(frozen=True)
class _Case:
    """A query, the right item that comes first, and what was found."""

    query: int
    rank: float
    own: int
    score: float
    found: Sequence[tuple[int, float, bool]]  # item, score, whether it is right

    def placed(self) -> list[tuple[int, int, float, bool]]:
        """What was found, each with its place behind the item."""
        return [(item, place, score, right) for place, (item, score, right) in enumerate(self.found, 1)]


def _ways(details: RetrievalDetails) -> list[_Way]:
    images, texts = details.image_vectors, details.text_vectors
    ways = [
        _Way("t2i", details.ranking.t2i, texts, images, details.text_rows, details.image_rows),
        _Way("i2t", details.ranking.i2t, images, texts, details.image_rows, details.text_rows),
    ]
    return [way for way in ways if len(way.ranks.queries)]


def _retrieval(result: Evaluation, details: RetrievalDetails, pictures: _Pictures) -> list[str]:
    ways = _ways(details)
    return [
        _retrieval_headline(result, ways),
        *_comparison(result),
        *_curve_section(result, ways),
        _rank_section(ways),
        *_retrieval_slices(result),
        *(section for way in ways for section in _example_sections(way, details, pictures)),
    ]


def _retrieval_headline(result: Evaluation, ways: Sequence[_Way]) -> str:
    panels = []
    for way in ways:
        names = {name: name[4:] for name in result.metrics if name.startswith(f"{way.name}_hit@")}
        also = [
            f"{label}\xa0{_number(name, result.metrics[name])}"
            for label, measure in (("median rank", "median_rank"), ("mean rank", "mean_rank"), ("MRR", "mrr"))
            if (name := f"{way.name}_{measure}") in result.metrics
        ]
        found = ("picture", "pictures") if way.name == "t2i" else ("caption", "captions")
        note = f"{_several(len(way.ranks.queries), 'query', 'queries')} among {_several(len(way.items), *found)}"
        note += "".join(f" · {fact}" for fact in also)
        panels.append(_panel(_headline(result, names, way.name), _WAYS[way.name], note))
    if "rsum" in result.metrics:
        chart = _headline(result, {"rsum": "rsum"}, "even", Axis(0, 6, 1))
        panels.append(_panel(chart, note="The sum of hit@1, 5 and 10 both ways: 6 at most.", kind="whole"))
    return f"<section>\n{_panels(panels)}\n{_quiet(_filled_or_hollow(result))}</section>"


def _curve_section(result: Evaluation, ways: Sequence[_Way]) -> list[str]:
    """hit@k over k; with one item on either side there is nothing to draw."""
    ways = [way for way in ways if len(way.items) > 1]
    if not ways:
        return []
    lines = [Curve(ks := _ks(len(way.items)), _chance(way, ks), kind="chance") for way in ways]
    marks = [(way.name, "", _WAYS[way.name]) for way in ways]
    if result.comparison and isinstance(result.comparison.other.details, RetrievalDetails):
        for way in _ways(result.comparison.other.details):
            if len(way.items) > 1:
                ks = _ks(len(way.items))
                lines.append(Curve(ks, [point[0] for point in _hit_curve(way.ranks, ks)], kind=f"{way.name} other"))
        marks.append(("even", "dashed", result.comparison.other.model))
    for way in ways:
        ks = _ks(len(way.items))
        points = _hit_curve(way.ranks, ks)
        lines.append(Curve(ks, [p for p, _, _ in points], [(low, high) for _, low, high in points], way.name))
    marks.append(("even", "dotted", "chance"))
    content = _panel(f"{_legend(marks)}\n{curves(lines, 'hit at k over k')}")
    note = "hit@k: a right answer is among the first k. Shaded: 95 % at each k, normal approximation over pictures."
    return [_section("How far down one has to look", content, note)]


def _legend(marks: Sequence[tuple[str, str, str]]) -> str:
    """Lines of a colour and a dash, and what they stand for."""
    words = [
        f'<span><svg class="{kind}" width="26" height="8" aria-hidden="true"><path class="{dash}" d="M0 4H26"/></svg>'
        f"{_text(called, _NAME)}</span>"
        for kind, dash, called in marks
    ]
    return f'<div class="legend">{"".join(words)}</div>'


def _ks(items: int) -> list[int]:
    """From 1 to the number of items, 1,000 at most: every k that a logarithmic axis can show apart."""
    return sorted({round(k) for k in np.geomspace(1, min(items, _CURVE), 160).tolist()})


def _hit_curve(ranks: Ranks, ks: Sequence[int]) -> list[tuple[float, float, float]]:
    """hit@k for each k with the ends of its 95 % interval.

    Queries of one picture are not independent: the standard error is that of a ratio over clusters (Cochran 1977,
    Sampling Techniques, chapter 11; with n/(n - 1)), and the interval is cut off at 0 and 1.
    """
    images, cluster = np.unique(ranks.images, return_inverse=True)
    sizes = np.bincount(cluster)
    points = []
    for k in ks:
        hits = ranks.best <= k
        share = float(hits.mean())
        off = np.bincount(cluster, weights=hits) - share * sizes
        error = _Z * math.sqrt(float((off**2).sum()) * len(images) / max(1, len(images) - 1)) / len(hits)
        points.append((share, max(0.0, share - error), min(1.0, share + error)))
    return points


def _chance(way: _Way, ks: Sequence[int]) -> list[float]:
    """hit@k of a random order: 1 less the chance that none of a query's R right items is among k of the N items."""
    items = len(way.items)
    relevant, counts = np.unique(way.ranks.relevant, return_counts=True)
    k = np.array(ks)
    missed = np.zeros(len(ks))
    for right, count in zip(relevant.tolist(), counts.tolist(), strict=True):
        places = np.arange(right)[:, None]
        missed += count * np.prod(np.clip(items - k - places, 0, None) / (items - places), axis=0)
    chances: list[float] = (1 - missed / len(way.ranks.queries)).tolist()
    return chances


def _rank_section(ways: Sequence[_Way]) -> str:
    counted = [(way, *_bins(way.ranks.best, len(way.items))) for way in ways]
    most = max(max(counts) / max(1, sum(counts)) for _, _, counts in counted)
    panels = [_panel(histogram(names, counts, way.name, most), _WAYS[way.name]) for way, names, counts in counted]
    return _section("Ranks of the first right answer", _panels(panels))


def _bins(best: NDArray[np.float64], items: int) -> tuple[list[str], list[int]]:
    """Names of bins and how many ranks are in each; bins beyond the number of items are left out."""
    ends = [end for end in _BINS if end < items]
    counts = np.bincount(np.searchsorted(ends, best), minlength=len(ends) + 1).tolist()
    begins = [1, *(end + 1 for end in ends)]
    names = [f"{begin}" if begin == end else f"{begin}–{end}" for begin, end in zip(begins, ends, strict=False)]
    last = f"{begins[-1]}–…" if len(ends) == len(_BINS) else f"{begins[-1]}–{items}"
    return [*names, f"{items}" if begins[-1] == items else last], counts


def _retrieval_slices(result: Evaluation) -> list[str]:
    ks = [int(name.partition("@")[2]) for name in result.metrics if name.startswith("t2i_hit@")]
    if not result.slices or not ks:
        return []
    k = 10 if 10 in ks else max(ks)
    shown = {f"{way}_hit@{k}": way for way in _WAYS}
    marks = [
        (way, "", _called(name)) for name, way in shown.items() if any(name in part.metrics for part in result.slices)
    ]
    note = "Queries of each slice, ranked among everything. The dotted line is text → image over all queries."
    return [_section("Slices", _panel(f"{_legend(marks)}\n{_slice_chart(result, shown)}"), note)]


# ---- retrieval: examples ---------------------------------------------------------------------------------------------


def _example_sections(way: _Way, details: RetrievalDetails, pictures: _Pictures) -> list[str]:
    show, asked = (_sentence_cases, "sentences") if way.name == "t2i" else (_picture_cases, "pictures")
    worst, best = _worst(way), _best(way)
    none = "Every first right answer is the first of all."
    sections = [
        _section(
            f"{_WAYS[way.name]}: worst {asked}",
            show(worst, details, pictures) if worst else "",
            "Where the first right answer stands lowest." if worst else none,
        )
    ]
    if best:
        note = "Right answers that come first, by the widest margin over the first wrong one."
        sections.append(_section(f"{_WAYS[way.name]}: best {asked}", show(best, details, pictures), note))
    return sections


def _worst(way: _Way) -> list[_Case]:
    """The queries whose first right item ranks lowest; equal ranks by row."""
    best = way.ranks.best
    order = np.argsort(-best, kind="stable")[:_WORST]
    return _cases(way, order[best[order] > 1])


def _best(way: _Way) -> list[_Case]:
    """The queries that found a right item first, by how far the first wrong one scores below it.

    Of more than `_PROBED` such queries, as many are looked at, evenly spread.
    """
    found = np.flatnonzero(way.ranks.best == 1)
    depth = int(way.ranks.relevant[found].max(initial=0)) + 1  # far enough down to meet a wrong item, if there is one
    most = max(1, min(_PROBED, 4_000_000 // depth))
    if len(found) > most:
        found = found[np.linspace(0, len(found) - 1, most).round().astype(np.int64)]
    queries = way.ranks.queries[found]
    hits = exact_search(way.items, way.asked[queries], depth)
    right = np.isin(queries[:, None] * len(way.items) + hits.rows, way.query_of * len(way.items) + way.item_of)
    wrong = ~right & (hits.rows >= 0)
    first = wrong.argmax(axis=1)
    margin = np.where(wrong.any(axis=1), hits.scores[:, 0] - hits.scores[np.arange(len(found)), first], -np.inf)
    order = np.argsort(-margin, kind="stable")[:_BEST]
    return _cases(way, found[order])


def _cases(way: _Way, places: Rows) -> list[_Case]:
    """What queries found, by their places among the ranks."""
    queries = way.ranks.queries[places]
    hits = exact_search(way.items, way.asked[queries], _SHOWN)
    cases = []
    for query, rank, found, scores in zip(
        queries.tolist(), way.ranks.best[places].tolist(), hits.rows.tolist(), hits.scores.tolist(), strict=True
    ):
        right = way.right(query)
        own = cosines(way.asked[query], way.items[right])
        first = int(own.argmax())
        mine = set(right.tolist())
        shown = [(item, score, item in mine) for item, score in zip(found, scores, strict=True) if item >= 0]
        cases.append(_Case(query, rank, int(right[first]), float(own[first]), shown))
    return cases


def _sentence_cases(cases: Sequence[_Case], details: RetrievalDetails, pictures: _Pictures) -> str:
    """Sentences with the pictures found; and before them the right one, unless it is the first."""
    first = all(case.rank == 1 for case in cases)
    kind, heads = ("case first", ("sentence", "found")) if first else ("case", ("sentence", "its picture", "found"))
    lines = [f'<div class="{kind} heads">{"".join(f"<span>{head}</span>" for head in heads)}</div>']
    for case in cases:
        sentence = details.texts[case.query]
        tiles = [] if first else [_tile(pictures, case.own, case.rank, case.score, right=True)]
        tiles += [_tile(pictures, *found) for found in case.placed()]
        lines.append(
            f'<article class="{kind}"><div class="said"><p class="words" title="{_text(sentence, 4 * _SENTENCE)}">'
            f'{_text(sentence, _SENTENCE)}</p><p class="where">rank {_rank(case.rank)} of '
            f"{len(details.records):,}</p></div>{''.join(tiles)}</article>"
        )
    return "\n".join(lines)


def _tile(pictures: _Pictures, row: int, place: float, score: float, right: bool) -> str:
    return _figure(pictures, row, f"<b>{_rank(place)}</b> · {_score(score)}", "right" if right else "")


def _figure(pictures: _Pictures, row: int, caption: str, kind: str = "") -> str:
    return f'<figure class="{kind}">{pictures.tile(row)}<figcaption>{caption}</figcaption></figure>'


def _picture_cases(cases: Sequence[_Case], details: RetrievalDetails, pictures: _Pictures) -> str:
    """Pictures with the captions found; and before them the right one, unless it is the first."""
    cards = []
    for case in cases:
        own = [] if case.rank == 1 else [_line(details.texts[case.own], case.rank, case.score, "right first")]
        found = [
            _line(details.texts[item], place, score, "right" if right else "")
            for item, place, score, right in case.placed()
        ]
        cards.append(_card(pictures, case.query, [*own, *found]))
    return _cards(cards)


def _cards(cards: Sequence[str]) -> str:
    return '<div class="cards">\n' + "\n".join(cards) + "\n</div>"


def _card(pictures: _Pictures, row: int, lines: Sequence[str]) -> str:
    """A picture with its name, beside lines of words and scores."""
    tile = _figure(pictures, row, _text(pictures.records[row].image.name, _NAME))
    return f'<article class="card">{tile}<ol>{"".join(lines)}</ol></article>'


def _line(words: str, place: float, score: float, kind: str = "") -> str:
    return (
        f'<li class="{kind}"><b>{_rank(place)}</b><span class="words" title="{_text(words, 4 * _SENTENCE)}">'
        f"{_text(words, _SENTENCE)}</span><span>{_score(score)}</span></li>"
    )


# ---- classification --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Guesses:
    """What each of N pictures is, and what it was taken for: (N,) each."""

    right: Rows  # the right class; the best scored, if there are several
    first: Rows  # the first guess
    gap: NDArray[np.float32]  # by how much it scores above the right class; 0 where it is right


def _guesses(details: ClassificationDetails) -> _Guesses:
    """As :func:`retrieval.metrics.evaluate_classification` counts them: a tie is a mistake."""
    own = np.where(details.right, details.scores, -np.inf)
    wrong = np.where(details.right, -np.inf, details.scores)
    mine = own.argmax(axis=1)
    first = np.where(details.result.ranks <= 1, mine, wrong.argmax(axis=1))
    every = np.arange(len(mine))
    return _Guesses(mine, first, details.scores[every, first] - details.scores[every, mine])


def _classification(result: Evaluation, details: ClassificationDetails, pictures: _Pictures) -> list[str]:
    guesses = _guesses(details)
    mistakes = np.flatnonzero(details.result.ranks > 1)
    worst = mistakes[np.argsort(-details.result.ranks[mistakes], kind="stable")][:_WORST]
    confident = mistakes[np.argsort(-guesses.gap[mistakes], kind="stable")][:_WORST]
    return [
        _classification_headline(result),
        *_comparison(result),
        *_classification_slices(result),
        _class_section(details),
        _confusion_section(details),
        *_pair_section(details, guesses, pictures),
        _picture_section("Worst pictures", "Where the right class stands lowest.", worst, details, pictures),
        _picture_section(
            "Most confident mistakes",
            "The first guess scores highest above the right class.",
            confident,
            details,
            pictures,
        ),
    ]


def _classification_headline(result: Evaluation) -> str:
    names = {name: _called(name) for name in result.metrics}
    return (
        f"<section>\n{_panels([_panel(_headline(result, names, 't2i'), note=_filled_or_hollow(result))])}\n</section>"
    )


def _classification_slices(result: Evaluation) -> list[str]:
    if not result.slices:
        return []
    name = next(iter(result.metrics))
    note = f"{_called(name)} of each slice. The dotted line is all pictures."
    return [_section("Slices", _panel(_slice_chart(result, {name: "t2i"})), note)]


def _class_section(details: ClassificationDetails) -> str:
    shares, members = details.result.per_class, details.right.sum(axis=0)
    known = np.flatnonzero(np.isfinite(shares))
    worst = known[np.lexsort((known, -members[known], shares[known]))][: min(_CLASSES, math.ceil(len(known) / 2))]
    others = np.setdiff1d(known, worst)
    best = others[np.lexsort((others, -members[others], -shares[others]))][:_CLASSES]
    panels = []
    for title, chosen in (("Worst classes", worst), ("Best classes", best)):
        lines = [
            row(
                _text(details.names[number], _NAME),
                share_bar(float(shares[number]), "t2i"),
                f"{_number('top1', float(shares[number]))} of {members[number]:,}",
            )
            for number in chosen.tolist()
        ]
        if lines:
            panels.append(_panel(rows(lines, axis_labels(SHARES)), title))
    absent = len(shares) - len(known)
    note = "Share of each class's pictures that the first guess has right."
    if absent:
        note += f" {_several(absent, 'class has', 'classes have')} no picture."
    return _section("Classes", _panels(panels), note)


def _confusion_section(details: ClassificationDetails) -> str:
    confusion = details.result.confusion
    wrong = confusion - np.diag(np.diag(confusion))
    shown = np.arange(len(confusion))
    note = "Rows: the right class; columns: the first guess. The darker, the larger the share of the row."
    if len(confusion) > _WHOLE:
        shown = np.sort(np.argsort(-(wrong.sum(axis=0) + wrong.sum(axis=1)), kind="stable")[:_MAP])
        note += f" The {_MAP} most confused of {len(confusion):,} classes."
    names = [_plain(details.names[number], _NAME) for number in shown.tolist()]
    drawn = heat_map(names, confusion[np.ix_(shown, shown)], confusion.sum(axis=1)[shown].tolist())
    return _section("What is taken for what", _panel(drawn), note)


def _pair_section(details: ClassificationDetails, guesses: _Guesses, pictures: _Pictures) -> list[str]:
    confusion = details.result.confusion.copy()
    np.fill_diagonal(confusion, 0)
    rights, guessed = np.nonzero(confusion)
    order = np.lexsort((guessed, rights, -confusion[rights, guessed]))[:_CONFUSED]
    cards = []
    for right, taken in zip(rights[order].tolist(), guessed[order].tolist(), strict=True):
        members = np.flatnonzero((guesses.right == right) & (guesses.first == taken))
        example = int(members[guesses.gap[members].argmax()])
        names = f"{_text(details.names[right], _NAME)} → <b>{_text(details.names[taken], _NAME)}</b>"
        count = f"{confusion[right, taken]:,} of {details.result.confusion[right].sum():,}"
        cards.append(_figure(pictures, example, f"{names}<br>{count}"))
    if not cards:
        return []
    content = '<div class="tiles">\n' + "\n".join(cards) + "\n</div>"
    return [_section("Most confused", content, "Right class → first guess, and the clearest example of each.")]


def _picture_section(title: str, note: str, chosen: Rows, details: ClassificationDetails, pictures: _Pictures) -> str:
    if not len(chosen):
        return _section(title, "", "There is no mistake.")
    cards = []
    for number in chosen.tolist():
        scores = details.scores[number]
        own = np.flatnonzero(details.right[number])
        best = own[scores[own].argmax()]
        labels = ", ".join(details.names[label] for label in own.tolist())
        lines = [_line(labels, float(details.result.ranks[number]), float(scores[best]), "right first")]
        for place, guess in enumerate(np.lexsort((np.arange(len(scores)), -scores))[:_SHOWN].tolist(), 1):
            kind = "right" if details.right[number, guess] else ""
            lines.append(_line(details.names[guess], place, float(scores[guess]), kind))
        cards.append(_card(pictures, number, lines))
    return _section(title, _cards(cards), note)
