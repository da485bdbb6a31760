"""classify: what a picture with its text and columns is, by a head on vectors that are already there."""

from __future__ import annotations

import tempfile
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

from cli import render
from cli.app import (
    DeviceOption,
    ImagesOption,
    JsonOption,
    ModelOption,
    NoCacheOption,
    SameModelOption,
    ThreadsOption,
    classify_app,
    encoder_loader,
    needs_heads,
    show_page,
)


class Imbalance(str, Enum):
    """What is done about classes that are rare."""

    none = "none"
    class_weights = "class-weights"
    focal = "focal"
    oversample = "oversample"
    undersample = "undersample"
    smote = "smote"
    augment = "augment"


class Balance(str, Enum):
    """What is done about a modality that learns faster than the others."""

    none = "none"
    ogm_ge = "ogm-ge"


class TaskKind(str, Enum):
    """What is predicted."""

    auto = "auto"
    class_ = "class"
    labels = "labels"
    number = "number"


StoredOption = Annotated[
    Path | None,
    typer.Option(
        "--index", help="An index, or its folder: of pictures that it holds, vectors are taken as they are stored."
    ),
]


@classify_app.command("fit")
def fit(
    data: Annotated[
        Path, typer.Argument(help="CSV, TSV, JSONL or Parquet with pictures, texts, labels and columns, any may lack.")
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder to make: the classifier, and its report.")],
    target: Annotated[str, typer.Option(metavar="COLUMN", help="What to predict.")] = "label",
    task: Annotated[
        TaskKind, typer.Option(help="A class, several labels (in CSV between semicolons), or a number.")
    ] = TaskKind.auto,
    columns: Annotated[
        list[str] | None,
        typer.Option(metavar="NAMES", help="Further modalities, with commas between: numbers, categories, vectors."),
    ] = None,
    variants: Annotated[
        list[str] | None, typer.Option(metavar="NAMES", help="Only these fusions, with commas between; default: all.")
    ] = None,
    imbalance: Annotated[
        Imbalance, typer.Option(help="What is done about classes that are rare.")
    ] = Imbalance.class_weights,
    balance: Annotated[
        Balance, typer.Option(help="What is done about a modality that learns faster than the others.")
    ] = Balance.none,
    views: Annotated[
        int, typer.Option(min=0, help="Further views of each photo to learn from, for --imbalance augment.")
    ] = 0,
    pixels: Annotated[
        bool | None,
        typer.Option(
            "--pixels/--no-pixels",
            help="Measure a small CNN on the pixels beside the vectors; default: unless there is an --index.",
            show_default=False,
        ),
    ] = None,
    study: Annotated[
        bool, typer.Option("--study/--no-study", help="Compare every treatment of rare classes on one network.")
    ] = True,
    folds: Annotated[
        int, typer.Option(min=0, help="Stratified cross-validation with so many folds; 0: the split given.")
    ] = 0,
    finetune: Annotated[
        bool, typer.Option("--finetune", help="Send a network's gradients on into the towers; kept if better on val.")
    ] = False,
    blocks: Annotated[
        int, typer.Option("--finetune-blocks", min=1, help="How many of each tower's last blocks learn then.")
    ] = 1,
    start: Annotated[
        str, typer.Option("--finetune-from", metavar="NAME", help="The network to begin with, if not the best one.")
    ] = "",
    explain: Annotated[bool, typer.Option("--explain", help="What each modality contributed on test.")] = False,
    bootstrap: Annotated[int, typer.Option(min=1, help="Draws for the 95 % intervals.")] = 1000,
    seed: Annotated[int, typer.Option(min=0, help="Of every random number.")] = 0,
    images: ImagesOption = None,
    index: StoredOption = None,
    no_cache: NoCacheOption = False,
    model: ModelOption = None,
    device: DeviceOption = "cpu",
    threads: ThreadsOption = None,
    open_: Annotated[bool, typer.Option("--open", help="Open the report in the browser.")] = False,
    json: JsonOption = False,
) -> None:
    """Fit fusions of image, text and columns on train, choose on val, report on test; beside each modality alone."""
    classify, kept = _heads()
    from retrieval.encoders import BUILTIN, device_beside, lasting_spec
    from retrieval.heads.settings import ClassifySettings
    from retrieval.report.classification import classification_page

    kept.refuse(out)
    settings = ClassifySettings(
        target=target,
        task=task.value,
        columns=_names(columns),
        variants=_names(variants),
        imbalance=imbalance.value,
        balance=balance.value,
        views=views,
        pixels=index is None if pixels is None else pixels,
        study=study,
        folds=folds,
        explain=explain,
        draws=bootstrap,
        seed=seed,
        device=device,
        finetune=blocks if finetune else 0,
        start=start,
    )
    spec = lasting_spec(model or _model_of(index) or BUILTIN)
    with tempfile.TemporaryDirectory(prefix="diptych-classify-") as scratch:
        with render.progress("fitting", "steps") as advance:
            result, classifier = classify.fit(
                data,
                encoder_loader(spec, device_beside(device), threads),
                spec,
                settings,
                images=images,
                index=index,
                scratch=Path(scratch),
                cached=not no_cache,
                progress=advance,
                note=render.note,
            )
        plain = result.to_json()
        classifier.save(
            out, {kept.PAGE: classification_page(result).encode(), kept.RESULT: render.json_text(plain).encode()}
        )
    if json:
        render.json_out(plain)
    else:
        render.classification(result)
    show_page(out / kept.PAGE, open_)


@classify_app.command("predict")
def predict(
    classifier: Annotated[Path, typer.Argument(metavar="MODEL", help="The folder that `classify fit` made.")],
    data: Annotated[Path, typer.Argument(help="As for fit; labels are not looked at, and anything else may lack.")],
    explain: Annotated[
        bool, typer.Option("--explain", help="What each modality contributed to each answer, by leaving it out.")
    ] = False,
    fill: Annotated[
        list[Path] | None,
        typer.Option(metavar="GENERATOR", help="Fill in missing pictures or texts by a generator of `imagine fit`."),
    ] = None,
    images: ImagesOption = None,
    index: StoredOption = None,
    no_cache: NoCacheOption = False,
    model: SameModelOption = None,
    device: DeviceOption = "cpu",
    threads: ThreadsOption = None,
    json: JsonOption = False,
) -> None:
    """Say what each row of DATA is, in order."""
    classify, kept = _heads()
    found = kept.FusionClassifier.load(classifier)
    translators = []
    if fill:
        with needs_heads("classify --fill"):
            from retrieval.heads.generation.storage import translators as load_translators
        translators = [way for folder in fill for way in load_translators(folder)]
    with render.progress("encoding", "images") as advance:
        answers = classify.predict(
            found,
            data,
            encoder_loader(model or found.encoder, device, threads),
            images=images,
            index=index,
            cached=not no_cache,
            explain=explain,
            fill=translators,
            progress=advance,
            note=render.note,
        )
    if json:
        render.json_out([answer.to_json() for answer in answers])
    else:
        render.answers(answers)


def _heads() -> tuple[Any, Any]:
    """The modules that fit and keep classifiers."""
    with needs_heads("classify"):
        from retrieval.heads import classify, model
    return classify, model


def _model_of(index: Path | None) -> str | None:
    """The model that an index was made with."""
    if index is None:
        return None
    from retrieval.stored import open_store

    return open_store(index).model.name


def _names(given: list[str] | None) -> tuple[str, ...]:
    return tuple(name.strip() for one in given or () for name in one.split(",") if name.strip())
