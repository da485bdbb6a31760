"""The command line: parse, call, print. Everything that is known about pictures and vectors lies below."""

from __future__ import annotations

import math
import os
import sys
from dataclasses import asdict
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from cli import render
from indexes.errors import DiptychError, StoreError, StoreNotFound

if TYPE_CHECKING:
    from retrieval.library import Library, Term

USER_ERROR, WITH_FAILURES, INTERRUPTED = 1, 3, 130  # 0 is success, 2 is typer's for wrong usage

app = typer.Typer(
    name="diptych",
    help="Make a folder of photos searchable by sentence, measure the retriever, train a better one.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
models_app = typer.Typer(help="List, import and export models.", no_args_is_help=True)
app.add_typer(models_app, name="models")

IndexOption = Annotated[
    Path | None, typer.Option("--index", help="The index itself, where it does not lie in FOLDER/.diptych.")
]
ModelOption = Annotated[
    str | None,
    typer.Option(
        "--model",
        help="builtin, an imported name, a bundle's folder, or open_clip's NAME/PRETRAINED, hf-hub:…, local-dir:….",
    ),
]
DeviceOption = Annotated[str, typer.Option(help="cpu, cuda, …; bundles run on the CPU.")]
ThreadsOption = Annotated[
    int | None, typer.Option(min=1, help="Threads of the model; default: all this process may use.")
]
PreprocessOption = Annotated[
    str | None,
    typer.Option(help="Only for a bare checkpoint: the open_clip tag it was trained like, or a JSON file."),
]
JsonOption = Annotated[bool, typer.Option("--json", help="JSON on standard output.")]


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


class Precision(str, Enum):
    """Of stored weights."""

    fp32 = "fp32"
    fp16 = "fp16"


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


@app.command()
def index(
    folder: Annotated[Path, typer.Argument(help="The folder of photos.")] = Path(),
    index: IndexOption = None,
    model: ModelOption = None,
    device: DeviceOption = "cpu",
    threads: ThreadsOption = None,
    preprocess: PreprocessOption = None,
    max_megapixels: Annotated[
        float | None, typer.Option(min=0.01, help="Larger pictures count as failures.", show_default="128")
    ] = None,
    json: JsonOption = False,
) -> None:
    """Embed a folder of photos, once; later runs take in only what was added, changed, renamed or deleted."""
    from retrieval.images import MAX_PIXELS

    max_pixels = MAX_PIXELS if max_megapixels is None else int(max_megapixels * 1e6)
    library, created = _open_or_create(folder, index, model, device=device, threads=threads, preprocess=preprocess)
    below = library.below(folder)
    if below:
        render.note(f"{folder} belongs to the index of {library.root}: taking in this part of it")
    with render.progress("indexing", "images") as advance:
        report = library.index(below, progress=advance, max_pixels=max_pixels, wait=_LOCK_SECONDS)
    failures = [{"path": str(library.root / f.path), "reason": f.reason} for f in report.failures]
    if json:
        render.json_out({**asdict(report), "failures": failures})
    else:
        render.index_report(report, library, created)
    if report.failures:
        raise typer.Exit(WITH_FAILURES)


_LOCK_SECONDS = 2.0


@app.command()
def search(
    query: Annotated[
        list[str] | None,
        typer.Argument(metavar="QUERY...", help='What the picture shows; several are added up, "2:word" counts twice.'),
    ] = None,
    like: Annotated[list[Path] | None, typer.Option("--like", help="A picture to search with.")] = None,
    avoid: Annotated[list[str] | None, typer.Option("--not", help="What the picture should not show.")] = None,
    top: Annotated[int, typer.Option("--top", "-t", min=1, help="How many results.")] = 10,
    threshold: Annotated[float, typer.Option(help="Only pictures with at least this score (a cosine).")] = -1.0,
    folder: Annotated[Path, typer.Option("--folder", "-C", help="Search as if started in this folder.")] = Path(),
    all_: Annotated[
        bool, typer.Option("--all", help="The whole index, not only this folder and those below it.")
    ] = False,
    filepath_only: Annotated[bool, typer.Option("--filepath-only", "-f", help="One path a line.")] = False,
    no_indexing: Annotated[bool, typer.Option("--no-indexing", "-n", help="Do not look for new photos first.")] = False,
    json: JsonOption = False,
    html: Annotated[Path | None, typer.Option(help="Write a page with the pictures found.")] = None,
    open_: Annotated[bool, typer.Option("--open", help="Show the pictures found in the browser.")] = False,
    index: IndexOption = None,
    model: ModelOption = None,
    device: DeviceOption = "cpu",
    threads: ThreadsOption = None,
    preprocess: PreprocessOption = None,
) -> None:
    """Find photos by sentence, by example, or both. Scores are cosines."""
    if math.isnan(threshold):
        raise typer.BadParameter("it must be a number", param_hint="--threshold")
    terms = _terms(query or [], like or [], avoid or [])
    library = _open(folder, index, model, device=device, threads=threads, preprocess=preprocess)
    if not no_indexing:
        _catch_up(library)
    below = "" if all_ else library.below(folder)
    matches = library.search(terms, top, below=below, threshold=threshold)
    if html or open_:
        from retrieval.report import write_results_page

        _show(write_results_page([(render.describe(terms), matches)], html), open_)
    if json:
        render.json_out([render.match_fields(match) for match in matches])
    elif filepath_only:
        render.paths(matches)
    elif not html and not open_:
        render.matches(matches)
    if not matches and not json:
        render.note("nothing found" + ("" if len(library.store) else f": {library.root} has no pictures in its index"))


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
) -> None:
    """Write the unit vectors of pictures or sentences to a .npy file: float32, one row each, in order."""
    import numpy as np

    from retrieval.embedding import encode_pictures
    from retrieval.encoders import BUILTIN, load_encoder

    sentences = [*(text or []), *_lines(texts)]
    if bool(images) == bool(sentences):
        raise typer.BadParameter("give pictures or sentences: one kind at a time, at least one")
    encoder = load_encoder(model or BUILTIN, device=device, threads=threads, preprocess=preprocess)
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
) -> None:
    """Measure a model on pictures with known captions or labels, with intervals, and against another model."""
    from retrieval import evaluation
    from retrieval.encoders import BUILTIN, load_encoder
    from retrieval.pairs import read_pairs

    if runs and task is Task.classification:
        raise typer.BadParameter("a run lists what was retrieved: it is for --task retrieval", param_hint="--runs")
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
        cached=not no_cache,
    )
    encoder = load_encoder(model or BUILTIN, device=device, threads=threads, preprocess=preprocess)
    other = load_encoder(compare, device=device, threads=threads) if compare else None
    measure = evaluation.classify if task is Task.classification else evaluation.evaluate
    with render.progress("encoding", "images") as advance:
        result = measure(encoder, records, settings, other=other, progress=advance)
    if html or open_:
        from retrieval.report import write_evaluation_page

        _show(write_evaluation_page(result, html), open_)
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


