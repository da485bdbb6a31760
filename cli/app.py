"""What every command shares: the app, options of the same name, exit codes, and how an index is found."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from cli import render
from indexes.errors import StoreNotFound

if TYPE_CHECKING:
    from collections.abc import Callable

    from retrieval.encoders import Encoder
    from retrieval.library import Library

USER_ERROR, WITH_FAILURES, INTERRUPTED = 1, 3, 130  # 0 is success, 2 is typer's for wrong usage

# In the order in which `diptych --help` lists them, each with the module of this package that declares it.
_MODULES = {
    "index": "indexing",
    "search": "indexing",
    "info": "indexing",
    "dedupe": "keeping",
    "encode": "measuring",
    "evaluate": "measuring",
    "export": "porting",
    "import": "porting",
    "train": "training",
    "classify": "classifying",
    "caption": "captioning",
    "imagine": "imagining",
    "models": "models",
}


class _Commands(Mapping[str, Any]):
    """The commands by name; only what is asked for is imported and built."""

    def __iter__(self) -> Iterator[str]:
        return iter(_MODULES)

    def __len__(self) -> int:
        return len(_MODULES)

    def __getitem__(self, name: str) -> Any:
        return _command(name)


@functools.cache
def _command(name: str) -> Any:
    importlib.import_module(f"cli.{_MODULES[name]}")
    groups = {"models": models_app, "classify": classify_app, "caption": caption_app, "imagine": imagine_app}
    group = groups.get(name)
    if group is not None:
        return typer.main.get_command(group)
    single = typer.Typer(add_completion=False)
    single.registered_commands = [
        info for info in app.registered_commands if name == (info.name or getattr(info.callback, "__name__", None))
    ]
    return typer.main.get_command(single)


class _Group(TyperGroup):
    def __init__(self, **settings: Any) -> None:
        super().__init__(**{**settings, "commands": _Commands()})


class _FirstByDefault(TyperGroup):
    """`caption beach.jpg` is `caption photos beach.jpg`: what does not begin with a command is for the first one."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and args[0] not in self.commands and args[0] not in ctx.help_option_names:
            args = [next(iter(self.commands)), *args]
        return super().parse_args(ctx, args)


app = typer.Typer(
    name="diptych",
    cls=_Group,
    help="Make a folder of photos searchable by sentence, measure the retriever, train a better one.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
models_app = typer.Typer(
    name="models", help="List, import and export models.", no_args_is_help=True, add_completion=False
)
classify_app = typer.Typer(
    name="classify",
    help="Say what pictures with text and columns are: fit a fusion, use it.",
    no_args_is_help=True,
    add_completion=False,
)
caption_app = typer.Typer(
    name="caption",
    cls=_FirstByDefault,
    help="Say what photos show: diptych caption PHOTO…, or one of the commands below.",
    no_args_is_help=True,
    add_completion=False,
)
imagine_app = typer.Typer(
    name="imagine",
    cls=_FirstByDefault,
    help='Make small pictures of sentences, and vectors of vectors: diptych imagine "TEXT" --out x.png.',
    no_args_is_help=True,
    add_completion=False,
)

IndexOption = Annotated[
    Path | None,
    typer.Option("--index", help="The index itself, where it does not lie in FOLDER/.diptych or FILE.diptych."),
]
ModelOption = Annotated[
    str | None,
    typer.Option(
        "--model",
        help="builtin, an imported name, a bundle's folder, or open_clip's NAME/PRETRAINED, hf-hub:…, local-dir:….",
    ),
]
SameModelOption = Annotated[
    str | None, typer.Option("--model", help="The encoder, where it is not where it was: the same one.")
]
DeviceOption = Annotated[str, typer.Option(help="cpu, cuda, several as cuda:0,cuda:1; bundles run on the CPU.")]
ThreadsOption = Annotated[
    int | None, typer.Option(min=1, help="Threads of the model; default: all this process may use.")
]
PreprocessOption = Annotated[
    str | None,
    typer.Option(help="Only for a bare checkpoint: the open_clip tag it was trained like, or a JSON file."),
]


class RunPrecision(str, Enum):
    """Of the arithmetic."""

    auto = "auto"
    fp32 = "fp32"
    bf16 = "bf16"


PrecisionOption = Annotated[
    RunPrecision,
    typer.Option("--precision", help="What the model multiplies in: auto is the fastest here; int8 bundles stay int8."),
]
ImagesOption = Annotated[Path | None, typer.Option(help="Where the pictures are, if not beside DATA.")]
NoCacheOption = Annotated[
    bool, typer.Option("--no-cache", help="Encode everything anew, and keep nothing for the next time.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="JSON on standard output.")]
LOCK_SECONDS = 2.0  # that a command waits for another one's writing


def _print_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"diptych {version('diptych')}")
        raise typer.Exit


@app.callback()
def _main(
    _version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    pass


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


@contextmanager
def needs_heads(what: str) -> Iterator[None]:
    """While modules of heads are imported: MissingExtra where what they need is not installed."""
    try:
        yield
    except ImportError as error:
        if (error.name or "").split(".")[0] not in {"torch", "sklearn", "imblearn", "scipy", "safetensors"}:
            raise
        from retrieval.errors import MissingExtra

        raise MissingExtra(what, "'diptych[heads]'") from error


def encoder_loader(spec: str, device: str, threads: int | None) -> Callable[[], Encoder]:
    """What loads an encoder when it is needed: with vectors from an index or the cache it may never be."""
    from retrieval.encoders import load_encoder

    return lambda: load_encoder(spec, device=device, threads=threads)


def show_page(page: Path, in_browser: bool) -> None:
    """Open a page in the browser, or say that it was written."""
    if in_browser:
        typer.launch(page.absolute().as_uri())
    else:
        render.note(f"wrote {page}")
