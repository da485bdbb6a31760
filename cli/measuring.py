"""evaluate and encode: a model, without an index."""

from __future__ import annotations

from pathlib import Path
from typing import IO, TYPE_CHECKING

import click

from cli import render
from cli.app import PATH, device_option, json_option, model_option, preprocess_option, show_page, threads_option

if TYPE_CHECKING:
    from retrieval.ranks import Ties


@click.command("encode")
@click.argument("images", type=PATH, nargs=-1, metavar="IMAGE...", help="Pictures to encode.")
@click.option("--text", multiple=True, help="A sentence to encode.")
@click.option(
    "--texts", type=click.File("r", encoding="utf-8"), help="A file of sentences, one a line; - is standard input."
)
@click.option("--output", "-o", type=PATH, default=Path("vectors.npy"), help="The .npy file to write.")
@model_option
@device_option
@threads_option
@preprocess_option
def encode(
    images: tuple[Path, ...],
    text: tuple[str, ...],
    texts: IO[str] | None,
    output: Path,
    model: str | None,
    device: str,
    threads: int | None,
    preprocess: str | None,
) -> None:
    """Write the unit vectors of pictures or sentences to a .npy file: float32, one row each, in order."""
    import numpy as np

    from retrieval.embedding import encode_pictures
    from retrieval.encoders import BUILTIN, load_encoder

    sentences = [*text, *_lines(texts)]
    if bool(images) == bool(sentences):
        raise click.BadParameter("give pictures or sentences: one kind at a time, at least one")
    encoder = load_encoder(model or BUILTIN, device=device, threads=threads, preprocess=preprocess)
    if images:
        with render.progress("encoding", "images") as advance:
            vectors = encode_pictures(encoder, images, progress=advance)
    else:
        vectors = encoder.encode_texts(sentences)
    with output.open("wb") as file:
        np.save(file, vectors)
    render.note(f"wrote {output}: {vectors.shape[0]} vectors of {vectors.shape[1]} numbers")


