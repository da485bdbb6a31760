"""Walking a folder: against os.walk, and through every trap that a folder of photos may hold."""

import os
import random
import shutil
import socket
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest

from retrieval import folder as module
from retrieval.errors import UsageError
from retrieval.folder import ScannedFile, scan, scan_columns
from retrieval.images import IMAGE_SUFFIXES
from tests.odd_photos import make_odd_folder


def touch(root, *names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"x")


def paths(root, below="", **options):
    """What is found, both ways: file by file, and as columns."""
    found = list(scan(root, below, **options))
    columns = scan_columns(root, below, **dict.fromkeys(options, lambda *_: None))
    assert columns.take(np.arange(len(columns))) == found
    return [file.path for file in found]


def test_the_odd_folder(tmp_path):
    odd = make_odd_folder(tmp_path / "odd")
    found = paths(odd.path)
    assert sorted(found) == sorted([*odd.good, *odd.bad])
    assert not set(found) & set(odd.skipped)
    for path in found:
        assert (odd.path / path).is_file()


def test_equals_a_walk_of_a_random_tree(tmp_path):
    chance = random.Random(0)
    folders = [tmp_path]
    for number in range(60):
        folders.append(chance.choice(folders) / f"{chance.choice('abcXYZ é')}{number}{chance.choice(['', '.jpg'])}")
        folders[-1].mkdir()
    for number in range(300):
        name = f"{number}{chance.choice(['.jpg', '.JPEG', '.Png', '.txt', '.jpg.xmp', '', '.heic', '.'])}"
        (chance.choice(folders) / name).write_bytes(bytes(number))
    expected = {}
    for top, _, names in os.walk(tmp_path):
        for name in names:
            path = Path(top, name)
            if path.suffix.lower() in IMAGE_SUFFIXES:
                info = path.stat()
                expected[path.relative_to(tmp_path).as_posix()] = (info.st_size, info.st_mtime_ns)
    found = list(scan(tmp_path))
    assert {file.path: (file.size, file.mtime_ns) for file in found} == expected
    assert [file.path for file in found] == sorted(expected, key=lambda path: path.split("/"))  # by parts, depth first
    assert found == list(scan(tmp_path))
    for inner in folders:
        below = inner.relative_to(tmp_path).as_posix()
        assert paths(tmp_path, below) == [
            path for path in paths(tmp_path) if below == "." or path.startswith(f"{below}/")
        ]


def test_suffixes_in_either_case(tmp_path):
    touch(tmp_path, *(f"{number}{suffix}" for number, suffix in enumerate(IMAGE_SUFFIXES)))
    touch(tmp_path, *(f"{number}{suffix.upper()}" for number, suffix in enumerate(IMAGE_SUFFIXES)))
    touch(tmp_path, "jpg", "a.jpg~", "a.jpg.part", "a.mp4", "a.psd", "a.eps", "a.svg")
    assert len(paths(tmp_path)) == 2 * len(IMAGE_SUFFIXES)


def test_hidden_and_clutter(tmp_path):
    touch(
        tmp_path,
        ".a.jpg",
        "._b.jpg",
        ".git/c.jpg",
        ".diptych/d.jpg",
        "@eaDir/e.jpg/S.jpg",
        "__MACOSX/f.jpg",
        "g/.h/i.jpg",
    )
    touch(tmp_path, "@eaDirs/1.jpg", "__macosx.jpg", "@eaDir.jpg")
    assert paths(tmp_path) == ["@eaDir.jpg", "@eaDirs/1.jpg", "__macosx.jpg"]


def test_below_a_place_that_is_left_out(tmp_path):
    touch(tmp_path, ".hidden/a/b.jpg", "c/d.jpg", "e.jpg")
    for below in (".hidden", ".hidden/a", "gone", "e.jpg", "..", "c/../c", "c/d.jpg"):
        assert paths(tmp_path, below) == [], below
    for below in ("c", "c/", "./c", "c/."):
        assert paths(tmp_path, below) == ["c/d.jpg"], below
    for below in ("", ".", "./"):
        assert paths(tmp_path, below) == ["c/d.jpg", "e.jpg"], below


def test_a_hidden_or_linked_root_is_walked(tmp_path):
    touch(tmp_path, ".photos/a.jpg")
    (tmp_path / "link").symlink_to(".photos")
    (tmp_path / ".photos/here").symlink_to(tmp_path / "link")
    assert paths(tmp_path / ".photos") == ["a.jpg"]
    assert paths(tmp_path / "link") == ["a.jpg"]


def test_relative_root(tmp_path, monkeypatch):
    touch(tmp_path, "a/b.jpg")
    monkeypatch.chdir(tmp_path)
    assert paths(Path()) == ["a/b.jpg"]
    assert paths(Path("a")) == ["b.jpg"]


