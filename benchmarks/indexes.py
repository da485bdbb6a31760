"""Search in large stores: the Library beside bare FAISS, exact search and other index packages, in one run.

    python -m benchmarks.indexes [--rows 100000 1000000] [--vectors V.npy --queries Q.npy] [--peers-python PYTHON]
                                 [--peers-rows 100000] [--threads 1] [--repetitions 5] [--folder FOLDER]

For each number of rows, and for each recall that is asked for, a store is made, its FAISS index is chosen and tuned on
one half of the text queries, and everything is measured on the other half, by turns: a query to bare FAISS, the same
to the Library, and so on, and some to FAISS's exact flat index. Ratios are medians over the repetitions, since other
work on a machine comes and goes. All sides search the same vectors, those that the store holds, with one thread.

Vectors are drawn like CLIP's, unless real ones are given: 512 wide; an image is 0.65 of a direction that all images
share beside 0.76 of a unit vector of its own, which is 0.65 of one of N/200 centres of different sizes (shares
1/(10 + i)) beside 0.76 of chance. Texts lie apart (a modality gap): 0.7 of a direction that has a cosine of 0.4 with
the images', beside 0.71 of a vector that is 0.75 of some image's own and 0.66 of chance. Chance has variances falling
as (17 + i)^-1.8 along axes turned at random. The numbers were chosen on 100,000 vectors of real photos and captions by
the built-in model, so that what an index lives on is alike (real numbers in brackets): 16, 64, 128 and 256 principal
axes hold 45, 78, 89 and 96 % of the variance (43, 76, 90, 97); the 2, 4 and 9 % of the rows in the nearest of 1,024
inverted lists hold 93, 97 and 99 % of a text's ten nearest (92, 97, 99); and the 1st, 10th and 100th nearest stand out
from all images by 5.5, 3.7 and 3.1 standard deviations (5.0, 4.4, 3.7).
`--vectors` and `--queries` are (N, D) and (Q, D) arrays of numbers.

Peers (usearch, autofaiss) run under an interpreter of their own, where they are installed; autofaiss needs
`numpy<2 pyarrow<17 faiss-cpu<1.8`. They get the same vectors and the same memory budget, and answer the same queries
between ours.

With --folder, what has been made there is used again, and stays.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.table import machine, write_section

ROOT = Path(__file__).parents[1]
DIM, K = 512, 10
QUERIES = 600  # half of them to tune on, half to measure with
RECALLS = (0.95, 0.99)
MEMORY = 4 << 30  # bytes that an index may take, ours and the peers'
FLAT = 20  # queries to exact search in a repetition
NOT_INSTALLED = 3  # exit status
PEERS = ("usearch", "autofaiss")

# bars
OVERHEAD, OVERHEAD_MS, FASTER, OPENING_S = 1.15, 0.5, {0.95: 50, 0.99: 8}, 0.3


# ---- what is searched ------------------------------------------------------------------------------------------------


def unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


def draw(folder: Path, rows: int) -> None:
    """vectors.npy and queries.npy, as the head of this file says."""
    random = np.random.default_rng(0)
    axes = np.linalg.qr(random.standard_normal((DIM, DIM)))[0] / ((17 + np.arange(DIM)) ** 0.9)[:, None]
    axes = axes.astype(np.float32)
    image, apart = np.linalg.qr(random.standard_normal((DIM, 2)))[0].T.astype(np.float32)
    text = 0.4 * image + np.sqrt(1 - 0.4**2) * apart

    def chance(count: int) -> np.ndarray:
        return unit(random.standard_normal((count, DIM), dtype=np.float32) @ axes)

    def mixed(share: float, one: np.ndarray, other: np.ndarray) -> np.ndarray:
        return unit(np.float32(share) * one + np.float32(np.sqrt(1 - share**2)) * other)

    centres = chance(rows // 200)
    sizes = 1 / np.arange(10, 10 + len(centres))
    vectors = np.lib.format.open_memmap(folder / "vectors.npy", "w+", np.float32, (rows, DIM))
    own = np.empty((0, DIM), np.float32)
    for i in range(0, rows, 50_000):
        count = min(50_000, rows - i)
        latent = mixed(0.65, centres[random.choice(len(centres), count, p=sizes / sizes.sum())], chance(count))
        vectors[i : i + count] = mixed(0.65, image, latent)
        own = np.concatenate([own, latent[: -(-QUERIES * count // rows)]])
    np.save(folder / "queries.npy", mixed(0.7, text, mixed(0.75, own[:QUERIES], chance(QUERIES))))


def make(folder: Path, rows: int, vectors: str, queries: str) -> None:
    """Draw the vectors, or take the first of the given ones, and write a store of them."""
    from indexes.store import ModelRef, Store

    if vectors:
        np.save(folder / "vectors.npy", np.load(vectors, mmap_mode="r")[:rows].astype(np.float32))
        np.save(folder / "queries.npy", unit(np.load(queries).astype(np.float32)))
    else:
        draw(folder, rows)
    given = np.load(folder / "vectors.npy", mmap_mode="r")
    store = Store.create(folder / "store", None, ModelRef("benchmark", "0" * 64, given.shape[1]))
    with store.write() as writer:
        writer.add_many(photos(len(given)), given)
    # What the store holds, rounded to float16: what everybody searches.
    searched = np.lib.format.open_memmap(folder / "vectors.npy", "r+")
    for first, block in store.snapshot.blocks():
        searched[first : first + len(block)] = block


def photos(rows: int) -> Any:
    """Rows as an index run makes them: paths by month, sizes, dates and pixels, some places."""
    import pyarrow as pa

    random = np.random.default_rng(1)
    seconds = np.sort(random.integers(1_100_000_000, 1_760_000_000, rows))  # 2004 to 2025
    months = seconds.astype("datetime64[s]").astype("datetime64[M]").astype(str)
    somewhere = random.random(rows) < 0.8
    size = random.choice([4032, 6000, 1920, 640], rows).astype(np.int32)
    return pa.table(
        {
            "path": [f"{month.replace('-', '/')}/IMG_{i:05d}.jpg" for i, month in enumerate(months.tolist())],
            "size": random.integers(200_000, 9_000_000, rows),
            "mtime_ns": seconds * 10**9 + random.integers(0, 10**9, rows),
            "hash": [random.bytes(32).hex() for _ in range(rows)],
            "width": size,
            "height": size * 3 // 4,
            "taken_at": pa.array(seconds * 10**6, pa.timestamp("us")),
            "latitude": pa.array(random.uniform(-60, 70, rows), mask=somewhere),
            "longitude": pa.array(random.uniform(-180, 180, rows), mask=somewhere),
        }
    )


def halves(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """Queries to tune on, and to measure with."""
    queries = np.load(folder / "queries.npy")
    return queries[::2].copy(), queries[1::2].copy()


def build(folder: Path, recall: float) -> dict:
    """A store of its own with the index that is chosen for a recall; the segments are shared with the first one."""
    from indexes.store import Store, Wanted

    shutil.copytree(folder / "store", store_at(folder, recall), copy_function=os.link)
    store = Store.open(store_at(folder, recall))
    began = time.perf_counter()
    store.rebuild_index(Wanted(recall=recall, memory=MEMORY), {"text": halves(folder)[0]})
    ann = store.ann
    assert ann is not None, "so few rows are searched exactly"
    assert ann.measured is not None
    return {
        "seconds": time.perf_counter() - began,
        "kind": ann.factory,
        "effort": ann.effort,
        "refine": ann.refine,
        "bytes": ann.measured.bytes,
        "tuned": ann.measured.recall,
        "peak_mb": status("VmHWM"),
    }


def store_at(folder: Path, recall: float) -> Path:
    return folder / f"store-{recall}"


def status(field: str) -> float:
    """Megabytes of this process, as Linux counts them: RssAnon is held, RssFile is mapped, VmHWM was the most."""
    lines = Path("/proc/self/status").read_text("ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field + ":")) / 1000


def read_from_disk() -> float:
    """Megabytes that this process made the system read from the disk, for maps as well."""
    lines = Path("/proc/self/io").read_text("ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("read_bytes:")) / 1e6


# ---- opening ---------------------------------------------------------------------------------------------------------


def opening(folder: Path, recall: float) -> dict:
    """Open a store that is not in the system's cache, and search it: seconds, and what was read and is held."""
    import indexes.filters  # noqa: F401  imports are a matter of start-up, measured elsewhere
    from indexes.runtime import faiss
    from retrieval.library import Library

    faiss()
    queries = halves(folder)[1]
    place = store_at(folder, recall)
    for file in place.rglob("*"):
        if file.is_file():
            with file.open("rb") as stream:
                os.fsync(stream.fileno())
                os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    out: dict[str, dict[str, float]] = {}

    def measured(name: str, act: Callable[[], Any]) -> Any:
        before, read, began = status("RssAnon"), read_from_disk(), time.perf_counter()
        result = act()
        out[name] = {
            "s": time.perf_counter() - began,
            "read_mb": read_from_disk() - read,
            "held_mb": status("RssAnon") - before,
        }
        return result

    library = measured("open", lambda: Library.open(index=place))
    measured("first search", lambda: library.search(queries[0], K))
    measured("searches", lambda: [library.search(query, K) for query in queries])
    out["searches"]["s"] /= len(queries)
    return out


