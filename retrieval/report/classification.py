"""The page of a fitted classifier: whether fusion pays, what it gets wrong, and what every model is worth."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from retrieval.report import page
from retrieval.report.charts import (
    SHARES,
    Axis,
    Dot,
    Line,
    axis_labels,
    group,
    heat_map,
    lines,
    row,
    rows,
    whiskers,
)

if TYPE_CHECKING:  # what measures needs scikit-learn, what shows does not
    from retrieval.heads.results import Classification, ModelScores
    from retrieval.metrics import Scores

_COLOURS = ("t2i", "i2t", "good", "bad", "even")
_CURVES = len(_COLOURS)  # classes whose curves are drawn: the most frequent ones
_MAP = 40  # classes of a confusion matrix
_POINTS = 60  # of a curve
_STAGES = {
    "alone": "One modality alone",
    "early": "Early: side by side",
    "weighted": "Weighted sums",
    "intermediate": "Intermediate",
    "graph": "Over a graph",
    "late": "Late: outputs joined",
    "fine-tuned": "With towers fine-tuned",
}


def classification_page(result: Classification) -> str:
    """The page of a fitted classifier as text: the same for the same result."""
    sections = [
        _head(result),
        _models(result),
        *_difference(result),
        *_finetuning(result),
        *_classes(result),
        *_confusion(result),
        *_curves(result),
        *_effects(result),
        *_explanation(result),
        *_sharing(result),
        _table(result),
    ]
    return page.document(f"Diptych: {result.data}, {result.chosen}", page.STYLE, "\n".join(sections))


def _head(result: Classification) -> str:
    what = {"class": "classes", "labels": "labels", "number": "number"}[result.target.task]
    count = "" if result.target.task == "number" else f"{len(result.target.names)} "
    facts = [
        f"{count}{what} in {page.text(result.target.column)}",
        "modalities: " + page.text(", ".join(result.modalities)),
        " / ".join(f"{rows:,} {split}" for split, rows in result.rows.items()),
        *([f"{result.folds}-fold cross-validation"] if result.folds else []),
        *([f"vectors of {page.text(result.encoder)} ({page.text(result.fingerprint[:12])})"] if result.encoder else []),
        "95 % intervals: bootstrap over rows of test, the same draws for all",
    ]
    notes = "".join(f'<p class="quiet">{page.text(note)}</p>\n' for note in result.notes)
    verdict = result.verdict
    return (
        f'<header>\n<p class="quiet">Diptych · classifier</p>\n<h1>{page.text(result.data)}: '
        f"{page.text(result.chosen)}</h1>\n<p>{page.text(verdict[0].upper() + verdict[1:])}.</p>\n"
        f'<p class="quiet">{" · ".join(facts)}</p>\n{notes}</header>'
    )


# ---- all models ------------------------------------------------------------------------------------------------------


def _models(result: Classification) -> str:
    """Every model's headline measure, grouped by where modalities meet."""
    everyone = [*result.baselines, *(one for one in result.models.values() if not one.modality)]
    headline = result.headline
    ends = [end for one in everyone for end in (*one.test.intervals[headline], one.test[headline])]
    axis = Axis.around(ends, -1, 1)
    alone = [one.test[headline] for name, one in result.models.items() if one.modality]
    drawn: list[str] = []
    for stage, called in _STAGES.items():
        of_stage = [one for one in everyone if one.stage == stage]
        drawn += [group(called)] if of_stage else []
        drawn += [_model_row(result, one, axis, max(alone)) for one in of_stage]
    note = (
        f"{_measure(headline)} on test. Blue: the model chosen on val, and the best on val of each modality alone; "
        "dotted line: the best of those alone."
    )
    return page.section("Does fusion pay?", page.panel(rows(drawn, axis_labels(axis))), note)


def _model_row(result: Classification, one: ModelScores, axis: Axis, guide: float) -> str:
    best = result.models.get(one.modality or one.name) is one and (one.modality or one.name == result.chosen)
    kind = "t2i" if best else "even"
    value, ends = one.test[result.headline], one.test.intervals[result.headline]
    label = page.text(f"{one.modality}: {one.name}" if one.modality else one.name, page.NAME)
    number = f'<b class="{kind}">{page.number("", value)}</b>' if best else page.number("", value)
    told = f"<span>{number}</span> <span>{page.number('', ends[0])} to {page.number('', ends[1])}</span>"
    return row(label, whiskers([Dot(value, ends, kind)], axis, guide), told)


def _difference(result: Classification) -> list[str]:
    if not result.differences:
        return []
    named = {f"less {name} alone": scores for name, scores in result.differences.items()}
    note = f"{page.text(result.chosen)} less the best model of each modality alone, in points, with paired intervals."
    return [page.section("Difference", _differences(named), note)]


