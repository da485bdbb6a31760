"""evaluate and encode: a model, without an index."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from cli import render
from cli.app import (
    DeviceOption,
    JsonOption,
    ModelOption,
    PrecisionOption,
    PreprocessOption,
    RunPrecision,
    ThreadsOption,
    app,
    show_page,
)


class Task(str, Enum):
    """What `evaluate` measures."""

    retrieval = "retrieval"
    classification = "classification"


class TieRule(str, Enum):
    """Where a right answer stands among wrong ones of the same score."""

    pessimistic = "pessimistic"
    mean = "mean"


class Format(str, Enum):
    """Whose result `evaluate` prints."""

    clip_benchmark = "clip-benchmark"


@app.command()
def encode(
    images: Annotated[list[Path] | None, typer.Argument(metavar="IMAGE...", help="Pictures to encode.")] = None,
    text: Annotated[list[str] | None, typer.Option("--text", help="A sentence to encode.")] = None,
    texts: Annotated[
        typer.FileText | None, typer.Option("--texts", help="A file of sentences, one a line; - is standard input.")
    ] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="The .npy file to write.")] = Path("vectors.npy"),
    model: ModelOption = None,
    device: DeviceOption = "cpu",
    threads: ThreadsOption = None,
    preprocess: PreprocessOption = None,
    precision: PrecisionOption = RunPrecision.auto,
) -> None:
    """Write the unit vectors of pictures or sentences to a .npy file: float32, one row each, in order."""
    import numpy as np

    from retrieval.embedding import encode_pictures
    from retrieval.encoders import BUILTIN, load_encoder

    sentences = [*(text or []), *_lines(texts)]
    if bool(images) == bool(sentences):
        raise typer.BadParameter("give pictures or sentences: one kind at a time, at least one")
    encoder = load_encoder(
        model or BUILTIN, device=device, threads=threads, preprocess=preprocess, precision=precision.value
    )
    if images:
        with render.progress("encoding", "images") as advance:
            vectors = encode_pictures(encoder, images, progress=advance)
    else:
        vectors = encoder.encode_texts(sentences)
    with output.open("wb") as file:
        np.save(file, vectors)
    render.note(f"wrote {output}: {vectors.shape[0]} vectors of {vectors.shape[1]} numbers")


@app.command()
def evaluate(
    pairs: Annotated[
        Path,
        typer.Argument(
            help="JSONL, CSV, TSV or Parquet; Karpathy's or COCO's JSON; Flickr's captions.txt or token file; "
            "webdataset tars; a folder of a.jpg + a.txt, or of one folder for each class."
        ),
    ],
    task: Annotated[
        Task, typer.Option(help="hit@k between pictures and captions, or zero-shot top-k of labels.")
    ] = Task.retrieval,
    split: Annotated[
        str | None, typer.Option(help='Only this split; "all" for every row. Default: test where there is one.')
    ] = None,
    images: Annotated[Path | None, typer.Option(help="Where the pictures are, if not beside PAIRS.")] = None,
    k: Annotated[
        list[int] | None, typer.Option("-k", min=1, help="A k of hit@k; may be repeated.", show_default="1 5 10")
    ] = None,
    ties: Annotated[
        TieRule, typer.Option(help="Where a right answer stands among wrong ones of the same score.")
    ] = TieRule.pessimistic,
    bootstrap: Annotated[int, typer.Option(min=0, help="Draws for the 95 % intervals; 0 for none.")] = 1000,
    compare: Annotated[
        str | None, typer.Option(metavar="MODEL", help="A second model: differences, with paired intervals.")
    ] = None,
    slice_: Annotated[
        list[str] | None,
        typer.Option("--slice", metavar="COLUMN", help="Measure each value of a column, label, or caption-length too."),
    ] = None,
    merge_captions: Annotated[
        bool, typer.Option("--merge-captions", help="Equal captions are one sentence with several right pictures.")
    ] = False,
    prompt: Annotated[
        list[str] | None,
        typer.Option(
            help="Sentence for a class, with {name} in it; several are averaged.", show_default="a photo of a {name}."
        ),
    ] = None,
    templates: Annotated[Path | None, typer.Option(help="A file of such sentences, one a line.")] = None,
    index: Annotated[
        list[str] | None,
        typer.Option(
            "--index",
            metavar="KIND",
            help="Measure retrieval through a FAISS index too: a factory string, auto for what an index folder of as "
            "many rows would have, or exact; may be repeated.",
        ),
    ] = None,
    json: JsonOption = False,
    format_: Annotated[
        Format | None, typer.Option("--format", help="clip-benchmark: the JSON that CLIP_benchmark writes.")
    ] = None,
    html: Annotated[Path | None, typer.Option(help="Write a page with curves, and the best and worst queries.")] = None,
    open_: Annotated[bool, typer.Option("--open", help="Show that page in the browser.")] = False,
    runs: Annotated[
        Path | None,
        typer.Option(help="Write the 100 best of each query in TREC's run format; the right ones to FILE.qrels."),
    ] = None,
    no_cache: Annotated[
        bool, typer.Option("--no-cache", help="Encode everything anew, and keep nothing for the next time.")
    ] = False,
    model: ModelOption = None,
    device: DeviceOption = "cpu",
    threads: ThreadsOption = None,
    preprocess: PreprocessOption = None,
    precision: PrecisionOption = RunPrecision.auto,
) -> None:
    """Measure a model on pictures with known captions or labels, with intervals, and against another model."""
    from retrieval import evaluation
    from retrieval.encoders import BUILTIN, load_encoder
    from retrieval.pairs import read_pairs

    if runs and task is Task.classification:
        raise typer.BadParameter("a run lists what was retrieved: it is for --task retrieval", param_hint="--runs")
    if index and task is Task.classification:
        raise typer.BadParameter("an index is searched: it is for --task retrieval", param_hint="--index")
    beside = pairs / "zeroshot_classification_templates.txt"  # in CLIP_benchmark's layout
    if task is Task.classification and not prompt and not templates and beside.is_file():
        templates = beside
        render.note(f"taking the prompts of {beside}")
    prompts = [*(prompt or []), *(_template_lines(templates) if templates else [])]
    for text in prompts:
        if not any(placeholder in text for placeholder in evaluation.PLACEHOLDERS):
            raise typer.BadParameter(f"{text!r} has no {{name}} in it", param_hint="--prompt")
    records = read_pairs(pairs, None if split == "all" else split, prefer=None if split else "test", images=images)
    if split is None and all(record.split == "test" for record in records):
        split = "test"
        render.note("evaluating the test split; --split all takes every row")
    settings = evaluation.Settings(
        ks=k or (),
        bootstrap=bootstrap,
        ties=ties.value,
        slices=slice_ or (),
        merge_captions=merge_captions,
        prompts=prompts or (evaluation.PROMPT,),
        indexes=index or (),
        cached=not no_cache,
    )
    encoder = load_encoder(
        model or BUILTIN, device=device, threads=threads, preprocess=preprocess, precision=precision.value
    )
    other = load_encoder(compare, device=device, threads=threads) if compare else None
    measure = evaluation.classify if task is Task.classification else evaluation.evaluate
    with render.progress("encoding", "images") as advance:
        result = measure(encoder, records, settings, other=other, progress=advance)
    if html or open_:
        from retrieval.report import write_evaluation_page

        show_page(write_evaluation_page(result, html), open_)
    if runs:
        evaluation.write_lines(evaluation.trec_run(result), runs)
        evaluation.write_lines(evaluation.trec_qrels(result), runs.with_name(runs.name + ".qrels"))
        render.note(f"wrote {runs}, and {runs}.qrels")
    if format_ is Format.clip_benchmark:
        render.json_out(evaluation.clip_benchmark_result(result, evaluation.dataset_name(pairs)))
    elif json:
        render.json_out({"data": str(pairs), "split": split or "all", **result.to_json()})
    else:
        render.evaluation(result)


def _template_lines(file: Path) -> list[str]:
    from retrieval.errors import UsageError

    try:
        lines = [line.strip() for line in file.read_text("utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{file} cannot be read as lines of text: {error}") from error
    return [line for line in lines if line]


def _lines(file: typer.FileText | None) -> list[str]:
    from retrieval.errors import DataError

    try:
        return [line.rstrip("\n") for line in file or []]
    except UnicodeDecodeError as error:
        raise DataError(f"{getattr(file, 'name', 'the file')} is not UTF-8 text: one sentence a line") from error
