"""Results to the terminal, as TSV and as JSON; progress and remarks to standard error."""

from __future__ import annotations

import json
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.progress import Progress
    from rich.table import Table

    from retrieval.duplicates import Duplicates
    from retrieval.evaluation import Comparison, Evaluation
    from retrieval.heads.classify import Prediction
    from retrieval.heads.results import Classification
    from retrieval.index_evaluation import IndexScores
    from retrieval.indexing import IndexReport
    from retrieval.library import Library, Match, Matches, Term

_SHOWN_FAILURES = 20


def note(text: str) -> None:
    """One remark on standard error, in one line: what in a name is no text comes out escaped."""
    sys.stderr.write(_printable(text) + "\n")


def quantised(cost: Mapping[str, Any]) -> None:
    """What int8 costs, of a bundle's ``training["int8"]``: one line."""
    cosines = ", ".join(f"{value['mean']:.4f} ({tower}s)" for tower, value in cost["cosine"].items())
    changes = ", ".join(
        f"{name.replace('_', ' ')} {100 * value:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}]"
        for name, value in cost["change"].items()
        for low, high in [cost["intervals"][name]]
    )
    note(f"int8 on {cost['measured_on']} pictures: mean cosine {cosines}; in points: {changes}")


def json_out(value: Any) -> None:
    """One JSON document on standard output. File names that are not UTF-8 come out as lone surrogates, escaped."""
    sys.stdout.write(json_text(value))


def json_text(value: Any) -> str:
    """The document of :func:`json_out`."""

    def plain(item: Any) -> Any:
        return item.isoformat() if isinstance(item, date) else str(item)

    return json.dumps(value, indent=2, default=plain) + "\n"


def _raw_line(text: str) -> None:
    """A line whose bytes are the file's own name, whatever the terminal's encoding is."""
    sys.stdout.flush()
    sys.stdout.buffer.write(os.fsencode(text) + b"\n")


def _silent(_done: int, _total: int) -> None:
    pass


@contextmanager
def progress(what: str, unit: str) -> Iterator[Callable[[int, int], None]]:
    """A bar with rate and time left on standard error, once there is something to wait for; silent when piped."""
    if not sys.stderr.isatty():
        yield _silent
        return
    with ExitStack() as shown:
        bar: Progress | None = None

        def advance(done: int, total: int) -> None:
            nonlocal bar
            if bar is None:
                bar = shown.enter_context(_bar(what))
            task = bar.tasks[0]
            rate = f"{task.speed:.1f} {unit}/s" if task.speed else ""
            bar.update(task.id, completed=done, total=total, rate=rate)

        yield advance


def _bar(what: str) -> Progress:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn(what),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
    )
    bar = Progress(*columns, console=Console(stderr=True), transient=True)
    bar.add_task(what, total=None, rate="")
    return bar


def _print_table(table: Table, title: str = "") -> None:
    from rich.console import Console
    from rich.text import Text

    console = Console()
    if title:
        console.print(Text(f" {title}"))  # a table's own title is broken at the table's width
    console.print(table)


def _table(*columns: str) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD)
    for column in columns:
        table.add_column(
            column,
            justify="left" if column in ("path", "sentence", "name", "measure", "slice", "index", "") else "right",
            overflow="fold",
        )
    return table


def describe(terms: Sequence[Term]) -> str:
    """A query in words, for the heading of a page."""
    parts = []
    for term in terms:
        weight = "" if abs(term.weight) == 1 else f"{abs(term.weight):g}:"
        parts.append(("not " if term.weight < 0 else "") + weight + (term.text or f"like {term.image}"))
    return " + ".join(parts)


def match_fields(match: Match) -> dict[str, Any]:
    """A match as JSON: the absolute path first; of a sentence, that of its picture, or null."""
    more: dict[str, Any] = {"columns": dict(match.columns)} if match.columns else {}
    if match.kind == "text":
        path = str(match.file) if match.path else None
        return {"path": path, "text": match.caption, "score": round(match.score, 4), **more}
    if match.caption is not None:
        more = {"caption": match.caption, **more}
    return {
        "path": str(match.file),
        "score": round(match.score, 4),
        "width": match.width,
        "height": match.height,
        "taken_at": match.taken_at,
        "id": match.id,
        **more,
    }


