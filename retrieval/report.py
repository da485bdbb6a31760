"""HTML pages, each one self-contained file: to be looked at rather than read."""

from __future__ import annotations

import base64
import html
import io
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import quote

from PIL import Image

from retrieval.errors import ImageError, UsageError
from retrieval.images import read_photo
from retrieval.library import Match

_THUMBNAIL = 320  # pixels of the longer side: sharp in a 200-pixel column on a dense screen
_PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
  :root {{ color-scheme: light dark; font: 16px/1.4 system-ui, sans-serif; }}
  body {{ max-width: 76rem; margin: 2rem auto; padding: 0 1rem; }}
  h1 {{ font-size: 1.1rem; font-weight: 600; opacity: .7; }}
  h2 {{ font-size: 1.35rem; margin: 2.2rem 0 .8rem; overflow-wrap: anywhere; }}
  .found {{ display: grid; grid-template-columns: repeat(auto-fill, minmax(11rem, 1fr)); gap: 1rem; }}
  figure {{ margin: 0; }}
  img {{ width: 100%; aspect-ratio: 4 / 3; object-fit: cover; border-radius: .5rem; background: #8883; }}
  figcaption {{ font-size: .82rem; display: flex; gap: .6rem; justify-content: space-between; }}
  figcaption span:first-child {{ overflow: hidden; text-overflow: ellipsis; white-space: nowrap; }}
  .score {{ font-variant-numeric: tabular-nums; opacity: .7; }}
  .none {{ opacity: .7; }}
</style>
<h1>{title}</h1>
{body}
</html>
"""


def write_results_page(results: Sequence[tuple[str, Sequence[Match]]], file: Path | None = None) -> Path:
    """Write a page with the pictures found for each query, best first; to a temporary file when none is named.

    The pictures on it are thumbnails inside the page, linked to the files.
    """
    if file is None:
        handle, name = tempfile.mkstemp(prefix="diptych-", suffix=".html")
        os.close(handle)
        file = Path(name)
    try:
        file.write_text(results_page(results), "utf-8", "backslashreplace")
    except OSError as error:
        raise UsageError(f"{file} cannot be written: {error.strerror}") from error
    return file


def results_page(results: Sequence[tuple[str, Sequence[Match]]]) -> str:
    """The page of :func:`write_results_page` as text."""
    sections = []
    for query, matches in results:
        figures = "\n".join(_figure(match) for match in matches)
        found = f'<div class="found">\n{figures}\n</div>' if figures else '<p class="none">Nothing found.</p>'
        sections.append(f"<h2>{html.escape(query)}</h2>\n{found}")
    title = results[0][0] if len(results) == 1 else f"{len(results)} searches"
    return _PAGE.format(title=html.escape(f"Diptych: {title}"), body="\n".join(sections))


def _figure(match: Match) -> str:
    name = html.escape(match.path.encode("utf-8", "backslashreplace").decode("utf-8"))
    link = "file://" + quote(os.fsencode(match.file))
    picture = _thumbnail(match.file)
    image = (
        f'<img src="data:image/jpeg;base64,{picture}" alt="{name}">' if picture else f'<img alt="{name} (unreadable)">'
    )
    return (
        f'<figure><a href="{link}" title="{name}">{image}</a>'
        f'<figcaption><span>{name}</span><span class="score">{match.score:.3f}</span></figcaption></figure>'
    )


def _thumbnail(file: Path) -> str:
    try:
        picture = read_photo(file).image
    except ImageError:  # gone or damaged since it was indexed: the rest of the page is still worth having
        return ""
    picture.thumbnail((_THUMBNAIL, _THUMBNAIL), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=82)
    return base64.b64encode(buffer.getvalue()).decode("ascii")
