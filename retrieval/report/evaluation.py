"""The page of an evaluation: its numbers, and what it got right and wrong."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from retrieval.evaluation import ClassificationDetails, Comparison, Evaluation, RetrievalDetails
from retrieval.ranks import Rows
from retrieval.report import examples, page
from retrieval.report.charts import (
    SHARES,
    Axis,
    Curve,
    Dot,
    axis_labels,
    curves,
    group,
    heat_map,
    histogram,
    row,
    rows,
    share_bar,
    whiskers,
)
from retrieval.report.indexes import index_section

_WORST, _BEST, _SHOWN = 8, 4, 4  # examples of a direction, and what is shown of the answer to each
_PROBED = 5000  # queries among which the best are looked for
_BINS = (1, 3, 5, 10, 20, 50, 100)  # of ranks: the last one of each bin
_CURVE = 1000  # the largest k of the curves
_MAP = 30  # classes of a confusion matrix; one that has up to _WHOLE is shown whole
_WHOLE = 40
_CLASSES = 15  # worst and best
_CONFUSED = 12  # pairs


def write_evaluation_page(result: Evaluation, file: Path | None = None) -> Path:
    """Write a page that shows an evaluation; to a temporary file when none is named.

    Numbers with their intervals as charts, and the best and the worst answers with thumbnails of the pictures. It
    needs no network and no script.
    """
    return page.written(evaluation_page(result), file)


def evaluation_page(result: Evaluation) -> str:
    """The page of :func:`write_evaluation_page` as text: the same for the same result."""
    pictures = page.Pictures(result.details.records)
    if isinstance(result.details, RetrievalDetails):
        sections = _retrieval(result, result.details, pictures)
    else:
        sections = _classification(result, result.details, pictures)
    body = "\n".join([_head(result), *sections, _tables(result), pictures.store()])
    return page.document(f"Diptych: {result.model}, {result.task}", page.STYLE, body)


# ---- numbers as they are written -------------------------------------------------------------------------------------


def _interval(name: str, ends: tuple[float, float] | None) -> str:
    if ends is None or not all(map(math.isfinite, ends)):
        return ""
    return "–".join(page.number(name, end).removesuffix("\xa0%") for end in ends)


def _score(value: float) -> str:
    return f"{value:.3f}".replace("-", "−")


def _several(count: int, one: str, many: str) -> str:
    return f"{count:,} {one if count == 1 else many}"


# ---- sections that all evaluations have ------------------------------------------------------------------------------


def _head(result: Evaluation) -> str:
    captions = ("caption", "captions") if result.task == "retrieval" else ("class", "classes")
    facts = [
        _several(result.images, "picture", "pictures"),
        _several(result.texts, *captions),
        f"data {page.text(result.checksum[:12])}",
        f"model {page.text(result.fingerprint[:12])}",
        "95 % intervals: bootstrap over pictures" if result.intervals else "no intervals were asked for",
    ]
    if result.ties == "mean":
        facts.append("ties share the middle place")
    if result.note:
        facts.append(page.text(result.note))
    against = f" against {page.text(result.comparison.other.model)}" if result.comparison else ""
    return (
        f'<header>\n<p class="quiet">Diptych · {page.text(result.task)}</p>\n'
        f"<h1>{page.text(result.model)}{against}</h1>\n"
        f'<p class="quiet">{" · ".join(facts)}</p>\n</header>'
    )


def _headline(result: Evaluation, names: Mapping[str, str], kind: str, axis: Axis = SHARES) -> str:
    """Measures, large, with their intervals, and the other model's as hollow dots. ``names``: what each is called."""
    other = result.comparison.other if result.comparison else None
    width = max(map(len, names.values()), default=0) + 1
    lines = []
    for name, called in names.items():
        value, ends = result.metrics[name], result.intervals.get(name)
        dots = [Dot(value, ends, kind)]
        if other:
            dots.append(Dot(other.metrics[name], other.intervals.get(name), f"{kind} other", lane=1))
        called = f'<span class="name" style="min-width:{width}ch">{page.text(called)}</span>'
        label = f'{called} <b class="number">{page.number(name, value)}</b>'
        lines.append(row(label, whiskers(dots, axis), f"<span>{_interval(name, ends)}</span>"))
    return rows(lines, axis_labels(axis, plain=axis is not SHARES))