# ---- searching -------------------------------------------------------------------------------------------------------


def timed(search: Callable[[np.ndarray], Any], query: np.ndarray) -> tuple[float, Any]:
    """Milliseconds: with one thread of processor time, since other work on the machine comes and goes."""
    clock = time.process_time if os.environ["OMP_NUM_THREADS"] == "1" else time.perf_counter
    began = clock()
    found = search(query)
    return 1000 * (clock() - began), found


def recall_of(found: list[list[int]], truth: np.ndarray) -> float:
    return float(np.mean([len(set(rows) & set(real)) / K for rows, real in zip(found, truth.tolist(), strict=True)]))


def measure(folder: Path, repetitions: int, peers_python: str) -> dict:
    """All contenders by turns -> their recall, and the median and 99th percentile of each repetition in ms."""
    import faiss

    from retrieval.library import Library

    threads = int(os.environ["OMP_NUM_THREADS"])
    faiss.omp_set_num_threads(threads)
    vectors = np.load(folder / "vectors.npy", mmap_mode="r")
    flat = faiss.IndexFlatIP(vectors.shape[1])
    for i in range(0, len(vectors), 50_000):
        flat.add(vectors[i : i + 50_000])
    queries = halves(folder)[1]
    truth = flat.search(queries, K)[1]

    contenders: dict[str, Callable[[np.ndarray], Any]] = {}
    for recall in RECALLS:
        library = Library.open(index=store_at(folder, recall))
        ann = library.store.ann
        assert ann is not None
        bare = faiss.read_index(str(store_at(folder, recall) / "vectors.faiss"))
        if ann.effort:
            faiss.extract_index_ivf(bare).nprobe = ann.effort
        fetch = library.store.snapshot.fetch(K)
        contenders |= {
            f"library {recall}": lambda query, library=library: [match.id for match in library.search(query, K)],
            f"bare {recall}": lambda query, bare=bare: bare.search(query[None], K)[1][0].tolist(),
            f"bare, candidates {recall}": lambda query, bare=bare, n=fetch: bare.search(query[None], n)[1][0].tolist(),
        }
    peers = {name: Peer(peers_python, folder, name) for name in PEERS if (folder / f"{name}.json").exists()}
    targets = {f"{name} {target}": (peer, target) for name, peer in peers.items() for target in peer.targets}
    names = ["flat", *contenders, *targets]
    runs: dict[str, list[list[float]]] = {name: [] for name in names}
    found: dict[str, list[list[int]]] = {name: [] for name in names}
    for repetition in range(-1, repetitions):  # the first one is to warm up
        times: dict[str, list[float]] = {name: [] for name in names}
        for query in queries[:FLAT]:
            times["flat"].append(timed(lambda query: flat.search(query[None], K), query)[0])
        found |= {name: [] for name in names}
        for i, query in enumerate(queries):
            order = list(contenders)
            for name in order[i % len(order) :] + order[: i % len(order)]:
                took, rows = timed(contenders[name], query)
                times[name].append(took)
                found[name].append(rows[:K])
        for name, (peer, target) in targets.items():
            times[name], found[name] = peer.answers(target)
        if repetition >= 0:
            for name in names:
                runs[name].append(times[name])
    for peer in peers.values():
        peer.end()
    found["flat"] = truth.tolist()
    return {
        name: {
            "recall": recall_of(found[name], truth),
            "p50": [statistics.median(times) for times in runs[name]],
            "p99": [float(np.percentile(times, 99)) for times in runs[name]],
        }
        for name in names
    }


