"""Tars, lists and sentences through the command, with the built-in model and real photos."""

from __future__ import annotations

import contextlib
import csv
import json
import os
import pty
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from tests.cli.commands import complaint, diptych, result
from tests.odd_photos import real_photos

SAID = {"chelsea": "a cat", "coffee": "a cup of coffee", "rocket": "a rocket launching into the sky"}


@pytest.fixture(scope="module")
def corpora(tmp_path_factory):
    """Three real photos in a folder, and the same in a tar, a list and a file of sentences."""
    root = tmp_path_factory.mktemp("corpora")
    (root / "photos").mkdir()
    for photo in real_photos():
        if photo.stem in SAID:
            shutil.copyfile(photo, root / "photos" / photo.name)
    names = sorted(path.name for path in (root / "photos").iterdir())
    assert len(names) == 3
    with tarfile.open(root / "set.tar", "w") as archive:
        for name in names:
            archive.add(root / "photos" / name, name)
    with (root / "list.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["filepath", "title", "price"])
        table.writerows([f"photos/{name}", SAID[Path(name).stem], i] for i, name in enumerate(names))
    (root / "sentences.txt").write_text("".join(f"{said}\n" for said in SAID.values()))
    return root


@pytest.fixture
def here(corpora, tmp_path):
    return Path(shutil.copytree(corpora, tmp_path / "corpora"))


def test_who_looks_on_hears_that_a_large_folder_is_not_looked_through(here):
    assert diptych("index", "photos", cwd=here).returncode == 0
    code = "import retrieval.library as l; l.QUICK_SCAN = 2; from cli.main import run; run()"

    def search(*options):
        ours, theirs = pty.openpty()
        command = [sys.executable, "-c", code, "search", "a cat", *options]
        subprocess.run(command, cwd=here / "photos", stdout=subprocess.DEVNULL, stderr=theirs, check=True)
        os.close(theirs)
        with os.fdopen(ours, "rb", buffering=0) as terminal, contextlib.suppress(OSError):  # closed at the other end
            return terminal.read(10_000).decode()
        return ""

    said = search()
    assert said.startswith("3 images are too many to look for new ones at each search: take them in with")
    assert search("--no-indexing") == ""


@pytest.mark.parametrize(("source", "place"), [("set.tar", "set.tar/chelsea.png"), ("list.csv", "photos/chelsea.png")])
def test_pictures_of_tars_and_lists(here, source, place):
    first = diptych("index", source, cwd=here)
    assert (first.returncode, first.stdout) == (0, "")
    index = here / f"{source}.diptych"
    said, speed = first.stderr.splitlines()
    assert said == f"3 added; 3 pictures searchable (new index {index})"
    assert speed.startswith("3 images in ")
    assert result(diptych("index", source, "--json", cwd=here))["skipped"] == 3
    found = result(diptych("search", "a cat", "-C", source, "--json", cwd=here))
    assert (found[0]["path"], len(found)) == (str(here / place), 3)
    if source == "list.csv":
        assert (found[0]["caption"], found[0]["columns"]) == ("a cat", {"price": 0})
    page = here / "page.html"
    assert diptych("search", "a cat", "--index", index, "--html", page, cwd=here).returncode == 0
    assert page.read_text().count("data:image/jpeg;base64,") == 3
    facts = result(diptych("info", source, "--json", "--check", cwd=here))
    assert (facts["pictures"], facts["texts"], facts["problems"]) == (3, 0, [])
    assert facts["source"] == str(here / source)


def test_the_same_scores_as_from_the_folder(here):
    """A picture has one vector, wherever it lies."""
    answers = {}
    for source in ("photos", "set.tar", "list.csv"):
        assert diptych("index", source, cwd=here).returncode == 0
        found = result(diptych("search", "a cup of coffee", "-C", source, "--json", cwd=here))
        answers[source] = [(Path(match["path"]).name, match["score"]) for match in found]
    assert answers["set.tar"] == answers["photos"] == answers["list.csv"]


def test_a_picture_finds_its_sentence(here):
    made = diptych("index", "sentences.txt", cwd=here)
    assert made.stderr.startswith("3 added; 3 sentences searchable (new index ")
    assert made.stderr.splitlines()[-1].startswith("3 sentences in ")
    for name, said in SAID.items():
        photo = next((here / "photos").glob(f"{name}.*"))
        found = result(diptych("search", "--like", photo, "-C", "sentences.txt", "--json", cwd=here))
        assert (found[0]["text"], found[0]["path"], set(found[0])) == (said, None, {"path", "text", "score"})
    lines = diptych("search", "a kitten", "-C", "sentences.txt", "-t", "1", cwd=here).stdout
    assert lines.split("\t")[1:] == ["a cat\n"]
    assert diptych("search", "a kitten", "-C", "sentences.txt", "-f", cwd=here).stdout == ""
    facts = result(diptych("info", "sentences.txt", "--json", cwd=here))
    assert (facts["pictures"], facts["texts"]) == (0, 3)


def test_sentences_of_a_list_name_their_pictures(here):
    assert diptych("index", "list.csv", "--texts", cwd=here).returncode == 0
    photo = here / "photos" / "coffee.png"
    (line,) = diptych("search", "--like", photo, "-C", "list.csv", "-t", "1", cwd=here).stdout.splitlines()
    assert line.split("\t")[1:] == ["a cup of coffee", str(photo)]
    assert diptych("search", "--like", photo, "-C", "list.csv", "-t", "1", "-f", cwd=here).stdout == f"{photo}\n"
    nothing = diptych("search", "x", "-C", "list.csv", "--kind", "image", cwd=here)
    assert (nothing.stdout, nothing.stderr) == ("", "nothing found\n")
    assert diptych("search", "x", "-C", "list.csv", "--kind", "sound", cwd=here).returncode == 2


def test_search_takes_in_new_lines_of_a_list(here):
    assert diptych("index", "sentences.txt", cwd=here).returncode == 0
    with (here / "sentences.txt").open("a") as file:
        file.write("an orange flower\n")
    found = result(diptych("search", "an orange flower", "-C", "sentences.txt", "--json", "-n", cwd=here))
    assert len(found) == 3
    found = result(diptych("search", "an orange flower", "-C", "sentences.txt", "--json", cwd=here))
    assert (found[0]["text"], len(found)) == ("an orange flower", 4)
    (here / "sentences.txt").unlink()
    gone = diptych("search", "a cat", "-C", ".", "--index", "sentences.txt.diptych", cwd=here)
    assert len(gone.stdout.splitlines()) == 4
    assert gone.stderr.startswith("searching the index as it is: the indexed file ")


def test_broken_members_are_told_with_exit_code_3(here):
    with tarfile.open(here / "set.tar", "a") as archive:
        archive.add(here / "sentences.txt", "broken.jpg")
    report = result(diptych("index", "set.tar", "--json", cwd=here), 3)
    assert [(failure["path"], report["added"]) for failure in report["failures"]] == [
        (str(here / "set.tar" / "broken.jpg"), 3)
    ]


def test_one_plain_line_for_what_is_no_corpus(here):
    (here / "urls.csv").write_text("url,caption\nhttps://a.b/c.jpg,x\n")
    (here / "more.csv").write_text("image\nhttps://a.b/c.jpg\n")
    (here / "two.jsonl").write_text(json.dumps({"image": "photos/coffee.png"}))
    for arguments, said in (
        (["https://a.b/c.tar"], "is an address: download it first"),
        (["urls.csv"], "lists addresses of pictures, not files"),
        (["more.csv"], "lists addresses, not files: 1 of its 1 pictures"),
        (["shards-{0..3}.tar"], "4 of the 4 files"),
        (["photos/coffee.png"], "is itself a picture"),
        (["photos", "--texts"], "is a folder of pictures"),
        (["two.jsonl", "--texts"], "has no sentences"),
    ):
        assert said in complaint(diptych("index", *arguments, cwd=here)), arguments
    assert list(here.glob("*.diptych")) == []  # and nothing is left behind
    assert "make one with  diptych index" in complaint(diptych("search", "x", "-C", "sentences.txt", cwd=here))
    assert diptych("index", "list.csv", "--index", "i", cwd=here).returncode == 0
    assert "make a second one" in complaint(diptych("index", "two.jsonl", "--index", "i", cwd=here))


def test_captions_of_flickr8k(shared_data, tmp_path):
    """Image to text over real captions: most of 20 photos find one of their own among 100 sentences first."""
    photos = sorted((shared_data / "flickr8k" / "originals").iterdir())[:20]
    said = {}
    for line in (shared_data / "flickr8k" / "captions.jsonl").read_text().splitlines():
        row = json.loads(line)
        said[Path(row["image"]).stem] = row["captions"]
    for photo in photos:
        shutil.copyfile(photo, tmp_path / photo.name)
    rows = [{"image": photo.name, "captions": said[photo.stem]} for photo in photos]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert diptych("index", "pairs.jsonl", "--texts", cwd=tmp_path).returncode == 0
    from retrieval.library import Library, Term

    library = Library.open(tmp_path / "pairs.jsonl")
    assert library.counts() == {"pictures": 0, "texts": 100}
    first = [library.search([Term(image=tmp_path / photo.name)], k=1)[0].path for photo in photos]
    assert sum(path == photo.name for path, photo in zip(first, photos, strict=True)) >= 15
