"""What commands share: options of the same name, exit codes, and how an index is found."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cli import render
from indexes.errors import StoreNotFound

if TYPE_CHECKING:
    from retrieval.library import Library

USER_ERROR, WITH_FAILURES, INTERRUPTED = 1, 3, 130  # 0 is success, 2 is click's for wrong usage
LOCK_SECONDS = 2.0  # that a command waits for another one's writing


class Number(click.FloatRange):
    """A number in a range; NaN, which no comparison refuses, is none."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """See click."""
        number = super().convert(value, param, ctx)
        if math.isnan(number):
            self.fail("it must be a number", param, ctx)
        return float(number)


PATH = click.Path(path_type=Path)

index_option = click.option(
    "--index", type=PATH, help="The index itself, where it does not lie in FOLDER/.diptych or FILE.diptych."
)
model_option = click.option(
    "--model",
    help="builtin, an imported name, a bundle's folder, or open_clip's NAME/PRETRAINED, hf-hub:…, local-dir:….",
)
device_option = click.option("--device", default="cpu", help="cpu, cuda, …; bundles run on the CPU.")
threads_option = click.option(
    "--threads", type=click.IntRange(min=1), help="Threads of the model; default: all this process may use."
)
preprocess_option = click.option(
    "--preprocess", help="Only for a bare checkpoint: the open_clip tag it was trained like, or a JSON file."
)
json_option = click.option("--json", is_flag=True, help="JSON on standard output.")


def open_library(folder: Path, index: Path | None, model: str | None, **loading: Any) -> Library:
    """Open the index that covers a folder or a corpus; `loading` is what `load_encoder` takes.

    Raises what Library.open does.
    """
    from retrieval.library import Library

    if not folder.is_dir():
        from retrieval.sources import check_given

        check_given(folder)
    encoder = None
    if model:
        from retrieval.encoders import load_encoder

        encoder = load_encoder(model, **loading)
    return Library.open(folder, index=index, encoder=encoder, **loading)


def open_or_create(
    folder: Path,
    index: Path | None,
    model: str | None,
    texts: bool = False,
    images: Path | None = None,
    **loading: Any,
) -> tuple[Library, bool]:
    """Open the index that covers a folder or a corpus, or make one; whether it was made."""
    from retrieval.encoders import BUILTIN
    from retrieval.library import Library

    try:
        library = open_library(folder, index, model, **loading)
    except StoreNotFound:
        model = model or BUILTIN
        return Library.create(folder, index=index, model=model, texts=texts, images=images, **loading), True
    library.check_source(folder, texts, images)
    return library, False


def show_page(page: Path, in_browser: bool) -> None:
    """Open a page in the browser, or say that it was written."""
    if in_browser:
        click.launch(page.absolute().as_uri())
    else:
        render.note(f"wrote {page}")
