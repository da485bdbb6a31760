"""Cold start: CPU seconds of whole new processes, `diptych search` beside a plain script and rclip.

    python -m benchmarks.startup [--rows 100000 1000000] [--rclip-python PYTHON] [--folder FOLDER] [--repetitions 5]

Every process is started anew, by turns, with a warm file cache and no settings of Python or OpenBLAS inherited; what
counts is user and system time, to the end of the process. The stores hold vectors drawn like CLIP's (see
benchmarks/indexes.py) and say that the built-in model made them; the query is encoded by it.

- The plain script imports torch, open_clip and FAISS, loads ViT-B-32 (random weights, from a file), encodes the query,
  and searches a flat FAISS file of the same vectors.
- rclip runs under an interpreter of its own that has `rclip` and `tokenizers`; its model's session and tokenizer are
  replaced by the built-in model's own files, everything else (command, database, ranking) is rclip's. It gets
  `--no-indexing`, and diptych looks at no folder either: it has more pictures than that is done for.

With --folder, what has been made there is used again, and stays.
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks import indexes
from benchmarks.demo import shipped_photos
from benchmarks.table import machine, write_section

ROOT = Path(__file__).parents[1]
DIPTYCH = "from cli.main import run; run()"
QUERY = "two dogs playing in the snow"
# bars
HELP_S, SEARCH_S, SCRIPT, RCLIP = 0.3, 0.35, 20, {100_000: 2, 1_000_000: 10}

SCRIPT_CODE = """
import sys, faiss, numpy as np, open_clip, torch
weights, index, query = sys.argv[1:]
model, _, _ = open_clip.create_model_and_transforms("ViT-B-32", pretrained=weights)
tokenizer = open_clip.get_tokenizer("ViT-B-32")
with torch.no_grad():
    vector = model.eval().encode_text(tokenizer([query]), normalize=True).numpy()
scores, rows = faiss.read_index(index).search(vector, 10)
for score, row in zip(scores[0], rows[0]):
    print(score, row)
"""

# The parts of a search, one after the other in a process; each is what the ones before it leave to do.
PARTS = {
    "Python itself": "",
    "typer": "import typer; from cli.main import app",
    "the command, its options read": "typer.main.get_command(app).commands['search'].make_context('search', ['a'])",
    "NumPy": "import numpy",
    "pyarrow, with Parquet": "import pyarrow, pyarrow.parquet",
    "own modules (and Pillow)": "import retrieval.library",
    "opening the index": "library = retrieval.library.Library.open(Path()); library.store.schema",
    "onnxruntime, tokenizers": "import onnxruntime, tokenizers",
    "opening the model, one query": "vector = library.query_vector([retrieval.library.Term(sys.argv[1])])",
    "FAISS": "import faiss",
    "the FAISS file": "library.store.snapshot.covered",
    "search": "library.store.search(vector[None], 10)",
    "search again, and its rows": "library.search(vector)",
}
PARTS_CODE = """
import os, sys, time
from pathlib import Path
from indexes.runtime import let_blas_sleep
let_blas_sleep()
for part in os.environ["PARTS"].split("|"):
    exec(part)
    print(1000 * time.process_time(), flush=True)
os._exit(0)
"""

RCLIP_CODE = """
import sys
from rclip import main, model, model_download
bundle = sys.argv.pop(1)

class Tokenizer:
    def __init__(self, bpe_path):
        import tokenizers
        self.own = tokenizers.Tokenizer.from_file(bundle + "/tokenizer.json")
    def __call__(self, texts):
        return model.np.array([encoding.ids for encoding in self.own.encode_batch(texts)], model.np.int64)

def run_textual(self, tokens):
    session = self._session_text
    return session.run(None, {session.get_inputs()[0].name: tokens})[0]

model.SimpleTokenizer = Tokenizer
model.Model._run_textual = run_textual
model_download.ensure_downloaded = lambda: None
model_download.download_tokenizer_vocab = lambda: None
model_download.download_textual_model = lambda: bundle + "/text.onnx"
main.main()
"""

RCLIP_FILL = """
import sys, numpy as np
from rclip import db
file, root, vectors, paths = sys.argv[1:]
database = db.DB(file)
for path, vector in zip(open(paths).read().splitlines(), np.load(vectors, mmap_mode="r")):
    image = db.NewImage(filepath=f"{root}/{path}", modified_at=0, size=1, vector=vector.tobytes(), hash=path)
    database.upsert_image(image, commit=False)
