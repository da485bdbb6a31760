"""What careless people type, and machines in a bad way: one plain line each, and nothing lost."""

from __future__ import annotations

import contextlib
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

from cli.main import main as run_command
from indexes.store import Store
from retrieval.bundle import Bundle
from retrieval.encoders import find_bundle
from tests.cli.commands import COMMAND, complaint, diptych
from tests.odd_photos import real_photos


@pytest.fixture
def here(shipped, monkeypatch, capfd):
    """The command in this process, started in the folder of photos: quicker where nothing depends on the process."""

    def here(*arguments):
        monkeypatch.chdir(shipped)
        monkeypatch.setenv("COLUMNS", "200")
        monkeypatch.setattr(sys, "argv", ["diptych", *map(str, arguments)])
        with pytest.raises(SystemExit) as leaving:
            run_command()
        printed = capfd.readouterr()
        return subprocess.CompletedProcess(arguments, leaving.value.code or 0, printed.out, printed.err)

    return here


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
        (["evaluate", "."], "none of these pictures has a caption"),
    ],
)
def test_one_plain_line(here, arguments, words):
    assert words in complaint(here(*arguments))


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
def test_wrong_usage(here, arguments):
    run = here(*arguments)
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
def test_odd_and_yet_answered(here, arguments):
    run = here("search", "-n", "-f", *map(os.fsdecode, arguments))
    assert run.returncode == 0, run.stderr
    assert len(run.stdout.splitlines()) == 6


def test_sentences_that_are_no_text(tmp_path):
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9\n")
    run = diptych("encode", "--texts", "latin.txt", cwd=tmp_path, env={"PYTHONUTF8": "1"})
    assert "latin.txt is not UTF-8 text: one sentence a line" in complaint(run)
    assert not (tmp_path / "vectors.npy").exists()


def test_pairs_that_are_odd(here, shipped, tmp_path):
    """A split that is no text, half a character in a caption, a picture's name that no file system takes."""
    photos = sorted(shipped.rglob("*.jpg"))[:3]
    lines = [
        {"image": str(photo), "captions": ["\ud800 x"], "split": split}
        for photo, split in zip(photos, (3, "x", ["y"]), strict=True)
    ]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert "its splits are: 3, ['y'], x" in complaint(here("evaluate", tmp_path / "p.jsonl", "--split", "z"))
    run = here("evaluate", tmp_path / "p.jsonl", "--split", "3", "--json")
    assert json.loads(run.stdout)["metrics"]["t2i_hit@1"] == 1.0, run.stderr
    (tmp_path / "q.jsonl").write_text(json.dumps({"image": "a" * 5000, "captions": ["x"]}))
    assert "1 of the 1 pictures" in complaint(here("evaluate", tmp_path / "q.jsonl"))


# ---- streams ---------------------------------------------------------------------------------------------------------


def shell(line: str, cwd: Path):
    command = f"{sys.executable} -c '{COMMAND}' {line}"
    return subprocess.run(["bash", "-o", "pipefail", "-c", command], cwd=cwd, capture_output=True, text=True)


def test_a_reader_that_leaves_early(shipped):
    run = shell("search cat -t 6 -f | head -n 1", shipped)
    assert (len(run.stdout.splitlines()), run.stderr) == (1, "")
    for _ in range(3):  # gone before the first byte
        assert shell("search cat -t 6 --json | true", shipped).stderr == ""


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
    for name in ("sub/..", photos, "sub/../../link/.", ""):
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
    model = Bundle.load(find_bundle("builtin")).copy_to(tmp_path / "model").path
    # Everything is imported before the user is changed: the new one may not even read the interpreter's files.
    code = (
        "import os, pathlib\nfrom cli.main import app, run\nfrom retrieval import encoders\n"
        f"encoders._BUILTIN_FOLDER = pathlib.Path({str(model)!r})\n"
        f"app(['search', 'warm', '-f', '-C', {str(tmp_path / 'warm')!r}], standalone_mode=False)\n"
        "print('---', flush=True)\nos.setgid(65534)\nos.setuid(65534)\nrun()"
    )
    shutil.copytree(photos, tmp_path / "warm")
    one = next(photos.glob("*.jpg"))

    def as_nobody(*arguments, cwd="/"):
        env = {**os.environ, "XDG_DATA_HOME": str(tmp_path / "nowhere"), "PYTHONDONTWRITEBYTECODE": "1"}
        shutil.copyfile(one, tmp_path / "warm" / f"{len(list((tmp_path / 'warm').iterdir()))}.jpg")  # to be taken in
        run = subprocess.run(
            [sys.executable, "-c", code, *map(str, arguments)], cwd=cwd, env=env, capture_output=True, text=True
        )
        run.stdout = run.stdout.partition("---\n")[2]
        return run

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
    shutil.copyfile(one, photos / "more.jpg")
    searched = as_nobody("search", "cat", "-f", "-C", photos)  # it cannot take the new one in, and says so
    assert (searched.returncode, len(searched.stdout.splitlines())) == (0, 6), searched.stderr
    assert "searching the index as it is" in searched.stderr
    assert "cannot be written" in as_nobody("index", photos).stderr


# ---- two at once, and a full disk ------------------------------------------------------------------------------------


def many(folder: Path, numbers: range) -> Path:
    folder.mkdir(exist_ok=True)
    for i in numbers:
        pixels = np.random.default_rng(i).integers(0, 256, (40, 40, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{i:03}.png")
    return folder


def test_two_index_runs_at_once_and_searches_between(tmp_path):
    folder = many(tmp_path / "photos", range(20))
    assert diptych("index", folder, cwd=tmp_path).returncode == 0
    many(folder, range(20, 80))
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
        assert 20 <= len(runs[f"search {i}"].stdout.splitlines()) <= 80
    # The second waits for the first, or says that it is not needed; together they took in all of it once.
    added = [json.loads(runs[i].stdout)["added"] for i in range(2) if runs[i].returncode == 0]
    assert sum(added) == 60
    for i in range(2):
        if runs[i].returncode:
            assert "another process is writing to the index" in complaint(runs[i])
    store = Store.open(folder / ".diptych")
    assert (len(store), len(set(store.paths())), store.check()) == (80, 80, [])


@pytest.mark.skipif(os.name != "posix" or os.geteuid() != 0, reason="needs root, to mount a small file system")
def test_a_full_disk_loses_nothing_that_was_committed(tmp_path):
    small = tmp_path / "small"
    small.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", small], capture_output=True).returncode:
        pytest.skip("may not mount")
    try:
        folder, store = many(tmp_path / "photos", range(10)), small / "store"
        assert diptych("index", folder, "--index", store, cwd=tmp_path).returncode == 0
        with (small / "filler").open("wb", buffering=0) as filler, contextlib.suppress(OSError):
            while filler.write(b"x" * 4096):
                pass
        many(folder, range(10, 20))
        run = diptych("index", folder, "--index", store, cwd=tmp_path)
        assert "No space left on device" in complaint(run)
        assert "make room" in run.stderr
        found = diptych("search", "noise", "-f", "-t", "999", "--index", store, cwd=tmp_path)
        assert (found.returncode, len(found.stdout.splitlines())) == (0, 10), found.stderr
        assert "searching the index as it is" in found.stderr
        assert Store.open(store).check() == []
        (small / "filler").unlink()
        report = json.loads(diptych("index", folder, "--index", store, "--json", cwd=tmp_path).stdout)
        assert (report["added"], report["skipped"]) == (10, 10)
    finally:
        subprocess.run(["umount", "-l", small], check=True)