def _show(page: Path, in_browser: bool) -> None:
    if in_browser:
        typer.launch(page.absolute().as_uri())
    else:
        render.note(f"wrote {page}")


@app.command()
def train(
    pairs: Annotated[
        list[Path] | None,
        typer.Argument(metavar="PAIRS...", help="Pictures with captions or labels: whatever `evaluate` reads."),
    ] = None,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder to make: the run, and the trained model.")
    ] = Path("run"),
    model: Annotated[
        str,
        typer.Option(
            help="What to train further: a bundle or an open_clip model; or from random weights: scratch:ViT-B-32, "
            "scratch:cnn-lstm (small)."
        ),
    ] = "builtin",
    word_vectors: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="What scratch:cnn-lstm's words begin with: word2vec's or GloVe's vectors."),
    ] = None,
    config: Annotated[Path | None, typer.Option(help="A recipe (TOML) instead of PAIRS and the options below.")] = None,
    resume: Annotated[
        Path | None, typer.Option(metavar="RUN", help="Go on with a run that was ended, and with nothing else.")
    ] = None,
    data: Annotated[Path | None, typer.Option(help="The folder that a recipe's paths are relative to.")] = None,
    epochs: Annotated[float | None, typer.Option(min=0.001, help="Passes over the data.")] = None,
    learning_rate: Annotated[float | None, typer.Option("--lr", min=0.0, help="Peak learning rate.")] = None,
    batch_size: Annotated[int | None, typer.Option(min=2, help="Pairs a step.")] = None,
    train: Annotated[
        str | None,
        typer.Option(
            help="What learns: heads, all, last-N blocks, image or text (the other tower locked), lora.",
            show_default="heads",
        ),
    ] = None,
    objective: Annotated[
        str | None, typer.Option(help="infonce, sigmoid, triplet, multi-positive, …", show_default="infonce")
    ] = None,
    teacher: Annotated[
        str | None, typer.Option(metavar="MODEL", help="A model whose similarities are learnt too (distillation).")
    ] = None,
    unlabelled: Annotated[
        list[Path] | None,
        typer.Option(metavar="PATH", help="Pictures to learn from without captions: a folder of them, or pairs."),
    ] = None,
    guard: Annotated[
        list[Path] | None,
        typer.Option(help="Pairs (or, with labels alone, classes) on which the model must not get worse."),
    ] = None,
    max_loss: Annotated[
        float | None, typer.Option(min=0.0, help="How far a score of the guard may fall.", show_default="0.01")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Of every random number.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, …")] = None,
    amp: Annotated[
        str | None,
        typer.Option(help="Arithmetic of towers that learn: auto (bf16 on a GPU, else fp32), fp32, bf16, fp16."),
    ] = None,
    json: JsonOption = False,
) -> None:
    """Train a bundle further on your own pairs, contrastively; the result is a bundle. A kill costs two minutes."""
    try:
        from retrieval.training import config as recipes
        from retrieval.training import distributed, loop
    except ImportError as error:
        if (error.name or "").split(".")[0] != "torch":
            raise
        from retrieval.errors import MissingExtra

        raise MissingExtra("training", "'diptych[torch]'") from error
    if sum(map(bool, (pairs, config, resume))) != 1:
        raise typer.BadParameter("give PAIRS, or a recipe with --config, or a run to --resume")
    changes = {
        "word_vectors": str(word_vectors.absolute()) if word_vectors else None,
        "epochs": epochs,
        "learning_rate": learning_rate,
        "batch_size": batch_size,
        "train": train,
        "objective": objective,
        "teacher": teacher,
        "unlabelled": recipes.unlabelled(unlabelled) if unlabelled else None,
        "guard": recipes.guards(guard) if guard else None,
        "max_loss": max_loss,
        "seed": seed,
        "device": device,
        "amp": amp,
    }
    changes = {key: value for key, value in changes.items() if value is not None}
    if resume and changes:
        raise typer.BadParameter(f"a run goes on as it began: leave out {', '.join(changes)}", param_hint="--resume")
    with distributed.one_voice(), render.progress("training", "steps") as advance:
        if resume:
            output, result = resume, loop.resume(resume, progress=advance, note=render.note)
        else:
            settings = recipes.load_config(config, data) if config else recipes.config_for(pairs or [], model)
            settings = recipes.with_changes(settings, changes)
            result = loop.train(settings, output, progress=advance, note=render.note)
    if not distributed.is_first():
        return
    if json:
        render.json_out({"model": str(output), "metrics": result})
    else:
        render.metrics(result, f"trained into {output}")


