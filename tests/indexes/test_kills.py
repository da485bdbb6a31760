"""`kill -9` at random moments of all that writes, readers and writers at once: against a journal kept outside."""

from __future__ import annotations

import hashlib
import json
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from indexes import writer as module
from indexes.manifest import Manifest
from indexes.store import ModelRef, Row, Store
from indexes.vectors import as_vectors
from tests.indexes.test_vectors import assert_same, brute

DIM = 8
MODEL = ModelRef("tiny", "ab" * 32, DIM)
# Thresholds so small that a second holds merges, files of deleted ids and FAISS files by the dozen.
SMALL = {"_TOMBSTONES": 9, "_SEGMENTS": 3}

# Each round says what it is about to do, does it in one commit, and says that it is done.
WRITER = f"""
import json, random, sys
from pathlib import Path
import numpy as np
import pyarrow as pa
from indexes import store as stores, writer as module
from indexes.store import Row, Store
module._TOMBSTONES, module._SEGMENTS, stores._STALE_ROWS = {SMALL["_TOMBSTONES"]}, {SMALL["_SEGMENTS"]}, 20
store, chance = Store.open(Path(sys.argv[1])), random.Random(int(sys.argv[2]))

def say(**what):
    print(json.dumps(what), flush=True)

def row(path, seed):
    return Row(path=path, size=seed, mtime_ns=seed, hash=f"{{seed:x}}")

def vector(seed):
    return np.random.default_rng(seed).standard_normal({DIM})

def some():
    seed = chance.randrange(1 << 30)
    return f"{{seed}}.jpg", seed

say(begin=True)
while True:
    ids, next_id = store.snapshot.ids.tolist(), store.snapshot.manifest.next_id
    if chance.random() < 0.2:
        rows = [some() for _ in range(chance.randrange(1, 60))]
        say(add={{next_id + i: each for i, each in enumerate(rows)}}, remove=[])
        seeds = [seed for _, seed in rows]
        columns = dict(path=[p for p, _ in rows], size=seeds, mtime_ns=seeds, hash=[f"{{s:x}}" for s in seeds])
        with store.write() as writer:
            writer.add_many(pa.table(columns), np.stack([vector(s) for s in seeds]))
    else:
        adds = [some() for _ in range(chance.randrange(8))]
        gone = chance.sample(ids, min(len(ids), chance.randrange(12)))
        kept = {{i: store.row(i).mtime_ns for i in gone[::3]}}  # replaced by a row of the same vector
        renamed = {{i: (some()[0], seed) for i, seed in kept.items()}}
        new = adds + list(renamed.values())
        say(add={{next_id + i: each for i, each in enumerate(new)}}, remove=gone)
        with store.write() as writer:
            for path, seed in adds:
                writer.add(row(path, seed), vector(seed))
            for i, (path, seed) in renamed.items():
                writer.replace(i, row(path, seed))
            for i in set(gone) - set(renamed):
                writer.remove(i)
    say(done=True)
    if chance.random() < 0.15:
        store.rebuild_index(chance.choice(["Flat", "SQ8", "HNSW8", "exact"]))
    elif store.index_is_stale():
        store.rebuild_index()
"""

State = dict[int, tuple[str, int]]  # id -> path and seed of the vector


def vector(seed: int):
    return np.random.default_rng(seed).standard_normal(DIM)


def bits(seed: int) -> bytes:
    return as_vectors(vector(seed)[None]).astype(np.float16).tobytes()


def after(state: State, change: dict) -> State:
    gone = set(change["remove"])
    added = {int(i): tuple(each) for i, each in change["add"].items()}
    return {i: each for i, each in {**state, **added}.items() if i not in gone}


