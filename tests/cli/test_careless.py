"""What careless people type, and machines in a bad way: one plain line each, and nothing lost."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from indexes.store import Store
from tests.odd_photos import real_photos

COMMAND = "from cli.main import run; run()"


def diptych(*arguments, cwd, **options):
    environment = {**os.environ, "COLUMNS": "200", **options.pop("env", {})}
    return subprocess.run(
        [sys.executable, "-c", COMMAND, *map(str, arguments)],
        cwd=cwd, env=environment, **{"capture_output": True, "text": True, **options},
    )  # fmt: skip


def complaint(run, code=1) -> str:
    assert run.returncode == code, (run.returncode, run.stdout, run.stderr)
    assert "Traceback" not in run.stderr
    assert len(run.stderr.splitlines()) == 1, run.stderr
    return run.stderr


@pytest.fixture(scope="module")
def shipped(tmp_path_factory):
    folder = tmp_path_factory.mktemp("careless") / "photos"
    (folder / "sub").mkdir(parents=True)
    for i, photo in enumerate(real_photos()[3:9]):
        picture = Image.open(photo).convert("RGB")
        picture.thumbnail((300, 300))
        picture.save((folder / "sub" if i % 2 else folder) / f"{photo.stem}.jpg")
    assert diptych("index", folder, cwd=folder).returncode == 0
    return folder


@pytest.fixture
def photos(shipped, tmp_path):
    return Path(shutil.copytree(shipped, tmp_path / "photos"))


# ---- arguments -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["index", "x" * 300], "File name too long"),
        (["index", "~nobody-of-that-name/photos"], "the name of a user who is not known here"),
        (["search", "cat", "--like", "~nobody-of-that-name/a.jpg"], "the name of a user who is not known here"),
        (["search", "cat", "--model", "~nobody-of-that-name/m"], "the name of a user who is not known here"),
        (["index", "new\nline"], r"there is no folder new\nline"),
        (["index", "\x1b[31mred"], r"there is no folder \x1b[31mred"),
        (["search", "9" * 400 + ":cat"], "the weight of 'cat' is too large: 1000 is the most"),
        (["search", "0:cat"], "cancel each other out"),
        (["search", "--like", "."], "a folder, not a file"),
        (["search", "--like", "/dev/zero"], "not a regular file"),
        (["search", "--not", "cat"], "the query is empty"),
        (["search", "cat", "--html", "/"], "cannot be written"),
        (["search", "cat", "--index", "/dev/null"], "there is no index at /dev/null"),
        (["index", "/dev/null"], "is not a folder"),
        (["encode", "--text", "a", "-o", "."], "Is a directory"),
        (["evaluate", "/dev/null"], "is empty"),
        (["evaluate", "."], "Is a directory"),
    ],
)
def test_one_plain_line(shipped, arguments, words):
    assert words in complaint(diptych(*arguments, cwd=shipped))


@pytest.mark.parametrize(
    "arguments",
    [
        ["search", "cat", "--threshold", "nan"],
        ["search", "-cat"],
        ["search", "cat", "-t", "1e9"],
        ["search", "cat", "--threads", "0"],
        ["encode", "--texts", "/nowhere.txt"],
    ],
)
def test_wrong_usage(shipped, arguments):
    run = diptych(*arguments, cwd=shipped)
    assert (run.returncode, run.stdout, "Traceback" in run.stderr) == (2, "", False)


@pytest.mark.parametrize(
    "arguments",
    [
        ["--", "-cat"],
        ["猫 🐈"],
        ["long " * 20_000],
        [b"caf\xe9"],
        ["cat", "-t", "9" * 40],
        ["\x1b[31mred"],
        ["cat", "--threads", "99999"],
    ],
)
def test_odd_and_yet_answered(shipped, arguments):
    run = diptych("search", "-n", "-f", *map(os.fsdecode, arguments), cwd=shipped)
    assert run.returncode == 0, run.stderr
    assert len(run.stdout.splitlines()) == 6


def test_sentences_that_are_no_text(tmp_path):
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9\n")
    run = diptych("encode", "--texts", "latin.txt", cwd=tmp_path, env={"PYTHONUTF8": "1"})
    assert "latin.txt is not UTF-8 text: one sentence a line" in complaint(run)
    assert not (tmp_path / "vectors.npy").exists()


def test_pairs_that_are_odd(shipped, tmp_path):
    (tmp_path / "p.jsonl").write_text(
        "\n".join(
            json.dumps({"image": str(shipped / "chelsea.jpg"), "captions": ["\ud800 x"], "split": s})
            for s in (3, "x", ["y"])
        )
    )
    assert "its splits are: 3, ['y'], x" in complaint(diptych("evaluate", "p.jsonl", "--split", "z", cwd=tmp_path))
    run = diptych("evaluate", "p.jsonl", "--split", "3", "--json", cwd=tmp_path)
    assert json.loads(run.stdout)["metrics"]["t2i_hit@1"] == 1.0
    (tmp_path / "q.jsonl").write_text(json.dumps({"image": "a" * 5000, "captions": ["x"]}))
    assert "File name too long" in complaint(diptych("evaluate", "q.jsonl", cwd=tmp_path))


# ---- streams ---------------------------------------------------------------------------------------------------------


def shell(line: str, cwd: Path):
    command = f"{sys.executable} -c '{COMMAND}' {line}"
    return subprocess.run(["bash", "-o", "pipefail", "-c", command], cwd=cwd, capture_output=True, text=True)


def test_a_reader_that_leaves_early(shipped):
    run = shell("search cat -t 6 -f | head -n 1", shipped)
    assert (len(run.stdout.splitlines()), run.stderr) == (1, "")


@pytest.mark.parametrize(
    "line", ["search cat >&-", "search cat -f >&-", "search cat --json >&-", "search cat 2>&- -f", "index . >&- 2>&-"]
)
def test_closed_streams(photos, line):
    run = shell(line, photos)
    assert (run.returncode, run.stderr) == (0, "")
    assert Store.open(photos / ".diptych").check() == []


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize(
    "line", ["search cat", "search cat -f", "search cat --json", "info", "encode --text cat -o /dev/full"]
)
def test_a_full_disk_behind_the_output(shipped, line):
    run = shell(line if "-o" in line else line + " >/dev/full", shipped)
    assert run.returncode != 0
    assert "No space left on device" in run.stderr
    assert "Traceback" not in run.stderr


# ---- folders ---------------------------------------------------------------------------------------------------------


def test_every_way_to_name_the_same_folder(photos, tmp_path):
    (tmp_path / "link").symlink_to(photos)
    for name in (".", "sub/..", "../photos", photos, tmp_path / "link", "sub/../../link/.", ""):
        run = diptych("index", name, "--json", cwd=photos)
        assert run.returncode == 0, run.stderr
        report = json.loads(run.stdout)
        assert (report["added"], report["skipped"]) == (0, 6), name
    below = diptych("index", tmp_path / "link" / "sub", "--json", cwd=tmp_path)
    assert json.loads(below.stdout)["skipped"] == 3
    found = diptych("search", "cat", "-f", "-C", tmp_path / "link" / "sub", cwd=tmp_path).stdout.splitlines()
    assert {Path(line).name for line in found} == {file.name for file in (photos / "sub").iterdir()}


def test_a_store_in_a_folder_of_its_own_inside_or_outside(photos, tmp_path):
    shutil.rmtree(photos / ".diptych")
    for store in (photos / "mine", tmp_path / "a" / "b"):
        assert json.loads(diptych("index", ".", "--index", store, "--json", cwd=photos).stdout)["added"] == 6
        assert len(diptych("search", "cat", "-f", "--index", store, cwd="/").stdout.splitlines()) == 6


def test_the_folder_one_stands_in_was_deleted(tmp_path):
    gone = tmp_path / "gone"
    gone.mkdir()
    run = shell(f"search cat; rmdir {gone} && {sys.executable} -c '{COMMAND}' search cat", gone)
    assert "Traceback" not in run.stderr
    assert run.returncode == 1


@pytest.mark.skipif(os.name != "posix" or os.geteuid() != 0, reason="needs root, to become somebody who may not read")
def test_folders_that_may_not_be_entered_or_written(photos, tmp_path):
    for path in (tmp_path, tmp_path.parent, tmp_path.parents[1]):
        path.chmod(0o755)
    closed = tmp_path / "closed"
    shutil.copytree(photos, closed / "photos")
    closed.chmod(0o700)
    # Everything is imported before the user is changed: the new one may not even read the interpreter's files.
    code = (
        "import os, sys\nfrom cli.main import run\nimport retrieval.library, onnxruntime, tokenizers, rich.progress\n"
        "import pyarrow.parquet, retrieval.images, PIL.JpegImagePlugin, filelock\n"
        "from retrieval.encoders import load_encoder; load_encoder().encode_texts(['warm'])\n"
        "os.setgid(65534); os.setuid(65534); run()"
    )

    def as_nobody(*arguments, cwd="/"):
        env = {**os.environ, "XDG_DATA_HOME": str(tmp_path / "nowhere"), "PYTHONDONTWRITEBYTECODE": "1"}
        return subprocess.run(
            [sys.executable, "-c", code, *map(str, arguments)], cwd=cwd, env=env, capture_output=True, text=True
        )

    for arguments in (
        ["index", closed / "photos"],
        ["search", "x", "-C", closed / "photos"],
        ["info", closed / "photos"],
    ):
        line = as_nobody(*arguments)
        assert line.returncode == 1, line
        assert ("Permission denied" in line.stderr) or ("no permission" in line.stderr), line.stderr
        assert len(line.stderr.splitlines()) == 1
    (photos / ".diptych").chmod(0o755)
    searched = as_nobody("search", "cat", "-f", "-C", photos)
    assert (searched.returncode, len(searched.stdout.splitlines())) == (0, 6), searched.stderr
    shutil.copyfile(photos / "chelsea.jpg", photos / "more.jpg")
    searched = as_nobody("search", "cat", "-f", "-C", photos)  # it cannot take the new one in, and says so
    assert (searched.returncode, len(searched.stdout.splitlines())) == (0, 6), searched.stderr
    assert "searching the index as it is" in searched.stderr
    assert "cannot be written" in as_nobody("index", photos).stderr


# ---- two at once, and a full disk ------------------------------------------------------------------------------------


def many(folder: Path, count: int) -> Path:
    folder.mkdir()
    random = np.random.default_rng(0)
    for i in range(count):
        Image.fromarray(random.integers(0, 256, (40, 40, 3), np.uint8)).save(folder / f"{i:03}.png")
    return folder


def test_two_index_runs_at_once_and_searches_between(tmp_path):
    folder = many(tmp_path / "photos", 60)
    assert diptych("index", folder, cwd=tmp_path).returncode == 0
    random = np.random.default_rng(1)
    for i in range(60, 160):
        Image.fromarray(random.integers(0, 256, (40, 40, 3), np.uint8)).save(folder / f"{i:03}.png")
    runs = {}

    def start(name, *arguments):
        runs[name] = diptych(*arguments, cwd=folder)

    threads = [threading.Thread(target=start, args=(i, "index", ".", "--json")) for i in range(2)]
    threads += [
        threading.Thread(target=start, args=(f"search {i}", "search", "noise", "-n", "-f", "-t", "999"))
        for i in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i in range(2):
        assert runs[f"search {i}"].returncode == 0, runs[f"search {i}"].stderr
        assert 60 <= len(runs[f"search {i}"].stdout.splitlines()) <= 160
    # The second waits for the first, or says that it is not needed; together they took in all of it once.
    added = [json.loads(runs[i].stdout)["added"] for i in range(2) if runs[i].returncode == 0]
    assert sum(added) == 100
    for i in range(2):
        if runs[i].returncode:
            assert "another process is writing to the index" in complaint(runs[i])
    store = Store.open(folder / ".diptych")
    assert (len(store), len(set(store.paths())), store.check()) == (160, 160, [])


@pytest.mark.skipif(os.name != "posix" or os.geteuid() != 0, reason="needs root, to mount a small file system")
def test_a_full_disk_loses_nothing_that_was_committed(tmp_path):
    small = tmp_path / "small"
    small.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=128k", "tmpfs", small], capture_output=True).returncode:
        pytest.skip("may not mount")
    try:
        folder = many(tmp_path / "photos", 150)
        run = diptych("index", folder, "--index", small / "store", cwd=tmp_path)
        assert "No space left on device" in complaint(run)
        assert "make room" in run.stderr
        store = Store.open(small / "store")
        assert store.check() == []
        assert len(store) < 150
        found = diptych("search", "noise", "-n", "-f", "-t", "999", "--index", small / "store", cwd=tmp_path)
        assert (found.returncode, len(found.stdout.splitlines())) == (0, len(store))
        subprocess.run(["mount", "-o", "remount,size=8m", small], check=True)
        report = json.loads(diptych("index", folder, "--index", small / "store", "--json", cwd=tmp_path).stdout)
        assert report["added"] + report["skipped"] == 150
    finally:
        subprocess.run(["umount", "-l", small], check=True)
