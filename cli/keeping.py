"""dedupe: keeping house in a folder of photos."""

from __future__ import annotations

import os
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from cli import render
from cli.app import IndexOption, JsonOption, app, show_page


class Grade(str, Enum):
    """How alike; each grade holds the finer ones before it."""

    same_file = "same-file"
    re_encoded = "re-encoded"
    similar = "similar"


@app.command()
def dedupe(
    folder: Annotated[Path, typer.Argument(help="A folder covered by an index.")] = Path(),
    index: IndexOption = None,
    grade: Annotated[
        Grade | None,
        typer.Option(
            help="Groups of all that is linked at this grade or a finer one; default: each photo under its coarsest."
        ),
    ] = None,
    json: JsonOption = False,
    html: Annotated[Path | None, typer.Option(help="Write a page with the groups.")] = None,
    open_: Annotated[bool, typer.Option("--open", help="Show the groups in the browser.")] = False,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads; default: all this process may use.")] = None,
) -> None:
    """Group photos that are there more than once: the same file, re-encoded or resized, similar shots.

    Only tells: nothing is deleted, moved or indexed. In each group the largest picture comes first.
    """
    if threads:
        os.environ["OMP_NUM_THREADS"] = str(threads)  # before numpy is loaded, which asks for it once
    from retrieval.library import Library

    library = Library.open(folder, index=index)
    with render.progress("comparing", "pictures") as advance:
        found = library.duplicates(grade.value if grade else None, below=library.below(folder), progress=advance)
    if html or open_:
        from retrieval.report import write_duplicates_page

        show_page(write_duplicates_page(found, f"Duplicates in {folder.absolute()}", html), open_)
    if json:
        render.json_out([{"grade": g.grade, "paths": [str(copy.file) for copy in g.copies]} for g in found.groups])
    elif not html and not open_:
        render.duplicates(found)
    render.duplicates_summary(found, library)