def held(store: Store) -> State:
    """What the store holds; that every vector is the one given, to the bit; and that search finds what there is."""
    assert store.check() == []
    rows = store.rows()
    state = dict(zip(rows["id"].to_pylist(), zip(store.paths(), rows["size"].to_pylist(), strict=True), strict=True))
    assert len(state) == len(store) == rows.num_rows
    assert [store.snapshot.halves(i).tobytes() for i in range(len(store))] == [bits(seed) for _, seed in state.values()]
    queries = as_vectors(np.random.default_rng(0).standard_normal((3, DIM)))
    hits, best = store.search(queries, 7), brute(store.vectors(), queries, 7)
    if store.ann is None or store.ann.factory == "Flat":
        assert_same(hits, best)
    else:  # an approximate kind may miss some, but never invents a score
        assert hits.rows.shape == best.rows.shape
        true = np.take_along_axis(queries @ store.vectors().T, hits.rows, axis=1)
        np.testing.assert_allclose(hits.scores, true, atol=1e-6)
    return state


def kill_again_and_again(folder, kills: int) -> set[str]:
    """Kill a writer so often; which kinds of states were met."""
    store = Store.create(folder / "index", folder, MODEL)
    chance, state, met = random.Random(kills), {}, set()
    for number in range(kills):
        complaints = folder / "complaints"
        with complaints.open("wb") as stderr:
            command = [sys.executable, "-c", WRITER, str(store.path), str(number)]
            child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stderr)
        assert json.loads(child.stdout.readline()) == {"begin": True}
        time.sleep(chance.uniform(0, 0.35))  # any moment is a good one
        child.send_signal(signal.SIGKILL)
        said = child.stdout.read()
        child.wait()
        assert complaints.read_bytes() == b""
        pending = None
        for line in said.split(b"\n")[:-1]:  # a line that is cut off was not followed by anything
            told = json.loads(line)
            if "done" in told:
                state, pending = after(state, pending), None
            else:
                pending = told
        now = held(Store.open(store.path))
        assert now in (
            state,
            *([after(state, pending)] if pending else []),
        )  # all that was finished, and one whole step
        met |= {"half-way"} if pending else {"between"}
        state = now
        manifest = Manifest.read(store.path)
        met |= {"faiss"} if manifest.ann else set()
        met |= {"file of deleted ids"} if manifest.deleted else set()
        met |= {"tombstones"} if manifest.tombstones else set()
    with Store.open(store.path).write():
        pass
    manifest = Manifest.read(store.path)
    named = {f"segments/{segment.file}" for segment in manifest.segments} | {"manifest.json", "write.lock"}
    named |= {manifest.deleted.file} if manifest.deleted else set()
    left = {file.relative_to(store.path).as_posix() for file in store.path.rglob("*") if file.is_file()}
    assert left - {"vectors.faiss"} == named  # what the killed ones left is gone
    return met


def test_8_kills_of_everything_that_writes(tmp_path):
    kill_again_and_again(tmp_path, 8)


@pytest.mark.slow
def test_100_kills_of_everything_that_writes(tmp_path):
    met = kill_again_and_again(tmp_path, 100)
    assert met == {"half-way", "between", "faiss", "file of deleted ids", "tombstones"}


# ---- readers beside a writer -----------------------------------------------------------------------------------------

# Says of each state that it sees which ids it holds; and that its parts belong to one moment.
READER = """
import hashlib, sys
from pathlib import Path
import numpy as np
from indexes.store import Store
from tests.indexes.test_kills import bits
path = Path(sys.argv[1])
query = np.random.default_rng(0).standard_normal((1, 8)).astype(np.float32)
query /= np.linalg.norm(query)
store = Store.open(path)
print("go", flush=True)
while not (path.parent / "stop").exists():
    store.refresh()
    for one in (store, Store.open(path)):
        rows, vectors = one.rows(), one.vectors()
        hits = one.search(query, 9)  # before or after: the FAISS file may be another by now
        assert len(one) == rows.num_rows == len(vectors) == len(one.paths())
        pairs = [name.split("/")[0] for name in one.paths()]
        assert all(pairs.count(pair) == 2 for pair in set(pairs)), pairs  # both or none of a pair
        seeds = rows["size"].to_pylist()
        assert [one.snapshot.halves(i).tobytes() for i in range(len(one))] == [bits(seed) for seed in seeds]
        true = np.sort((vectors @ query[0]))[::-1][: hits.rows.shape[1]]
        np.testing.assert_allclose(hits.scores[0], true, atol=1e-6)
        ids = ",".join(map(str, rows["id"].to_pylist()))
        print(hashlib.sha256(ids.encode()).hexdigest(), one.snapshot.covered > 0, flush=True)
"""