def paths(found: Sequence[Match]) -> None:
    """One path a line, raw, for xargs and friends; a sentence that names no picture has none."""
    for match in found:
        if match.path or match.kind != "text":
            _raw_line(str(match.file))


def matches(found: Sequence[Match]) -> None:
    """A table on a terminal; score, tab, path on a pipe (tabs, newlines and backslashes in names escaped).

    Of a sentence: score, tab, sentence, and where it names a picture tab, path.
    """
    if not sys.stdout.isatty():
        for match in found:
            name = _one_field(str(match.file))
            if match.kind == "text":
                name = _one_field(match.caption or "") + (f"\t{name}" if match.path else "")
            _raw_line(f"{match.score:.4f}\t{name}")
        return
    from rich.text import Text

    if found and found[0].kind == "text":
        table = _table("score", "sentence", "path")
        for match in found:
            path = _printable(_from_here(match.file)) if match.path else ""
            table.add_row(f"{match.score:.3f}", Text(_printable(match.caption or "")), Text(path))
        _print_table(table)
        return

    table = _table("score", "path", "size", "taken")
    for match in found:
        size = f"{match.width}×{match.height}" if match.width else ""
        taken = f"{match.taken_at:%Y-%m-%d %H:%M}" if match.taken_at else ""
        table.add_row(f"{match.score:.3f}", Text(_printable(_from_here(match.file))), size, taken)
    if found:
        _print_table(table)


def scored(found: Sequence[tuple[Path, float]]) -> None:
    """A table on a terminal; number, tab, path on a pipe (escaped as those of `matches`)."""
    if not sys.stdout.isatty():
        for path, value in found:
            _raw_line(f"{value:.4f}\t{_one_field(str(path))}")
        return
    from rich.text import Text

    table = _table("oddness", "path")
    for path, value in found:
        table.add_row(f"{value:.1f}", Text(_printable(_from_here(path))))
    _print_table(table)


def measured(result: Mapping[str, Any], prefix: str = "") -> None:
    """Names and values, one a line, tab between; those of a group below its name."""
    for name, value in result.items():
        if isinstance(value, Mapping):
            measured(value, f"{prefix}{name}: ")
        else:
            shown = f"{value:.4f}" if isinstance(value, float) else str(value)
            sys.stdout.write(f"{prefix}{name}\t{_printable(shown)}\n")


def few(found: Matches, library: Library, filtered: bool, asked: int) -> None:
    """Why fewer came out than were asked for: a filter that leaves too few, or no pictures at all."""
    total = len(library.store)
    what = "rows" if library.counts()["texts"] else "pictures"
    left = f"{found.qualified:,} of {total:,} {what} qualif{'ies' if found.qualified == 1 else 'y'}"
    if filtered and found.qualified < asked and total:
        note(left if found else f"nothing found: {left}")
    elif not found:
        note("nothing found" + ("" if total else f": nothing of {library.place} is in its index"))


def _one_field(text: str) -> str:
    return text.replace("\\", "\\\\").replace("\t", "\\t").replace("\n", "\\n").replace("\r", "\\r")


def _from_here(file: Path) -> str:
    try:
        return str(file.relative_to(Path.cwd()))
    except ValueError:
        return str(file)


