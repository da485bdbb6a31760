"""index, search, info: a folder of photos and its index."""

from __future__ import annotations

import math
import re
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from cli import render
from cli.app import (
    LOCK_SECONDS,
    USER_ERROR,
    WITH_FAILURES,
    DeviceOption,
    IndexOption,
    JsonOption,
    ModelOption,
    PrecisionOption,
    PreprocessOption,
    RunPrecision,
    ThreadsOption,
    app,
    needs_heads,
    open_library,
    open_or_create,
    show_page,
)
from indexes.errors import DiptychError, StoreError

if TYPE_CHECKING:
    from indexes.filters import Condition
    from indexes.store import Wanted
    from retrieval.heads import Translator
    from retrieval.library import Library, Term


Kind = Literal["image", "text"]


@app.command()
def index(
    folder: Annotated[
        Path,
        typer.Argument(
            metavar="SOURCE",
            help="A folder of photos; webdataset tars; a table or list of picture files; or sentences.",
        ),
    ] = Path(),
    texts: Annotated[bool, typer.Option("--texts", help="Index SOURCE's sentences instead of its pictures.")] = False,
    images: Annotated[Path | None, typer.Option(help="Where the pictures are that SOURCE lists.")] = None,
    index: IndexOption = None,
    model: ModelOption = None,
    device: DeviceOption = "cpu",
    threads: ThreadsOption = None,
    preprocess: PreprocessOption = None,
    precision: PrecisionOption = RunPrecision.auto,
    max_megapixels: Annotated[
        float | None, typer.Option(min=0.01, help="Larger pictures count as failures.", show_default="128")
    ] = None,
    index_kind: Annotated[
        str | None,
        typer.Option(
            metavar="KIND",
            help="What is searched, from now on: auto (chosen by size), exact, or a FAISS factory string (IVF256,SQ8).",
        ),
    ] = None,
    max_index_memory: Annotated[
        str | None, typer.Option(metavar="SIZE", help="What a chosen kind may take.", show_default="4G")
    ] = None,
    target_recall: Annotated[
        float | None,
        typer.Option(min=0.0, max=1.0, help="Share of the ten nearest that it finds.", show_default="0.95"),
    ] = None,
    repair: Annotated[
        bool,
        typer.Option("--repair", help="First drop damaged parts of the index; what they held is embedded anew."),
    ] = False,
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="Say how many seconds each stage was at work.")
    ] = False,
    json: JsonOption = False,
) -> None:
    """Embed photos or sentences, once; later runs take in only what was added, changed, renamed or deleted."""
    from retrieval.images import MAX_PIXELS

    max_pixels = MAX_PIXELS if max_megapixels is None else int(max_megapixels * 1e6)
    loading = {"device": device, "threads": threads, "preprocess": preprocess, "precision": precision.value}
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
        render.json_out({**asdict(report), "failures": failures, "bounded_by": report.bounded_by})
    else:
        render.index_report(report, library, created)
        render.index_speed(report, library.unit, verbose)
    if report.failures:
        raise typer.Exit(WITH_FAILURES)


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
        raise typer.BadParameter(f"{size!r} is no size: write 500M or 4G", param_hint="--max-index-memory")
    return int(float(found[1]) * 1024 ** " KMGT".index(found[2].upper() or " "))