def _filled_or_hollow(result: Evaluation) -> str:
    if not result.comparison:
        return ""
    return f"Filled: {page.text(result.model)}. Hollow: {page.text(result.comparison.other.model)}."


def _slice_chart(result: Evaluation, shown: Mapping[str, str]) -> str:
    """One row for each slice with the measures that it has; ``shown``: measures and the colours of their dots."""
    found = [
        (part.metrics[name], part.intervals.get(name))
        for part in result.slices
        for name in shown
        if name in part.metrics
    ]
    guide = next(result.metrics[name] for name in shown if name in result.metrics)
    axis = Axis.around([guide, *(end for value, ends in found for end in (value, *(ends or ())))], 0, 1)
    lines: list[str] = []
    column = None
    for part in result.slices:
        name_of_column, _, called = part.name.partition("=")
        if name_of_column != column:
            column = name_of_column
            lines.append(group(page.text(column, page.NAME)))
        present = [name for name in shown if name in part.metrics]
        dots = [Dot(part.metrics[name], part.intervals.get(name), shown[name], i) for i, name in enumerate(present)]
        facts = [f'<b class="{shown[name]}">{page.number(name, part.metrics[name])}</b>' for name in present]
        facts += [_several(part.images, "picture", "pictures")] if part.images else []
        facts += [_several(part.texts, "caption", "captions")] if part.texts and result.task == "retrieval" else []
        value = " ".join(f"<span>{fact}</span>" for fact in facts)
        lines.append(row(page.text(called, page.NAME), whiskers(dots, axis, guide), value))
    return rows(lines, axis_labels(axis))


def _difference_chart(comparison: Comparison, metrics: Mapping[str, float]) -> str:
    """Differences of shares around zero: better or worse where the interval leaves 0 out, grey where it does not."""
    found, intervals = comparison.differences, comparison.intervals
    names = _distinct(metrics, found)
    axis = Axis.around([0, *(value for name in names for value in (found[name], *intervals.get(name, ())))], -1, 1)
    lines = []
    for name in names:
        ends = intervals.get(name)
        kind = "good" if ends and ends[0] > 0 else "bad" if ends and ends[1] < 0 else "even"  # NaN: even
        value = f'<span><b class="{kind}">{page.difference(name, found[name])}</b></span>'
        if ends:
            value += f" <span>{page.difference(name, ends[0])} to {page.difference(name, ends[1])}</span>"
        lines.append(row(page.text(page.called(name)), whiskers([Dot(found[name], ends, kind)], axis, 0), value))
    return rows(lines, axis_labels(axis, signed=True))


def _distinct(metrics: Mapping[str, float], found: Mapping[str, float]) -> list[str]:
    """Shares, without those equal to another of their direction: recall@k is hit@k where one answer is right."""
    seen: dict[tuple[str, float, float], str] = {}
    for name in found:
        if page.is_share(name):
            seen.setdefault((page.way_of(name), metrics[name], found[name]), name)
    return list(seen.values())


def _comparison(result: Evaluation) -> list[str]:
    if not result.comparison:
        return []
    note = (
        f"{page.text(result.model)} less {page.text(result.comparison.other.model)}, in percentage points. "
        "Paired intervals: green is better, red worse; grey lines hold 0, so the two cannot be told apart there."
    )
    if not result.comparison.intervals:
        note = note.partition(". ")[0] + ". Without intervals nobody knows which of these are more than chance."
    chart = _difference_chart(result.comparison, result.metrics)
    return [page.section("Difference", page.panel(chart), note)]