def _printable(name: str) -> str:
    text = name.encode("utf-8", "backslashreplace").decode("utf-8")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def index_report(report: IndexReport, library: Library, created: bool) -> None:
    """What an index run did, and what could not be read."""
    counts = ("added", "changed", "renamed", "deleted")
    done = [f"{getattr(report, name):,} {name}" for name in counts if getattr(report, name)]
    line = ", ".join(done) or "nothing new"
    where = f" (new index {library.store.path})" if created else ""
    held = [f"{count:,} {what}" for what, count in library.counts().items() if count or what == "pictures"]
    if library.unit == "sentences":
        held = [f"{len(library.store):,} sentences"]
    note(f"{line}; {' and '.join(held)} searchable{where}")
    if report.failures:
        note(f"{len(report.failures):,} could not be read; each is tried again when it changes:")
        for failure in report.failures[:_SHOWN_FAILURES]:
            note(f"  {_printable(failure.path)}: {failure.reason}")
        if len(report.failures) > _SHOWN_FAILURES:
            note(f"  … and {len(report.failures) - _SHOWN_FAILURES:,} more: diptych info --json lists them")


def index_speed(report: IndexReport, unit: str, verbose: bool) -> None:
    """How fast it went and what it waited for, if anything was encoded; and the seconds of each stage, if asked for."""
    if verbose:
        stages = ", ".join(f"{name} {seconds:.2f} s" for name, seconds in asdict(report.seconds).items())
        note(f"at work, beside one another: {stages}")
    if report.embedded:
        rate = f"{report.embedded / report.elapsed:.1f} {unit}/s"
        note(f"{report.embedded:,} {unit} in {report.elapsed:.1f} s: {rate}, bounded by {report.bounded_by}")


def duplicates(found: Duplicates) -> None:
    """Groups as a table on a terminal; number of the group, grade, path on a pipe (escaped as those of `matches`)."""
    if not sys.stdout.isatty():
        for number, group in enumerate(found.groups, 1):
            for copy in group.copies:
                _raw_line(f"{number}\t{group.grade}\t{_one_field(str(copy.file))}")
        return
    from rich.text import Text

    table = _table("group", "grade", "path", "size", "kB")
    for number, group in enumerate(found.groups, 1):
        for place, copy in enumerate(group.copies):
            size = f"{copy.width}×{copy.height}" if copy.width else ""
            head = ("", "") if place else (str(number), group.grade)
            last = place == len(group.copies) - 1
            name = Text(_printable(_from_here(copy.file)))
            table.add_row(*head, name, size, f"{copy.size / 1e3:,.0f}", end_section=last)
    if found.groups:
        _print_table(table)


def duplicates_summary(found: Duplicates, library: Library) -> None:
    """How many groups of each grade, and what was left out."""
    counts = Counter(group.grade for group in found.groups)
    groups = ", ".join(f"{count:,} {grade}" for grade, count in counts.items())
    note(f"pictures compared: {found.compared:,}; groups: {groups or 'none'}")
    if found.stale:
        remedy = f"take that in with  diptych index {library.root}"
        note(f"left out, changed or gone since the last run: {found.stale:,}; {remedy}")


def evaluation(result: Evaluation) -> None:
    """The measures, with intervals; then the slices, and the other model. TSV on a pipe: name, value, low, high."""
    what = "classes" if result.task == "classification" else "captions"
    title = f"{result.model}: {result.images:,} pictures, {result.texts:,} {what} (checksum {result.checksum[:12]})"
    if sys.stdout.isatty():
        _measures_table(title, result.metrics, result.intervals)
        if result.slices:
            _slices_table(result)
        if result.comparison:
            _comparison_table(result.comparison, result)
        if result.indexes:
            _indexes_table(result.indexes)
    else:
        _measures_tsv("", result.metrics, result.intervals)
        for part in result.slices:
            _measures_tsv(f"{part.name}:", part.metrics, part.intervals)
        if result.comparison:
            _measures_tsv("other:", result.comparison.other.metrics, result.comparison.other.intervals)
            _measures_tsv("difference:", result.comparison.differences, result.comparison.intervals)
        for scores in result.indexes:
            _index_tsv(scores)
        note(title)
    for scores in result.indexes:
        if scores.asked == "auto":
            what = "pictures" if scores.way == "t2i" else "texts"
            note(f"auto, for {scores.rows:,} {what}: {'exact search' if scores.kind == 'exact' else scores.kind}")
    if result.note:
        note(result.note)


