"""dedupe: keeping house in a folder of photos."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import click

from cli import render
from cli.app import PATH, index_option, json_option, show_page

if TYPE_CHECKING:
    from retrieval.duplicates import Grade


@click.command("dedupe")
@click.argument("folder", type=PATH, default=Path(), help="A folder covered by an index.")
@index_option
@click.option(
    "--grade",
    type=click.Choice(["same-file", "re-encoded", "similar"]),
    help="Groups of all that is linked at this grade or a finer one; default: each photo under its coarsest.",
)
@json_option
@click.option("--html", type=PATH, help="Write a page with the groups.")
@click.option("--open", "open_", is_flag=True, help="Show the groups in the browser.")
@click.option("--threads", type=click.IntRange(min=1), help="Threads; default: all this process may use.")
def dedupe(
    folder: Path,
    index: Path | None,
    grade: Grade | None,
    json: bool,
    html: Path | None,
    open_: bool,
    threads: int | None,
) -> None:
    """Group photos that are there more than once: the same file, re-encoded or resized, similar shots.

    Only tells: nothing is deleted, moved or indexed. In each group the largest picture comes first.
    """
    if threads:
        os.environ["OMP_NUM_THREADS"] = str(threads)  # before numpy is loaded, which asks for it once
    from retrieval.library import Library

    library = Library.open(folder, index=index)
    with render.progress("comparing", "pictures") as advance:
        found = library.duplicates(grade, below=library.below(folder), progress=advance)
    if html or open_:
        from retrieval.report import write_duplicates_page

        show_page(write_duplicates_page(found, f"Duplicates in {folder.absolute()}", html), open_)
    if json:
        render.json_out([{"grade": g.grade, "paths": [str(copy.file) for copy in g.copies]} for g in found.groups])
    elif not html and not open_:
        render.duplicates(found)
    render.duplicates_summary(found, library)