def _tables(result: Evaluation) -> str:
    """Every number there is."""
    heads = ["measure", "value", "95 % interval"]
    other = result.comparison
    if other:
        heads += [page.text(other.other.model, page.NAME), "difference", "paired interval"]
    lines = []
    for name, value in result.metrics.items():
        cells = [name, page.number(name, value), _interval(name, result.intervals.get(name))]
        if other:
            ends = other.intervals.get(name)
            cells += [
                page.number(name, other.other.metrics[name]),
                page.difference(name, other.differences[name]),
                " to ".join(page.difference(name, end) for end in ends) if ends else "",
            ]
        lines.append(cells)
    tables = [page.table(heads, lines)]
    if result.slices:
        heads = ["measure", "all", *(page.text(part.name, page.NAME) for part in result.slices)]
        of_all = [result.metrics, *(part.metrics for part in result.slices)]
        tables.append(
            page.table(
                heads,
                [[name, *(page.number(name, of.get(name, math.nan)) for of in of_all)] for name in result.metrics],
            )
        )
    return "<details>\n<summary>All numbers</summary>\n" + "\n".join(tables) + "\n</details>"


# ---- retrieval -------------------------------------------------------------------------------------------------------


def _retrieval(result: Evaluation, details: RetrievalDetails, pictures: page.Pictures) -> list[str]:
    ways = examples.ways(details)
    return [
        _retrieval_headline(result, ways),
        *_comparison(result),
        *_curve_section(result, ways),
        _rank_section(ways),
        *_retrieval_slices(result),
        *index_section(result.indexes),
        *(section for way in ways for section in _example_sections(way, details, pictures)),
    ]


def _retrieval_headline(result: Evaluation, ways: Sequence[examples.Way]) -> str:
    panels = []
    for way in ways:
        names = {name: name[4:] for name in result.metrics if name.startswith(f"{way.name}_hit@")}
        also = [
            f"{label}\xa0{page.number(name, result.metrics[name])}"
            for label, measure in (("median rank", "median_rank"), ("mean rank", "mean_rank"), ("MRR", "mrr"))
            if (name := f"{way.name}_{measure}") in result.metrics
        ]
        found = ("picture", "pictures") if way.name == "t2i" else ("caption", "captions")
        note = f"{_several(len(way.ranks.queries), 'query', 'queries')} among {_several(len(way.items), *found)}"
        note += "".join(f" · {fact}" for fact in also)
        panels.append(page.panel(_headline(result, names, way.name), page.WAYS[way.name], note))
    if "rsum" in result.metrics:
        chart = _headline(result, {"rsum": "rsum"}, "even", Axis(0, 6, 1))
        panels.append(page.panel(chart, note="The sum of hit@1, 5 and 10 both ways: 6 at most.", kind="whole"))
    return f"<section>\n{page.panels(panels)}\n{page.quiet(_filled_or_hollow(result))}</section>"


def _curve_section(result: Evaluation, ways: Sequence[examples.Way]) -> list[str]:
    """hit@k over k; with one item on either side there is nothing to draw."""
    ways = [way for way in ways if len(way.items) > 1]
    if not ways:
        return []
    lines = [Curve(ks := _ks(len(way.items)), examples.chance(way, ks), kind="chance") for way in ways]
    marks = [(way.name, "", page.WAYS[way.name]) for way in ways]
    if result.comparison and isinstance(result.comparison.other.details, RetrievalDetails):
        for way in examples.ways(result.comparison.other.details):
            if len(way.items) > 1:
                ks = _ks(len(way.items))
                lines.append(
                    Curve(ks, [point[0] for point in examples.hit_curve(way.ranks, ks)], kind=f"{way.name} other")
                )
        marks.append(("even", "dashed", result.comparison.other.model))
    for way in ways:
        ks = _ks(len(way.items))
        points = examples.hit_curve(way.ranks, ks)
        lines.append(Curve(ks, [p for p, _, _ in points], [(low, high) for _, low, high in points], way.name))
    marks.append(("even", "dotted", "chance"))
    content = page.panel(f"{page.legend(marks)}\n{curves(lines, 'hit at k over k')}")
    note = "hit@k: a right answer is among the first k. Shaded: 95 % at each k, normal approximation over pictures."
    return [page.section("How far down one has to look", content, note)]


