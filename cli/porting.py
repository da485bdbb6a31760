"""export and import: vectors to other tools and from them, without encoding anything."""

from __future__ import annotations

from dataclasses import asdict
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cli import render
from cli.app import DeviceOption, IndexOption, JsonOption, ModelOption, PreprocessOption, ThreadsOption, app

if TYPE_CHECKING:
    from retrieval.exchange import ImportReport

_ALIKE = 0.98  # below this cosine, pictures were prepared or rounded otherwise than they are here


class Layout(str, Enum):
    """Of what `export` writes."""

    npy = "npy"
    clip_retrieval = "clip-retrieval"


class Kind(str, Enum):
    """Of rows."""

    image = "image"
    text = "text"


class Number(str, Enum):
    """Of vectors in a file."""

    float16 = "float16"
    float32 = "float32"


@app.command()
def export(
    folder: Annotated[Path, typer.Argument(help="A folder covered by an index, or what was indexed.")] = Path(),
    output: Annotated[Path, typer.Option("--output", "-o", help="The folder to make.", show_default=False)] = ...,  # type: ignore[assignment]
    layout: Annotated[
        Layout,
        typer.Option(
            "--format",
            help="npy: vectors.npy + metadata.parquet. clip-retrieval: img_emb/, text_emb/, metadata/, *.index.",
        ),
    ] = Layout.npy,
    dtype: Annotated[
        Number, typer.Option(help="float16 is what the index holds, bit for bit; float32 has rows of length 1.")
    ] = Number.float16,
    kind: Annotated[Kind | None, typer.Option(help="clip-retrieval: only pictures, or only texts.")] = None,
    faiss: Annotated[
        str, typer.Option(metavar="KIND", help="clip-retrieval: the FAISS kind of image.index and text.index; none.")
    ] = "SQfp16",
    index: IndexOption = None,
    json: JsonOption = False,
) -> None:
    """Write the vectors of an index and what is known of their rows for other tools; nothing is encoded."""
    import numpy as np

    from indexes.export import export_clip_retrieval, export_npy
    from retrieval.library import Library

    library = Library.open(folder, index=index)
    number = np.float16 if dtype is Number.float16 else np.float32
    if layout is Layout.npy:
        if kind is not None:
            raise typer.BadParameter("only for --format clip-retrieval", param_hint="--kind")
        written = export_npy(library.store, output, number)
    else:
        written = export_clip_retrieval(
            library.store, output, number, kind=kind and kind.value, faiss_kind=None if faiss == "none" else faiss
        )
    if json:
        render.json_out({"output": str(output.absolute()), **asdict(written), "model": asdict(library.store.model)})
    else:
        texts = f", {written.texts:,} of texts" if written.texts else ""
        render.note(f"wrote {output}: {written.images:,} vectors of pictures{texts}")


@app.command("import")
def import_(
    source: Annotated[
        Path, typer.Argument(help="clip-retrieval's folder, a .npy file of vectors, or a folder that export wrote.")
    ],
    metadata: Annotated[
        Path | None,
        typer.Option(metavar="TABLE", help="What row i of the .npy file is: Parquet, CSV, TSV or JSONL, in its order."),
    ] = None,
    root: Annotated[
        Path,
        typer.Option("--root", "-C", metavar="FOLDER", help="The folder that the pictures' paths are relative to."),
    ] = Path(),
    index: IndexOption = None,
    model: ModelOption = None,
    unverified: Annotated[
        bool, typer.Option("--unverified", help="Take --model's name for it: the model is not at hand.")
    ] = False,
    kind: Annotated[Kind | None, typer.Option(help="What the rows of the .npy file are.", show_default="image")] = None,
    path_column: Annotated[
        str | None, typer.Option(metavar="NAME", help="The column of paths.", show_default="image_path, path, …")
    ] = None,
    caption_column: Annotated[
        str | None, typer.Option(metavar="NAME", help="The column of captions.", show_default="caption, text, …")
    ] = None,
    no_hash: Annotated[
        bool,
        typer.Option(
            "--no-hash", help="Read no picture: its size and date stay unknown, and once moved it is encoded anew."
        ),
    ] = False,
    device: DeviceOption = "cpu",
    threads: ThreadsOption = None,
    preprocess: PreprocessOption = None,
    json: JsonOption = False,
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
            kind=kind and kind.value,
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
