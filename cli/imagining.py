"""imagine: small pictures of sentences, and vectors of vectors, by generators on vectors that are already there."""

from __future__ import annotations

import json as jsonlib
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cli import render
from cli.app import (
    DeviceOption,
    ImagesOption,
    JsonOption,
    ModelOption,
    SameModelOption,
    ThreadsOption,
    encoder_loader,
    imagine_app,
    needs_heads,
)

if TYPE_CHECKING:
    from retrieval.heads.generation.material import Material
    from retrieval.library import Library


GeneratorArgument = Annotated[Path, typer.Argument(metavar="GENERATOR", help="The folder that `imagine fit` made.")]
DataArgument = Annotated[
    Path | None,
    typer.Argument(metavar="[DATA]", help="Pictures, with sentences or without; else those of an index."),
]
StoreOption = Annotated[
    Path | None, typer.Option("--index", help="Instead of DATA: an index; default: the one of this folder.")
]
NoCacheOption = Annotated[
    bool, typer.Option("--no-cache", help="Encode DATA anew, and keep nothing for the next time.")
]
SeedOption = Annotated[int, typer.Option(min=0, help="Of every random number.")]


@imagine_app.command("draw")
def draw(
    text: Annotated[
        list[str], typer.Argument(metavar="TEXT...", help="What the picture is to show; several: a row each.")
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="The picture to write, PNG or whatever its suffix says.")],
    generator: Annotated[
        Path, typer.Option("--generator", "-g", metavar="GENERATOR", help="The folder that `imagine fit` made.")
    ] = Path("imagine"),
    count: Annotated[int, typer.Option(min=1, help="Pictures of each sentence, side by side.")] = 1,
    scale: Annotated[int, typer.Option(min=1, max=16, help="Make every pixel so many pixels wide.")] = 1,
    seed: SeedOption = 0,
    model: SameModelOption = None,
    device: DeviceOption = "cpu",
    threads: ThreadsOption = None,
    json: JsonOption = False,
) -> None:
    """Make a small picture of a sentence. A research head: 64 pixels wide, what it has seen, and blurred."""
    with needs_heads("imagine"):
        from retrieval.heads.generation import drawing, storage
    from retrieval.encoders import load_encoder

    found = storage.load(generator, device)
    drawn = drawing.draw(found, text, load_encoder(model or found.encoder, threads=threads), count=count, seed=seed)
    drawing.write(drawn, out, scale)
    fields = [
        {"text": one, "cosines": [round(value, 4) for value in cosines]}
        for one, cosines in zip(text, drawn.cosines.tolist(), strict=True)
    ]
    if json:
        render.json_out({"picture": str(out), "seed": seed, "side": drawn.side, "sentences": fields})
        return
    best = max(max(one["cosines"]) for one in fields)
    render.note(
        f"wrote {out}: {drawn.side} × {drawn.side} pixels each, cosine to its sentence up to {best:.3f}. "
        "A small research head: expect colours and outlines, not photographs"
    )


@imagine_app.command("fit")
def fit(
    data: DataArgument = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder to make.")] = Path("imagine"),
    kind: Annotated[
        str,
        typer.Option(
            help="gan (pictures); regression or cvae (sentence to picture vector); autoencoder, denoiser or vae; "
            "joint or joint-vae (over both)."
        ),
    ] = "gan",
    index: StoreOption = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="NAME=VALUE", help="A setting of the kind: steps=2000, latent=32, source=image."),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the GAN in --out that was cut short; --set steps=N may change.")
    ] = False,
    seed: SeedOption = 0,
    images: ImagesOption = None,
    no_cache: NoCacheOption = False,
    model: ModelOption = None,
    device: DeviceOption = "cpu",
    threads: ThreadsOption = None,
    json: JsonOption = False,
) -> None:
    """Fit a generator to the vectors (and, for a GAN, the pictures) of an index or of a file of pairs."""
    with needs_heads("imagine"):
        from retrieval.heads.generation import fitting, storage
    changes = _changes(set_ or [])
    if resume:
        begun = fitting.goes_on(out)
        if unknown := sorted(changes.keys() - {"steps"}):
            raise typer.BadParameter(f"a run goes on as it began: leave out {', '.join(unknown)}", param_hint="--set")
        kind, about = str(begun["kind"]), begun["about"]
        changes = {**begun["settings"], **changes}
        data, index, images = (Path(about[name]) if about[name] else None for name in ("data", "index", "images"))
        model, seed = about["model"], int(changes.pop("seed"))
    else:
        storage.refuse(out)
        about = {
            "data": str(data.absolute()) if data else None,
            "index": str(_library(index).store.path) if data is None else None,
            "images": str(images.absolute()) if images else None,
            "model": model,
        }
    settings = fitting.settings_of(kind, {**changes, "seed": seed})
    material = _material(data, index, images, not no_cache, model, threads, seed)
    with render.progress("playing", "steps") as advance:
        generator = fitting.fit(
            material,
            kind,
            settings,
            out,
            device=device,
            threads=threads,
            about=about,
            progress=advance,
            note=render.note,
        )
    if json:
        render.json_out({"generator": str(out), **storage.told(out)})
    else:
        render.note(f"wrote {out}: {generator.source} to {generator.target}; {fitting.KINDS[kind].about}")


