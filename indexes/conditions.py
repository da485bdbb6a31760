"""Conditions on rows, as pyarrow expressions: by path, date, size, orientation, type, words and id."""

from __future__ import annotations

import operator
import re
import unicodedata
from collections.abc import Callable, Collection, Iterable
from datetime import datetime, timedelta, timezone
from typing import Any, TypeAlias

import pyarrow as pa
import pyarrow.compute as pc

from indexes.derived import OFFSETS_KNOWN, SPELLINGS, TEXT, TEXTS, file_type, kind_of
from indexes.errors import FilterError
from indexes.segments import ESCAPE

Condition: TypeAlias = Any  # pc.Expression, which has no type stubs

_ORIENTATIONS = {"landscape": operator.gt, "portrait": operator.lt, "square": operator.eq}  # of width to height
_TEXT_COLUMNS = ("caption", "captions", "label", "labels")  # where words are looked for, if the rows have them


def all_of(conditions: Iterable[Condition | None]) -> Condition | None:
    """Join conditions with "and"; None stands for no condition."""
    return _joined(operator.and_, [one for one in conditions if one is not None])


def any_of(conditions: Iterable[Condition]) -> Condition | None:
    """Join conditions with "or"; None where there are none."""
    return _joined(operator.or_, list(conditions))


def _joined(join: Callable[[Any, Any], Any], parts: list[Condition]) -> Condition | None:
    while len(parts) > 1:  # a balanced tree: Arrow goes down into it recursively
        pairs = [join(*pair) for pair in zip(parts[::2], parts[1::2], strict=False)]
        parts = pairs + ([parts[-1]] if len(parts) % 2 else [])
    return parts[0] if parts else None


def below(folder: str) -> Condition | None:
    """Match what lies in a folder, relative to the root; None for the root ("")."""
    return glob("/" + re.sub(r"([*?\[\\])", r"\\\1", folder) + "/") if folder else None


def glob(pattern: str, folder: str = "") -> Condition:
    r"""Match paths as a line of .gitignore does.

    A pattern with a ``/`` at its beginning or middle is a path from the folder on; any other is the name of a file or
    folder at any depth. What matches a folder matches all that lies in it; with a ``/`` at its end, a pattern matches
    folders only. ``*`` and ``?`` stand for characters other than ``/``, ``**/`` for any folders or none, ``[a-c]`` and
    ``[!a-c]`` for one character; ``\`` takes the next character as it is. Upper and lower case differ. A name that is
    not UTF-8 is matched byte by byte.

    Args:
        pattern: the pattern, as Python has file names (surrogate escapes where they are not UTF-8).
        folder: what it is relative to, itself relative to the root ("").

    Raises:
        FilterError: the pattern is empty, has a ``[`` without a ``]``, or a range that runs backwards.

    """
    as_bytes = _regex(*(text.encode("utf-8", ESCAPE).decode("latin-1") for text in (pattern, folder)))
    return pc.coalesce(
        pc.match_substring_regex(pc.field("path_bytes"), as_bytes),
        pc.match_substring_regex(pc.field("path"), _regex(pattern, folder)),
    )


def globs(patterns: Collection[str], folder: str = "") -> Condition | None:
    """Match any of some patterns and none of those behind a ``!``; None where there is no pattern. See `glob`."""
    wanted = any_of(glob(pattern, folder) for pattern in patterns if not pattern.startswith("!"))
    unwanted = any_of(glob(pattern[1:], folder) for pattern in patterns if pattern.startswith("!"))
    return all_of([wanted, None if unwanted is None else ~unwanted])


_GLOB = re.compile(
    r"(?P<folders>(?:(?<=/)|^)(?:\*\*/+)+)|(?P<rest>(?:(?<=/)|^)\*\*$)|(?P<stars>\*+)|(?P<one>\?)"
    r"|\[(?P<negated>[!^]?)(?P<set>(?:\\.|[^\\])(?:\\.|[^\]\\])*)\]|(?P<open>\[)|\\(?P<escaped>.)|(?P<plain>.)",
    re.DOTALL,
)
_RANGE = re.compile(r"\\?(.)(?:-\\?(.))?", re.DOTALL)


