"""index, search, info: a folder of photos and its index."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import click

from cli import render
from cli.app import (
    LOCK_SECONDS,
    PATH,
    USER_ERROR,
    WITH_FAILURES,
    Number,
    device_option,
    index_option,
    json_option,
    model_option,
    open_library,
    open_or_create,
    preprocess_option,
    show_page,
    threads_option,
)
from indexes.errors import DiptychError, StoreError

if TYPE_CHECKING:
    from indexes.store import Wanted
    from retrieval.library import Library, Term


@click.command("index")
@click.argument(
    "folder",
    type=PATH,
    default=Path(),
    metavar="SOURCE",
    help="A folder of photos; webdataset tars; a table or list of picture files; or sentences.",
)
@click.option("--texts", is_flag=True, help="Index SOURCE's sentences instead of its pictures.")
@click.option("--images", type=PATH, help="Where the pictures are that SOURCE lists.")
@index_option
@model_option
@device_option
@threads_option
@preprocess_option
@click.option("--max-megapixels", type=Number(min=0.01), show_default="128", help="Larger pictures count as failures.")
@click.option(
    "--index-kind",
    metavar="KIND",
    help="What is searched, from now on: auto (chosen by size), exact, or a FAISS factory string (IVF256,SQ8).",
)
@click.option("--max-index-memory", metavar="SIZE", show_default="4G", help="What a chosen kind may take.")
@click.option(
    "--target-recall",
    type=Number(min=0.0, max=1.0),
    show_default="0.95",
    help="Share of the ten nearest that it finds.",
)
@click.option("--repair", is_flag=True, help="First drop damaged parts of the index; what they held is embedded anew.")
@json_option
def index(
    folder: Path,
    texts: bool,
    images: Path | None,
    index: Path | None,
    model: str | None,
    device: str,
    threads: int | None,
    preprocess: str | None,
    max_megapixels: float | None,
    index_kind: str | None,
    max_index_memory: str | None,
    target_recall: float | None,
    repair: bool,
    json: bool,
) -> None:
    """Embed photos or sentences, once; later runs take in only what was added, changed, renamed or deleted."""
    from retrieval.images import MAX_PIXELS

    max_pixels = MAX_PIXELS if max_megapixels is None else int(max_megapixels * 1e6)
    loading = {"device": device, "threads": threads, "preprocess": preprocess}
    if repair:
        _repair(folder, index)
    library, created = open_or_create(folder, index, model, texts, images, **loading)
    below = library.below(folder)
    if below:
        render.note(f"{folder} belongs to the index of {library.root}: taking in this part of it")
    with render.progress("indexing", library.unit) as advance:
        report = library.index(
            below,
            progress=advance,
            max_pixels=max_pixels,
            wait=LOCK_SECONDS,
            wanted=_wanted(library, index_kind, max_index_memory, target_recall),
        )
    failures = [{"path": str(library.root / f.path), "reason": f.reason} for f in report.failures]
    if json:
        render.json_out({**asdict(report), "failures": failures})
    else:
        render.index_report(report, library, created)
    if report.failures:
        raise click.exceptions.Exit(WITH_FAILURES)


def _repair(folder: Path, index: Path | None) -> None:
    """Take damaged segments out of the index that covers a folder, if there is one."""
    from indexes.store import Store
    from retrieval.library import find_store

    place = index or find_store(folder.expanduser().absolute())
    if place is None:
        return
    done = Store.repair(place, LOCK_SECONDS)
    if done.segments:
        render.note(f"gave up {done.rows:,} rows of {place} in damaged files: {', '.join(done.segments)}")
    else:
        render.note(f"nothing of {place} has to be given up: every part of it is whole")


def _wanted(library: Library, kind: str | None, memory: str | None, recall: float | None) -> Wanted | None:
    """What the options say of the FAISS index; None if they say nothing."""
    changes: dict[str, Any] = {}
    if kind is not None:
        changes["factory"] = None if kind == "auto" else kind
    if memory is not None:
        changes["memory"] = _bytes(memory)
    if recall is not None:
        changes["recall"] = recall
    return replace(library.store.wanted, **changes) if changes else None


def _bytes(size: str) -> int:
    """Read 500M, 4G or 4.5GiB; K, M, G and T count in 1,024s."""
    found = re.fullmatch(r"(\d+\.?\d*)\s*([KMGT]?)(?:i?B)?", size.strip(), re.IGNORECASE)
    if not found:
        raise click.BadParameter(f"{size!r} is no size: write 500M or 4G", param_hint="--max-index-memory")
    return int(float(found[1]) * 1024 ** " KMGT".index(found[2].upper() or " "))


@click.command("search")
@click.argument(
    "query", nargs=-1, metavar="QUERY...", help='What the picture shows; several are added up, "2:word" counts twice.'
)
@click.option("--like", type=PATH, multiple=True, help="A picture to search with.")
@click.option("--not", "avoid", multiple=True, help="What the picture should not show.")
@click.option("--top", "-t", type=click.IntRange(min=1), default=10, help="How many results.")
@click.option("--threshold", type=float, default=-1.0, help="Only pictures with at least this score (a cosine).")
@click.option(
    "--path",
    multiple=True,
    metavar="GLOB",
    help="Only these files or folders, as in .gitignore; !GLOB leaves them out.",
)
@click.option("--taken", metavar="DATES", help="Only pictures taken then: 2021, 2021-05.., ..2020 or 2019..2021-06-30.")
@click.option("--modified", metavar="DATES", help="Only files changed then; dates as for --taken.")
@click.option("--width", metavar="PIXELS", help="Only pictures so wide: 640, 1000.., ..500 or 1000..2000.")
@click.option("--height", metavar="PIXELS", help="Only pictures so high.")
@click.option("--orientation", multiple=True, metavar="WORD", help="Only landscape, portrait or square pictures.")
@click.option("--type", "type_", multiple=True, metavar="SUFFIX", help="Only files of this type; jpeg is jpg, too.")
@click.option("--words", metavar="WORDS", help="Only pictures with all of these in their captions or labels.")
@click.option(
    "--ids",
    type=click.File("rb"),
    metavar="FILE",
    help="Only the rows with these ids (in --json's output), one a line; - is stdin.",
)
@click.option(
    "--where", metavar="CONDITION", help="Only pictures of which this holds: \"width > 1000 and type == 'png'\"."
)
@click.option(
    "--kind",
    type=click.Choice(["image", "text"]),
    help="Find pictures or sentences; default: pictures, where there are any.",
)
@click.option(
    "--folder", "-C", type=PATH, default=Path(), help="Search as if started in this folder; or what was indexed."
)
@click.option("--all", "all_", is_flag=True, help="The whole index, not only this folder and those below it.")
@click.option("--filepath-only", "-f", is_flag=True, help="One path a line.")
@click.option("--no-indexing", "-n", is_flag=True, help="Do not look for new photos first.")
@json_option
@click.option("--html", type=PATH, help="Write a page with the pictures found.")
@click.option("--open", "open_", is_flag=True, help="Show the pictures found in the browser.")
@index_option
@model_option
@device_option
@threads_option
@preprocess_option
def search(
    query: tuple[str, ...],
    like: tuple[Path, ...],
    avoid: tuple[str, ...],
    top: int,
    threshold: float,
    path: tuple[str, ...],
    taken: str | None,
    modified: str | None,
    width: str | None,
    height: str | None,
    orientation: tuple[str, ...],
    type_: tuple[str, ...],
    words: str | None,
    ids: IO[bytes] | None,
    where: str | None,
    kind: str | None,
    folder: Path,
    all_: bool,
    filepath_only: bool,
    no_indexing: bool,
    json: bool,
    html: Path | None,
    open_: bool,
    index: Path | None,
    model: str | None,
    device: str,
    threads: int | None,
    preprocess: str | None,
) -> None:
    """Find photos by sentence, by example, or both. Scores are cosines."""
    if math.isnan(threshold):
        raise click.BadParameter("it must be a number", param_hint="--threshold")
    terms = _terms(query, like, avoid)
    library = open_library(folder, index, model, device=device, threads=threads, preprocess=preprocess)
    below = "" if all_ else library.below(folder)
    asked = {
        "path": path,
        "taken_in": taken,
        "modified_in": modified,
        "width": width,
        "height": height,
        "orientations": orientation,
        "types": type_,
        "containing": words,
        "where": where,
    }
    condition = None
    if ids or any(value not in (None, ()) for value in asked.values()):
        from indexes.filters import criteria, read_ids

        among = read_ids(ids, ids.name) if ids else None
        condition = criteria(library.store.schema, folder=below, among=among, **asked)  # type: ignore[arg-type]
    if not no_indexing:
        _catch_up(library)
    matches = library.search(terms, top, below=below, where=condition, threshold=threshold, kind=kind)
    if html or open_:
        from retrieval.report import write_results_page

        show_page(write_results_page([(render.describe(terms), matches)], html), open_)
    if json:
        render.json_out([render.match_fields(match) for match in matches])
    elif filepath_only:
        render.paths(matches)
    elif not html and not open_:
        render.matches(matches)
    if not json or condition is not None:
        render.few(matches, library, filtered=condition is not None, asked=top)


@click.command("info")
@click.argument("folder", type=PATH, default=Path(), help="A folder covered by an index, or what was indexed.")
@index_option
@click.option("--check", is_flag=True, help="Recompute every checksum, of the index and of its model.")
@json_option
def info(
    folder: Path,
    index: Path | None,
    check: bool,
    json: bool,
) -> None:
    """Show what an index holds and what it was made with."""
    from retrieval.library import Library, describe

    library = Library.open(folder, index=index)
    problems = library.check() if check else None
    try:
        facts = describe(library)
    except StoreError:
        if not problems:
            raise
        facts = {"folder": str(library.root), "index": str(library.store.path)}  # the problems say the rest
    if json:
        render.json_out({**facts, **({} if problems is None else {"problems": problems})})
    else:
        render.facts(facts)
        if problems is not None:
            render.problems(problems)
    if problems:
        raise click.exceptions.Exit(USER_ERROR)


def _terms(query: Sequence[str], like: Sequence[Path], avoid: Sequence[str]) -> list[Term]:
    from retrieval.errors import UsageError
    from retrieval.library import Term

    terms = [Term.parse(text) for text in query]
    terms += [Term(image=path) for path in like]
    if not terms:
        raise UsageError('the query is empty: say what the picture shows, as in  diptych search "a dog in the snow"')
    return terms + [Term.parse(text, sign=-1.0) for text in avoid]


def _catch_up(library: Library) -> None:
    """Take in what changed if that is quick; say so when it is not. Never a reason to answer nothing."""
    try:
        with render.progress("indexing", library.unit) as advance:
            left = library.catch_up(advance)
    except (StoreError, DiptychError) as error:
        render.note(f"searching the index as it is: {error}")
        return
    if left:
        render.note(f"{left:,} files have changed since the last run: take them in with  diptych index {library.place}")