@imagine_app.command("evaluate")
def evaluate(
    generator: GeneratorArgument,
    data: DataArgument = None,
    index: StoreOption = None,
    split: Annotated[str, typer.Option(help="train, val or test.")] = "test",
    samples: Annotated[
        Path | None, typer.Option(help="Write a grid of pictures beside the real ones (of a GAN).")
    ] = None,
    seed: SeedOption = 0,
    images: ImagesOption = None,
    no_cache: NoCacheOption = False,
    model: SameModelOption = None,
    device: DeviceOption = "cpu",
    threads: ThreadsOption = None,
    json: JsonOption = False,
) -> None:
    """Measure a generator: what it rebuilds, what it is worth to search, what its pictures are worth."""
    with needs_heads("imagine"):
        from retrieval.heads.generation import drawing, fitting, storage
    if split not in ("train", "val", "test"):
        raise typer.BadParameter("it is train, val or test", param_hint="--split")
    found = storage.load(generator, device)
    spec = model or found.encoder
    material = _material(data, index, images, not no_cache, spec, threads, seed)
    result = fitting.evaluate(found, material, encoder_loader(spec, "cpu", threads), part=split, seed=seed)
    if samples:
        drawing.write_samples(found, material, split, samples, seed)
        render.note(f"wrote {samples}: a sentence's real picture, then what was made of it")
    if json:
        render.json_out(result)
    else:
        render.measured(result)


@imagine_app.command("odd")
def odd(
    generator: GeneratorArgument,
    folder: Annotated[Path, typer.Option("--folder", "-C", help="What was indexed.")] = Path(),
    index: StoreOption = None,
    top: Annotated[int, typer.Option("--top", "-t", min=1, help="How many pictures.")] = 10,
    json: JsonOption = False,
) -> None:
    """List the pictures of an index that are least like those that a vae has learnt from, the oddest first."""
    with needs_heads("imagine"):
        from retrieval.heads.generation import storage
        from retrieval.heads.generation.drawing import oddest
    found = oddest(storage.load(generator), _library(index, folder), top)
    if json:
        render.json_out([{"path": str(path), "oddness": round(value, 4)} for path, value in found])
    else:
        render.scored(found)


def _library(index: Path | None, folder: Path = Path()) -> Library:
    from retrieval.library import Library

    return Library.open(folder, index=index)


def _material(
    data: Path | None,
    index: Path | None,
    images: Path | None,
    cached: bool,
    spec: str | None,
    threads: int | None,
    seed: int,
) -> Material:
    """What to learn from or to measure with: a file, or an index. The seed draws a split where there is none."""
    from retrieval.encoders import BUILTIN, lasting_spec, load_encoder
    from retrieval.heads.generation.material import material_of_pairs, material_of_store

    if data is None:
        return material_of_store(_library(index), seed=seed, note=render.note)
    name = lasting_spec(spec or BUILTIN)
    with render.progress("encoding", "images") as advance:
        return material_of_pairs(
            data,
            load_encoder(name, threads=threads),
            name,
            images=images,
            cached=cached,
            seed=seed,
            progress=advance,
            note=render.note,
        )


def _changes(given: list[str]) -> dict[str, Any]:
    """NAME=VALUE, the value as JSON has it, or else as the text that it is."""
    changes = {}
    for one in given:
        name, equals, value = one.partition("=")
        if not equals or not name.strip():
            raise typer.BadParameter(f"{one!r} is no setting: write NAME=VALUE", param_hint="--set")
        try:
            changes[name.strip()] = jsonlib.loads(value)
        except ValueError:
            changes[name.strip()] = value
    return changes