@app.command()
def info(
    folder: Annotated[Path, typer.Argument(help="A folder covered by an index.")] = Path(),
    index: IndexOption = None,
    check: Annotated[
        bool, typer.Option("--check", help="Recompute every checksum, of the index and of its model.")
    ] = False,
    json: JsonOption = False,
) -> None:
    """Show what an index holds and what it was made with."""
    from retrieval.library import Library, describe

    library = Library.open(folder, index=index)
    facts = describe(library)
    problems = library.check() if check else None
    if json:
        render.json_out({**facts, **({} if problems is None else {"problems": problems})})
    else:
        render.facts(facts)
        if problems is not None:
            render.problems(problems)
    if problems:
        raise typer.Exit(USER_ERROR)


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
    precision: Annotated[Precision, typer.Option(help="Of the stored weights.")] = Precision.fp32,
    preprocess: PreprocessOption = None,
) -> None:
    """Write a model as a bundle: ONNX, tokenizer and preprocessing in one folder that needs no torch."""
    from retrieval.encoders import export_bundle

    bundle = export_bundle(model, output, precision.value, preprocess)
    render.note(f"wrote {bundle.path}: use it with  --model {bundle.path}")


def _lines(file: typer.FileText | None) -> list[str]:
    from retrieval.errors import DataError

    try:
        return [line.rstrip("\n") for line in file or []]
    except UnicodeDecodeError as error:
        raise DataError(f"{getattr(file, 'name', 'the file')} is not UTF-8 text: one sentence a line") from error