# ---- peers: this part runs under their own interpreter ---------------------------------------------------------------


def build_peer(folder: Path, name: str, threads: int) -> dict:
    """Build an index as the peer's manual has it, within the memory budget, and find the settings for the recalls."""
    vectors = np.load(folder / "vectors.npy", mmap_mode="r")
    file = folder / f"{name}.index"
    out: dict[str, Any] = {"version": importlib.metadata.version(name)}
    began = time.perf_counter()
    if name == "usearch":
        from usearch.index import Index

        index = Index(ndim=vectors.shape[1], metric="ip", dtype="f16")
        index.add(np.arange(len(vectors)), vectors, threads=threads)
        index.save(str(file))
        out |= {"seconds": time.perf_counter() - began, "kind": f"HNSW{index.connectivity}, f16"}
        probes = halves(folder)[0]
        truth = np.concatenate([exact(vectors, query) for query in probes])
        out["targets"] = {}
        for recall in RECALLS:
            for effort in (16, 32, 64, 128, 256, 512, 1024, 2048):
                index.expansion_search = effort
                found = [index.search(query, K, threads=1).keys.tolist() for query in probes]
                if recall_of(found, truth) >= recall:
                    break
            out["targets"][str(recall)] = effort
    else:
        import faiss
        from autofaiss import build_index

        faiss.omp_set_num_threads(threads)
        index, _ = build_index(
            np.asarray(vectors),
            save_on_disk=False,
            metric_type="ip",
            max_index_memory_usage=f"{MEMORY >> 20}MB",
            current_memory_available=f"{2 * MEMORY >> 20}MB",
            nb_cores=threads,
        )
        faiss.write_index(index, str(file))
        kind = type(faiss.downcast_index(index)).__name__
        out |= {"seconds": time.perf_counter() - began, "kind": kind, "targets": {"by itself": 0}}
    return out | {"bytes": file.stat().st_size}


