"""Fit any kind of generator, and measure it: what `diptych imagine fit` and `evaluate` do."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from retrieval.embedding import Progress
from retrieval.encoders import Encoder
from retrieval.errors import DataError
from retrieval.heads import Translator, check_fingerprint
from retrieval.heads.generation import storage
from retrieval.heads.generation.adversarial import parameters
from retrieval.heads.generation.autoencoder import Autoencoder, AutoencoderSettings, fit_autoencoder
from retrieval.heads.generation.drawing import as_pixels, picture_vectors
from retrieval.heads.generation.gan import (
    CHECKPOINT,
    LOG,
    Game,
    GANSettings,
    PictureGenerator,
    read_checkpoint,
    train,
)
from retrieval.heads.generation.material import Centring, Material, Note
from retrieval.heads.generation.prior import (
    PriorSettings,
    between,
    choose_share,
    fit_prior,
    hits,
)
from retrieval.heads.generation.scores import coverage, frechet_distance, mean_distance
from retrieval.heads.modalities import IMAGE, TEXT
from retrieval.heads.networks import Recipe
from retrieval.heads.pixels import Pixels, read_squares
from retrieval.metrics import evaluate_retrieval

Settings = AutoencoderSettings | PriorSettings | GANSettings
MEASURED = 1000  # pictures that are made to be measured, at most
_RECIPE = {"epochs", "batch", "learning_rate", "weight_decay"}  # of a recipe, what may be changed
_AGAIN = 8  # pictures of one sentence, for how much they differ
_SENTENCES = 64  # of which so many are made


@dataclass(frozen=True)
class Kind:
    """A kind of generator: the settings that it begins with, and a sentence on it."""

    settings: Settings
    about: str


_JOINT = Recipe(epochs=8, batch=256, learning_rate=1e-3, weight_decay=0.01)  # a picture stands once for each sentence

KINDS: Mapping[str, Kind] = {
    "gan": Kind(GANSettings(), "Small pictures from sentences: a conditional GAN with a projection discriminator."),
    "regression": Kind(PriorSettings(), "The picture's vector from the sentence's: its mean."),
    "cvae": Kind(PriorSettings(latent=32), "The same by a conditional VAE: one of the vectors that may be meant."),
    "autoencoder": Kind(AutoencoderSettings(), "Vectors in fewer numbers."),
    "denoiser": Kind(AutoencoderSettings(latent=128, noise=1.0), "Vectors without their noise."),
    "vae": Kind(AutoencoderSettings(beta=0.1), "Vectors in fewer numbers, and how odd each is: a beta-VAE."),
    "joint": Kind(
        AutoencoderSettings(modalities=(IMAGE, TEXT), recipe=_JOINT),
        "Pictures and sentences joined, either from the other.",
    ),
    "joint-vae": Kind(
        AutoencoderSettings(modalities=(IMAGE, TEXT), beta=0.1, recipe=_JOINT), "The same as a beta-VAE."
    ),
}


def settings_of(kind: str, changes: Mapping[str, Any]) -> Settings:
    """The settings of a kind with some of them changed, those of its recipe among them.

    Raises:
        DataError: what is not known, or does not fit.
    """
    if kind not in KINDS:
        raise DataError(f"there is no kind of generator {kind!r}: there are {', '.join(KINDS)}")
    settings = KINDS[kind].settings
    recipe = None if isinstance(settings, GANSettings) else settings.recipe
    own, of_recipe = _names(settings) - {"recipe", "device"}, _RECIPE if recipe else set()
    if unknown := sorted(changes.keys() - own - of_recipe):
        near = difflib.get_close_matches(unknown[0], own | of_recipe, 1)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(sorted(own | of_recipe))}"
        raise DataError(f"{kind} has no setting {unknown[0]!r}: {hint}")
    if recipe is not None:
        changed = {name: _like(name, getattr(recipe, name), changes[name]) for name in _RECIPE & changes.keys()}
        settings = replace(settings, recipe=replace(recipe, **changed))  # type: ignore[arg-type]
    settings = replace(
        settings, **{name: _like(name, getattr(settings, name), changes[name]) for name in own & changes.keys()}
    )
    settings.check()
    return settings


def _names(settings: Any) -> set[str]:
    return {field.name for field in fields(settings)}


def _like(name: str, old: object, value: object) -> Any:
    """A value of the type that a setting has; DataError."""
    if isinstance(old, tuple):
        value = tuple(value.split(",")) if isinstance(value, str) else value
        value = tuple(value) if isinstance(value, list) else value
    if isinstance(value, bool) or not isinstance(value, (int, float) if isinstance(old, float) else type(old)):
        raise DataError(f"{name} is like {old!r}, not {value!r}")
    return value


def fit(
    material: Material,
    kind: str,
    settings: Settings,
    out: Path,
    *,
    device: str = "cpu",
    threads: int | None = None,
    about: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
    note: Note = lambda _: None,
) -> storage.Stored:
    """Fit a generator and write its folder.

    Args:
        material: what to learn from.
        kind: one of :data:`KINDS`.
        settings: of that kind.
        out: the folder; of a GAN it holds a log, and until the end a checkpoint, from which it goes on.
        device: where to learn.
        threads: of torch, in all of this process; None: as they are.
        about: where the material is from; kept beside the settings.
        progress: of a GAN, called with (steps done, steps).
        note: told of pictures that cannot be read, and of what a prior is worth to search.

    Raises:
        DataError: of the material, or what is learnt is no number any more.
        UsageError: the folder cannot be written.
    """
    if threads:
        torch.set_num_threads(threads)
    told = {"kind": kind, "settings": asdict(settings), "about": dict(about or {})}
    generator: storage.Stored
    if isinstance(settings, GANSettings):
        return _fit_pictures(material, settings, out, device, told, progress, note)
    if isinstance(settings, PriorSettings):
        generator = fit_prior(material, replace(settings, device=device))
    else:
        generator = fit_autoencoder(material, replace(settings, device=device))
    translator = between(generator, TEXT, IMAGE)
    if translator is not None:
        share, tried = choose_share(translator, material)
        generator = replace(generator, share=share)
        told["shares"] = tried
        if not share:
            note("no share of its vectors makes search better on val: with --prior, search stays as it is")
    storage.save(generator, out, told)
    return generator


def _fit_pictures(
    material: Material,
    settings: GANSettings,
    out: Path,
    device: str,
    told: Mapping[str, Any],
    progress: Progress | None,
    note: Note,
) -> PictureGenerator:
    rows = material.parts["train"]
    pixels, readable = read_squares([material.pictures[row] for row in rows.tolist()], settings.side)
    if not readable.all():
        note(f"{int((~readable).sum())} of {len(rows)} pictures cannot be read and are left out")
        rows, pixels = rows[readable], pixels[readable]
    if len(rows) < 2:
        raise DataError("a GAN learns from pictures, and fewer than 2 of them can be read")
    place = np.full(len(material.images), -1)
    place[rows] = np.arange(len(rows))
    spoken = place[material.owner] >= 0
    centring = Centring.of_material(material)
    game = Game(
        settings, pixels, material.images[rows], material.texts[spoken], place[material.owner[spoken]], centring, device
    )
    begun = (out / CHECKPOINT).is_file()
    if begun:
        game.restore(*read_checkpoint(out))
    else:
        out.mkdir(parents=True, exist_ok=True)
    try:
        train(game, out, told, progress)
    finally:
        if not (out / CHECKPOINT).exists() and game.step < settings.steps:  # nothing could go on from here
            (out / LOG).unlink(missing_ok=True)
            out.rmdir()
    with game.average.applied(game.generator):
        generator = PictureGenerator(
            material.fingerprint, material.encoder, centring, game.generator, game.build, device=device
        )
        storage.save(generator, out, {**told, "steps": game.step, "parameters": parameters(game.generator)})
    (out / CHECKPOINT).unlink(missing_ok=True)
    loaded = storage.load(out, device)
    assert isinstance(loaded, PictureGenerator)  # as it was saved
    return loaded


# ---- measured --------------------------------------------------------------------------------------------------------


def evaluate(
    generator: storage.Stored,
    material: Material,
    encoder: Callable[[], Encoder],
    *,
    part: str = "test",
    seed: int = 0,
) -> dict[str, Any]:
    """Measure a generator on a part of the material: in plain values.

    Raises:
        ModelMismatch: the material's vectors are another model's.
        DataError: the part has no sentences, where they are needed.
    """
    check_fingerprint("the generator", generator.fingerprint, material.fingerprint)
    result: dict[str, Any] = {"kind": generator.kind, "part": part, "pictures": len(material.parts[part])}
    if isinstance(generator, PictureGenerator):
        return {**result, **picture_scores(generator, material, encoder(), part, seed)}
    if isinstance(generator, Autoencoder):
        result["rebuilt"] = rebuilt(generator, material, part)
    translator = between(generator, TEXT, IMAGE)
    if translator is not None:
        result["search"] = {
            "without": hits(None, material, part),
            "with": hits(translator, material, part),
            "share": translator.share,
            "translated alone": hits(translator, material, part, 1.0),
        }
    for source, target in ((TEXT, IMAGE), (IMAGE, TEXT)):
        way = between(generator, source, target)
        if way is not None:
            result[f"{source} to {target}"] = translated(way, material, part)
    return result


def rebuilt(generator: Autoencoder, material: Material, part: str) -> dict[str, float]:
    """How well a part's rows are rebuilt from all that they have: half the squared error, nats, mean cosine."""
    images, texts = (
        material.pairs(part) if TEXT in generator.modalities else (material.images[material.parts[part]],) * 2
    )
    tables = {name: rows for name, rows in ((IMAGE, images), (TEXT, texts)) if name in generator.modalities}
    if not len(images):
        raise DataError(f"nothing is said of the pictures of the split {part}: there is nothing to measure on")
    losses, made = generator.losses(tables), generator.rebuild(tables)
    return {
        "reconstruction": float(losses.reconstruction.mean()),
        "kl": float(losses.kl.mean()),
        "oddness": float(generator.oddness(tables).mean()),
        **{f"cosine {name}": float((rows * made[name]).sum(1).mean()) for name, rows in tables.items()},
    }