def test_names_that_are_no_text(tmp_path):
    """Names that begin like each other, that end in what separates them elsewhere, and that are not UTF-8."""
    names = ["a.jpg", "a.jpg.jpg", os.fsdecode(b"\xff.jpg"), "ä.jpg", "a\u0308.jpg", "a\nb.jpg", "a\\.jpg"]
    expected = [f"{folder}/{name}" for folder in (os.fsdecode(b"d\xe9"), "d", "d d", "d/e.jpg") for name in names]
    touch(tmp_path, *expected)
    assert sorted(paths(tmp_path)) == sorted(expected)


# --- Links ---


def test_links_back_into_the_tree_add_nothing(tmp_path):
    root = tmp_path / "root"
    touch(root, "a/1.jpg", "z/2.jpg")
    (root / "a" / "up").symlink_to("..")
    (root / "a" / "far up").symlink_to("/")
    (root / "a" / "itself").symlink_to(".")
    (root / "a" / "other").symlink_to("../z")  # sorts before z: the real path must win all the same
    (root / "a" / "2.jpg").symlink_to("../z/2.jpg")
    (root / "z" / "back").symlink_to("../a")
    (root / "parent").symlink_to(tmp_path)
    assert paths(root) == ["a/1.jpg", "z/2.jpg"]
    assert paths(root, "a") == ["a/1.jpg"]
    assert paths(root, "a/other") == []
    assert paths(root, "parent/root") == []


def test_links_out_of_the_tree_are_followed_once(tmp_path):
    root, out = tmp_path / "root", tmp_path / "out"
    touch(root, "a.jpg")
    touch(out, "1.jpg", "inner/2.jpg", "inner/deeper/3.jpg")
    touch(tmp_path, "root2/x.jpg")  # a name that begins like the root's does not lie below it
    (out / "inner" / "round").symlink_to(out)
    (out / "home").symlink_to(root)
    for name, target in {
        "b": out,
        "c": out,
        "d": out / "inner",
        "e": tmp_path / "root2",
        "f.jpg": out / "1.jpg",
    }.items():
        (root / name).symlink_to(target)
    expected = ["a.jpg", "b/1.jpg", "b/inner/2.jpg", "b/inner/deeper/3.jpg", "e/x.jpg", "f.jpg"]
    assert paths(root) == expected
    assert paths(root, "b/inner") == ["b/inner/2.jpg", "b/inner/deeper/3.jpg"]


def test_folders_that_link_to_each_other_end(tmp_path):
    """Twelve folders outside, each with links to all: 12! ways through them."""
    (tmp_path / "root").mkdir()
    outside = [tmp_path / f"out{number}" for number in range(12)]
    for each in outside:
        touch(each, "1.jpg")
        for other in outside:
            (each / other.name).symlink_to(other)
    (tmp_path / "root" / "start").symlink_to(outside[0])
    assert len(paths(tmp_path / "root")) == 12


def test_links_to_hidden_places_are_followed(tmp_path):
    """git-annex: what is seen is a link into .git, sometimes to a file without a suffix."""
    touch(tmp_path, ".git/annex/one.jpg", ".git/annex/two", ".albums/x/3.jpg", "data.bin")
    for name in ("1.jpg", "again.jpg"):
        (tmp_path / name).symlink_to(".git/annex/one.jpg")
    (tmp_path / "2.jpg").symlink_to(".git/annex/two")
    (tmp_path / "4.jpg").symlink_to("data.bin")
    (tmp_path / "x").symlink_to(".albums/x")
    assert paths(tmp_path) == ["1.jpg", "2.jpg", "4.jpg", "again.jpg", "x/3.jpg"]


def test_a_linked_file_has_its_targets_size_and_time(tmp_path):
    touch(tmp_path, "root/a.jpg")
    (tmp_path / "big").write_bytes(bytes(5000))
    os.utime(tmp_path / "big", ns=(1, 1_234_567_890_123_456_789))
    (tmp_path / "root" / "b.jpg").symlink_to(tmp_path / "big")
    size, mtime = 5000, (tmp_path / "big").stat().st_mtime_ns
    assert list(scan(tmp_path / "root"))[1] == ScannedFile("b.jpg", size, mtime)


def test_links_to_nowhere(tmp_path):
    touch(tmp_path, "a.jpg")
    (tmp_path / "gone.jpg").symlink_to("no/such/file.jpg")
    (tmp_path / "self.jpg").symlink_to("self.jpg")
    (tmp_path / "self").symlink_to("self")
    (tmp_path / "through.jpg").symlink_to("a.jpg/b.jpg")
    assert paths(tmp_path, on_error=pytest.fail) == ["a.jpg"]


