"""train: contrastive training into a bundle."""

from __future__ import annotations

from pathlib import Path

import click

from cli import render
from cli.app import PATH, Number, json_option


@click.command("train")
@click.argument(
    "pairs",
    type=PATH,
    nargs=-1,
    metavar="PAIRS...",
    help="Pictures with captions or labels: whatever `evaluate` reads.",
)
@click.option("--output", "-o", type=PATH, default=Path("run"), help="Folder to make: the run, and the trained model.")
@click.option(
    "--model",
    default="builtin",
    help="What to train further: a bundle or an open_clip model; or from random weights: scratch:ViT-B-32, "
    "scratch:cnn-lstm (small).",
)
@click.option(
    "--word-vectors",
    type=PATH,
    metavar="FILE",
    help="What scratch:cnn-lstm's words begin with: word2vec's or GloVe's vectors.",
)
@click.option("--config", type=PATH, help="A recipe (TOML) instead of PAIRS and the options below.")
@click.option("--resume", type=PATH, metavar="RUN", help="Go on with a run that was ended, and with nothing else.")
@click.option("--data", type=PATH, help="The folder that a recipe's paths are relative to.")
@click.option("--epochs", type=Number(min=0.001), help="Passes over the data.")
@click.option("--lr", "learning_rate", type=Number(min=0.0), help="Peak learning rate.")
@click.option("--batch-size", type=click.IntRange(min=2), help="Pairs a step.")
@click.option(
    "--train",
    show_default="heads",
    help="What learns: heads, all, last-N blocks, image or text (the other tower locked), lora.",
)
@click.option("--objective", show_default="infonce", help="infonce, sigmoid, triplet, multi-positive, …")
@click.option("--teacher", metavar="MODEL", help="A model whose similarities are learnt too (distillation).")
@click.option(
    "--unlabelled",
    type=PATH,
    multiple=True,
    metavar="PATH",
    help="Pictures to learn from without captions: a folder of them, or pairs.",
)
@click.option(
    "--guard",
    type=PATH,
    multiple=True,
    help="Pairs (or, with labels alone, classes) on which the model must not get worse.",
)
@click.option("--max-loss", type=Number(min=0.0), show_default="0.01", help="How far a score of the guard may fall.")
@click.option("--seed", type=int, help="Of every random number.")
@click.option("--device", help="cpu, cuda, …")
@click.option("--amp", help="Arithmetic of towers that learn: auto (bf16 on a GPU, else fp32), fp32, bf16, fp16.")
@json_option
def train(
    pairs: tuple[Path, ...],
    output: Path,
    model: str,
    word_vectors: Path | None,
    config: Path | None,
    resume: Path | None,
    data: Path | None,
    epochs: float | None,
    learning_rate: float | None,
    batch_size: int | None,
    train: str | None,
    objective: str | None,
    teacher: str | None,
    unlabelled: tuple[Path, ...],
    guard: tuple[Path, ...],
    max_loss: float | None,
    seed: int | None,
    device: str | None,
    amp: str | None,
    json: bool,
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
        raise click.BadParameter("give PAIRS, or a recipe with --config, or a run to --resume")
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
        raise click.BadParameter(f"a run goes on as it began: leave out {', '.join(changes)}", param_hint="--resume")
    with distributed.one_voice(), render.progress("training", "steps") as advance:
        if resume:
            output, result = resume, loop.resume(resume, progress=advance, note=render.note)
        else:
            settings = recipes.load_config(config, data) if config else recipes.config_for(list(pairs), model)
            settings = recipes.with_changes(settings, changes)
            result = loop.train(settings, output, progress=advance, note=render.note)
    if not distributed.is_first():
        return
    if json:
        render.json_out({"model": str(output), "metrics": result})
    else:
        render.metrics(result, f"trained into {output}")
