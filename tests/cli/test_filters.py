"""`diptych search` with filters, as a person types them."""

from __future__ import annotations

import json
import os
from datetime import datetime
from pathlib import Path

import pytest
from PIL import Image

from tests.cli.commands import complaint, diptych, result


@pytest.fixture(scope="module")
def indexed(tmp_path_factory):
    """Six pictures, taken one a year from 2018 on, indexed with the built-in model."""
    root = tmp_path_factory.mktemp("filters") / "photos"
    for i, name in enumerate(("a.jpg", "b.png", "2020/c.jpeg", "2020/may/d.JPG", "x/2020/e.png", "x/f.webp")):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        exif = Image.Exif()
        exif.get_ifd(0x8769)[0x9003] = f"{2018 + i}:05:31 23:59:59"
        Image.new("RGB", (100 * (i + 1), 300), (40 * i, 200, 90)).save(path, exif=exif.tobytes())
        os.utime(path, (0, datetime(2010 + i, 12, 31, 23, 59).timestamp()))
    assert result(diptych("index", root, "--json"))["added"] == 6
    return root


def search(root: Path, *options, cwd: Path | None = None) -> str:
    """The first letters of the names found, in alphabetical order."""
    matches = result(diptych("search", "a colour", "-n", "--json", *options, cwd=cwd or root))
    return "".join(sorted(Path(match["path"]).name[0] for match in matches))


@pytest.mark.parametrize(
    ("options", "found"),
    [
        (["--path", "*.png"], "be"),
        (["--path", "2020"], "cde"),
        (["--path", "/2020/*"], "cd"),
        (["--path", "2020", "--path", "a.*", "--path", "!may"], "ace"),
        (["--taken", "2019-05..2020-05-31"], "bc"),
        (["--taken", "..2018"], "a"),
        (["--modified", "2014.."], "ef"),
        (["--modified", "2011-12-31"], "b"),
        (["--width", "300..500"], "cde"),
        (["--height", "301.."], ""),
        (["--orientation", "square"], "c"),
        (["--orientation", "portrait,square"], "abc"),
        (["--type", "jpg"], "acd"),
        (["--type", "png", "--type", "webp"], "bef"),
        (["--where", "width > 300 and type != 'png' or taken_at < '2019'"], "adf"),
        (["--type", "jpg", "--width", "200..", "--where", "folder == '2020'"], "c"),
        (["--words", "dog"], ""),
        (["--path", "2020", "-t", "1"], "cde"),
    ],
)
def test_what_is_left(indexed, options, found):
    if "-t" in options:
        assert search(indexed, *options) in found
        return
    assert search(indexed, *options) == found


def test_globs_are_relative_to_where_one_stands(indexed):
    assert search(indexed, "--path", "2020", cwd=indexed / "x") == "e"
    assert search(indexed, "--path", "/2020/*", cwd=indexed / "x") == "e"
    assert search(indexed, "--path", "may/d.JPG", cwd=indexed / "2020") == "d"
    assert search(indexed, "--path", "2020/may", "--all", cwd=indexed / "x") == "d"


def test_ids_of_one_search_for_another(indexed, tmp_path):
    matches = result(diptych("search", "green", "-t", "2", "--json", "-n", cwd=indexed))
    wanted = "".join(f"{match['id']}\n" for match in matches)
    (tmp_path / "ids").write_text(wanted)
    names = "".join(sorted(Path(match["path"]).name[0] for match in matches))
    assert search(indexed, "--ids", tmp_path / "ids") == names
    run = diptych("search", "a colour", "-n", "--json", "--ids", "-", cwd=indexed, input=wanted)
    assert len(json.loads(run.stdout)) == 2


def test_how_many_qualify_is_said_when_they_are_too_few(indexed):
    some = diptych("search", "a colour", "-n", "-f", "--type", "png", cwd=indexed)
    assert (len(some.stdout.splitlines()), some.stderr) == (2, "2 of 6 pictures qualify\n")
    one = diptych("search", "a colour", "-n", "-f", "--path", "a.jpg", cwd=indexed)
    assert one.stderr == "1 of 6 pictures qualifies\n"
    none = diptych("search", "a colour", "-n", "--width", "9999..", cwd=indexed)
    assert (none.returncode, none.stdout, none.stderr) == (0, "", "nothing found: 0 of 6 pictures qualify\n")
    enough = diptych("search", "a colour", "-n", "-f", "-t", "2", "--type", "png", cwd=indexed)
    assert (len(enough.stdout.splitlines()), enough.stderr) == (2, "")
    unfiltered = diptych("search", "a colour", "-n", "-f", "-t", "99", cwd=indexed)
    assert (len(unfiltered.stdout.splitlines()), unfiltered.stderr) == (6, "")
    as_json = diptych("search", "a colour", "-n", "--json", "--width", "9999..", cwd=indexed)
    assert (as_json.stdout, as_json.stderr) == ("[]\n", "nothing found: 0 of 6 pictures qualify\n")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--taken", "last summer"], "'last summer' is no date: write it as 2021"),
        (["--modified", "2021-02-30"], "'2021-02-30' is no date: day"),
        (["--width", "wide"], "'wide' is no range of width"),
        (["--orientation", "diagonal"], "landscape, portrait, square"),
        (["--path", "[a"], "without a ]"),
        (["--words", "?!"], "there is no word in '?!'"),
        (["--where", "widht > 3"], "there is no column 'widht'; the columns are id, kind, path"),
        (["--where", "width = 3"], "'width = 3' is no condition"),
        (["--where", "width > '3'"], "width holds numbers"),
        (["--where", ""], "is no condition"),
    ],
)
def test_mistakes_are_one_plain_line(indexed, options, message):
    assert message in complaint(diptych("search", "a colour", "-n", *options, cwd=indexed))


def test_ids_that_are_none(indexed, tmp_path):
    (tmp_path / "ids").write_text("1\na.jpg\n")
    line = complaint(diptych("search", "a colour", "-n", "--ids", tmp_path / "ids", cwd=indexed))
    assert f"{tmp_path / 'ids'}, line 2: 'a.jpg' is not the id of a row" in line
    missing = diptych("search", "a colour", "-n", "--ids", tmp_path / "none", cwd=indexed)
    assert missing.returncode == 2
    assert "No such file" in missing.stderr