_WAYS = {"t2i": "text to image", "i2t": "image to text"}
Intervals = Mapping[str, tuple[float, float]]


def _measures_tsv(prefix: str, values: Mapping[str, float], intervals: Intervals) -> None:
    for name, value in values.items():
        ends = "".join(f"\t{end:.4f}" for end in intervals.get(name, ()))
        sys.stdout.write(f"{_printable(prefix + name)}\t{value:.4f}{ends}\n")


def _measures_table(title: str, values: Mapping[str, float], intervals: Intervals) -> None:
    """One row for each measure, one column for each direction."""
    ways = [way for way in _WAYS if any(name.startswith(f"{way}_") for name in values)]
    table = _table("measure", *([_WAYS[way] for way in ways] or ["value"]))
    if ways:
        for name in (name.removeprefix(f"{ways[0]}_") for name in values if name.startswith(f"{ways[0]}_")):
            table.add_row(name, *(_with_interval(f"{way}_{name}", values, intervals) for way in ways))
    for name in values:
        if name.partition("_")[0] not in _WAYS:
            table.add_row(name, _with_interval(name, values, intervals))
    _print_table(table, title)


def _slices_table(result: Evaluation) -> None:
    shown = [name for name in ("t2i_hit@1", "t2i_hit@10", "i2t_hit@1", "i2t_hit@10", "top1") if name in result.metrics]
    table = _table("slice", "pictures", "texts", *shown)
    for part in result.slices:
        values = [_with_interval(name, part.metrics, part.intervals) if name in part.metrics else "" for name in shown]
        table.add_row(_printable(part.name), f"{part.images:,}", f"{part.texts:,}", *values)
    _print_table(table)


def _comparison_table(comparison: Comparison, result: Evaluation) -> None:
    table = _table("measure", result.model, comparison.other.model, "difference", "")
    for name, change in comparison.differences.items():
        low, high = comparison.intervals.get(name, (change, change))
        sure = "" if low <= 0 <= high else "beyond chance"
        this, that = (_value(name, one.metrics[name]) for one in (result, comparison.other))
        table.add_row(name, this, that, _with_interval(name, comparison.differences, comparison.intervals, "+"), sure)
    _print_table(table)


def _indexes_table(indexes: Sequence[IndexScores]) -> None:
    shown = [name.partition("_")[2] for name in indexes[0].metrics if "_hit@" in name]
    table = _table("", "index", *shown, "of exact's 10", "queries/s", "MB")
    way = ""
    for scores in indexes:
        if way and scores.way != way:
            table.add_section()
        hits = [_value(name, scores.metrics[f"{scores.way}_{name}"]) for name in shown]
        found, speed, size = f"{100 * scores.recall:.1f}", f"{scores.queries_per_second:,.0f}", scores.bytes / 1e6
        table.add_row(_WAYS[scores.way] if scores.way != way else "", scores.name, *hits, found, speed, f"{size:,.2f}")
        way = scores.way
    _print_table(table)


def _index_tsv(scores: IndexScores) -> None:
    values = {name: f"{value:.4f}" for name, value in scores.metrics.items()}
    values[f"{scores.way}_recall_of_exact@10"] = f"{scores.recall:.4f}"
    values[f"{scores.way}_queries_per_second"] = f"{scores.queries_per_second:.1f}"
    values[f"{scores.way}_bytes"] = f"{scores.bytes}"
    for name, value in values.items():
        sys.stdout.write(f"index={_printable(scores.asked)}:{name}\t{value}\n")


def _with_interval(name: str, values: Mapping[str, float], intervals: Intervals, sign: str = "") -> str:
    ends = " … ".join(_value(name, end, sign) for end in intervals.get(name, ()))
    return f"{_value(name, values[name], sign)}  ({ends})" if ends else _value(name, values[name], sign)


def _value(name: str, value: float, sign: str = "") -> str:
    """Ranks and sums as they are, shares in percent."""
    return f"{value:{sign}.4g}" if name.endswith("rank") or name == "rsum" else f"{100 * value:{sign}.1f}"


