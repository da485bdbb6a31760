"""models list, import, export."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from cli import render
from cli.app import PATH, json_option, preprocess_option

if TYPE_CHECKING:
    from retrieval.encoders import Precision


@click.group("models")
def models() -> None:
    """List, import and export models."""


@models.command("list")
@json_option
def models_list(
    json: bool,
) -> None:
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


@models.command("import")
@click.argument("source", help="A bundle's or training run's folder, or hf-hub:org/name of a repository with one.")
@click.option("--name", help="What to call it here; default: its own name.")
def models_import(
    source: str,
    name: str | None,
) -> None:
    """Copy a bundle into the data directory, so that --model NAME finds it from anywhere."""
    from retrieval.encoders import import_bundle

    imported, path = import_bundle(source, name)
    render.note(f"imported {path}: use it with  --model {imported}")


@models.command("export")
@click.argument("model", help="Any model: builtin, NAME/PRETRAINED of open_clip, local-dir:/path, …")
@click.argument("output", type=PATH, help="The folder to make.")
@click.option("--precision", type=click.Choice(["fp32", "fp16"]), default="fp32", help="Of the stored weights.")
@preprocess_option
def models_export(
    model: str,
    output: Path,
    precision: Precision,
    preprocess: str | None,
) -> None:
    """Write a model as a bundle: ONNX, tokenizer and preprocessing in one folder that needs no torch."""
    from retrieval.encoders import export_bundle

    bundle = export_bundle(model, output, precision, preprocess)
    render.note(f"wrote {bundle.path}: use it with  --model {bundle.path}")
