"""export and import: vectors to other tools and from them, without encoding anything."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from cli import render
from cli.app import (
    PATH,
    device_option,
    index_option,
    json_option,
    model_option,
    preprocess_option,
    threads_option,
)

if TYPE_CHECKING:
    from retrieval.exchange import ImportReport

_ALIKE = 0.98  # below this cosine, pictures were prepared or rounded otherwise than they are here


@click.command("export")
@click.argument("folder", type=PATH, default=Path(), help="A folder covered by an index, or what was indexed.")
@click.option("--output", "-o", type=PATH, required=True, help="The folder to make.")
@click.option(
    "--format",
    "layout",
    type=click.Choice(["npy", "clip-retrieval"]),
    default="npy",
    help="npy: vectors.npy + metadata.parquet. clip-retrieval: img_emb/, text_emb/, metadata/, *.index.",
)
@click.option(
    "--dtype",
    type=click.Choice(["float16", "float32"]),
    default="float16",
    help="float16 is what the index holds, bit for bit; float32 has rows of length 1.",
)
@click.option("--kind", type=click.Choice(["image", "text"]), help="clip-retrieval: only pictures, or only texts.")
@click.option(
    "--faiss",
    default="SQfp16",
    metavar="KIND",
    help="clip-retrieval: the FAISS kind of image.index and text.index; none.",
)
@index_option
@json_option
def export(
    folder: Path,
    output: Path,
    layout: str,
    dtype: str,
    kind: str | None,
    faiss: str,
    index: Path | None,
    json: bool,
) -> None:
    """Write the vectors of an index and what is known of their rows for other tools; nothing is encoded."""
    import numpy as np

    from indexes.export import export_clip_retrieval, export_npy
    from retrieval.library import Library

    library = Library.open(folder, index=index)
    number = np.float16 if dtype == "float16" else np.float32
    if layout == "npy":
        if kind is not None:
            raise click.BadParameter("only for --format clip-retrieval", param_hint="--kind")
        written = export_npy(library.store, output, number)
    else:
        written = export_clip_retrieval(
            library.store, output, number, kind=kind, faiss_kind=None if faiss == "none" else faiss
        )
    if json:
        render.json_out({"output": str(output.absolute()), **asdict(written), "model": asdict(library.store.model)})
    else:
        texts = f", {written.texts:,} of texts" if written.texts else ""
        render.note(f"wrote {output}: {written.images:,} vectors of pictures{texts}")


@click.command("import")
@click.argument(
    "source", type=PATH, help="clip-retrieval's folder, a .npy file of vectors, or a folder that export wrote."
)
@click.option(
    "--metadata",
    type=PATH,
    metavar="TABLE",
    help="What row i of the .npy file is: Parquet, CSV, TSV or JSONL, in its order.",
)
@click.option(
    "--root",
    "-C",
    type=PATH,
    default=Path(),
    metavar="FOLDER",
    help="The folder that the pictures' paths are relative to.",
)
@index_option
@model_option
@click.option("--unverified", is_flag=True, help="Take --model's name for it: the model is not at hand.")
@click.option(
    "--kind", type=click.Choice(["image", "text"]), show_default="image", help="What the rows of the .npy file are."
)
@click.option("--path-column", metavar="NAME", show_default="image_path, path, …", help="The column of paths.")
@click.option("--caption-column", metavar="NAME", show_default="caption, text, …", help="The column of captions.")
@click.option(
    "--no-hash",
    is_flag=True,
    help="Read no picture: its size and date stay unknown, and once moved it is encoded anew.",
)
@device_option
@threads_option
@preprocess_option
@json_option
def import_(
    source: Path,
    metadata: Path | None,
    root: Path,
    index: Path | None,
    model: str | None,
    unverified: bool,
    kind: str | None,
    path_column: str | None,
    caption_column: str | None,
    no_hash: bool,
    device: str,
    threads: int | None,
    preprocess: str | None,
    json: bool,
) -> None:
    """Make an index from vectors that are there already; nothing is encoded but a few pictures, to try the model."""
    from retrieval.exchange import import_vectors

    with render.progress("importing", "rows") as advance:
        report = import_vectors(
            source,
            root=root,
            index=index,
            model=model,
            unverified=unverified,
            metadata=metadata,
            kind=kind,
            path_column=path_column,
            caption_column=caption_column,
            hashing=not no_hash,
            progress=advance,
            device=device,
            threads=threads,
            preprocess=preprocess,
        )
    if json:
        facts = {"index": str(report.path), "folder": str(report.root), "model": asdict(report.model)}
        render.json_out({**facts, **asdict(report.rows), "agreement": report.agreement})
    else:
        for line in _told(report):
            render.note(line)


def _told(report: ImportReport) -> list[str]:
    rows = report.rows
    texts = f" and {rows.texts:,} texts" if rows.texts else ""
    lines = [f"imported {rows.images:,} pictures{texts} into {report.path}"]
    if rows.repeated:
        lines.append(f"{rows.repeated:,} rows name a picture again, with the same vector: each is in the index once")
    if rows.missing:
        lines.append(f"{rows.missing:,} of them are not below {report.root}: the next  diptych index  forgets them")
    if rows.changed:
        lines.append(f"{rows.changed:,} of them have changed since: the next  diptych index  encodes them anew")
    if report.agreement is not None and report.agreement < _ALIKE:
        lines.append(
            f"{report.model.name} encodes the same pictures a little differently now (median cosine "
            f"{report.agreement:.3f}): another preparation of pictures, or rounding"
        )
    return lines