def _regex(pattern: str, folder: str) -> str:
    """Translate a glob into a regular expression of RE2, Arrow's engine."""
    body = re.sub(r"^(?:\./+)+", "/", pattern).rstrip("/")
    anchored = "/" in body
    body = body.lstrip("/")
    if not body:
        raise FilterError(f"the pattern {pattern!r} names no file or folder")
    start = "^" + literal(folder + "/") if folder else ""
    if anchored:
        start = start or "^"
    elif body.startswith("*"):  # any folders, then the beginning of a name: any characters
        start, body = start and start + ".*", body.lstrip("*")
    else:
        start = start + "(?:.*/)?" if start else "(?:^|/)"
    simple = {"folders": "(?:.*/)?", "rest": ".+", "stars": "[^/]*", "one": "[^/]"}
    out = [f"(?s){start}"]
    for token in _GLOB.finditer(body):
        kind = token.lastgroup or ""
        if kind == "open":
            raise FilterError(f"the pattern {pattern!r} has a [ without a ]: write \\[ for the character itself")
        if kind == "set":
            out.append(_set(token["set"], bool(token["negated"]), pattern))
        else:
            out.append(simple.get(kind) or literal(token[kind]))
    return "".join(out) + ("/" if pattern.endswith("/") else r"(?:/|\z)")


def _set(members: str, negated: bool, pattern: str) -> str:
    """Translate what stands between brackets. Neither a set nor its opposite holds the slash."""
    parts = ["/"] if negated else []
    for one in _RANGE.finditer(members):
        low, high = ord(one[1]), ord(one[2] or one[1])
        if low > high:
            raise FilterError(f"the pattern {pattern!r} has a range that runs backwards: {one[0]}")
        around = ((low, min(high, ord("/") - 1)), (max(low, ord("/") + 1), high))
        parts += [f"{literal(chr(a))}-{literal(chr(b))}" for a, b in around if a <= b]
    nothing = r"[^\x00-\x{10ffff}]"
    return f"[{'^' if negated else ''}{''.join(parts)}]" if parts else nothing


def literal(text: str) -> str:
    """Text as RE2 takes it for itself, also in brackets and in Latin-1."""
    return "".join(char if char.isascii() and char.isalnum() else rf"\x{{{ord(char):x}}}" for char in text)


def taken(when: str) -> Condition:
    """Match pictures taken in a range of dates, by the camera's clock: see `date_range`. Raises FilterError."""
    start, end = date_range(when)
    return within("taken_at", *(moment and pa.scalar(moment, pa.timestamp("us")) for moment in (start, end)))


def modified(when: str) -> Condition:
    """Match files changed in a range of dates, by local time: see `date_range`. Raises FilterError."""
    return within("mtime_ns", *(moment and _local_ns(moment) for moment in date_range(when)))


def within(column: str, start: Any, end: Any) -> Condition:
    """Match values from one on, and up to another without it; None is open."""
    field = pc.field(column)
    if start is None and end is None:
        return field.is_valid()
    return all_of([None if start is None else field >= start, None if end is None else field < end])


def _local_ns(moment: datetime) -> int:
    """Nanoseconds since 1970 of a moment by local clocks, or the nearest number that fits into 64 bits."""
    first, last = (datetime.fromtimestamp(second, timezone.utc).replace(tzinfo=None) for second in OFFSETS_KNOWN)
    offset = min(max(moment, first), last).astimezone().utcoffset() or timedelta()
    micros = (moment - datetime(1970, 1, 1) - offset) // timedelta(microseconds=1)
    return min(max(micros * 1000, -(2**63)), 2**63 - 1)


_DATE = re.compile(r"(\d{4})(?:-(\d\d)(?:-(\d\d)(?:[T ](\d\d)(?::(\d\d)(?::(\d\d))?)?)?)?)?", re.ASCII)


def date_range(text: str) -> tuple[datetime | None, datetime | None]:
    """Read ``2021``, ``2021-05``, ``2021-05-01T18:30``, ``2021..``, ``..2020`` or ``2019..2021-06``.

    The end of a range lies in it, to the precision given: ``..2020`` ends with the year.

    Returns:
        The first moment in the range, and the first one after it; None where it is open.

    Raises:
        FilterError: the text is no such range, or it ends before it begins.

    """
    first, dots, last = (part.strip() for part in text.partition(".."))
    start, end = period(first) if first or not dots else (None, None)
    if dots:
        end = period(last)[1] if last else None
    if start and end and start >= end:
        raise FilterError(f"the range {text!r} ends before it begins")
    return start, end