def classification(result: Classification) -> None:
    """Every model's measures with intervals, and the verdict. TSV on a pipe: name:measure, value, low, high."""
    if sys.stdout.isatty():
        measures = list(result.models[result.chosen].test)
        table = _table("name", "variant", *measures, f"val {result.headline}", "seconds")
        for name, one in result.models.items():
            values = [_with_interval(measure, one.test, one.test.intervals) for measure in measures]
            mark = "→ " if name == result.chosen else ""
            table.add_row(mark + _printable(name), one.name, *values, f"{100 * one.val:.1f}", f"{one.seconds:.1f}")
        _print_table(table)
    else:
        for name, one in result.models.items():
            _measures_tsv(f"{name}:", one.test, one.test.intervals)
    if result.finetuning:
        note(result.finetuning.verdict(result.headline))
    note(f"chosen on val: {result.chosen}; {result.verdict}")


def answers(found: Sequence[Prediction]) -> None:
    """One line a row: what it is, its probability, and picture or text (escaped as those of `matches`)."""
    for one in found:
        share = max(one.outputs.values(), default=0.0)
        said = "; ".join(one.answer) if isinstance(one.answer, list) else str(one.answer)
        what = one.image if one.image is not None else one.text
        told = "" if isinstance(one.answer, float) else f"{share:.4f}"
        _raw_line(f"{_one_field(said)}\t{told}\t{_one_field(what)}")


def captions(photos: Sequence[Path], said: Sequence[str]) -> None:
    """One line a photo: the caption alone of a single one, else path and caption (escaped as those of `matches`)."""
    for photo, caption in zip(photos, said, strict=True):
        _raw_line(caption if len(photos) == 1 else f"{_one_field(str(photo))}\t{caption}")


def metrics(values: Mapping[str, float], title: str) -> None:
    """Measures as a table on a terminal, as TSV on a pipe. Shares are printed in percent on the terminal only."""
    if not sys.stdout.isatty():
        for name, value in values.items():
            sys.stdout.write(f"{name}\t{value:.4f}\n")
        return
    table = _table("measure", "value")
    for name, value in values.items():
        table.add_row(name, _value(name, value))
    _print_table(table, title)


def facts(values: Mapping[str, Any]) -> None:
    """Names and values, one a line."""
    for name, value in values.items():
        if name == "failures":
            sys.stdout.write(f"failures\t{len(value)}\n")
            for failure in value[:_SHOWN_FAILURES]:
                sys.stdout.write(f"\t{_printable(failure['path'])}: {failure['reason']}\n")
        elif name == "search":
            sys.stdout.write(f"search\t{_search_kind(value)}\n")
        else:
            sys.stdout.write(f"{name}\t{_printable(str(value))}\n")


def _search_kind(value: Mapping[str, Any]) -> str:
    """How an index is searched, in a line."""
    if "recall" not in value:
        return f"{value['kind']}" + (f" (for {value['wanted']} there are too few rows)" if "wanted" in value else "")
    recall = ", ".join(f"{share:.3f} for {name} queries" for name, share in value["recall"].items())
    size = value["bytes"] / 1e6
    times = f"{value['p50_ms']:.2f} ms a query (p99 {value['p99_ms']:.2f})"
    return f"{value['kind']}, {value['rows']:,} rows, {size:,.1f} MB, recall@10 {recall}; {times}"


def problems(found: Sequence[str]) -> None:
    """What a check found."""
    for problem in found:
        note(f"damaged: {problem}")
    if not found:
        note("every checksum is right")


def models(rows: Sequence[Mapping[str, Any]]) -> None:
    """The models at hand."""
    if not sys.stdout.isatty():
        for row in rows:
            sys.stdout.write(f"{row['name']}\t{row['model']}\t{row['dim']}\t{row['bytes']}\t{row['path']}\n")
        return
    table = _table("name", "path", "dim", "MB")
    for row in rows:
        table.add_row(row["name"], row["path"], str(row["dim"]), f"{row['bytes'] / 1e6:.0f}")
    _print_table(table)
