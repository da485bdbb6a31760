"""Filters against predicates on one row at a time: slow, obvious, and written without the filters' own parts."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import time
from datetime import datetime, timedelta

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from indexes import filters
from indexes.errors import FilterError
from indexes.segments import ROW_SCHEMA, Row, encode_rows
from indexes.store import ModelRef, Store
from tests.indexes.test_store import MODEL, fill, row, unit
from tests.indexes.test_vectors import brute

F = pc.field
few = settings(max_examples=150, deadline=None)


class Rows:
    """A table in the place of a snapshot, which notes what is read of it."""

    def __init__(self, rows: list[Row], **extra) -> None:
        self.table = encode_rows(dict(enumerate(rows)))
        for name, values in extra.items():
            self.table = self.table.append_column(name, values if isinstance(values, pa.Array) else pa.array(values))
        self.schema = self.table.schema
        self.read: set[str] = set()

    def columns(self, *names):
        self.read |= set(names)
        return self.table.select(names)


def picked(rows: Rows, where) -> list[int]:
    return np.flatnonzero(filters.mask(rows, where)).tolist()


def paths_matching(paths: list[str], condition) -> list[str]:
    return [paths[i] for i in picked(Rows([row(path) for path in paths]), condition)]


# ---- paths ---------------------------------------------------------------------------------------------------------


def slow_glob(pattern: str, path: str) -> bool:
    """As .gitignore: the path or a folder above it matches, part by part."""
    body = pattern.rstrip("/")
    parts = path.split("/")
    for n in range(1, len(parts) + 1):
        if pattern.endswith("/") and n == len(parts):
            continue  # that is the file
        if "/" in body:
            if match_parts([part for part in body.split("/") if part], parts[:n]):
                return True
        elif match_name(body, parts[n - 1]):
            return True
    return False


def match_parts(pattern: list[str], parts: list[str]) -> bool:
    if not pattern:
        return not parts
    if pattern[0] == "**":
        if len(pattern) == 1:
            return bool(parts)
        return any(match_parts(pattern[1:], parts[i:]) for i in range(len(parts) + 1))
    return bool(parts) and match_name(pattern[0], parts[0]) and match_parts(pattern[1:], parts[1:])


def match_name(pattern: str, name: str) -> bool:
    if not pattern:
        return not name
    if pattern[0] == "*":
        return any(match_name(pattern[1:], name[i:]) for i in range(len(name) + 1))
    if pattern[0] == "[":
        negated = pattern[1] in "!^"
        members, _, rest = pattern[2 if negated else 1 :].partition("]")
        ranges = re.findall("(.)-(.)|(.)", members)
        inside = bool(name) and any(name[0] == one or (a and a <= name[0] <= b) for a, b, one in ranges)
        return bool(name) and inside != negated and match_name(rest, name[1:])
    if pattern[0] == "\\":
        return (
            match_name(pattern[1:], name)
            if pattern[1] not in "*?[\\"
            else name[:1] == pattern[1] and match_name(pattern[2:], name[1:])
        )
    return bool(name) and pattern[0] in ("?", name[0]) and match_name(pattern[1:], name[1:])


names = st.text("abA.é-\n$", min_size=1, max_size=4)
paths = st.lists(names, min_size=1, max_size=4).map("/".join)
part = st.lists(
    st.sampled_from(["a", "b", "A", ".", "é", "*", "?", "[ab]", "[!a]", "[a-c]", "[+-9]", "\\*", "$"]), min_size=1
).map("".join)
patterns = st.builds(
    lambda parts, start, end: start + "/".join(parts) + end,
    st.lists(part | st.just("**"), min_size=1, max_size=4),
    st.sampled_from(["", "", "/"]),
    st.sampled_from(["", "", "/"]),
)


@few
@given(st.lists(paths, max_size=8), patterns)
@example(["a/b", "b/a/c", "c"], "**")
@example(["a/b", "a"], "a/**")
@example(["a", "x/a/b/c"], "**/a/**/c")
def test_globs_equal_a_loop_over_the_parts(paths, pattern):
    assert paths_matching(paths, filters.glob(pattern)) == [path for path in paths if slow_glob(pattern, path)]


@few
@given(st.lists(paths, max_size=8), patterns, paths)
def test_globs_below_a_folder_are_relative_to_it(paths, pattern, folder):
    paths += [f"{folder}/{path}" for path in paths]
    expected = [path for path in paths if path.startswith(folder + "/") and slow_glob(pattern, path[len(folder) + 1 :])]
    assert paths_matching(paths, filters.glob(pattern, folder)) == expected


@few
@given(st.lists(paths, max_size=8), paths)
def test_below_equals_startswith(paths, folder):
    paths += [f"{folder}/{path}" for path in paths]
    assert paths_matching(paths, filters.below(folder)) == [path for path in paths if path.startswith(folder + "/")]
    assert filters.below("") is None


@pytest.mark.skipif(shutil.which("git") is None, reason="git is the reference")
def test_globs_are_gitignore_s(tmp_path):
    subprocess.run(["git", "init", "-q", tmp_path], check=True)
    tree = [
        "a.jpg", "b.png", "2021/a.jpg", "2021/05/a.jpg", "2021/05/b.png", "x/2021/c.jpg", "x/2021.jpg", "a/b/c/d.jpg",
        "a/c.jpg", "a/x/c.jpg", "A/c.jpg", "a.b/c", "[x]/y.jpg", "sp ace/u.jpg", "a*b.jpg", "aXb.jpg", "**",
        ".h/.x.jpg",
    ]  # fmt: skip
    asked = [
        "*.jpg", "2021", "2021/", "/2021", "x/2021", "2021/*", "2021/**", "2021/*.jpg", "**/2021", "**/*.png",
        "a/**/c.jpg", "a/*/c.jpg", "*/c.jpg", "/*.jpg", "[ab].*", "[!a].*", "a?b.jpg", "a\\*b.jpg", "\\[x\\]", "?.jpg",
        "*", "**", "A", "c", "c/", "2021/05/", "/a", "a/b", "b/c", "/**/c.jpg", "sp ace", "u.jpg", "*.h", ".*", "*/",
        "[a-c]", "[[]x]",
    ]  # fmt: skip
    for pattern in asked:
        (tmp_path / ".gitignore").write_text(pattern + "\n", "utf-8")
        run = subprocess.run(
            ["git", "-c", "core.ignorecase=false", "check-ignore", "--no-index", "-z", "--stdin"],
            cwd=tmp_path,
            input="\0".join(tree),
            capture_output=True,
            text=True,
        )
        assert run.returncode in (0, 1), run.stderr
        assert paths_matching(tree, filters.glob(pattern)) == [name for name in run.stdout.split("\0") if name], pattern


def test_names_that_are_not_utf_8_are_matched_as_they_are():
    latin, other, replaced = os.fsdecode(b"caf\xe9/\xff.jpg"), os.fsdecode(b"caf\xe8/x.jpg"), "caf\ufffd/\ufffd.jpg"
    everything = [latin, other, replaced, "café/x.jpg", "cafe/x.jpg"]
    assert paths_matching(everything, filters.glob(latin)) == [latin]
    assert paths_matching(everything, filters.glob(os.fsdecode(b"caf\xe9"))) == [latin]
    assert paths_matching(everything, filters.glob("caf\ufffd")) == [replaced]
    assert paths_matching(everything, filters.glob("café")) == ["café/x.jpg"]
    assert paths_matching(everything, filters.glob("caf?")) == everything
    assert paths_matching(everything, filters.glob(os.fsdecode(b"caf[\xe8-\xe9]/x*"))) == [other]
    assert paths_matching(everything, filters.below(os.fsdecode(b"caf\xe9"))) == [latin]
    assert paths_matching(everything, filters.glob("*.jpg", os.fsdecode(b"caf\xe9"))) == [latin]
    assert paths_matching(everything, filters.below("café")) == ["café/x.jpg"]


def test_several_globs_and_those_to_leave_out():
    everything = ["a.jpg", "b.png", "x/a.png", "x/c.gif", "!odd.jpg"]
    assert paths_matching(everything, filters.globs(["*.jpg", "*.gif"])) == ["a.jpg", "x/c.gif", "!odd.jpg"]
    assert paths_matching(everything, filters.globs(["*.png", "*.jpg", "!x", "!a.*"])) == ["b.png", "!odd.jpg"]
    assert paths_matching(everything, filters.globs(["!x"])) == ["a.jpg", "b.png", "!odd.jpg"]
    assert paths_matching(everything, filters.globs(["\\!odd.jpg"])) == ["!odd.jpg"]
    assert paths_matching(everything, filters.globs(["./x/*.png"])) == ["x/a.png"]
    assert filters.globs([]) is None


@pytest.mark.parametrize(
    ("pattern", "message"),
    [("", "no file"), ("/", "no file"), ("!", "no file"), ("a[b", "without a"), ("[z-a]", "back")],
)
def test_patterns_that_mean_nothing(pattern, message):
    with pytest.raises(FilterError, match=message):
        filters.globs([pattern])


# ---- dates ---------------------------------------------------------------------------------------------------------

moments = st.datetimes(datetime(1971, 1, 2), datetime(2099, 12, 30)).map(lambda moment: moment.replace(microsecond=0))
dates = st.builds(lambda moment, n: moment.isoformat()[:n], moments, st.sampled_from([4, 7, 10, 13, 16, 19]))
ranges = dates | dates.map(lambda d: d + "..") | dates.map(lambda d: ".." + d) | st.tuples(dates, dates).map("..".join)


def slow_dated(text: str, moment: datetime | None) -> bool:
    """ISO dates sort like text, and what a date leaves unsaid may be anything."""
    if moment is None:
        return False
    low, dots, high = text.partition("..")
    iso = moment.isoformat()
    return iso[: len(low)] >= low and (iso[: len(high)] <= high or not high if dots else iso.startswith(low))


@few
@given(st.lists(st.none() | moments, max_size=8), ranges, st.data())
def test_date_ranges_equal_a_comparison_of_texts(moments, text, data):
    near = data.draw(st.lists(st.timedeltas(timedelta(-2), timedelta(2)), max_size=3))
    start = next(edge for edge in (*filters.date_range("1990"), datetime(1990, 1, 1)) if edge)
    moments += [start + (by - timedelta(microseconds=by.microseconds)) for by in near]
    rows = Rows([row(str(i), taken_at=moment) for i, moment in enumerate(moments)])
    try:
        condition = filters.taken(text)
    except FilterError:  # it ends before it begins
        assert not any(slow_dated(text, moment) for moment in moments)
        return
    assert picked(rows, condition) == [i for i, moment in enumerate(moments) if slow_dated(text, moment)]


@pytest.fixture(params=["UTC", "Europe/Berlin", "America/St_Johns", "Pacific/Apia", "Africa/Casablanca"])
def zone(request, monkeypatch):
    monkeypatch.setenv("TZ", request.param)
    time.tzset()
    yield request.param
    monkeypatch.undo()
    time.tzset()


def test_file_dates_are_local(zone):
    rng = np.random.default_rng(0)
    seconds = rng.integers(40_000_000, 4_000_000_000, 3000).tolist()
    seconds += [datetime(2021, 3, 28).timestamp() + 900 * i for i in range(96)]  # clocks are changed in Berlin
    seconds += [datetime(2011, 12, 29).timestamp() + 900 * i for i in range(96)]  # Samoa leaves out a day
    seconds += [-5_000_000_000, 6_000_000_000, 0]
    rows = Rows([row(str(i), mtime_ns=int(second) * 10**9 + 999) for i, second in enumerate(seconds)])
    local = [datetime.fromtimestamp(int(second)) for second in seconds]
    derived = filters.DERIVED["mtime"].make(rows.table).to_pylist()
    assert derived[:-3] == local[:-3]  # the last three lie before 1971 or after 2100
    for text in ("2021", "2021-03", "2021-03-28", "..1999", "2030-06..", "2011-12-29..2012-01", "2000..2020-02-29"):
        expected = [i for i, moment in enumerate(local) if slow_dated(text, moment)]
        assert picked(rows, filters.modified(text)) == expected, text
        low, dots, high = text.partition("..")
        written = [f"mtime >= '{low}'"] * bool(low) + [f"mtime <= '{high if dots else low}'"] * bool(high or not dots)
        assert picked(rows, " and ".join(written)) == expected, text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is no date"), ("yesterday", "is no date"), ("2021-13", "month"), ("2021-02-30", "day"), ("21", "is no"),
        ("2021-5", "is no date"), ("2021..2020", "ends before"), ("2021...2022", "is no date"), ("0000", "year"),
        ("2021-05..2021-04", "ends before"), ("２０２１", "is no date"), ("2021-01-01T25", "hour"),
    ],
)  # fmt: skip
def test_dates_that_are_none(text, message):
    for condition in (filters.taken, filters.modified):
        with pytest.raises(FilterError, match=message) as raised:
            condition(text)
        assert "\n" not in str(raised.value)


def test_the_last_year_there_is():
    rows = Rows(
        [row("a", taken_at=datetime(9999, 12, 31, 23, 59, 59)), row("b", taken_at=datetime(9998, 1, 1)), row("c")]
    )
    for text in ("9999", "9999-12", "9999-12-31", "9999-12-31T23:59:59", "9998-12.."):
        assert picked(rows, filters.taken(text)) == [0]
    assert picked(rows, filters.taken("..")) == [0, 1]
    assert picked(rows, ~filters.taken("9999")) == [1]
    assert picked(rows, "taken_at <= '9999'") == [0, 1]
    assert picked(rows, "taken_at > '9999'") == []
    assert picked(rows, "not taken_at <= '9999'") == []
    assert picked(rows, filters.modified("0001..9999")) == [0, 1, 2]


# ---- numbers, shapes, types, words, ids ----------------------------------------------------------------------------

sizes = st.none() | st.integers(1, 5)


@few
@given(st.lists(st.tuples(sizes, sizes), max_size=10), st.integers(0, 6), st.integers(0, 6))
def test_sizes_and_orientations(shapes, low, high):
    rows = Rows([row(str(i), width=w, height=h) for i, (w, h) in enumerate(shapes)])
    low, high = sorted((low, high))

    def where(holds):
        return [i for i, (w, h) in enumerate(shapes) if holds(w, h)]

    assert picked(rows, filters.number_range("width", f"{low}..{high}")) == where(lambda w, _: w and low <= w <= high)
    assert picked(rows, filters.number_range("width", f"{low}..")) == where(lambda w, _: w and w >= low)
    assert picked(rows, filters.number_range("height", f" .. {high} ")) == where(lambda _, h: h and h <= high)
    assert picked(rows, filters.number_range("height", str(low))) == where(lambda _, h: h == low)
    named = {
        "landscape": where(lambda w, h: w and h and w > h),
        "portrait": where(lambda w, h: w and h and w < h),
        "square": where(lambda w, h: w and h and w == h),
    }
    for name, expected in named.items():
        assert picked(rows, filters.orientation(name)) == expected
        assert picked(rows, F("orientation") == name) == expected
    assert picked(rows, filters.orientation("portrait", "square")) == sorted(named["portrait"] + named["square"])


@pytest.mark.parametrize("text", ["", "big", "1000px", "-5", "1.5", "5..3", "1..2..3", ". .", "1" * 19, "١"])
def test_ranges_of_numbers_that_are_none(text):
    with pytest.raises(FilterError, match=r"range .*width"):
        filters.number_range("width", text)


def test_types_are_suffixes_in_any_spelling():
    everything = {
        "a.jpg": "jpeg", "b.JPEG": "jpeg", "c.jfif": "jpeg", "d.png": "png", "e.HIF": "heic", "f.tif": "tiff",
        "g": None, "h.jpg/i": None, "jpg": None, ".jpg": "jpeg", "k.": None, "l.tar.gz": "gz", "m.x\n": "x",
        "n.ÄÖ": "äö",
    }  # fmt: skip
    paths = list(everything)
    rows = Rows([row(path) for path in paths])
    assert filters.DERIVED["type"].make(rows.table).to_pylist() == list(everything.values())
    for asked, kind in (
        ("jpg", "jpeg"),
        ("jpeg", "jpeg"),
        (".JPE", "jpeg"),
        ("heic", "heic"),
        ("gz", "gz"),
        ("zip", "zip"),
    ):
        expected = [path for path, found in everything.items() if found == kind]
        assert paths_matching(paths, filters.file_types(asked)) == expected
        assert [paths[i] for i in picked(rows, f"type == '{asked}'")] == expected
        assert [paths[i] for i in picked(rows, F("type") == kind)] == expected
    assert paths_matching(paths, filters.file_types("png", "tif")) == ["d.png", "f.tif"]
    assert filters.file_types() is None
    with pytest.raises(FilterError, match="empty"):
        filters.file_types("png", " ")
    assert filters.DERIVED["folder"].make(rows.table).to_pylist() == ["h.jpg" if p == "h.jpg/i" else "" for p in paths]


texts = st.text("aBbéÉßдД_1 -.,'\n", max_size=12)


@few
@given(st.lists(st.none() | texts, max_size=8), texts)
@example(["a dog", "DOG!", "dogs", "hot-dog", "dog_1", None, "", "snow: dog"], "Dog")
@example(["a dog in the snow", "snow dog", "dog"], "snow, dog")
def test_words_equal_a_set_of_words(captions, asked):
    wanted = set(re.findall(r"\w+", asked.lower()))
    rows = Rows([row(str(i), caption=caption) for i, caption in enumerate(captions)])
    if not wanted:
        with pytest.raises(FilterError, match="no word"):
            filters.words(asked, rows.schema)
        return
    expected = [i for i, text in enumerate(captions) if text and wanted <= set(re.findall(r"\w+", text.lower()))]
    assert picked(rows, filters.words(asked, rows.schema)) == expected


def test_words_are_looked_for_in_captions_and_labels():
    rows = Rows(
        [row("a", caption="a dog"), row("b", caption="snow"), row("c"), row("d"), row("e", caption="dogsnow")],
        labels=pa.array([["snow"], ["big dog", "sled"], None, ["dog", "Snow"], []], pa.list_(pa.string())),
        label=["x", None, "dog snow", None, None],
        title=["", "", "", "", "dog snow"],
    )
    assert picked(rows, filters.words("dog snow", rows.schema)) == [0, 1, 2, 3]
    assert picked(rows, filters.words("sled", rows.schema)) == [1]
    assert rows.read == {"id", "caption", "label", "labels"}


@few
@given(st.integers(0, 9), st.lists(st.integers(-3, 12)))
def test_ids(n, wanted):
    rows = Rows([row(str(i)) for i in range(n)])
    expected = [i for i in range(n) if i in wanted]
    assert picked(rows, filters.ids(wanted)) == expected
    assert picked(rows, filters.ids(np.array(wanted, np.int64))) == expected


def test_ids_from_a_file_and_what_are_none():
    assert filters.read_ids([b"3\n", b"\n", b" 12\r\n"], "ids") == [3, 12]
    with pytest.raises(FilterError, match=r"ids, line 2: 'a\.jpg' is not the id"):
        filters.read_ids([b"3\n", b"a.jpg\n"], "ids")
    for wrong in ([2**70], ["a"], [1.5], 3):
        with pytest.raises(FilterError, match="whole numbers"):
            filters.ids(wrong)


# ---- written conditions --------------------------------------------------------------------------------------------

COLUMNS = {
    "width": st.integers(0, 3),
    "country": st.sampled_from(["FR", "DE", "it's"]),
    "iso": st.sampled_from([0.5, 1, 2]),
}
OPERATORS = {
    "==": lambda a, b: a == b, "!=": lambda a, b: a != b, "<": lambda a, b: a < b, "<=": lambda a, b: a <= b,
    ">": lambda a, b: a > b, ">=": lambda a, b: a >= b,
}  # fmt: skip


@st.composite
def comparison(draw):
    """A comparison as a text, and as a function of a row that gives True, False or None for unknown."""
    name = draw(st.sampled_from(list(COLUMNS)))
    kind = draw(st.sampled_from(["column first", "value first", "in", "not in", "none", "chain"]))
    value, other = draw(COLUMNS[name]), draw(COLUMNS[name])
    sign = draw(st.sampled_from(list(OPERATORS)))
    compare = OPERATORS[sign]

    def unless_none(holds):
        return lambda row: None if row[name] is None else holds(row[name])

    if kind == "column first":
        return f"{name} {sign} {value!r}", unless_none(lambda v: compare(v, value))
    if kind == "value first":
        return f"{value!r} {sign} column({name!r})", unless_none(lambda v: compare(value, v))
    if kind == "in":
        return f"{name} in ({value!r}, {other!r})", unless_none(lambda v: v in (value, other))
    if kind == "not in":
        return f"{name} not in [{value!r}]", unless_none(lambda v: v not in [value])
    if kind == "none":
        return f"{name} is not None", lambda row: row[name] is not None
    return f"{value!r} <= {name} {sign} {other!r}", unless_none(lambda v: value <= v and compare(v, other))


def both(pairs, word):
    (left, one), (right, other) = pairs
    absorbing = word == "or"

    def holds(row):
        values = (one(row), other(row))
        return absorbing if absorbing in values else None if None in values else not absorbing

    return f"({left} {word} {right})", holds


def negated(pair):
    text, holds = pair
    return f"not ({text})", lambda row: None if holds(row) is None else not holds(row)


conditions = st.recursive(
    comparison(),
    lambda inner: st.builds(both, st.tuples(inner, inner), st.sampled_from(["and", "or"])) | inner.map(negated),
    max_leaves=6,
)
values = st.fixed_dictionaries({name: st.none() | one for name, one in COLUMNS.items()})


@settings(max_examples=300, deadline=None)
@given(st.lists(values, max_size=8), conditions)
def test_written_conditions_equal_python_on_each_row(values, condition):
    text, holds = condition
    rows = Rows(
        [row(str(i), width=one["width"]) for i, one in enumerate(values)],
        country=pa.array([one["country"] for one in values], pa.string()),
        iso=pa.array([one["iso"] for one in values], pa.float64()),
    )
    assert picked(rows, text) == [i for i, one in enumerate(values) if holds(one)]


@few
@given(st.lists(st.none() | moments, max_size=8), dates, st.sampled_from(list(OPERATORS)))
def test_written_dates_stand_for_all_that_they_leave_open(moments, date, sign):
    rows = Rows([row(str(i), taken_at=moment) for i, moment in enumerate(moments)])
    expected = [i for i, m in enumerate(moments) if m and OPERATORS[sign](m.isoformat()[: len(date)], date)]
    assert picked(rows, f"taken_at {sign} '{date}'") == expected


def test_what_else_can_be_written():
    rows = Rows(
        [row("a", width=3, height=2, caption="a dog"), row("b/c", width=2, height=2), row("d", width=1, height=2)],
        labels=pa.array([["dog", "big cat"], None, ["cat"]], pa.list_(pa.string())),
        flagged=[True, None, False],
        **{"my size": [1, 2, 3], "class": ["x", "y", "z"]},
    )
    assert picked(rows, "width > height") == [0]
    assert picked(rows, "flagged") == [0]
    assert picked(rows, "not flagged or flagged is None") == [1, 2]
    assert picked(rows, "flagged == False") == [2]
    assert picked(rows, "'do' in caption") == [0]
    assert picked(rows, "'do' in labels") == []
    assert picked(rows, "'cat' in labels") == [2]
    assert picked(rows, "'cat' not in labels") == [0]
    assert picked(rows, "column('my size') >= 2 and column('class') != 'y'") == [2]
    assert picked(rows, "caption in (None, 'a dog')") == [0, 1, 2]
    assert picked(rows, "width in ()") == []
    assert picked(rows, "folder == 'b' or orientation == 'portrait'") == [1, 2]
    assert picked(rows, "-1 < width < 1e999") == [0, 1, 2]
    assert picked(rows, "\n width == 3 ") == [0]
    assert picked(rows, " and ".join(["width > 0"] * 1000)) == [0, 1, 2]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("widht > 3", "there is no column 'widht'; the columns are id, .*width.*mtime"),
        ("column('no') == 1", "there is no column 'no'"),
        ("width > '3'", "width holds numbers and cannot be compared with '3'"),
        ("width == True", "width holds numbers and cannot be compared with True"),
        ("caption == 3", "caption holds text and cannot be compared with 3"),
        ("taken_at > 2021", "taken_at holds dates and cannot be compared with 2021"),
        ("taken_at > 'May'", "'May' is no date"),
        ("path_bytes == 'a'", "path_bytes holds binary"),
        ("width < None", "cannot be compared with None"),
        ("width", "compare it with something"),
        ("width > caption", "width is int32; caption is string"),
        ("width > 3 and", "is no condition"),
        ("width = 3", "is no condition"),
        ("", "is no condition"),
        ("1 < 2", "there is no column in 1 < 2"),
        ("True", "is no comparison"),
        ("width + 1 > 2", "there is no column|neither a column nor a value"),
        ("__import__('os').system('true') == 0", "there is no column|neither"),
        ("width > len('a')", "neither a column nor a value"),
        ("width.real > 1", "there is no column|neither"),
        ("column() > 1", "takes the name of one column"),
        ("column(width) > 1", "neither a column nor a value"),
        ("[x for x in width]", "is no comparison"),
        ("width in 3", "takes several values"),
        ("'a' in width", "only a text can be in a column"),
        ("caption in caption", "only a text can be in a column"),
        ("width > 3\x00", "is no condition"),
        ("width > " + "9" * 30, "is no condition"),
        ("width > " + "9" * 9999, "is no condition"),
        ("not " * 9999 + "width > 3", "is no condition"),
        ("(" * 999 + "width" + ")" * 999 + " > 3", "is no condition"),
        ("caption == '\udce9'", "not in UTF-8"),
        ("width > 1; width", "is no condition"),
        ("width > (lambda: 1)()", "neither"),
        ("width > 1j", "cannot be compared"),
        (" and ".join(["width > 0"] * 20_000), "more than 1,000 comparisons"),
    ],
)
def test_conditions_that_cannot_be_read(text, message):
    with pytest.raises(FilterError, match=message) as raised:
        filters.mask(Rows([row("a", width=3, caption="x")]), text)
    assert "\n" not in str(raised.value)


# ---- any pyarrow expression ----------------------------------------------------------------------------------------


def test_only_named_columns_are_read():
    rows = Rows([row("a.jpg", width=3, height=2), row("b.png", width=1, height=2)], country=["FR", None])
    for where, read in (
        (F("width") > 2, {"width"}),
        ((F("country") == "FR") & (F("type") == "jpeg"), {"country", "path"}),
        (F("orientation") == "landscape", {"width", "height"}),
        (F("mtime") > datetime(1970, 1, 1), {"mtime_ns"}),
        (pc.scalar(True), set()),
        (filters.glob("a*"), {"path", "path_bytes"}),
    ):
        rows.read = set()
        filters.mask(rows, where)
        assert rows.read == {"id", *read}


def test_a_stored_column_hides_a_derived_one():
    rows = Rows([row("a.jpg"), row("b.png")], type=["holiday", "jpg"])
    assert picked(rows, F("type") == "holiday") == [0]
    assert picked(rows, "type == 'jpg'") == [1]
    assert picked(rows, filters.file_types("jpg")) == [0]


def test_values_that_are_unknown_do_not_qualify():
    rows = Rows([row("a", width=3), row("b")])
    assert picked(rows, F("width") != 4) == [0]
    assert picked(rows, ~(F("width") == 4)) == [0]
    assert picked(rows, F("width") == pa.scalar(None, pa.int32())) == []
    assert picked(rows, F("width").is_null()) == [1]
    assert picked(rows, pc.scalar(True)) == [0, 1]
    assert picked(Rows([]), F("width") > 3) == []


@pytest.mark.parametrize(
    ("where", "message"),
    [
        (
            F("widht") > 3,
            "there is no column 'widht'; the columns are id, kind, path.*folder, type, orientation, mtime",
        ),
        (F("width") > "big", r"width > \"big\".*cannot be applied.*width is int32"),
        (F("width"), "is int32, not true or false"),
        (F("width", "x") > 3, "cannot be applied"),
        (F(7) > 3, "by their names, not by numbers"),
        (pc.match_substring_regex(F("path"), "("), "missing"),
        (True, "not bool"),
        (np.array([True]), "not ndarray"),
        (None, "not NoneType"),
        (pc.starts_with(F("path_bytes"), b"\xe9") > 3, "on bytes cannot be applied"),
    ],
)
def test_expressions_that_cannot_be_applied(where, message):
    with pytest.raises(FilterError, match=message) as raised:
        filters.mask(Rows([row("a", width=3)]), where)
    assert "\n" not in str(raised.value)


# ---- criteria ------------------------------------------------------------------------------------------------------


def test_criteria_are_joined_with_and():
    rows = Rows(
        [
            row("x/a.jpg", width=9, height=5, taken_at=datetime(2021, 5, 1), caption="a dog"),
            row("x/b.jpg", width=9, height=5, taken_at=datetime(2020, 5, 1), caption="a dog"),
            row("a.jpg", width=9, height=5, taken_at=datetime(2021, 5, 1), caption="a dog"),
            row("x/c.png", width=5, height=9, taken_at=datetime(2021, 5, 2), caption="a cat"),
        ]
    )

    def chosen(**options):
        condition = filters.criteria(rows.schema, **options)
        return list(range(4)) if condition is None else picked(rows, condition)

    assert chosen() == [0, 1, 2, 3]
    assert chosen(path=["/a.jpg"], folder="x") == [0]
    assert chosen(taken_in="2021", width="6..", containing="dog", path=["x"]) == [0]
    assert chosen(types=["jpg,png"], orientations=["portrait, square"], height="9") == [3]
    assert chosen(among=[1, 3], modified_in="1970..", where="width == 9") == [1]
    assert chosen(among=[]) == []


# ---- in a store ----------------------------------------------------------------------------------------------------


@pytest.fixture
def store(tmp_path):
    """Three segments, rows deleted from each."""
    store = Store.create(tmp_path / ".diptych", None, MODEL)
    for part in range(3):
        vectors = unit(40, part)
        with store.write() as writer:
            for i in range(40):
                writer.add(row(f"{part}/{i}.jpg", width=i, caption=f"number {i}" if i % 2 else None), vectors[i])
    with store.write() as writer:
        for row_id in range(0, 120, 7):
            writer.remove(row_id)
    assert len(store.snapshot.segments) > 1
    assert store.snapshot.manifest.tombstones
    return store


def test_columns_and_rows_taken_are_those_of_the_table(store):
    table = store.rows()
    assert table.schema == store.schema == ROW_SCHEMA
    fresh = Store.open(store.path).snapshot
    assert fresh.columns("width", "path").equals(table.select(["width", "path"]))
    assert fresh.columns("path", "id").equals(table.select(["path", "id"]))
    assert "rows" not in fresh.__dict__
    positions = np.array([50, 3, 3, len(store) - 1])
    for some in (positions, positions[:1], np.arange(len(store)), positions[:0]):
        expected = table.select(["caption", "id"]).take(some)
        assert Store.open(store.path).snapshot.records(some, "caption", "id") == expected.to_pylist()
        assert fresh.records(some, "caption", "id") == expected.to_pylist()
        assert store.snapshot.records(some, "caption", "id") == expected.to_pylist()


def test_few_rows_are_taken_from_their_row_groups(tmp_path, monkeypatch):
    monkeypatch.setattr("indexes.segments._GROUP", 4)
    store = Store.create(tmp_path / ".diptych", None, MODEL)
    fill(store, 99)
    with store.write() as writer:
        writer.remove(50)
    snapshot = Store.open(store.path).snapshot
    expected = store.rows().select(["path", "id", "caption"]).take([60, 2]).to_pylist()
    assert snapshot.records(np.array([60, 2]), "path", "id", "caption") == expected
    assert snapshot._columns == {}


@pytest.mark.parametrize("factory", [None, "Flat", "IVF1,Flat"])
@pytest.mark.parametrize(
    "where",
    [F("width") > 20, F("width") < 3, F("caption").is_valid(), F("width") < 0, filters.glob("1/"), "width == 13"],
)
def test_k_results_whenever_k_rows_qualify(store, factory, where):
    if factory:
        store.rebuild_index(factory)
        fill(store, 5, seed=9)
    table = store.rows()
    everything = [one for one in table.to_pylist() if one["width"] is not None]
    holds = {
        str(F("width") > 20): lambda one: one["width"] > 20,
        str(F("width") < 3): lambda one: one["width"] < 3,
        str(F("caption").is_valid()): lambda one: one["caption"] is not None,
        str(F("width") < 0): lambda one: False,
        str(filters.glob("1/")): lambda one: one["path"].startswith("1/"),
        "width == 13": lambda one: one["width"] == 13,
    }[str(where)]
    qualify = {one["id"] for one in everything if holds(one)}
    allowed = store.mask(where)
    assert set(table["id"].to_numpy()[allowed].tolist()) == qualify
    queries = unit(3, 77)
    for k in (1, 5, 200):
        hits = store.search(queries, k, allowed)
        expected = brute(store.vectors(), queries, k, allowed)
        assert (hits.rows >= 0).sum(axis=1).tolist() == [min(k, len(qualify))] * 3
        if factory != "IVF1,Flat":
            assert np.array_equal(hits.rows, expected.rows)


@pytest.mark.parametrize("wanted", [0, 1, 5, 64, 65, 200])
def test_single_rows_are_those_of_whole_columns(tmp_path, monkeypatch, wanted):
    monkeypatch.setattr("indexes.segments._GROUP", 16)
    store = Store.create(tmp_path / "store", None, ModelRef("m", "f", 4))
    for part in range(3):  # segments of several row groups, and an extra column that one of them lacks
        with store.write() as writer:
            for i in range(80):
                columns = {"place": f"{part} {i}"} if part != 1 and i % 3 else {}
                row = Row(path=f"{part}/{i}.jpg", size=i, mtime_ns=1, hash="x", width=i or None, columns=columns)
                writer.add(row, np.eye(4, dtype=np.float32)[i % 4])
    with store.write() as writer:
        for i in (0, 17, 80, 81, 239):
            writer.remove(i)
    positions = np.random.default_rng(wanted).integers(0, len(store), wanted)
    names = ("path", "id", "width", "place")
    expected = [store.rows().select(names).to_pylist()[position] for position in positions]
    fresh = Store.open(store.path).snapshot
    assert fresh.records(positions, *names) == expected
    fresh.columns(*names)  # held from here on
    assert fresh.records(positions, *names) == expected