def translated(translator: Translator, material: Material, part: str) -> dict[str, float]:
    """Mean cosine between vectors of a part and what they should translate to, before and after."""
    images, texts = material.pairs(part)
    if not len(images):
        raise DataError(f"nothing is said of the pictures of the split {part}: there is nothing to measure on")
    given, right = (texts, images) if translator.source == TEXT else (images, texts)
    return {
        "cosine before": float((given * right).sum(1).mean()),
        "cosine after": float((translator.generate(given) * right).sum(1).mean()),
    }


def picture_scores(
    generator: PictureGenerator, material: Material, encoder: Encoder, part: str, seed: int = 0
) -> dict[str, Any]:
    """Make a picture of a sentence about each picture of a part, and measure them in the image tower's features.

    Beside each figure stands that of the real pictures at the same size: what could be had at most.

    - ``frechet``: see :func:`retrieval.heads.generation.scores.frechet_distance`, to real pictures of train, as small
    - ``finds_hit@k``: does a picture find its own sentence among those of all the others?
    - ``distance``: mean 1 - cosine between pictures of different sentences; ``distance_again``: of the same sentence
    - ``coverage``: see :func:`retrieval.heads.generation.scores.coverage`
    """
    side = 4 << len(generator.build["channels"])
    rows = np.array(
        [row for row in material.parts[part].tolist() if (material.owner == row).any()][:MEASURED], np.int64
    )
    if len(rows) < 2:
        raise DataError(f"nothing is said of the pictures of the split {part}: there is nothing to make pictures of")
    first = {int(owner): at for at, owner in reversed(list(enumerate(material.owner.tolist())))}
    texts = material.texts[[first[row] for row in rows.tolist()]]
    others = material.parts["train"][: len(rows)]
    real, elsewhere = (
        picture_vectors(encoder, _shown(read_squares([material.pictures[row] for row in some.tolist()], side)))
        for some in (rows, others)
    )
    made = picture_vectors(encoder, as_pixels(generator.generate(texts, seed)))
    again = np.stack(
        [
            picture_vectors(encoder, as_pixels(generator.generate(texts[:_SENTENCES], seed + 1 + number)))
            for number in range(_AGAIN)
        ],
        axis=1,
    )  # (sentences, again, D)
    place = np.arange(len(rows))
    found = {}
    for name, vectors in (("made", made), ("real", real)):
        scores = evaluate_retrieval(vectors, texts, place)
        found[name] = {
            "frechet": frechet_distance(vectors, elsewhere),
            **{f"finds_hit@{k}": scores[f"i2t_hit@{k}"] for k in (1, 5, 10)},
            "cosine": float((vectors * texts).sum(1).mean()),
            "distance": mean_distance(vectors),
        }
    k = min(5, len(elsewhere) - 1)
    return {
        "side": side,
        "made": {
            **found["made"],
            "distance_again": float(np.mean([mean_distance(rows) for rows in again])),
            "coverage": coverage(elsewhere, made, k),
        },
        "real": {**found["real"], "coverage": coverage(elsewhere, real, k)},
        "chance_hit@10": min(1.0, 10 / len(rows)),
    }


def _shown(read: tuple[Pixels, NDArray[np.bool_]]) -> Pixels:
    pixels, readable = read
    if not readable.all():
        raise DataError(f"{int((~readable).sum())} of {len(pixels)} pictures to measure with cannot be read")
    return pixels


def goes_on(folder: Path) -> dict[str, Any]:
    """What a checkpoint says of its training: kind, settings, where the material is from. DataError without one."""
    state = read_checkpoint(folder)[1]
    return {name: value for name, value in state.items() if name != "random"}
