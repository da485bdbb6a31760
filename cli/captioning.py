"""caption: what pictures show, by a decoder on vectors that are already there, or are made once."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cli import render
from cli.app import (
    LOCK_SECONDS,
    USER_ERROR,
    DeviceOption,
    IndexOption,
    JsonOption,
    ModelOption,
    NoCacheOption,
    ThreadsOption,
    caption_app,
    needs_heads,
    show_page,
)
from indexes.runtime import thread_count

if TYPE_CHECKING:
    from retrieval.encoders import Encoder
    from retrieval.heads.captioning.decoders import CaptionDecoder

DecoderOption = Annotated[
    Path | None, typer.Option("--decoder", metavar="DIR", help="What `caption fit` made; default: the model's own.")
]
BeamOption = Annotated[
    int | None, typer.Option("--beam", min=1, help="Captions kept open at a time; 1: greedy. Default: the decoder's.")
]


@caption_app.command("photos")
def photos(
    photos: Annotated[list[Path], typer.Argument(metavar="PHOTO...", help="Pictures.")],
    decoder: DecoderOption = None,
    beam: BeamOption = None,
    model: ModelOption = None,
    device: DeviceOption = "cpu",
    threads: ThreadsOption = None,
    json: JsonOption = False,
) -> None:
    """Say what photos show. The word `photos` may be left out: diptych caption beach.jpg."""
    from retrieval.embedding import UnreadablePictures, encode_pictures
    from retrieval.heads.captioning.decoders import decode_all

    found, encoder = _both(decoder, model, device, threads)
    with render.progress("captioning", "images") as advance:
        try:
            vectors = encode_pictures(encoder, photos, progress=advance)
        except UnreadablePictures as error:
            for reason in error.reasons.values():
                render.note(f"diptych: {reason}")
            photos = [photo for row, photo in enumerate(photos) if row not in error.reasons]
            unreadable = len(error.reasons)
            vectors = encode_pictures(encoder, photos, progress=advance)
        else:
            unreadable = 0
    captions = decode_all(found, vectors, beam)
    if json:
        render.json_out([{"path": str(p), "caption": said} for p, said in zip(photos, captions, strict=True)])
    else:
        render.captions(photos, captions)
    if unreadable:
        raise typer.Exit(USER_ERROR)


@caption_app.command("store")
def store(
    folder: Annotated[Path, typer.Argument(help="A folder covered by an index.")] = Path(),
    index: IndexOption = None,
    decoder: DecoderOption = None,
    beam: BeamOption = None,
    again: Annotated[bool, typer.Option("--again", help="Also where there is a caption, whoever wrote it.")] = False,
    threads: ThreadsOption = None,
    json: JsonOption = False,
) -> None:
    """Caption every photo of an index from its stored vector, for `search --words` and `--where` to use."""
    from retrieval.heads.captioning.decoders import decoder_of, load_decoder
    from retrieval.heads.captioning.storing import caption_store
    from retrieval.library import Library

    library = Library.open(folder, index=index)
    found = load_decoder(
        decoder or decoder_of(library.store.model.name), library.store.model.fingerprint, threads or thread_count()
    )
    with render.progress("captioning", "images") as advance:
        done = caption_store(library, found, again=again, beams=beam, wait=LOCK_SECONDS, progress=advance)
    if json:
        render.json_out({"captioned": done.captioned, "kept": done.kept})
    else:
        render.note(f"{done.captioned:,} photos captioned, {done.kept:,} had a caption")


@caption_app.command("fit")
def fit(
    config: Annotated[Path, typer.Option("--config", help="A recipe (TOML): kind, captions, and how it learns.")],
    data: Annotated[Path, typer.Option("--data", help="The folder that the recipe's paths are relative to.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder to make: the decoder.")],
    checkpoint: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Written on the way; a run that was ended goes on from it.")
    ] = None,
    no_cache: NoCacheOption = False,
    model: ModelOption = None,
    device: DeviceOption = "cpu",
    threads: ThreadsOption = None,
    json: JsonOption = False,
) -> None:
    """Make a decoder from captions and the embeddings of their pictures, or from captions alone."""
    from retrieval.encoders import BUILTIN, device_beside, lasting_spec, load_encoder

    with needs_heads("caption fit"):
        from retrieval.heads.captioning import making, recipe
    settings = recipe.load_recipe(config)
    spec = lasting_spec(model or BUILTIN)
    encoder = load_encoder(spec, device=device_beside(device), threads=threads)
    with render.progress("encoding", "images") as encoding, render.progress("learning", "steps") as advance:
        card = making.fit_decoder(
            settings,
            data,
            encoder,
            spec,
            out,
            checkpoint=checkpoint,
            device=device,
            threads=threads or thread_count(),
            cached=not no_cache,
            encoding=encoding,
            progress=advance,
            note=render.note,
        )
    if json:
        render.json_out({"decoder": str(out), "kind": card.kind, "training": dict(card.training)})
    else:
        render.note(f"wrote {out}")


@caption_app.command("evaluate")
def evaluate(
    data: Annotated[Path, typer.Argument(help="Pictures with captions, as for `diptych evaluate`.")],
    decoder: DecoderOption = None,
    beam: BeamOption = None,
    split: Annotated[
        str | None, typer.Option(help="Only this split, or all; default: test where there is one, else everything.")
    ] = None,
    images: Annotated[Path | None, typer.Option(help="Where the pictures are, if not beside DATA.")] = None,
    no_cache: NoCacheOption = False,
    model: ModelOption = None,
    device: DeviceOption = "cpu",
    threads: ThreadsOption = None,
    html: Annotated[Path | None, typer.Option(help="Write a page with pictures and what is said of them.")] = None,
    open_: Annotated[bool, typer.Option("--open", help="Show that page in the browser.")] = False,
    json: JsonOption = False,
) -> None:
    """Compare captions with what people said: BLEU, ROUGE-L, CIDEr-D; and whether they find their pictures."""
    from retrieval.heads.captioning import evaluation
    from retrieval.pairs import read_pairs

    records = read_pairs(data, None if split == "all" else split, prefer=None if split else "test", images=images)
    found, encoder = _both(decoder, model, device, threads)
    with render.progress("encoding", "images") as advance:
        result = evaluation.evaluate(found, encoder, records, beams=beam, cached=not no_cache, progress=advance)
    if html or open_:
        from retrieval.report import write_captions_page

        show_page(write_captions_page(result, html), open_)
    if json:
        render.json_out({"data": str(data), **result.to_json()})
    else:
        render.metrics(result.metrics, f"{found.card.name} on {len(result.records):,} pictures")


def _both(folder: Path | None, model: str | None, device: str, threads: int | None) -> tuple[CaptionDecoder, Encoder]:
    """The decoder, and the encoder that it was made for."""
    from retrieval.encoders import BUILTIN, load_encoder
    from retrieval.heads.captioning.decoders import Card, decoder_of, load_decoder

    spec = model or (Card.load(folder).encoder if folder else BUILTIN)
    place = folder or decoder_of(spec)
    encoder = load_encoder(spec, device=device, threads=threads)
    return load_decoder(place, encoder.fingerprint, threads or thread_count()), encoder