def readers_see_whole_states(folder, monkeypatch, rounds: int) -> None:
    for name, value in SMALL.items():
        monkeypatch.setattr(module, name, value)
    store = Store.create(folder / "index", folder, MODEL)
    chance, pairs, serial = random.Random(rounds), {}, 0
    digests = {hashlib.sha256(b"").hexdigest()}
    said = [folder / f"reader {i}" for i in range(2)]  # no pipes, which fill up
    readers = []
    for file in said:
        with file.open("wb") as out:
            command = [sys.executable, "-c", READER, str(store.path)]
            readers.append(subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT))
    try:
        while not all(file.stat().st_size for file in said):
            time.sleep(0.01)
        for step in range(rounds):
            with store.write() as writer:
                for _ in range(chance.randrange(1, 6)):
                    pairs[serial] = [
                        writer.add(
                            Row(path=f"{serial}/{side}", size=2 * serial + side, mtime_ns=0, hash="0"),
                            vector(2 * serial + side),
                        )
                        for side in (0, 1)
                    ]
                    serial += 1
                for pair in chance.sample(sorted(pairs), len(pairs) // 4):
                    for i in pairs.pop(pair):
                        writer.remove(i)
                ids = ",".join(map(str, sorted(i for both in pairs.values() for i in both)))
                digests.add(hashlib.sha256(ids.encode()).hexdigest())  # before anybody can see it
            if step % 4 == 1:
                store.rebuild_index(chance.choice(["Flat", "exact", "Flat"]))
    finally:
        (folder / "stop").touch()
        codes = [reader.wait(60) for reader in readers]
    assert codes == [0, 0], [file.read_text()[-2000:] for file in said]
    seen = [line.split() for file in said for line in file.read_text().splitlines()[1:]]
    assert {digest for digest, _ in seen} <= digests
    assert len({digest for digest, _ in seen}) > 3
    assert store.check() == []


def test_readers_beside_a_writer_see_whole_states(tmp_path, monkeypatch):
    readers_see_whole_states(tmp_path, monkeypatch, 40)


@pytest.mark.slow
def test_readers_beside_a_busy_writer_see_whole_states(tmp_path, monkeypatch):
    readers_see_whole_states(tmp_path, monkeypatch, 600)


def test_writers_at_once_wait_or_fail_and_lose_nothing(tmp_path):
    """Half of them wait; the others are told, and try again. Whatever one of them called done is there once."""
    store = Store.create(tmp_path / "index", tmp_path, MODEL)
    code = """
import sys
from pathlib import Path
from indexes.errors import StoreLocked
from indexes.store import Row, Store
from tests.indexes.test_kills import vector
path, name, wait = Path(sys.argv[1]), sys.argv[2], float(sys.argv[3])
sys.stdin.readline()
refused = done = 0
while done < 8:
    try:
        with Store.open(path).write(wait) as writer:
            writer.add(Row(path=f"{name}/{done}", size=done, mtime_ns=0, hash="0"), vector(done))
        done += 1
    except StoreLocked as error:
        assert str(error) == f"another process is writing to the index at {path}: wait until it is done"
        refused += 1
print(refused)
"""
    command = [sys.executable, "-c", code, str(store.path)]
    children = [
        subprocess.Popen([*command, str(i), "0" if i % 2 else "60"], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        for i in range(4)
    ]
    said = [child.communicate(b"\n")[0] for child in children]
    assert [child.returncode for child in children] == [0] * 4
    assert said[0] == said[2] == b"0\n"
    after = Store.open(store.path)
    assert sorted(after.paths()) == [f"{i}/{k}" for i in range(4) for k in range(8)]
    assert (after.rows()["id"].to_pylist(), after.check()) == (list(range(32)), [])