def _ks(items: int) -> list[int]:
    """From 1 to the number of items, 1,000 at most: every k that a logarithmic axis can show apart."""
    return sorted({round(k) for k in np.geomspace(1, min(items, _CURVE), 160).tolist()})


def _rank_section(ways: Sequence[examples.Way]) -> str:
    counted = [(way, *_bins(way.ranks.best, len(way.items))) for way in ways]
    most = max(max(counts) / max(1, sum(counts)) for _, _, counts in counted)
    panels = [
        page.panel(histogram(names, counts, way.name, most), page.WAYS[way.name]) for way, names, counts in counted
    ]
    return page.section("Ranks of the first right answer", page.panels(panels))


def _bins(best: NDArray[np.float64], items: int) -> tuple[list[str], list[int]]:
    """Names of bins and how many ranks are in each; bins beyond the number of items are left out."""
    ends = [end for end in _BINS if end < items]
    counts = np.bincount(np.searchsorted(ends, best), minlength=len(ends) + 1).tolist()
    begins = [1, *(end + 1 for end in ends)]
    names = [f"{begin}" if begin == end else f"{begin}–{end}" for begin, end in zip(begins, ends, strict=False)]
    last = f"{begins[-1]}–…" if len(ends) == len(_BINS) else f"{begins[-1]}–{items}"
    return [*names, f"{items}" if begins[-1] == items else last], counts


def _retrieval_slices(result: Evaluation) -> list[str]:
    ks = [int(name.partition("@")[2]) for name in result.metrics if name.startswith("t2i_hit@")]
    if not result.slices or not ks:
        return []
    k = 10 if 10 in ks else max(ks)
    shown = {f"{way}_hit@{k}": way for way in page.WAYS}
    marks = [
        (way, "", page.called(name))
        for name, way in shown.items()
        if any(name in part.metrics for part in result.slices)
    ]
    note = "Queries of each slice, ranked among everything. The dotted line is text → image over all queries."
    return [page.section("Slices", page.panel(f"{page.legend(marks)}\n{_slice_chart(result, shown)}"), note)]


# ---- retrieval: examples ---------------------------------------------------------------------------------------------


def _example_sections(way: examples.Way, details: RetrievalDetails, pictures: page.Pictures) -> list[str]:
    show, asked = (_sentence_cases, "sentences") if way.name == "t2i" else (_picture_cases, "pictures")
    worst = examples.worst(way, _WORST, _SHOWN)
    best = examples.best(way, _BEST, _SHOWN, _PROBED)
    none = "Every first right answer is the first of all."
    sections = [
        page.section(
            f"{page.WAYS[way.name]}: worst {asked}",
            show(worst, details, pictures) if worst else "",
            "Where the first right answer stands lowest." if worst else none,
        )
    ]
    if best:
        note = "Right answers that come first, by the widest margin over the first wrong one."
        sections.append(page.section(f"{page.WAYS[way.name]}: best {asked}", show(best, details, pictures), note))
    return sections


