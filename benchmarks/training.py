"""How fast towers learn, beside open_clip's own training of the same model on the same photos.

python -m benchmarks.training [--pictures FOLDER] [--peers-python PYTHON] [--repetitions 3] [--quick]

Both run as a user runs them: `retrieval.training.loop.train`, and `open_clip_train.main.main` with its arguments, each
in a process of its own, by turns; ratios are medians over the turns. Clocks are read at the end of each step, ours
through its report of progress, open_clip's as it asks for the next learning rate. The first steps do not count, nor
does what comes before them, which is told apart: ours decodes all pictures once and holds them, as far as
`in_memory_gb` allows; open_clip decodes at every visit, in worker processes, whose CPU time counts. Runs are ended
within their first epoch, before any checkpoint of either.

open_clip_train comes with open_clip_torch, and needs braceexpand, pandas and webdataset beside it.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.table import machine, write_section

ROOT = Path(__file__).parents[1]
NOT_INSTALLED = 3  # exit status
WARM, STEPS = 2, 6  # steps that do not count, and that do
EPOCHS = 1000  # of which a run sees the beginning
THREADS, WORKERS = 2, 2
PICTURE = (500, 375)  # of generated ones
BAR = 1.0  # of samples a second, ours by open_clip's

TINY_TEXT = {"context_length": 77, "vocab_size": 49408, "width": 192, "heads": 3, "layers": 4}
MODELS: dict[str, tuple[int, dict[str, Any]]] = {  # batch, description
    "small ViT at 96": (
        32,
        {
            "embed_dim": 192,
            "vision_cfg": {"image_size": 96, "layers": 6, "width": 192, "head_width": 64, "patch_size": 16},
            "text_cfg": TINY_TEXT,
        },
    ),
    "RN50 at 96": (
        16,
        {
            "embed_dim": 1024,
            "vision_cfg": {"image_size": 96, "layers": [3, 4, 6, 3], "width": 64, "patch_size": None},
            "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 512, "heads": 8, "layers": 12},
        },
    ),
}
CONTENDERS = {"held": "ours, pictures held", "streamed": "ours, decoded at every visit", "peer": "open_clip_train"}


class Enough(Exception):
    """All steps that count are done."""


class Watch:
    """Looks at the clocks at the end of every step."""

    def __init__(self) -> None:
        self.begun, self.seen = time.perf_counter(), []

    def __call__(self, *_: object) -> None:
        self.seen.append((time.perf_counter(), cpu()))
        if len(self.seen) > WARM + STEPS:
            raise Enough

    def result(self, batch: int) -> dict[str, float]:
        (wall, spent), (last, all_spent) = self.seen[WARM], self.seen[-1]
        pairs = batch * STEPS
        return {
            "rate": pairs / (last - wall),
            "cpu": 1000 * (all_spent - spent) / pairs,
            "start": self.seen[0][0] - self.begun,
        }


def cpu() -> float:
    """Seconds of processor time, of this process and of those that load pictures for it."""
    ticks = 0
    for process in multiprocessing.active_children():
        fields = Path(f"/proc/{process.pid}/stat").read_text("ascii").rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return time.process_time() + ticks / os.sysconf("SC_CLK_TCK")


# ---- contenders ------------------------------------------------------------------------------------------------------


def ours(folder: Path, batch: int, device: str, watch: Watch, in_memory: float) -> None:
    from retrieval.training.config import Source, TrainConfig
    from retrieval.training.loop import train

    config = TrainConfig(
        sources=(Source(str(folder / "pairs.tsv")),),
        model="scratch:benchmark",
        train="all",
        batch_size=batch,
        epochs=EPOCHS,
        device=device,
        amp="fp32",
        in_memory_gb=in_memory,
    )
    pairs = len((folder / "pairs.tsv").read_text("utf-8").splitlines()) - 1

    def progress(_: int, total: int) -> None:
        if total > pairs:  # steps of all epochs, not pictures that are read
            watch()

    train(config, folder / f"run-{os.getpid()}", progress=progress)


def peer(folder: Path, batch: int, device: str, watch: Watch) -> None:
    try:
        from open_clip_train import main
    except ImportError as error:
        print(error, file=sys.stderr)
        sys.exit(NOT_INSTALLED)
    main.cosine_lr = lambda *_: lambda step: step and watch()  # asked as a step begins: the one before has ended
    arguments: dict[str, object] = {
        "model": "benchmark",
        "train-data": folder / "pairs.tsv",
        "dataset-type": "csv",
        "batch-size": batch,
        "epochs": EPOCHS,
        "workers": WORKERS,
        "precision": "fp32",
        "device": device,
        "logs": folder / f"logs-{os.getpid()}",
    }
    main.main([item for name, value in arguments.items() for item in (f"--{name}", str(value))])


def run(folder: Path, name: str, contender: str, device: str) -> None:
    """Print what it took, as JSON."""
    import open_clip
    import torch

    torch.set_num_threads(THREADS)
    batch, description = MODELS[name]
    (folder / "benchmark.json").write_text(json.dumps(description))
    open_clip.add_model_config(folder / "benchmark.json")
    watch = Watch()
    try:
        if contender == "peer":
            peer(folder, batch, device, watch)
        else:
            ours(folder, batch, device, watch, 4.0 if contender == "held" else 0.0)
    except Enough:
        print(json.dumps(watch.result(batch)))


# ---- all of them -----------------------------------------------------------------------------------------------------


def make(folder: Path, pictures: Path | None) -> int:
    """A table of as many pairs as the largest model needs in an epoch; of generated photos where none are given."""
    count = (WARM + STEPS + 2) * max(batch for batch, _ in MODELS.values())
    random = np.random.default_rng(0)
    files = sorted(pictures.absolute().rglob("*.jpg"))[:count] if pictures else []
    if pictures and len(files) < 2:
        sys.exit(f"{pictures} has no photos (*.jpg)")
    for number in range(0 if pictures else count):
        files.append(folder / f"{number}.jpg")
        small = Image.fromarray(random.integers(0, 256, (24, 32, 3), np.uint8))
        small.resize(PICTURE, Image.Resampling.BICUBIC).save(files[-1], quality=90)
    words = ["dog", "house", "red", "river", "two", "people", "on", "a", "under", "old", "bridge", "snow"]
    rows = [f"{files[i % len(files)]}\t{' '.join(random.choice(words, 10))}" for i in range(count)]
    (folder / "pairs.tsv").write_text("\n".join(["filepath\ttitle", *rows]) + "\n", "utf-8")
    return len(files)


def start(python: str, *arguments: object) -> dict | None:
    """Run a contender; None if its package is not installed."""
    command = [python, "-W", "ignore", "-m", "benchmarks.training", "--child", *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(THREADS)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode == NOT_INSTALLED:
        return None
    if done.returncode:
        sys.exit(f"{arguments} failed:\n{done.stderr}")
    result = json.loads(done.stdout.splitlines()[-1])
    print(*arguments[1:], result, flush=True)
    return result


def measure(folder: Path, name: str, device: str, repetitions: int, peers_python: str) -> dict[str, list[dict]]:
    runs: dict[str, list[dict]] = {}
    for turn in range(repetitions):
        order = list(CONTENDERS) if turn % 2 == 0 else list(reversed(CONTENDERS))  # nobody always runs after the same
        for contender in order:
            result = start(peers_python if contender == "peer" else sys.executable, folder, name, contender, device)
            if result is not None:
                runs.setdefault(contender, []).append(result)
    return runs


def ratios(runs: dict[str, list[dict]], one: str, key: str) -> list[float]:
    """Of each turn, by open_clip's run of the same turn."""
    return [a[key] / b[key] for a, b in zip(runs[one], runs["peer"], strict=True)]