def _terms(query: list[str], like: list[Path], avoid: list[str]) -> list[Term]:
    from retrieval.errors import UsageError
    from retrieval.library import Term

    terms = [Term.parse(text) for text in query]
    terms += [Term(image=path) for path in like]
    if not terms:
        raise UsageError('the query is empty: say what the picture shows, as in  diptych search "a dog in the snow"')
    return terms + [Term.parse(text, sign=-1.0) for text in avoid]


def _open(folder: Path, index: Path | None, model: str | None, **loading: Any) -> Library:
    from retrieval.encoders import load_encoder
    from retrieval.errors import UsageError
    from retrieval.library import Library

    if not folder.expanduser().is_dir():
        raise UsageError(f"{folder} is not a folder" if folder.exists() else f"there is no folder {folder}")
    encoder = load_encoder(model, **loading) if model else None
    return Library.open(folder, index=index, encoder=encoder, **loading)


def _open_or_create(folder: Path, index: Path | None, model: str | None, **loading: Any) -> tuple[Library, bool]:
    from retrieval.encoders import BUILTIN
    from retrieval.library import Library

    try:
        return _open(folder, index, model, **loading), False
    except StoreNotFound:
        return Library.create(folder, index=index, model=model or BUILTIN, **loading), True


def _catch_up(library: Library) -> None:
    """Take in what changed if that is quick; say so when it is not. Never a reason to answer nothing."""
    try:
        with render.progress("indexing", "images") as advance:
            left = library.catch_up(advance)
    except (StoreError, DiptychError) as error:
        render.note(f"searching the index as it is: {error}")
        return
    if left:
        render.note(f"{left:,} files have changed since the last run: take them in with  diptych index {library.root}")


def run() -> NoReturn:
    """Entry point: the exit codes, and the one plain line of every mistake."""
    # Closed by the caller (>&-): what is opened next would take its place and get what is printed.
    sys.stdout, sys.stderr = (stream or Path(os.devnull).open("w") for stream in (sys.stdout, sys.stderr))  # noqa: SIM115
    code: object = 0
    try:
        app()
    except DiptychError as error:
        code = _complain(str(error))
    except OSError as error:  # of the place it runs in: a full disk, a name too long, a folder that may not be entered
        where = f"{os.fsdecode(error.filename)}: " if isinstance(error.filename, (str, bytes)) else ""
        code = _complain(where + (error.strerror or str(error)))
    except RuntimeError as error:
        if "home directory" not in str(error):
            raise
        code = _complain("a path begins with ~ and the name of a user who is not known here")
    except KeyboardInterrupt:
        code = INTERRUPTED
    except SystemExit as leaving:
        code = leaving.code
    if code == INTERRUPTED:
        render.note("interrupted; everything finished so far is kept")
    sys.exit(_flushed(code))  # type: ignore[arg-type]


def _flushed(code: object) -> object:
    """Send off what is still buffered; else Python would do it after us, and complain in its own words."""
    if sys.__stdout__ is None:
        return code
    try:
        sys.__stdout__.flush()
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.__stdout__.fileno())
        if not isinstance(error, BrokenPipeError):  # the reader, `head` for one, has seen enough
            return _complain(error.strerror or str(error))
    return code


def _complain(reason: str) -> int:
    render.note(f"diptych: {reason}")
    return USER_ERROR
