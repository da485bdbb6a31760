"""train: contrastive training into a bundle."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cli import render
from cli.app import JsonOption, app


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
