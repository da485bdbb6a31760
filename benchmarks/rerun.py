"""What a re-run over an unchanged folder costs, beside the least that anybody must do: list it, and stat its files.

python -m benchmarks.rerun [--files 100000] [--folders 1000] [--repetitions 9]

The tree is made of tiny files, and its index of rows with random vectors: nothing is encoded. Each side runs in a
process of its own, by turns, with everything imported and the file cache warm; ratios are medians over the turns. The
last row is the whole command in a new process, start-up included.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks.ranking import judged, median, peak, ratio
from benchmarks.startup import DIPTYCH
from benchmarks.table import machine, write_section

ROOT = Path(__file__).parents[1]
DIM = 512
BAR = 2.0  # times the walk


def walk(folder: Path) -> int:
    """Every file's size and time, as tightly as Python can ask for them."""
    waiting, files = [str(folder)], 0
    while waiting:
        with os.scandir(waiting.pop()) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    waiting.append(entry.path)
                else:
                    entry.stat()
                    files += 1
    return files


def rerun(folder: Path) -> int:
    from retrieval.library import Library

    report = Library.open(folder).index()
    assert report.added == report.changed == report.renamed == report.deleted == 0
    return report.skipped


def command(folder: Path) -> int:
    done = subprocess.run(
        [sys.executable, "-c", DIPTYCH, "index", str(folder), "--json"], cwd=ROOT, capture_output=True, check=True
    )
    return int(json.loads(done.stdout)["skipped"])


SIDES: dict[str, tuple[str, Callable[[Path], int]]] = {
    "walk": ("`os.scandir` and `stat` alone", walk),
    "rerun": ("`Library.open(folder).index()`", rerun),
    "command": ("`diptych index FOLDER`, a new process", command),
}


def make(folder: Path, files: int, folders: int) -> None:
    """A tree of tiny files, 20 years of so many albums, and its index; every tenth row has been deleted before."""
    import numpy as np
    import pyarrow as pa

    from indexes.store import ModelRef, Store
    from retrieval.folder import scan

    for i in range(folders):
        album = folder / str(2004 + i % 20) / f"album {i:05}"
        album.mkdir(parents=True)
        for j in range(i, files, folders):
            (album / f"IMG_{j:06}.jpg").write_bytes(b"%d" % j)
    random = np.random.default_rng(0)
    found = list(scan(folder))
    gone = len(found) // 10
    rows = {
        "path": [file.path for file in found] + [f"gone/{i}.jpg" for i in range(gone)],
        "size": [file.size for file in found] + [1] * gone,
        "mtime_ns": [file.mtime_ns for file in found] + [1] * gone,
        "hash": [random.bytes(32).hex() for _ in range(len(found) + gone)],
    }
    store = Store.create(folder / ".diptych", None, ModelRef("random", "00", DIM))
    with store.write() as writer:
        ids = writer.add_many(pa.table(rows), random.standard_normal((len(rows["path"]), DIM), dtype=np.float32))
    if store.index_is_stale():  # as after a first run
        store.rebuild_index()
    with store.write() as writer:
        for row_id in ids[len(found) :].tolist():
            writer.remove(row_id)


def run(side: str, small: Path, large: Path, files: int) -> None:
    """Print what it costs, as JSON."""
    function = SIDES[side][1]
    function(small)  # imports and starts threads
    before, wall, times = peak(), time.perf_counter(), os.times()
    assert function(large) >= files
    wall, after = time.perf_counter() - wall, os.times()
    print(json.dumps({"cpu": sum(after[:4]) - sum(times[:4]), "wall": wall, "mb": peak() - before}))


def child(*arguments: object) -> dict[str, float]:
    """Do it in a new process. This one stays small: a child inherits its peak."""
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.rerun", "--child", *map(str, arguments)],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    if done.returncode:
        sys.exit(f"{arguments} failed:\n{done.stderr}")
    return json.loads(done.stdout) if done.stdout else {}


def main(files: int, folders: int, repetitions: int) -> None:
    runs: dict[str, list[dict]] = {side: [] for side in SIDES}
    with tempfile.TemporaryDirectory() as scratch:
        small, large = Path(scratch) / "small", Path(scratch) / "large"
        child("make", small, 100, 10)
        child("make", large, files, folders)
        for turn in range(repetitions + 1):
            for side in SIDES:
                result = child(side, small, large, files)
                print(turn or "warm", side, result, flush=True)
                if turn:
                    runs[side].append(result)
    spread = sorted(a["wall"] / b["wall"] for a, b in zip(runs["rerun"], runs["walk"], strict=True))
    wall, cpu = (ratio(runs, "rerun", "walk", key) for key in ("wall", "cpu"))
    write_section(
        "A re-run over an unchanged folder",
        f"`python -m benchmarks.rerun --files {files} --folders {folders}` on {machine()}: files in {folders:,} "
        f"folders, a warm file cache, {DIM}-d rows and a tenth as many deleted ones; medians of {repetitions} turns, a "
        "process each; memory is what is needed beyond the imports.\n\n"
        f"{wall:.2f} times ({spread[0]:.2f} to {spread[-1]:.2f}) the wall clock of the walk alone (bar {BAR:g}: "
        f"{judged(wall, BAR)}), {cpu:.2f} times its CPU; "
        f"{statistics.median(1e6 * one['wall'] / files for one in runs['rerun']):.1f} microseconds a file.",
        ("files", "what", "wall s", "CPU s", "MB"),
        [
            (
                f"{files:,}",
                SIDES[side][0],
                *(f"{median(some, key):.2f}" for key in ("wall", "cpu")),
                f"{median(some, 'mb'):.0f}" if side != "command" else "",
            )
            for side, some in runs.items()
        ],
    )


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        if sys.argv[2] == "make":
            make(Path(sys.argv[3]), *map(int, sys.argv[4:6]))
        else:
            run(sys.argv[2], Path(sys.argv[3]), Path(sys.argv[4]), int(sys.argv[5]))
    else:
        parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
        parser.add_argument("--files", type=int, default=100_000)
        parser.add_argument("--folders", type=int, default=1_000)
        parser.add_argument("--repetitions", type=int, default=9)
        options = parser.parse_args()
        main(options.files, options.folders, options.repetitions)