@app.command()
def search(
    query: Annotated[
        list[str] | None,
        typer.Argument(metavar="QUERY...", help='What the picture shows; several are added up, "2:word" counts twice.'),
    ] = None,
    like: Annotated[list[Path] | None, typer.Option("--like", help="A picture to search with.")] = None,
    avoid: Annotated[list[str] | None, typer.Option("--not", help="What the picture should not show.")] = None,
    top: Annotated[int, typer.Option("--top", "-t", min=1, help="How many results.")] = 10,
    threshold: Annotated[float, typer.Option(help="Only pictures with at least this score (a cosine).")] = -1.0,
    path: Annotated[
        list[str] | None,
        typer.Option(
            "--path", metavar="GLOB", help="Only these files or folders, as in .gitignore; !GLOB leaves them out."
        ),
    ] = None,
    taken: Annotated[
        str | None,
        typer.Option(metavar="DATES", help="Only pictures taken then: 2021, 2021-05.., ..2020 or 2019..2021-06-30."),
    ] = None,
    modified: Annotated[
        str | None, typer.Option(metavar="DATES", help="Only files changed then; dates as for --taken.")
    ] = None,
    width: Annotated[
        str | None, typer.Option(metavar="PIXELS", help="Only pictures so wide: 640, 1000.., ..500 or 1000..2000.")
    ] = None,
    height: Annotated[str | None, typer.Option(metavar="PIXELS", help="Only pictures so high.")] = None,
    orientation: Annotated[
        list[str] | None, typer.Option(metavar="WORD", help="Only landscape, portrait or square pictures.")
    ] = None,
    type_: Annotated[
        list[str] | None, typer.Option("--type", metavar="SUFFIX", help="Only files of this type; jpeg is jpg, too.")
    ] = None,
    words: Annotated[
        str | None, typer.Option(metavar="WORDS", help="Only pictures with all of these in their captions or labels.")
    ] = None,
    ids: Annotated[
        typer.FileBinaryRead | None,
        typer.Option(metavar="FILE", help="Only the rows with these ids (in --json's output), one a line; - is stdin."),
    ] = None,
    where: Annotated[
        str | None,
        typer.Option(
            metavar="CONDITION", help="Only pictures of which this holds: \"width > 1000 and type == 'png'\"."
        ),
    ] = None,
    prior: Annotated[
        Path | None,
        typer.Option(metavar="GENERATOR", help="First lead the sentence nearer to pictures: a prior of `imagine fit`."),
    ] = None,
    kind: Annotated[
        Kind | None, typer.Option(help="Find pictures or sentences; default: pictures, where there are any.")
    ] = None,
    folder: Annotated[
        Path, typer.Option("--folder", "-C", help="Search as if started in this folder; or what was indexed.")
    ] = Path(),
    all_: Annotated[
        bool, typer.Option("--all", help="The whole index, not only this folder and those below it.")
    ] = False,
    filepath_only: Annotated[bool, typer.Option("--filepath-only", "-f", help="One path a line.")] = False,
    no_indexing: Annotated[bool, typer.Option("--no-indexing", "-n", help="Do not look for new photos first.")] = False,
    json: JsonOption = False,
    html: Annotated[Path | None, typer.Option(help="Write a page with the pictures found.")] = None,
    open_: Annotated[bool, typer.Option("--open", help="Show the pictures found in the browser.")] = False,
    index: IndexOption = None,
    model: ModelOption = None,
    device: DeviceOption = "cpu",
    threads: ThreadsOption = None,
    preprocess: PreprocessOption = None,
    precision: PrecisionOption = RunPrecision.auto,
) -> None:
    """Find photos by sentence, by example, or both. Scores are cosines."""
    if math.isnan(threshold):
        raise typer.BadParameter("it must be a number", param_hint="--threshold")
    terms = _terms(query or [], like or [], avoid or [])
    library = open_library(
        folder, index, model, device=device, threads=threads, preprocess=preprocess, precision=precision.value
    )
    below = "" if all_ else library.below(folder)
    condition = _condition(
        library,
        folder=below,
        path=path or [],
        taken_in=taken,
        modified_in=modified,
        width=width,
        height=height,
        orientations=orientation or [],
        types=type_ or [],
        containing=words,
        among=ids,
        where=where,
    )
    if not no_indexing:
        _catch_up(library)
    matches = library.search(
        terms, top, below=below, where=condition, threshold=threshold, kind=kind, prior=_prior(prior)
    )
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


@app.command()
def info(
    folder: Annotated[Path, typer.Argument(help="A folder covered by an index, or what was indexed.")] = Path(),
    index: IndexOption = None,
    check: Annotated[
        bool, typer.Option("--check", help="Recompute every checksum, of the index and of its model.")
    ] = False,
    json: JsonOption = False,
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
        raise typer.Exit(USER_ERROR)


def _terms(query: list[str], like: list[Path], avoid: list[str]) -> list[Term]:
    from retrieval.errors import UsageError
    from retrieval.library import Term

    terms = [Term.parse(text) for text in query]
    terms += [Term(image=path) for path in like]
    if not terms:
        raise UsageError('the query is empty: say what the picture shows, as in  diptych search "a dog in the snow"')
    return terms + [Term.parse(text, sign=-1.0) for text in avoid]


def _prior(folder: Path | None) -> Translator | None:
    """What leads from sentences to pictures; torch is loaded where there is one."""
    if folder is None:
        return None
    with needs_heads("search --prior"):
        from retrieval.heads.generation.storage import translators
    return translators(folder, "text", "image")[0]


def _condition(library: Library, folder: str, among: typer.FileBinaryRead | None, **asked: Any) -> Condition | None:
    """What the options ask for; indexes.filters, and Arrow's functions with it, are loaded where that is something."""
    if among is None and all(value in (None, []) for value in asked.values()):
        return None
    from indexes.filters import criteria, read_ids

    chosen = None if among is None else read_ids(among, among.name)
    return criteria(library.store.schema, folder=folder, among=chosen, **asked)


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
    elif library.too_large_to_scan and sys.stderr.isatty():
        render.note(
            f"{len(library.store):,} {library.unit} are too many to look for new ones at each search: "
            f"take them in with  diptych index {library.place}"
        )