database.close()
"""


@dataclass
class Process:
    """A command, and what its runs took."""

    name: str
    arguments: list[str]
    cwd: Path
    environment: dict[str, str]
    lines: int = 0  # that it has to print at least

    def __post_init__(self) -> None:
        self.cpu: list[float] = []
        self.wall: list[float] = []

    def run(self) -> None:
        inherited = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "OPENBLAS"))}
        before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
        done = subprocess.run(
            self.arguments, cwd=self.cwd, env=inherited | self.environment, capture_output=True, text=True
        )
        self.wall.append(time.perf_counter() - began)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        self.cpu.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
        self.printed = done.stdout
        if done.returncode or len(done.stdout.splitlines()) < self.lines:
            sys.exit(f"{self.name}: status {done.returncode}\n{done.stdout}\n{done.stderr}")

    @property
    def seconds(self) -> float:
        return statistics.median(self.cpu)


def own(name: str, arguments: list[str], cwd: Path, **more: object) -> Process:
    return Process(name, [sys.executable, *arguments], cwd, {"PYTHONPATH": str(ROOT)}, **more)  # type: ignore[arg-type]


# ---- what is searched ------------------------------------------------------------------------------------------------


def make_store(folder: Path, rows: int) -> None:
    """FOLDER/.diptych, with a FAISS index tuned as benchmarks.indexes does, and the vectors that it holds."""
    from indexes.store import ModelRef, Store
    from retrieval.encoders import BUILTIN, load_encoder

    folder.mkdir(parents=True, exist_ok=True)
    if (folder / ".diptych" / "manifest.json").exists():
        return
    indexes.draw(folder, rows)
    vectors = np.load(folder / "vectors.npy", mmap_mode="r")
    store = Store.create(folder / ".diptych", None, ModelRef(BUILTIN, load_encoder().fingerprint, vectors.shape[1]))
    with store.write() as writer:
        writer.add_many(indexes.photos(rows), vectors)
    store.rebuild_index(probes={"text": indexes.halves(folder)[0]})


def make_flat(folder: Path) -> Path:
    """The vectors as a flat FAISS file."""
    import faiss

    file = folder / "flat.faiss"
    if not file.exists():
        vectors = np.load(folder / "vectors.npy")
        index = faiss.IndexFlatIP(vectors.shape[1])
        index.add(vectors)
        faiss.write_index(index, str(file))
    return file


def make_weights(folder: Path) -> Path:
    """ViT-B-32 as open_clip begins it, in a file."""
    import open_clip
    from safetensors.torch import save_file

    file = folder / "ViT-B-32.safetensors"
    if not file.exists():
        save_file(open_clip.create_model("ViT-B-32").state_dict(), file)
    return file


def make_database(folder: Path, python: str) -> Path:
    """What rclip would have of the same pictures."""
    from indexes.store import Store

    place = folder / "rclip"
    file, paths = place / "db.sqlite3", folder / "paths.txt"
    if not file.exists():
        place.mkdir(exist_ok=True)
        paths.write_text("\n".join(Store.open(folder / ".diptych").paths()))
        half = place / "half.sqlite3"
        subprocess.run([python, "-c", RCLIP_FILL, half, folder, folder / "vectors.npy", paths], check=True)
        half.rename(file)
    return place


# ---- the run ---------------------------------------------------------------------------------------------------------


def processes(folder: Path, rows: list[int], rclip_python: str | None) -> list[Process]:
    from retrieval.encoders import BUILTIN, find_bundle

    photos = shipped_photos(folder / "photos")
    subprocess.run([sys.executable, "-c", DIPTYCH, "index", str(photos)], check=True)
    search = ["-c", DIPTYCH, "search", QUERY]
    found = [
        own("`python -c pass`", ["-c", "pass"], photos),
        own("`diptych --help`", ["-c", DIPTYCH, "--help"], photos, lines=10),
        own("`diptych search`, 20 photos", search, photos, lines=10),
        own("the same with `--no-indexing`", [*search, "-n"], photos, lines=10),
    ]
    for count in rows:
        place = (folder / str(count)).resolve()  # as rclip, which is started in it, calls it
        make_store(place, count)
        size = f"{count:,} rows"
        found.append(own(f"`diptych search`, {size}", search, place, lines=10))
        if count == min(rows):
            found.append(own(f"`diptych search --json`, {size}", [*search, "--json"], place, lines=10))
            script = ["-c", SCRIPT_CODE, str(make_weights(folder)), str(make_flat(place)), QUERY]
            found.append(own(f"torch, open_clip and FAISS, {size}", script, place, lines=10))
        if rclip_python:
            environment = {"RCLIP_DATADIR": str(make_database(place, rclip_python))}
            arguments = [rclip_python, "-c", RCLIP_CODE, str(find_bundle(BUILTIN)), "--no-indexing", QUERY]
            found.append(Process(f"rclip, {size}", arguments, place, environment, lines=10))
    return found


def _judged(text: str, bar: float, met: bool) -> str:
    return f"{text} (bar {bar}: {'met' if met else 'MISSED'})"


def bars(done: dict[str, Process], rows: list[int]) -> list[str]:
    """What is promised, and whether it is so."""
    seconds = {name: process.seconds for name, process in done.items()}
    small = seconds[f"`diptych search`, {min(rows):,} rows"]
    said = [
        _judged(f"`diptych --help`: {seconds['`diptych --help`']:.2f} s", HELP_S, seconds["`diptych --help`"] < HELP_S),
        _judged(f"`diptych search` on {min(rows):,} rows: {small:.2f} s", SEARCH_S, small < SEARCH_S),
    ]
    script = seconds[f"torch, open_clip and FAISS, {min(rows):,} rows"] / small
    said.append(_judged(f"{script:.0f} times less than torch, open_clip and FAISS", SCRIPT, script >= SCRIPT))
    for count in rows:
        if f"rclip, {count:,} rows" in seconds:
            ratio = seconds[f"rclip, {count:,} rows"] / seconds[f"`diptych search`, {count:,} rows"]
            bar = RCLIP.get(count)
            text = f"{ratio:.1f} times less than rclip on {count:,} rows"
            said.append(_judged(text, bar, ratio >= bar) if bar else text)
    return said


def write_parts(folder: Path, rows: int, repetitions: int) -> None:
    """A table of where a search's time goes; what the process takes beyond its last part is its end."""
    place = (folder / str(rows)).resolve()
    process = own("parts", ["-c", PARTS_CODE, QUERY], place, lines=len(PARTS))
    process.environment["PARTS"] = "|".join(PARTS.values())
    runs = []
    for _ in range(repetitions + 1):
        process.run()
        ends = [0.0, *map(float, process.printed.split()), 1000 * process.cpu[-1]]
        runs.append(np.diff(ends))
    milliseconds = np.median(runs[1:], axis=0)
    write_section(
        "Cold start: where the time goes",
        f"`python -m benchmarks.startup` on {machine()}: milliseconds of CPU of the parts of a search "
        f"among {rows:,} rows, one after the other in a process; medians of {repetitions}.",
        ("part", "CPU ms"),
        [(name, f"{took:.0f}") for name, took in zip([*PARTS, "the end of the process"], milliseconds, strict=True)],
    )


def main(arguments: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(arguments.folder or scratch).absolute()
        every = processes(folder, arguments.rows, arguments.rclip_python)
        for turn in range(arguments.repetitions + 1):
            for process in every:
                process.run()
                if not turn:  # it warmed the file cache, and compiled what was not
                    process.cpu, process.wall = [], []
        write_parts(folder, min(arguments.rows), arguments.repetitions)
    said = bars({process.name: process for process in every}, arguments.rows)
    write_section(
        "Cold start",
        f"`python -m benchmarks.startup` on {machine()}: whole new processes by turns, medians of "
        f"{arguments.repetitions}; CPU is user and system time.\n\n" + "; ".join(said) + ".",
        ("process", "CPU s", "wall s"),
        [(p.name, f"{p.seconds:.2f}", f"{statistics.median(p.wall):.2f}") for p in every],
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[100_000, 1_000_000])
    parser.add_argument("--rclip-python", help="an interpreter that has rclip and tokenizers")
    parser.add_argument("--folder", help="keep what is made here, and use it again")
    parser.add_argument("--repetitions", type=int, default=5)
    main(parser.parse_args())