def _sentence_cases(cases: Sequence[examples.Case], details: RetrievalDetails, pictures: page.Pictures) -> str:
    """Sentences with the pictures found; and before them the right one, unless it is the first."""
    first = all(case.rank == 1 for case in cases)
    kind, heads = ("case first", ("sentence", "found")) if first else ("case", ("sentence", "its picture", "found"))
    lines = [f'<div class="{kind} heads">{"".join(f"<span>{head}</span>" for head in heads)}</div>']
    for case in cases:
        sentence = details.texts[case.query]
        tiles = [] if first else [_tile(pictures, case.own, case.rank, case.score, right=True)]
        tiles += [_tile(pictures, *found) for found in case.placed()]
        lines.append(
            f'<article class="{kind}"><div class="said">'
            f'<p class="words" title="{page.text(sentence, 4 * page.SENTENCE)}">'
            f'{page.text(sentence, page.SENTENCE)}</p><p class="where">rank {page.rank(case.rank)} of '
            f"{len(details.records):,}</p></div>{''.join(tiles)}</article>"
        )
    return "\n".join(lines)


def _tile(pictures: page.Pictures, row: int, place: float, score: float, right: bool) -> str:
    return _figure(pictures, row, f"<b>{page.rank(place)}</b> · {_score(score)}", "right" if right else "")


def _figure(pictures: page.Pictures, row: int, caption: str, kind: str = "") -> str:
    return f'<figure class="{kind}">{pictures.tile(row)}<figcaption>{caption}</figcaption></figure>'


def _picture_cases(cases: Sequence[examples.Case], details: RetrievalDetails, pictures: page.Pictures) -> str:
    """Pictures with the captions found; and before them the right one, unless it is the first."""
    cards = []
    for case in cases:
        own = [] if case.rank == 1 else [_line(details.texts[case.own], case.rank, case.score, "right first")]
        found = [
            _line(details.texts[item], place, score, "right" if right else "")
            for item, place, score, right in case.placed()
        ]
        cards.append(_card(pictures, case.query, [*own, *found]))
    return _cards(cards)


def _cards(cards: Sequence[str]) -> str:
    return '<div class="cards">\n' + "\n".join(cards) + "\n</div>"


def _card(pictures: page.Pictures, row: int, lines: Sequence[str]) -> str:
    """A picture with its name, beside lines of words and scores."""
    tile = _figure(pictures, row, page.text(pictures.records[row].image.name, page.NAME))
    return f'<article class="card">{tile}<ol>{"".join(lines)}</ol></article>'


def _line(words: str, place: float, score: float, kind: str = "") -> str:
    return (
        f'<li class="{kind}"><b>{page.rank(place)}</b>'
        f'<span class="words" title="{page.text(words, 4 * page.SENTENCE)}">'
        f"{page.text(words, page.SENTENCE)}</span><span>{_score(score)}</span></li>"
    )


# ---- classification --------------------------------------------------------------------------------------------------


def _classification(result: Evaluation, details: ClassificationDetails, pictures: page.Pictures) -> list[str]:
    guesses = examples.guesses(details)
    mistakes = np.flatnonzero(details.result.ranks > 1)
    worst = mistakes[np.argsort(-details.result.ranks[mistakes], kind="stable")][:_WORST]
    confident = mistakes[np.argsort(-guesses.gap[mistakes], kind="stable")][:_WORST]
    return [
        _classification_headline(result),
        *_comparison(result),
        *_classification_slices(result),
        _class_section(details),
        _confusion_section(details),
        *_pair_section(details, guesses, pictures),
        _picture_section("Worst pictures", "Where the right class stands lowest.", worst, details, pictures),
        _picture_section(
            "Most confident mistakes",
            "The first guess scores highest above the right class.",
            confident,
            details,
            pictures,
        ),
    ]


def _classification_headline(result: Evaluation) -> str:
    names = {name: page.called(name) for name in result.metrics}
    panel = page.panel(_headline(result, names, "t2i"), note=_filled_or_hollow(result))
    return f"<section>\n{page.panels([panel])}\n</section>"


def _classification_slices(result: Evaluation) -> list[str]:
    if not result.slices:
        return []
    name = next(iter(result.metrics))
    note = f"{page.called(name)} of each slice. The dotted line is all pictures."
    return [page.section("Slices", page.panel(_slice_chart(result, {name: "t2i"})), note)]