# --- What cannot be read, and what moves ---


@contextmanager
def unprivileged(root):
    """Root reads everything: meanwhile this process is another user, who may come to `root`."""
    me = os.geteuid()
    root.chmod(0o755)
    if me == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(me)


def test_what_is_refused_is_reported_and_the_rest_is_found():
    with TemporaryDirectory() as name:
        root = Path(name)
        touch(root, "a/1.jpg", "b/2.jpg", "c/d/3.jpg", "e.jpg", "f.jpg/4.jpg")
        (root / "b").chmod(0o311)  # may be entered but not listed
        (root / "c").chmod(0o644)  # may be listed, but nothing in it looked at
        paths(root, on_error=lambda *_: None)  # imports what is imported late: the other user may not read it
        refused = []
        with unprivileged(root):
            found = paths(root, on_error=lambda *refusal: refused.append(refusal))
            below = paths(root, "c/d", on_error=lambda *refusal: refused.append(refusal))
            with pytest.raises(UsageError, match=r"/b: no permission to read it$"):
                paths(root)
            with pytest.raises(UsageError, match=r"/b: no permission to read it$"):
                paths(root / "b", on_error=pytest.fail)
            with pytest.raises(UsageError, match=r"/b: no permission to read it$"):
                scan_columns(root)
            again = []
            scan_columns(root, on_error=lambda *refusal: again.append(refusal))
            assert again == refused[:2]
    assert (found, below) == (["a/1.jpg", "e.jpg", "f.jpg/4.jpg"], [])
    assert refused == [(path, "no permission to read it") for path in ("b", "c/d", "c/d")]


def test_a_root_that_cannot_be_listed_is_no_empty_folder(tmp_path):
    touch(tmp_path, "file.jpg")
    with pytest.raises(UsageError, match="gone: there is no such folder"):
        paths(tmp_path / "gone", on_error=pytest.fail)
    with pytest.raises(UsageError, match=r"file.jpg: this is no folder"):
        paths(tmp_path / "file.jpg", on_error=pytest.fail)
    with pytest.raises(UsageError, match="gone: there is no such folder"):
        paths(tmp_path / "gone", "inner", on_error=pytest.fail)


def test_what_vanishes_meanwhile_is_left_out(tmp_path, monkeypatch):
    touch(tmp_path, "a/1.jpg", "b/2.jpg", "c.jpg", "d.jpg")
    walk = scan(tmp_path, on_error=pytest.fail)
    assert next(walk).path == "a/1.jpg"
    shutil.rmtree(tmp_path / "b")  # listed already, not walked yet
    assert [file.path for file in walk] == ["c.jpg", "d.jpg"]

    listing = os.scandir

    def scandir(path):
        """List, and lose a file before anything is asked of it."""
        entries = listing(path)
        (tmp_path / "c.jpg").unlink(missing_ok=True)
        return entries

    monkeypatch.setattr(module.os, "scandir", scandir)
    assert "c.jpg" not in paths(tmp_path, on_error=pytest.fail)


def test_pipes_sockets_and_devices_are_not_pictures(tmp_path, monkeypatch):
    touch(tmp_path, "a.jpg")
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "null.jpg").symlink_to(os.devnull)
    monkeypatch.chdir(tmp_path)  # a socket's path may not be long
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("socket.jpg")
        assert paths(tmp_path, on_error=pytest.fail) == ["a.jpg"]


@contextmanager
def nested(root, name, depth):
    """Folders in folders, with a picture in the last; taken apart afterwards, as pytest cannot remove such a tree."""
    here = os.open(root, os.O_RDONLY)
    for _ in range(depth):
        os.mkdir(name, dir_fd=here)
        here, outer = os.open(name, os.O_RDONLY, dir_fd=here), here
        os.close(outer)
    os.close(os.open("a.jpg", os.O_CREAT | os.O_WRONLY, dir_fd=here))
    os.close(here)
    try:
        yield
    finally:
        top, spare = root / name, root / "spare"
        while (top / name).exists():
            (top / name).rename(spare)
            top.rmdir()
            spare.rename(top)


def test_a_tree_deeper_than_any_recursion(tmp_path):
    with nested(tmp_path, "d", 1100):
        assert paths(tmp_path) == ["d/" * 1100 + "a.jpg"]
        assert paths(tmp_path, "/".join(["d"] * 1050)) == ["d/" * 1100 + "a.jpg"]


def test_a_path_longer_than_the_system_takes_is_reported(tmp_path):
    refused = []
    with nested(tmp_path, "d" * 250, 20):
        assert paths(tmp_path, on_error=lambda path, reason: refused.append(reason)) == []
    assert refused == ["cannot be read: File name too long"]
