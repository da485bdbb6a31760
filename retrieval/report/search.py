"""The page of a search: the pictures found for each query."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import quote

from retrieval.library import Match
from retrieval.report import page

_THUMBNAIL = 320  # pixels of the longer side: sharp in a 200-pixel column on a dense screen
_STYLE = """
  h1 { font-size: 1.1rem; font-weight: 600; opacity: .7; }
  h2 { font-size: 1.35rem; margin: 2.2rem 0 .8rem; overflow-wrap: anywhere; }
  .found { display: grid; grid-template-columns: repeat(auto-fill, minmax(11rem, 1fr)); gap: 1rem; }
  img { width: 100%; aspect-ratio: 4 / 3; object-fit: cover; border-radius: .5rem; background: #8883; }
  figcaption { font-size: .82rem; display: flex; gap: .6rem; justify-content: space-between; }
  figcaption span:first-child { overflow: hidden; text-overflow: ellipsis; white-space: nowrap; }
  .score { font-variant-numeric: tabular-nums; opacity: .7; }
  blockquote { margin: 0 0 .4rem; padding: .8rem 1rem; border-radius: .5rem; background: #8883; }
  blockquote { overflow-wrap: anywhere; }
  .none { opacity: .7; }
"""


def write_results_page(results: Sequence[tuple[str, Sequence[Match]]], file: Path | None = None) -> Path:
    """Write a page with the pictures found for each query, best first; to a temporary file when none is named.

    The pictures on it are thumbnails inside the page, linked to the files.
    """
    return page.written(results_page(results), file)


def results_page(results: Sequence[tuple[str, Sequence[Match]]]) -> str:
    """The page of :func:`write_results_page` as text."""
    title = f"Diptych: {results[0][0] if len(results) == 1 else f'{len(results)} searches'}"
    sections = [f"<h1>{page.text(title)}</h1>"]
    for query, matches in results:
        figures = "\n".join(_match(match) for match in matches)
        found = f'<div class="found">\n{figures}\n</div>' if figures else '<p class="none">Nothing found.</p>'
        sections.append(f"<h2>{page.text(query)}</h2>\n{found}")
    return page.document(title, _STYLE, "\n".join(sections))


def _match(match: Match) -> str:
    name = page.text(match.path)
    if match.kind == "text":
        about = f"<span>{name}</span>" if name else "<span></span>"
        return (
            f'<figure class="said"><blockquote>{page.text(match.caption or "")}</blockquote>'
            f'<figcaption>{about}<span class="score">{match.score:.3f}</span></figcaption></figure>'
        )
    picture = match.picture or match.file
    link = "file://" + quote(os.fsencode(match.file)) if isinstance(picture, Path) else ""
    thumbnail = page.jpeg(picture, _THUMBNAIL)
    image = (
        f'<img src="data:image/jpeg;base64,{thumbnail[0]}" alt="{name}">'
        if thumbnail
        else f'<img alt="{name} (unreadable)">'
    )
    href = f' href="{link}"' if link else ""  # nothing opens a picture inside a tar
    return (
        f'<figure><a{href} title="{name}">{image}</a>'
        f'<figcaption><span>{name}</span><span class="score">{match.score:.3f}</span></figcaption></figure>'
    )
