"""The page of pictures found: self-contained, linked to the files, safe against whatever names and queries hold."""

from __future__ import annotations

import base64
import io
import os
import re
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote_to_bytes, urlsplit

import numpy as np
import pytest
from PIL import Image

from retrieval.errors import UsageError
from retrieval.library import Match
from retrieval.report import results_page, write_results_page


class Page(HTMLParser):
    """What a browser would make of it: elements with their attributes, and the text."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.words = [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.words.append(data)

    def all(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]

    @property
    def text(self):
        return "".join(self.words)


def match(file: Path, score: float = 0.25) -> Match:
    return Match(file.name, score, file, None, None, None, 0)


@pytest.fixture
def photo(tmp_path):
    path = tmp_path / "wide.png"
    pixels = np.zeros((300, 900, 3), np.uint8)
    pixels[:, 450:] = (250, 10, 10)
    Image.fromarray(pixels).save(path)
    return path


def pictures(page: Page) -> list[Image.Image]:
    sources = [image["src"] for image in page.all("img") if "src" in image]
    assert all(source.startswith("data:image/jpeg;base64,") for source in sources)
    return [Image.open(io.BytesIO(base64.b64decode(source.split(",")[1]))) for source in sources]


def test_a_thumbnail_of_the_picture_linked_to_its_file(photo):
    page = Page(results_page([("red", [match(photo, 0.2345)])]))
    (thumbnail,) = pictures(page)
    assert thumbnail.size == (320, 107)
    assert np.asarray(thumbnail)[50, [20, 300]] == pytest.approx(np.array([[0, 0, 0], [250, 10, 10]]), abs=8)
    (link,) = page.all("a")
    assert link["href"] == f"file://{photo}"
    assert "wide.png" in page.text
    assert "0.234" in page.text or "0.235" in page.text


def test_best_first_query_by_query(photo, tmp_path):
    other = tmp_path / "other.png"
    Image.new("RGB", (8, 8), "blue").save(other)
    page = Page(results_page([("one", [match(photo, 0.9), match(other, 0.1)]), ("two", [match(other)]), ("three", [])]))
    assert [link["title"] for link in page.all("a")] == ["wide.png", "other.png", "other.png"]
    assert page.text.index("one") < page.text.index("0.900") < page.text.index("0.100") < page.text.index("two")
    assert page.text.count("Nothing found.") == 1
    assert "Diptych: 3 searches" in page.text


def test_nothing_is_fetched_from_anywhere(photo):
    text = results_page([("q", [match(photo)])])
    assert not re.search(r"https?:|<script|<link|@import|url\(", text)


@pytest.mark.parametrize(
    "query",
    ["<script>alert(1)</script>", "a & b < c > d", "\"quoted\" 'too'", "{title} {0} {{x}}", "猫 🐈", "</title></h2>"],
)
def test_queries_come_out_as_they_were_typed(photo, query):
    page = Page(results_page([(query, [match(photo)])]))
    assert not page.all("script")
    assert len(page.all("h2")) == len(page.all("title")) == 1
    assert page.text.count(query) == 3  # title, heading of the page, heading of the search


@pytest.mark.parametrize(
    "name",
    [
        b'a "b" <i>&amp;.png',
        b"per%41cent #1?.png",
        b"new\nline.png",
        b"caf\xe9.png",
        "猫.png".encode(),
        b"x' onerror='y.png",
    ],
)
def test_links_lead_to_the_file_whatever_its_name(tmp_path, name):
    file = Path(os.fsdecode(os.fsencode(tmp_path) + b"/" + name))
    Image.new("RGB", (4, 4), "red").save(file, "PNG")
    page = Page(results_page([("q", [match(file)])]))
    (link,) = page.all("a")
    address = urlsplit(link["href"])
    assert (unquote_to_bytes(address.path), address.query, address.fragment) == (os.fsencode(file), "", "")
    assert len(pictures(page)) == 1
    assert not page.all("i")
    assert set(page.all("img")[0]) == {"src", "alt"}
    page_file = write_results_page([("q", [match(file)])], tmp_path / "page.html")
    page_file.read_bytes().decode("utf-8")


def test_a_picture_that_is_gone_or_damaged_leaves_the_rest(photo, tmp_path):
    (tmp_path / "bad.png").write_text("no picture")
    page = Page(results_page([("q", [match(tmp_path / "gone.png"), match(photo), match(tmp_path / "bad.png")])]))
    assert len(pictures(page)) == 1
    assert [image["alt"] for image in page.all("img")] == ["gone.png (unreadable)", "wide.png", "bad.png (unreadable)"]


def test_written_where_asked_or_to_a_new_temporary_file(photo, tmp_path, monkeypatch):
    target = tmp_path / "page.html"
    assert write_results_page([("q", [match(photo)])], target) == target
    assert target.read_text("utf-8") == results_page([("q", [match(photo)])])
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    first, second = (write_results_page([("q", [])]) for _ in range(2))
    assert first != second
    assert first.parent == tmp_path
    assert first.suffix == ".html"


def test_a_place_that_cannot_be_written_is_one_line(photo, tmp_path):
    for target in (tmp_path, tmp_path / "no" / "page.html"):
        with pytest.raises(UsageError, match="cannot be written") as caught:
            write_results_page([("q", [])], target)
        assert str(target) in str(caught.value)