def _finetuning(result: Classification) -> list[str]:
    found = result.finetuning
    if found is None:
        return []
    named = {f"less {name}, frozen": scores for name, scores in found.differences.items()}
    verdict = found.verdict(result.headline)
    note = f"{page.text(found.name)} less frozen models, in points, with paired intervals. {page.text(verdict)}."
    return [page.section("Does fine-tuning the towers pay?", _differences(named), note)]


def _differences(named: Mapping[str, Scores]) -> str:
    """A row for each measure of each difference."""
    found = [
        (name, measure, scores[measure], scores.intervals[measure])
        for name, scores in named.items()
        for measure in scores
        if measure != "mae"
    ]
    axis = Axis.around([0, *(end for *_, value, ends in found for end in (value, *ends))], -1, 1)
    drawn = []
    for name, measure, value, ends in found:
        kind = "good" if ends[0] > 0 else "bad" if ends[1] < 0 else "even"
        told = f'<span><b class="{kind}">{page.difference("", value)}</b></span>'
        told += f" <span>{page.difference('', ends[0])} to {page.difference('', ends[1])}</span>"
        drawn.append(row(page.text(f"{name}: {_measure(measure)}"), whiskers([Dot(value, ends, kind)], axis, 0), told))
    return page.panel(rows(drawn, axis_labels(axis, signed=True)))


# ---- classes ---------------------------------------------------------------------------------------------------------


def _shown(result: Classification) -> list[tuple[str, ModelScores]]:
    """The chosen model, and the best of each modality alone."""
    names = [result.chosen, *(name for name in result.modalities if name != result.chosen)]
    return [(name, result.models[name]) for name in names if result.models[name].details]


def _classes(result: Classification) -> list[str]:
    shown = _shown(result)
    if not shown:
        return []
    drawn = []
    for i, name in enumerate(result.target.names):
        dots = []
        told = []
        for lane, (_, one) in enumerate(shown[:_CURVES]):
            assert one.details is not None  # see above
            value = one.details.classes[i].f1
            dots.append(Dot(value, None, _COLOURS[lane], lane))
            told.append(f'<span><b class="{_COLOURS[lane]}">{page.number("", value)}</b></span>')
        assert shown[0][1].details is not None
        count = shown[0][1].details.classes[i].rows
        label = f'{page.text(name, page.NAME)} <span class="quiet">{count:,}</span>'
        drawn.append(row(label, whiskers(dots, SHARES), " ".join(told)))
    marks = page.legend([(_COLOURS[i], "", name) for i, (name, _) in enumerate(shown[:_CURVES])])
    averages = []
    for name, one in shown:
        assert one.details is not None
        averages.append([page.text(name), *(page.number("", value) for value in one.details.averages.values())])
    assert shown[0][1].details is not None
    heads = ["", *(key.replace("_", " ") for key in shown[0][1].details.averages)]
    content = page.panels(
        [
            page.panel(marks + rows(drawn, axis_labels(SHARES)), "F1 of each class", "And its rows in test."),
            page.panel(page.table(heads, averages), "Averages", kind="whole"),
        ]
    )
    return [page.section("Class by class", content)]


def _confusion(result: Classification) -> list[str]:
    names = list(result.target.names)
    maps = []
    for name, one in _shown(result):
        if one.details is not None and one.details.confusion is not None and len(names) <= _MAP:
            counts = one.details.confusion
            maps.append(page.panel(heat_map(names, counts, counts.sum(axis=1).tolist()), name))
    note = "Rows: what is right. Columns: what was said. As dark as their share of the row."
    return [page.section("What is taken for what", page.panels(maps), note)] if maps else []


def _curves(result: Classification) -> list[str]:
    shown = _shown(result)
    if not shown:
        return []
    details = shown[0][1].details
    assert details is not None
    often = sorted(details.classes, key=lambda one: -one.rows)[:_CURVES]
    curves = []
    for colour, one in zip(_COLOURS, often, strict=False):
        if one.precision_recall is not None:
            at = _spaced(one.precision_recall.xs)
            xs, ys = one.precision_recall.xs[at], one.precision_recall.ys[at]
            curves.append(Line(f"{one.name} ({one.average_precision:.2f})", xs.tolist(), ys.tolist(), colour))
    parts = []
    if curves:
        marks = page.legend([(line.kind, "", line.name) for line in curves])
        chart = lines(curves, SHARES, SHARES, "precision over recall", x_name="recall, %", y_name="precision, %")
        parts.append(page.panel(marks + chart, "Precision and recall", "In brackets: average precision."))
    ideal = Line("as it should be", [0, 1], [0, 1], "even")
    own = [
        Line(name, one.details.confidence.tolist(), one.details.accuracy.tolist(), colour)
        for colour, (name, one) in zip(_COLOURS, shown, strict=False)
        if one.details is not None
    ]
    errors = " · ".join(
        f"{page.text(name)}: {100 * one.details.calibration_error:.1f}\xa0%" for name, one in shown if one.details
    )
    chart = lines([ideal, *own], SHARES, SHARES, "right over sure", x_name="sure, %", y_name="right, %")
    marks = page.legend([(line.kind, "", line.name) for line in [*own, ideal]])
    parts.append(page.panel(marks + chart, "Calibration", f"Expected calibration error: {errors}"))
    return [page.section("How sure, and how right", page.panels(parts), f"Curves of {page.text(result.chosen)}.")]