@click.command("evaluate")
@click.argument(
    "pairs",
    type=PATH,
    help="JSONL, CSV, TSV or Parquet; Karpathy's or COCO's JSON; Flickr's captions.txt or token file; webdataset tars; "
    "a folder of a.jpg + a.txt, or of one folder for each class.",
)
@click.option(
    "--task",
    type=click.Choice(["retrieval", "classification"]),
    default="retrieval",
    help="hit@k between pictures and captions, or zero-shot top-k of labels.",
)
@click.option("--split", help='Only this split; "all" for every row. Default: test where there is one.')
@click.option("--images", type=PATH, help="Where the pictures are, if not beside PAIRS.")
@click.option(
    "-k", type=click.IntRange(min=1), multiple=True, show_default="1 5 10", help="A k of hit@k; may be repeated."
)
@click.option(
    "--ties",
    type=click.Choice(["pessimistic", "mean"]),
    default="pessimistic",
    help="Where a right answer stands among wrong ones of the same score.",
)
@click.option("--bootstrap", type=click.IntRange(min=0), default=1000, help="Draws for the 95 % intervals; 0 for none.")
@click.option("--compare", metavar="MODEL", help="A second model: differences, with paired intervals.")
@click.option(
    "--slice",
    "slice_",
    multiple=True,
    metavar="COLUMN",
    help="Measure each value of a column, label, or caption-length too.",
)
@click.option("--merge-captions", is_flag=True, help="Equal captions are one sentence with several right pictures.")
@click.option(
    "--prompt",
    multiple=True,
    show_default="a photo of a {name}.",
    help="Sentence for a class, with {name} in it; several are averaged.",
)
@click.option("--templates", type=PATH, help="A file of such sentences, one a line.")
@click.option(
    "--index",
    multiple=True,
    metavar="KIND",
    help="Measure retrieval through a FAISS index too: a factory string, auto for what an index folder of "
    "as many rows would have, or exact; may be repeated.",
)
@json_option
@click.option(
    "--format",
    "format_",
    type=click.Choice(["clip-benchmark"]),
    help="clip-benchmark: the JSON that CLIP_benchmark writes.",
)
@click.option("--html", type=PATH, help="Write a page with curves, and the best and worst queries.")
@click.option("--open", "open_", is_flag=True, help="Show that page in the browser.")
@click.option(
    "--runs", type=PATH, help="Write the 100 best of each query in TREC's run format; the right ones to FILE.qrels."
)
@click.option("--no-cache", is_flag=True, help="Encode everything anew, and keep nothing for the next time.")
@model_option
@device_option
@threads_option
@preprocess_option
def evaluate(
    pairs: Path,
    task: str,
    split: str | None,
    images: Path | None,
    k: tuple[int, ...],
    ties: Ties,
    bootstrap: int,
    compare: str | None,
    slice_: tuple[str, ...],
    merge_captions: bool,
    prompt: tuple[str, ...],
    templates: Path | None,
    index: tuple[str, ...],
    json: bool,
    format_: str | None,
    html: Path | None,
    open_: bool,
    runs: Path | None,
    no_cache: bool,
    model: str | None,
    device: str,
    threads: int | None,
    preprocess: str | None,
) -> None:
    """Measure a model on pictures with known captions or labels, with intervals, and against another model."""
    from retrieval import evaluation
    from retrieval.encoders import BUILTIN, load_encoder
    from retrieval.pairs import read_pairs

    if runs and task == "classification":
        raise click.BadParameter("a run lists what was retrieved: it is for --task retrieval", param_hint="--runs")
    if index and task == "classification":
        raise click.BadParameter("an index is searched: it is for --task retrieval", param_hint="--index")
    beside = pairs / "zeroshot_classification_templates.txt"  # in CLIP_benchmark's layout
    if task == "classification" and not prompt and not templates and beside.is_file():
        templates = beside
        render.note(f"taking the prompts of {beside}")
    prompts = [*prompt, *(_template_lines(templates) if templates else [])]
    for text in prompts:
        if not any(placeholder in text for placeholder in evaluation.PLACEHOLDERS):
            raise click.BadParameter(f"{text!r} has no {{name}} in it", param_hint="--prompt")
    records = read_pairs(pairs, None if split == "all" else split, prefer=None if split else "test", images=images)
    if split is None and all(record.split == "test" for record in records):
        split = "test"
        render.note("evaluating the test split; --split all takes every row")
    settings = evaluation.Settings(
        ks=k,
        bootstrap=bootstrap,
        ties=ties,
        slices=slice_,
        merge_captions=merge_captions,
        prompts=prompts or (evaluation.PROMPT,),
        indexes=index,
        cached=not no_cache,
    )
    encoder = load_encoder(model or BUILTIN, device=device, threads=threads, preprocess=preprocess)
    other = load_encoder(compare, device=device, threads=threads) if compare else None
    measure = evaluation.classify if task == "classification" else evaluation.evaluate
    with render.progress("encoding", "images") as advance:
        result = measure(encoder, records, settings, other=other, progress=advance)
    if html or open_:
        from retrieval.report import write_evaluation_page

        show_page(write_evaluation_page(result, html), open_)
    if runs:
        evaluation.write_lines(evaluation.trec_run(result), runs)
        evaluation.write_lines(evaluation.trec_qrels(result), runs.with_name(runs.name + ".qrels"))
        render.note(f"wrote {runs}, and {runs}.qrels")
    if format_ == "clip-benchmark":
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


def _lines(file: IO[str] | None) -> list[str]:
    from retrieval.errors import DataError

    try:
        return [line.rstrip("\n") for line in file or []]
    except UnicodeDecodeError as error:
        raise DataError(f"{getattr(file, 'name', 'the file')} is not UTF-8 text: one sentence a line") from error
