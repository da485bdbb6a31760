"""What the pages share: the frame, escaping, thumbnails, sections, and numbers as they are written."""

from __future__ import annotations

import base64
import html
import io
import math
import os
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

from PIL import Image

from retrieval.errors import ImageError, UsageError
from retrieval.images import read_photo
from retrieval.pairs import Picture, Record
from retrieval.report import charts

SENTENCE, NAME = 280, 60  # letters
WAYS = {"t2i": "Text → image", "i2t": "Image → text"}
_MEASURES = {"map": "mAP", "mrr": "MRR", "r_precision": "R-precision", "mean_per_class": "mean per class"}
_SMALL = 200  # pixels of a thumbnail: some eighty of them make a page of a megabyte

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

_STYLE = """
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
  .panel th, .panel td { padding: .22rem .5rem; }
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
STYLE = charts.STYLE + _STYLE  # of pages with charts


def document(title: str, style: str, body: str) -> str:
    """A whole page; the title is text, the rest as it will stand."""
    return _PAGE.format(title=text(title), style=style, body=body)


def written(page: str, file: Path | None) -> Path:
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


# ---- what a user gave ------------------------------------------------------------------------------------------------


def text(words: str, most: int = 0) -> str:
    """Anything a user gave, as HTML; cut if there is a limit."""
    return html.escape(plain(words, most))


def plain(words: str, most: int = 0) -> str:
    """Anything a user gave, as text that can be written: a file name need not be UTF-8."""
    if most and len(words) > most:
        words = words[: most - 1] + "…"
    return words.encode("utf-8", "backslashreplace").decode("utf-8")


# ---- thumbnails ------------------------------------------------------------------------------------------------------


def jpeg(picture: Picture, side: int) -> tuple[str, tuple[int, int]] | None:
    """A thumbnail in base64, no longer than that many pixels, and its size; None if the picture cannot be read."""
    try:
        image = read_photo(picture if isinstance(picture, Path) else picture.read_bytes()).image
    except (ImageError, OSError):  # gone or damaged since: the rest of the page is still worth having
        return None
    image.thumbnail((side, side), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=82)
    return base64.b64encode(buffer.getvalue()).decode("ascii"), image.size


class Pictures:
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
        name, label = self.rows[row], text(self.records[row].image.name, 200)
        if name is None:
            unreadable = '<text x="50" y="54" text-anchor="middle">unreadable</text>'
            return f'<svg class="tile" role="img" viewBox="0 0 100 100"><title>{label}</title>{unreadable}</svg>'
        return (
            f'<svg class="tile" role="img" viewBox="0 0 1 1"><title>{label}</title>'
            f'<use href="#{name}" width="1" height="1"/></svg>'
        )

    def _add(self, row: int) -> str | None:
        made = jpeg(self.records[row].image, _SMALL)
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


# ---- sections --------------------------------------------------------------------------------------------------------


def section(title: str, content: str, note: str = "") -> str:
    """A part of a page under its heading; the title is text, the rest HTML."""
    return f"<section>\n<h2>{text(title)}</h2>\n{quiet(note)}{content}\n</section>"


def panel(content: str, title: str = "", note: str = "", kind: str = "") -> str:
    """A framed part of a section; the title is text, the rest HTML, the kind a CSS class."""
    head = f"<h3>{text(title)}</h3>\n" if title else ""
    return f'<div class="panel {kind}">\n{head}{quiet(note)}{content}\n</div>'


def quiet(note: str) -> str:
    """A note in small grey type, HTML; nothing if it is empty."""
    return f'<p class="quiet">{note}</p>\n' if note else ""


def panels(content: Iterable[str]) -> str:
    """Panels beside each other, as many as there is room for."""
    return '<div class="panels">\n' + "\n".join(content) + "\n</div>"


def legend(marks: Sequence[tuple[str, str, str]]) -> str:
    """Lines of a colour and a dash, and what they stand for."""
    words = [
        f'<span><svg class="{kind}" width="26" height="8" aria-hidden="true"><path class="{dash}" d="M0 4H26"/></svg>'
        f"{text(name, NAME)}</span>"
        for kind, dash, name in marks
    ]
    return f'<div class="legend">{"".join(words)}</div>'


def table(heads: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A table; all cells are HTML."""
    head = "".join(f"<th>{cell}</th>" for cell in heads)
    body = "\n".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in line) + "</tr>" for line in lines)
    return f'<div class="scroll"><table>\n<tr>{head}</tr>\n{body}\n</table></div>'


# ---- numbers as they are written -------------------------------------------------------------------------------------


def is_share(name: str) -> bool:
    """Whether a measure is written in hundredths."""
    return not name.endswith("_rank") and name != "rsum"


def number(name: str, value: float) -> str:
    """A measure: a share as per cent with one decimal, rsum with three, a median with as many as it needs."""
    if not math.isfinite(value):
        return "–"
    if is_share(name):
        return f"{100 * value:.1f}\xa0%"
    if name == "rsum":
        return f"{value:.3f}"
    return f"{value:,.1f}" if name.endswith("mean_rank") else rank(value)


def difference(name: str, value: float) -> str:
    """With a sign; of shares in points."""
    if not math.isfinite(value):
        return "–"
    signed = f"{100 * value:+.1f}" if is_share(name) else f"{value:+.3f}" if name == "rsum" else f"{value:+,.1f}"
    return signed.replace("-", "−")


def rank(value: float) -> str:
    """A place, or a mean of places."""
    return f"{value:,.1f}".removesuffix(".0")


def way_of(name: str) -> str:
    """The direction that a measure is of; empty if it is of none."""
    way = name.partition("_")[0]
    return way if way in WAYS else ""


def called(name: str) -> str:
    """A measure in words."""
    way = way_of(name)
    measure = name.removeprefix(f"{way}_")
    measure = _MEASURES.get(measure, measure.replace("ndcg", "nDCG").replace("top", "top-"))
    return f"{WAYS[way]} {measure}" if way else measure