def judged(values: list[float]) -> str:
    """A bar is met or missed where all turns agree; else the machine had too much else to do to tell."""
    low, high = min(values), max(values)
    return "met" if low >= BAR else "MISSED" if high < BAR else "NOT DECIDED, turns disagree"


def bars(name: str, runs: dict[str, list[dict]]) -> str:
    if "peer" not in runs:
        return f"{name}: open_clip_train is not installed, or lacks a package."
    found = []
    for one in ("held", "streamed"):
        rates, spent = ratios(runs, one, "rate"), ratios(runs, one, "cpu")
        found.append(
            f"{CONTENDERS[one]}: {statistics.median(rates):.2f} ({min(rates):.2f} to {max(rates):.2f}) times the "
            f"samples a second of open_clip_train at {statistics.median(spent):.2f} ({min(spent):.2f} to "
            f"{max(spent):.2f}) times the CPU (bar {BAR:.0f}, not slower: {judged(rates)})"
        )
    return f"{name}: {'; '.join(found)}."


def spread(runs: list[dict], key: str) -> str:
    values = [run[key] for run in runs]
    return f"{statistics.median(values):.1f} ({min(values):.1f} to {max(values):.1f})"


def main(pictures: Path | None, device: str, peers_python: str, repetitions: int, quick: bool) -> None:
    rows, notes = [], []
    with tempfile.TemporaryDirectory() as scratch:
        count = make(Path(scratch), pictures)
        for name in list(MODELS)[: 1 if quick else None]:
            runs = measure(Path(scratch), name, device, repetitions, peers_python)
            notes.append(bars(name, runs))
            rows += [
                (
                    f"{name}, batch {MODELS[name][0]}",
                    what,
                    *(spread(runs[key], of) for of in ("rate", "cpu", "start")),
                )
                for key, what in CONTENDERS.items()
                if key in runs
            ]
    whose = f"{count} photos of a folder" if pictures else f"{count} generated photos of {PICTURE[0]} × {PICTURE[1]}"
    write_section(
        "Training",
        f"`python -m benchmarks.training{' --quick' if quick else ''}` on {machine()}, device {device}, {THREADS} "
        f"threads, {WORKERS} workers of open_clip's: random weights, all of them learning, fp32, {whose}, each side's "
        f"own augmentation. Means over {STEPS} steps of the first epoch after {WARM}, medians (and ranges) of "
        f"{repetitions} runs by turns. Before the first step ours decodes every picture once.\n\n" + "\n\n".join(notes),
        ("model", "trained by", "samples/s", "CPU ms a sample", "s to the first step's end"),
        rows,
    )


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        run(Path(sys.argv[2]), *sys.argv[3:6])
    else:
        parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
        parser.add_argument("--pictures", type=Path, help="a folder of photos; else they are generated")
        parser.add_argument("--device", default="cpu")
        parser.add_argument(
            "--peers-python", default=sys.executable, help="interpreter with what open_clip_train needs"
        )
        parser.add_argument("--repetitions", type=int, default=3)
        parser.add_argument("--quick", action="store_true", help="only the small model")
        options = parser.parse_args()
        main(options.pictures, options.device, options.peers_python, options.repetitions, options.quick)