def _class_section(details: ClassificationDetails) -> str:
    shares, members = details.result.per_class, details.right.sum(axis=0)
    known = np.flatnonzero(np.isfinite(shares))
    worst = known[np.lexsort((known, -members[known], shares[known]))][: min(_CLASSES, math.ceil(len(known) / 2))]
    others = np.setdiff1d(known, worst)
    best = others[np.lexsort((others, -members[others], -shares[others]))][:_CLASSES]
    panels = []
    for title, chosen in (("Worst classes", worst), ("Best classes", best)):
        lines = [
            row(
                page.text(details.names[number], page.NAME),
                share_bar(float(shares[number]), "t2i"),
                f"{page.number('top1', float(shares[number]))} of {members[number]:,}",
            )
            for number in chosen.tolist()
        ]
        if lines:
            panels.append(page.panel(rows(lines, axis_labels(SHARES)), title))
    absent = len(shares) - len(known)
    note = "Share of each class's pictures that the first guess has right."
    if absent:
        note += f" {_several(absent, 'class has', 'classes have')} no picture."
    return page.section("Classes", page.panels(panels), note)


def _confusion_section(details: ClassificationDetails) -> str:
    confusion = details.result.confusion
    wrong = confusion - np.diag(np.diag(confusion))
    shown = np.arange(len(confusion))
    note = "Rows: the right class; columns: the first guess. The darker, the larger the share of the row."
    if len(confusion) > _WHOLE:
        shown = np.sort(np.argsort(-(wrong.sum(axis=0) + wrong.sum(axis=1)), kind="stable")[:_MAP])
        note += f" The {_MAP} most confused of {len(confusion):,} classes."
    names = [page.plain(details.names[number], page.NAME) for number in shown.tolist()]
    drawn = heat_map(names, confusion[np.ix_(shown, shown)], confusion.sum(axis=1)[shown].tolist())
    return page.section("What is taken for what", page.panel(drawn), note)


def _pair_section(details: ClassificationDetails, guesses: examples.Guesses, pictures: page.Pictures) -> list[str]:
    confusion = details.result.confusion.copy()
    np.fill_diagonal(confusion, 0)
    rights, guessed = np.nonzero(confusion)
    order = np.lexsort((guessed, rights, -confusion[rights, guessed]))[:_CONFUSED]
    cards = []
    for right, taken in zip(rights[order].tolist(), guessed[order].tolist(), strict=True):
        members = np.flatnonzero((guesses.right == right) & (guesses.first == taken))
        example = int(members[guesses.gap[members].argmax()])
        names = f"{page.text(details.names[right], page.NAME)} → <b>{page.text(details.names[taken], page.NAME)}</b>"
        count = f"{confusion[right, taken]:,} of {details.result.confusion[right].sum():,}"
        cards.append(_figure(pictures, example, f"{names}<br>{count}"))
    if not cards:
        return []
    content = '<div class="tiles">\n' + "\n".join(cards) + "\n</div>"
    return [page.section("Most confused", content, "Right class → first guess, and the clearest example of each.")]


def _picture_section(
    title: str, note: str, chosen: Rows, details: ClassificationDetails, pictures: page.Pictures
) -> str:
    if not len(chosen):
        return page.section(title, "", "There is no mistake.")
    cards = []
    for number in chosen.tolist():
        scores = details.scores[number]
        own = np.flatnonzero(details.right[number])
        best = own[scores[own].argmax()]
        labels = ", ".join(details.names[label] for label in own.tolist())
        lines = [_line(labels, float(details.result.ranks[number]), float(scores[best]), "right first")]
        for place, guess in enumerate(np.lexsort((np.arange(len(scores)), -scores))[:_SHOWN].tolist(), 1):
            kind = "right" if details.right[number, guess] else ""
            lines.append(_line(details.names[guess], place, float(scores[guess]), kind))
        cards.append(_card(pictures, number, lines))
    return page.section(title, _cards(cards), note)