def _spaced(xs: Sequence[float] | np.ndarray[tuple[int, ...], np.dtype[np.float64]]) -> list[int]:
    """Places of some points that are about evenly spaced, the ends among them."""
    wanted = np.linspace(xs[0], xs[-1], _POINTS)
    return sorted({int(np.abs(np.asarray(xs) - value).argmin()) for value in wanted} | {0, len(xs) - 1})


# ---- why -------------------------------------------------------------------------------------------------------------


def _effects(result: Classification) -> list[str]:
    if not result.effects:
        return []
    plain = next((one for one in result.effects if one.treatment == "none"), result.effects[0])
    heads = ["treatment", "rows", "macro-F1 on val", "on test", *(page.text(name) for name in result.target.names)]
    cells = []
    for one in result.effects:
        changes = [
            page.number("", value) + ("" if one is plain else f" ({page.difference('', value - before)})")
            for value, before in zip(one.per_class, plain.per_class, strict=True)
        ]
        cells.append([one.treatment, f"{one.rows:,}", page.number("", one.val), page.number("", one.test), *changes])
    note = "The same network (early-mlp) under each treatment: F1 of each class on test, and its change from none."
    return [page.section("Rare classes", page.panel(page.table(heads, cells)), note)]


def _explanation(result: Classification) -> list[str]:
    found = result.explanation
    if found is None:
        return []
    axis = Axis.around([found.whole, *found.left_out], -1, 1)
    drawn = []
    for i, name in enumerate(found.names):
        value = found.left_out[i]
        told = f"<span>{page.number('', value)}</span> <span>{page.difference('', value - found.whole)}</span>"
        drawn.append(row(page.text(f"without {name}"), whiskers([Dot(value, None, "i2t")], axis, found.whole), told))
    parts = [
        page.panel(
            rows(drawn, axis_labels(axis)), f"{_measure(result.headline)} without it", "Dotted: with everything."
        )
    ]
    heads = ["modality", "mean fall of the answer's probability", "largest"]
    cells = [
        [page.text(name), page.difference("", float(part.mean())), page.difference("", float(part.max()))]
        for name, part in zip(found.names, found.contribution.T, strict=True)
    ]
    if found.attention is not None:
        heads.append("mean attention")
        for cell, share in zip(cells, found.attention.mean(axis=0).tolist(), strict=True):
            cell.append(page.number("", share))
    parts.append(page.panel(page.table(heads, cells), "What it adds to each answer"))
    return [page.section("What each modality contributes", page.panels(parts))]


def _sharing(result: Classification) -> list[str]:
    if not result.sharing:
        return []
    heads = ["", *next(iter(result.sharing.values()))]
    cells = [
        [page.text(name), *(page.number(key, value) for key, value in values.items())]
        for name, values in result.sharing.items()
    ]
    note = "The graph's outputs as a shared space: does a text still find its picture? Before and after."
    return [page.section("Over the graph", page.panel(page.table(heads, cells)), note)]


# ---- every number ----------------------------------------------------------------------------------------------------


def _table(result: Classification) -> str:
    everyone = [*result.baselines, *(one for one in result.models.values() if not one.modality)]
    measures = list(everyone[0].test)
    heads = ["model", f"val {_measure(result.headline)}"]
    for measure in measures:
        heads += [_measure(measure), "95 % interval"]
    heads += ["CPU seconds", "parameters", "what it is"]
    cells = []
    for one in everyone:
        cell = [
            page.text(f"{one.modality}: {one.name}" if one.modality else one.name),
            _number(result.headline, one.val),
        ]
        for measure in measures:
            ends = "–".join(_number(measure, end) for end in one.test.intervals[measure])
            cell += [_number(measure, one.test[measure]), ends]
        cells.append([*cell, f"{one.seconds:.1f}", f"{one.parameters:,}", page.text(one.about)])
    return f"<details>\n<summary>All numbers</summary>\n{page.table(heads, cells)}\n</details>"


def _number(measure: str, value: float) -> str:
    if not math.isfinite(value):
        return "–"
    return f"{value:.4g}" if measure == "mae" else page.number("", value)


def _measure(name: str) -> str:
    return {"macro_f1": "macro-F1", "r2": "R²", "mae": "mean absolute error"}.get(name, name)