def exact(vectors: np.ndarray, query: np.ndarray) -> np.ndarray:
    """(1, K) rows of the highest product."""
    return np.argsort(-(vectors @ query), kind="stable")[None, :K]


def serve_peer(folder: Path, name: str) -> None:
    """Answer all queries for each line that asks for it."""
    said = json.loads((folder / f"{name}.json").read_text("ascii"))
    queries = halves(folder)[1]
    file = str(folder / f"{name}.index")
    search: Callable[[np.ndarray], Any]
    if name == "usearch":
        from usearch.index import Index

        index = Index.restore(file)

        def search(query: np.ndarray) -> Any:
            return index.search(query, K, threads=1).keys.tolist()
    else:
        import faiss

        faiss.omp_set_num_threads(1)
        index = faiss.read_index(file)

        def search(query: np.ndarray) -> Any:
            return index.search(query[None], K)[1][0].tolist()

    for line in sys.stdin:
        if name == "usearch":
            index.expansion_search = said["targets"][line.strip()]
        answers = [timed(search, query) for query in queries]
        print(json.dumps({"times": [took for took, _ in answers], "rows": [rows for _, rows in answers]}), flush=True)


class Peer:
    """A peer's process."""

    def __init__(self, python: str, folder: Path, name: str) -> None:
        command = child(python, folder, "serve", name)
        self.targets = json.loads((folder / f"{name}.json").read_text("ascii"))["targets"]
        self._process = subprocess.Popen(command, cwd=ROOT, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def answers(self, target: str) -> tuple[list[float], list[list[int]]]:
        assert self._process.stdin
        assert self._process.stdout
        print(target, file=self._process.stdin, flush=True)
        said = json.loads(self._process.stdout.readline())
        return said["times"], said["rows"]

    def end(self) -> None:
        assert self._process.stdin
        self._process.stdin.close()
        self._process.wait()


# ---- all of it -------------------------------------------------------------------------------------------------------


def child(python: str, folder: Path, *arguments: object) -> list[str]:
    return [python, "-W", "ignore", "-m", "benchmarks.indexes", "--child", str(folder), *map(str, arguments)]


def start(python: str, threads: int, folder: Path, *arguments: object) -> Any:
    """Run a step in a process of its own; None if a package is missing there. It says its result on the last line."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "OPENBLAS_NUM_THREADS": str(threads)}
    done = subprocess.run(
        child(python, folder, *arguments), cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode == NOT_INSTALLED:
        return None
    if done.returncode:
        sys.exit(f"{arguments} failed:\n{done.stderr}")
    said = done.stdout.strip().splitlines()[-1]
    print(*arguments, said, flush=True)
    return json.loads(said)


def once(python: str, threads: int, folder: Path, name: str, *arguments: object) -> Any:
    """The same, with the result kept in the folder; if it is there, the step is not repeated."""
    file = folder / f"{name}.json"
    if not file.exists():
        said = start(python, threads, folder, *arguments)
        if said is None:
            return None
        file.write_text(json.dumps(said), "ascii")
    return json.loads(file.read_text("ascii"))


def judged(value: float, bar: float, at_least: bool = False) -> str:
    return "met" if (value >= bar if at_least else value <= bar) else "MISSED"


def at_size(folder: Path, rows: int, options: argparse.Namespace) -> tuple[list[tuple[object, ...]], list[str]]:
    """Rows of the table, and sentences about the bars."""
    cores = os.cpu_count() or 1
    once(sys.executable, cores, folder, "made", "make", rows, options.vectors, options.queries)
    built = {recall: once(sys.executable, cores, folder, f"built-{recall}", "build", recall) for recall in RECALLS}
    peers = {
        name: once(options.peers_python, cores, folder, name, "peer", name, cores)
        for name in PEERS
        if rows <= options.peers_rows
    }
    missing = [name for name, said in peers.items() if said is None]
    opened = [start(sys.executable, options.threads, folder, "open", RECALLS[0]) for _ in range(options.repetitions)]
    runs = start(sys.executable, options.threads, folder, "measure", options.repetitions, options.peers_python)

    def ratio(one: str, other: str) -> float:
        return statistics.median(a / b for a, b in zip(runs[one]["p50"], runs[other]["p50"], strict=True))

    def row(name: str, what: str, bytes_: float, seconds: float) -> tuple[object, ...]:
        p50, p99 = (statistics.median(runs[name][key]) for key in ("p50", "p99"))
        faster = "" if name == "flat" else f"{ratio('flat', name):.1f}"
        made = f"{seconds:.0f}" if seconds else ""
        mb = f"{bytes_ / 1e6:.0f}"
        return f"{rows:,}", what, f"{runs[name]['recall']:.3f}", f"{p50:.2f}", f"{p99:.2f}", faster, mb, made

    width = np.load(folder / "vectors.npy", mmap_mode="r").shape[1]
    table = [row("flat", "IndexFlatIP", 4 * rows * width, 0)]
    notes = []
    for recall, said in built.items():
        kind = f"{said['kind']}" + (f", nprobe {said['effort']}" if said["effort"] else "")
        for contender, what in (
            ("library", f"Library.search, asked for {recall}: {kind}, {said['refine'] * K} candidates"),
            ("bare", f"the same index, bare FAISS, {K} rows"),
            ("bare, candidates", f"the same index, bare FAISS, {said['refine'] * K} rows"),
        ):
            table.append(row(f"{contender} {recall}", what, said["bytes"], said["seconds"]))
        more = statistics.median(
            a - b for a, b in zip(runs[f"library {recall}"]["p50"], runs[f"bare {recall}"]["p50"], strict=True)
        )
        times = ratio(f"library {recall}", f"bare {recall}")
        verdict = "met" if times <= OVERHEAD or more <= OVERHEAD_MS else "MISSED"
        found, faster = runs[f"library {recall}"]["recall"], ratio("flat", f"library {recall}")
        note = (
            f"asked for {recall}, recall@{K} is {found:.3f} ({judged(found, recall, True)}); Library.search takes "
            f"{times:.2f} times bare FAISS, {more:.2f} ms more (bar {OVERHEAD} or {OVERHEAD_MS} ms: {verdict})"
        )
        if rows >= 1_000_000:
            note += f"; {faster:.0f} times faster than exact (bar {FASTER[recall]}: "
            note += f"{judged(faster, FASTER[recall], True)})"
        notes.append(note)
    for name, said in peers.items():
        for target in said["targets"] if said else ():
            what = f"{name} {said['version']}, {said['kind']}, asked for {target}"
            table.append(row(f"{name} {target}", what, said["bytes"], said["seconds"]))
    if missing:
        notes.append(f"left out, since not installed: {', '.join(missing)}")

    def middle(step: str, key: str) -> float:
        return statistics.median(run[step][key] for run in opened)

    seconds = middle("open", "s")
    verdict = f" (bar {OPENING_S} s: {judged(seconds, OPENING_S)})" if rows >= 1_000_000 else ""
    held = {
        step: f"reads {middle(step, 'read_mb'):.1f} MB and holds {middle(step, 'held_mb'):.1f} MB" for step in opened[0]
    }
    notes.append(
        f"with nothing in the system's cache, opening takes {seconds:.3f} s{verdict}, {held['open']}; the first search "
        f"takes {middle('first search', 's'):.2f} s, {held['first search']} more; {len(halves(folder)[1])} more take "
        f"{1000 * middle('searches', 's'):.1f} ms each, together {held['searches']} more, of "
        f"{2 * rows * width / 1e6:.0f} MB of vectors; building held "
        f"{max(said['peak_mb'] for said in built.values()):.0f} MB at most, mapped vectors and all"
    )
    return table, [f"{rows:,} rows: {'; '.join(notes)}."]


def main(options: argparse.Namespace) -> None:
    table, notes = [], []
    for rows in options.rows:
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(options.folder or scratch) / str(rows)
            folder.mkdir(parents=True, exist_ok=True)
            some, said = at_size(folder, rows, options)
        table += some
        notes += said
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("faiss-cpu", "numpy", "pyarrow"))
    real = bool(options.vectors)
    threads = "one thread, processor time" if options.threads == 1 else f"{options.threads} threads"
    write_section(
        "Search in large stores" + (", real vectors" if real else ""),
        f"`python -m benchmarks.indexes{' --vectors … --queries …' if real else ''}` on {machine()}, {versions}: "
        f"{'real' if real else 'drawn'} vectors, text queries that the index was not tuned on, one at a time, {K} rows "
        f"wanted, {threads}; medians of {options.repetitions} interleaved repetitions. Library.search "
        "begins with the query's vector and ends with the rows' metadata. Times faster: than IndexFlatIP. MB: of the "
        f"index file. Indexes were built with all cores, {MEMORY >> 30} GB allowed.\n\n" + "\n\n".join(notes),
        ("rows", "what", f"recall@{K}", "ms", "p99 ms", "times faster", "MB", "built in s"),
        table,
    )


def run_child(place: str, step: str, *arguments: str) -> None:
    folder = Path(place)
    said: Any = {}
    try:
        if step == "make":
            make(folder, int(arguments[0]), *arguments[1:])
        elif step == "build":
            said = build(folder, float(arguments[0]))
        elif step == "open":
            said = opening(folder, float(arguments[0]))
        elif step == "measure":
            said = measure(folder, int(arguments[0]), arguments[1])
        elif step == "peer":
            said = build_peer(folder, arguments[0], int(arguments[1]))
        else:
            return serve_peer(folder, *arguments)
    except ModuleNotFoundError as error:
        if error.name in PEERS:
            sys.exit(NOT_INSTALLED)
        raise
    except importlib.metadata.PackageNotFoundError:
        sys.exit(NOT_INSTALLED)
    print(json.dumps(said))
    return None


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        run_child(*sys.argv[2:])
    else:
        parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
        parser.add_argument("--rows", type=int, nargs="+", default=[100_000, 1_000_000])
        parser.add_argument("--vectors", default="", help="(N, D) array of numbers; rows beyond --rows are left out")
        parser.add_argument("--queries", default="", help="(Q, D) array of numbers")
        parser.add_argument("--peers-python", default=sys.executable, help="interpreter that has the peers")
        parser.add_argument("--peers-rows", type=int, default=100_000, help="larger graphs take them many minutes")
        parser.add_argument("--threads", type=int, default=1)
        parser.add_argument("--repetitions", type=int, default=5)
        parser.add_argument("--folder", help="keep what is made here, and use it again")
        main(parser.parse_args())
