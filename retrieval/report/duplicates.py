"""The page of duplicates: every group with its pictures, the largest first."""

from __future__ import annotations

import os
from pathlib import Path
from urllib.parse import quote

from retrieval.duplicates import GRADES, Copy, DuplicateGroup, Duplicates
from retrieval.report import page

_THUMBNAIL = 240  # pixels of the longer side
_GROUPS, _COPIES = 200, 24  # shown: some thousand thumbnails make a page of ten megabytes
_NAMES = {"same-file": "Same file", "re-encoded": "Same picture, re-encoded or resized", "similar": "Similar shots"}
_STYLE = """
  h1 { font-size: 1.1rem; font-weight: 600; opacity: .7; }
  h2 { font-size: 1.35rem; margin: 2.2rem 0 .2rem; }
  .quiet { opacity: .7; margin: 0 0 .6rem; }
  .group { display: grid; grid-template-columns: repeat(auto-fill, minmax(9rem, 1fr)); gap: .8rem; padding: .9rem 0;
    border-top: 1px solid #8885; break-inside: avoid; }
  img { width: 100%; aspect-ratio: 4 / 3; object-fit: contain; border-radius: .4rem; background: #8883; }
  figcaption { font-size: .78rem; overflow-wrap: anywhere; }
  figcaption span { display: block; opacity: .7; font-variant-numeric: tabular-nums; }
"""


def write_duplicates_page(found: Duplicates, title: str, file: Path | None = None) -> Path:
    """Write a page with the groups, at most 200 of each grade; to a temporary file when none is named.

    The pictures on it are thumbnails inside the page, linked to the files.
    """
    return page.written(duplicates_page(found, title), file)


def duplicates_page(found: Duplicates, title: str) -> str:
    """The page of :func:`write_duplicates_page` as text."""
    sections = [f"<h1>{page.text(title)}</h1>"]
    for grade in GRADES:
        groups = [group for group in found.groups if group.grade == grade]
        if groups:
            left = f"; the first {_GROUPS} are shown" if len(groups) > _GROUPS else ""
            count = sum(len(group.copies) for group in groups)
            sections.append(f"<h2>{_NAMES[grade]}</h2>")
            sections.append(
                f'<p class="quiet">{count:,} pictures in {len(groups):,} group{"s"[: len(groups) > 1]}{left}</p>'
            )
            sections += [_group(group) for group in groups[:_GROUPS]]
    if not found.groups:
        sections.append(f'<p class="quiet">No duplicates; pictures compared: {found.compared:,}.</p>')
    return page.document(title, _STYLE, "\n".join(sections))


def _group(group: DuplicateGroup) -> str:
    figures = "\n".join(map(_figure, group.copies[:_COPIES]))
    more = len(group.copies) - _COPIES
    rest = f"\n<p>… and {more:,} more</p>" if more > 0 else ""
    return f'<div class="group">\n{figures}{rest}\n</div>'


def _figure(copy: Copy) -> str:
    name = page.text(copy.path)
    link = "file://" + quote(os.fsencode(copy.file))
    thumbnail = page.jpeg(copy.file, _THUMBNAIL)
    source = f'src="data:image/jpeg;base64,{thumbnail[0]}" ' if thumbnail else ""
    size = f"{copy.width} × {copy.height}, " if copy.width and copy.height else ""
    return (
        f'<figure><a href="{link}" title="{name}"><img {source}alt="{name}"></a>'
        f"<figcaption>{name}<span>{size}{copy.size / 1e3:,.0f} kB</span></figcaption></figure>"
    )