def period(text: str) -> tuple[datetime, datetime | None]:
    """The first moment of a year, month, day, hour, minute or second, and the first one after it (None: year 10000)."""
    found = _DATE.fullmatch(text)
    if not found:
        raise FilterError(
            f"{text!r} is no date: write it as 2021, 2021-05 or 2021-05-01, a range as 2021.., ..2020 or 2019..2021-06"
        )
    given = sum(part is not None for part in found.groups())
    try:
        start = datetime.fromisoformat(text + "0000-01-01T00:00:00"[len(text) :])
    except ValueError as error:
        raise FilterError(f"{text!r} is no date: {error}") from error
    try:
        if given < 3:
            months = 12 * start.year + start.month - 1 + (12 if given == 1 else 1)
            return start, start.replace(year=months // 12, month=months % 12 + 1)
        unit = ("days", "hours", "minutes", "seconds")[given - 3]
        return start, start + timedelta(**{unit: 1})
    except (ValueError, OverflowError):
        return start, None


def number_range(column: str, text: str) -> Condition:
    """Match whole numbers in a range: ``640``, ``1000..``, ``..500`` or ``1000..2000``. Raises FilterError."""
    found = re.fullmatch(r"\s*(\d{1,18})?\s*(?:(\.\.)\s*(\d{1,18})?\s*)?", text, re.ASCII)
    if not found or not (found[1] or found[2]):
        raise FilterError(f"{text!r} is no range of {column}: write it as 640, 1000.., ..500 or 1000..2000")
    low = int(found[1]) if found[1] else None
    high = low if not found[2] else int(found[3]) if found[3] else None
    if low is not None and high is not None and low > high:
        raise FilterError(f"the range {text!r} of {column} ends before it begins")
    return within(column, low, None if high is None else high + 1)


def orientation(*names: str) -> Condition | None:
    """Match pictures that are landscape, portrait or square; None for no names. Raises FilterError."""
    wrong = [name for name in names if name not in _ORIENTATIONS]
    if wrong:
        raise FilterError(f"there is no orientation {wrong[0]!r}: it is {', '.join(_ORIENTATIONS)}")
    return any_of(_ORIENTATIONS[name](pc.field("width"), pc.field("height")) for name in names)


def file_types(*names: str) -> Condition | None:
    """Match files by their suffix in any spelling, so that jpeg is jpg too; None for no names. Raises FilterError."""
    kinds = {file_type(name) for name in names}
    if not all(kinds):
        raise FilterError("the type of a file is empty: write it as jpeg, png or heic")
    suffixes = sorted({*kinds, *(suffix for suffix, kind in SPELLINGS.items() if kind in kinds)})
    any_suffix = "|".join(map(literal, suffixes))
    return pc.match_substring_regex(pc.field("path"), rf"(?i)\.(?:{any_suffix})\z") if suffixes else None


def words(text: str, schema: pa.Schema) -> Condition:
    """Match rows whose captions and labels hold all the words of a text: whole words, in upper or lower case.

    Looked into are those of the columns caption, captions, label and labels that the schema of the rows has. A word is
    a run of letters, digits and underscores. Raises FilterError where there is none.
    """
    spaced = "".join(char if char == "_" or unicodedata.category(char)[0] in "LMN" else " " for char in text)
    if not spaced.split():
        raise FilterError(f"there is no word in {text!r}")
    places = []
    for name in _TEXT_COLUMNS:
        if name in schema.names and kind_of(schema.field(name).type) == TEXTS:
            places.append(pc.binary_join(pc.field(name), "\n"))
        elif name in schema.names and kind_of(schema.field(name).type) == TEXT:
            places.append(pc.field(name))
    edge = r"[^\pL\pM\pN_]"
    return all_of(
        any_of(pc.match_substring_regex(place, rf"(?i)(?:^|{edge}){literal(word)}(?:\z|{edge})") for place in places)
        for word in spaced.split()
    )


def ids(wanted: Iterable[int]) -> Condition:
    """Match rows by their ids; one that no row has does no harm. Raises FilterError for what is no whole number."""
    try:
        found = pa.array(wanted)
    except (pa.ArrowException, OverflowError, TypeError) as error:
        raise FilterError(f"ids are whole numbers: {one_line(str(error))}") from error
    if len(found) and not pa.types.is_integer(found.type):
        raise FilterError(f"ids are whole numbers, not {found.type}")
    return pc.field("id").isin(found.cast(pa.int64()))


def read_ids(lines: Iterable[bytes], name: str) -> list[int]:
    """Read ids, one a line, from a file of some name; empty lines do not count. Raises FilterError."""
    found = []
    for number, line in enumerate(lines, 1):
        text = line.strip()
        if text and not re.fullmatch(rb"\d{1,18}", text):
            raise FilterError(f"{name}, line {number}: {text.decode(errors='replace')[:40]!r} is not the id of a row")
        found += [int(text)] if text else []
    return found


def one_line(text: str) -> str:
    """Text without its line breaks."""
    return " ".join(text.split())
