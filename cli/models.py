"""models list, import, export."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cli import render
from cli.app import JsonOption, PreprocessOption, models_app


@models_app.command("list")
def models_list(json: JsonOption = False) -> None:
    """List the built-in and the imported models."""
    from retrieval.bundle import Bundle
    from retrieval.encoders import BUILTIN, find_bundle, list_imported

    rows = []
    for name in (BUILTIN, *list_imported()):
        folder = find_bundle(name)
        if folder is not None:
            bundle = Bundle.load(folder)
            size = sum(file.stat().st_size for file in folder.iterdir())
            rows.append(
                {
                    "name": name,
                    "model": bundle.name,
                    "dim": bundle.dim,
                    "bytes": size,
                    "path": str(folder),
                    "licence": bundle.licence,
                }
            )
    if json:
        render.json_out(rows)
    else:
        render.models(rows)


@models_app.command("import")
def models_import(
    source: Annotated[
        str, typer.Argument(help="A bundle's or training run's folder, or hf-hub:org/name of a repository with one.")
    ],
    name: Annotated[str | None, typer.Option(help="What to call it here; default: its own name.")] = None,
) -> None:
    """Copy a bundle into the data directory, so that --model NAME finds it from anywhere."""
    from retrieval.encoders import import_bundle

    imported, path = import_bundle(source, name)
    render.note(f"imported {path}: use it with  --model {imported}")


@models_app.command("export")
def models_export(
    model: Annotated[str, typer.Argument(help="Any model: builtin, NAME/PRETRAINED of open_clip, local-dir:/path, …")],
    output: Annotated[Path, typer.Argument(help="The folder to make.")],
    precision: Annotated[
        str | None,
        typer.Option(
            help="Of the weights: fp32, fp16, int8, or image/text: int8/fp16. Default: as stored; open_clip's: fp32."
        ),
    ] = None,
    calibrate: Annotated[
        Path | None,
        typer.Option(help="Captioned photos, for int8: 64 to calibrate, up to 1,000 others to measure the cost."),
    ] = None,
    split: Annotated[str | None, typer.Option(help="Only this split of them.")] = None,
    preprocess: PreprocessOption = None,
) -> None:
    """Write a model as a bundle: ONNX, tokenizer and preprocessing in one folder that needs no torch."""
    from retrieval.encoders import export_bundle

    records = []
    if calibrate is not None:
        from retrieval.pairs import read_pairs

        records = read_pairs(calibrate, split)
    bundle = export_bundle(model, output, precision, preprocess, records)
    if records and "int8" in bundle.training:
        render.quantised(bundle.training["int8"])
    render.note(f"wrote {bundle.path}: use it with  --model {bundle.path}")
