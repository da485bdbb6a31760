"""The page of a training run, done or under way."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from typing import Any

from retrieval.report import page
from retrieval.report.charts import (
    SHARES,
    Axis,
    Line,
    axis_labels,
    change,
    counted,
    group,
    lines,
    row,
    rows,
    share_bar,
    whiskers,
)

_VAL, _GUARD, _BEFORE = "val_", "guard_", "before_"
_INFORMATION = "mutual_information"


def write_run_page(
    name: str,
    log: Sequence[Mapping[str, Any]],
    config: Mapping[str, Any],
    file: Path | None = None,
    *,
    share: float | None = None,
) -> Path:
    """Write a page that shows a training run; to a temporary file when none is named. Arguments: :func:`run_page`."""
    return page.written(run_page(name, log, config, share=share), file)


def run_page(
    name: str, log: Sequence[Mapping[str, Any]], config: Mapping[str, Any], *, share: float | None = None
) -> str:
    """A page of a training run, done or under way: the same for the same arguments; no network, no script.

    Args:
        name: of the run.
        log: the lines of its ``log.jsonl``. What is missing is left out; what is no number is not drawn.
        config: its ``config.json``.
        share: of the new weights that was kept; looked for among the tries if it is not given.
    """
    run = _Run.read(log, share)
    sections = [_loss_section(run), *_validation_section(run), *_guard_section(run, config), *_won_and_lost(run)]
    sections += [*_tries_section(run, config), *_test_section(run)]
    body = "\n".join([_run_head(name, run, config), *sections, _run_tables(run, config)])
    return page.document(f"Diptych: {name}, training", page.STYLE, body)


@dataclass(frozen=True)
class _Run:
    """A log, taken apart.

    Attributes:
        steps: what was measured on the way, at step 0 too.
        tries: of shares of the new weights.
        end: the last line; None before the end.
        share: of the new weights that was kept; NaN if unknown.
    """

    steps: Sequence[Mapping[str, Any]]
    tries: Sequence[Mapping[str, Any]]
    end: Mapping[str, Any] | None
    share: float

    @classmethod
    def read(cls, log: Sequence[Mapping[str, Any]], share: float | None) -> _Run:
        tries = [line for line in log if math.isfinite(_value(line, "share"))]
        told = [line for line in log if math.isfinite(_value(line, "step"))]
        steps = [line for line in told if "loss" in line or _value(line, "step") == 0]
        end = next((line for line in reversed(told) if "loss" not in line and _value(line, "step") > 0), None)
        if share is None:
            share = _kept(tries, end or {})
        return cls(steps, tries, end, share if 0 <= share <= 1 else math.nan)

    @property
    def losses(self) -> list[Mapping[str, Any]]:
        return [line for line in self.steps if "loss" in line]

    @property
    def start(self) -> Mapping[str, Any]:
        """What was measured before the first step; empty if nothing was."""
        return next((line for line in self.steps if _value(line, "step") == 0), {})

    @property
    def before(self) -> dict[str, float]:
        """All measures of the start."""
        names = _names([self.start], _VAL, _GUARD)
        told = self.end or {}
        found = {name.removeprefix(_BEFORE): _value(told, name) for name in _names([told], _BEFORE + _VAL)}
        found |= {name.removeprefix(_BEFORE): _value(told, name) for name in _names([told], _BEFORE + _GUARD)}
        return {name: _value(self.start, name) for name in names} | found

    @property
    def after(self) -> tuple[dict[str, float], str]:
        """All measures of the result, and what it is: of the kept weights where they were measured."""
        end = self.end or {}
        names = _names([end], _VAL, _GUARD)
        if names:
            return {name: _value(end, name) for name in names}, "the weights that were kept"
        last = self.losses[-1] if self.losses else {}
        return {name: _value(last, name) for name in _names([last], _VAL, _GUARD)}, (
            "the last weights, before they were mixed with those of the start" if self.tries else "the last weights"
        )


def _value(line: Mapping[str, Any], name: str) -> float:
    """A number of a line; NaN if it is none."""
    value = line.get(name)
    return math.nan if isinstance(value, bool) or not isinstance(value, Real) else float(value)


def _names(told: Iterable[Mapping[str, Any]], *prefixes: str) -> list[str]:
    """The measures that begin so, in the order of their first appearance."""
    return list(dict.fromkeys(name for line in told for name in line if name.startswith(prefixes)))


def _kept(tries: Sequence[Mapping[str, Any]], end: Mapping[str, Any]) -> float:
    """The share of the only try that scored what the result scores; NaN if there is none, or several are alike."""
    hits = [_value(end, name) for name in _names([end], _VAL) if "hit@" in name]
    guard = _names([end], _GUARD)
    wanted = {**{name: _value(end, name) for name in guard}, **({"target": sum(hits)} if hits else {})}
    alike = [
        _value(one, "share")
        for one in tries
        if all(math.isclose(_value(one, name), value, abs_tol=1e-9) for name, value in wanted.items())
    ]
    return alike[0] if wanted and len(alike) == 1 else math.nan


def _run_number(name: str, value: float) -> str:
    """A number of the log as it is written; a share as per cent."""
    if not math.isfinite(value):
        return "–"
    if _is_hundredth(name):
        return page.number(name, value)
    return page.rank(value) if name.endswith("_rank") else f"{value:,.4f}".rstrip("0").rstrip(".").replace("-", "−")


def _is_hundredth(name: str) -> bool:
    plain = ("_rank", "rsum", _INFORMATION, "loss", "scale", "step", "target", "share")
    return not name.endswith(plain)


def _measure_called(name: str) -> str:
    """What a measure is called without the data that it is of."""
    known = name.endswith(_INFORMATION)
    return _INFORMATION.replace("_", " ") + ", nats" if known else page.called(name).replace("_", " ")


def _guarded(names: Iterable[str]) -> dict[str, dict[str, str]]:
    """The measures of each data set of the guard: their names in the log, and without the data set's."""
    found: dict[str, dict[str, str]] = {}
    for name in names:
        match = re.fullmatch(r"(.+)_((?:t2i|i2t)_.+|top\d+)", name.removeprefix(_GUARD))
        data, measure = match.groups() if match else (name.removeprefix(_GUARD), "")
        found.setdefault(data, {})[name] = measure
    return found


# ---- sections --------------------------------------------------------------------------------------------------------


def _run_head(name: str, run: _Run, config: Mapping[str, Any]) -> str:
    def told(*names: str) -> str:
        return " + ".join(page.text(str(config[one]), page.NAME) for one in names if config.get(one) not in (None, ""))

    epochs = f"{told('epochs')} {'epoch' if config.get('epochs') == 1 else 'epochs'}" if told("epochs") else ""
    facts = [
        f"{label}{value}"
        for label, value in (
            ("began with ", told("model") or told("image_tower", "text_tower")),
            ("objective ", told("objective")),
            ("trained: ", told("train")),
            ("", epochs),
            ("batch of ", told("batch_size")),
            ("seed ", told("seed")),
        )
        if value
    ]
    measured = [*run.steps, *([run.end] if run.end else [])]
    if run.steps:
        facts += [] if _names(measured, _VAL) else ["no validation pairs"]
        facts += [] if _names(measured, _GUARD) else ["no guard against forgetting"]
    if measured and not run.end:
        facts.append(f"not done: logged up to step {_run_number('step', max(_value(one, 'step') for one in measured))}")
    return (
        f'<header>\n<p class="quiet">Diptych · training</p>\n<h1>{page.text(name)}</h1>\n'
        f'<p class="quiet">{" · ".join(facts)}</p>\n</header>'
    )


def _series(told: Sequence[Mapping[str, Any]], over: str, name: str, called: str, kind: str) -> Line:
    """A measure over the steps or the shares, and where it began."""
    first = told[0] if told and _value(told[0], over) == 0 else {}
    places, values = [_value(line, over) for line in told], [_value(line, name) for line in told]
    return Line(called, places, values, kind, _value(first, name))


def _steps_axis(run: _Run) -> Axis:
    return counted(max(_value(line, "step") for line in run.steps))


def _drawable(drawn: Iterable[Line]) -> list[Line]:
    return [line for line in drawn if any(map(math.isfinite, line.ys))]


def _loss_section(run: _Run) -> str:
    loss = _drawable([_series(run.losses, "step", "loss", "loss", "t2i")])
    if not loss:
        nothing = "Nothing has been logged yet." if not run.steps and not run.end else "No loss has been logged yet."
        return page.section("Loss", "", "The loss was never a number." if run.losses else nothing)
    x = _steps_axis(run)
    chart = lines(loss, x, Axis.around(loss[0].ys), "loss over steps", y_name="loss")
    panels = [page.panel(chart, "Loss", "Of one batch at each step that was measured.")]
    known = _drawable([_series(run.steps, "step", _VAL + _INFORMATION, "mutual information", "t2i")])
    if known:
        chart = lines(known, x, Axis.around(known[0].ys), "mutual information over steps", y_name="nats")
        note = "What a picture and its sentence tell of each other, at least. Dotted: the start."
        panels.append(page.panel(chart, "Mutual information", note))
    return f"<section>\n{page.panels(panels)}\n</section>"


def _validation_section(run: _Run) -> list[str]:
    if not run.losses:
        return []
    of_ways = {
        way: _drawable(
            _series(run.steps, "step", name, name.removeprefix(f"{_VAL}{way}_"), way)
            for name in _names(run.steps, f"{_VAL}{way}_hit@")
        )
        for way in page.WAYS
    }
    everything = [line for drawn in of_ways.values() for line in drawn]
    if not everything:
        return []
    y = Axis.around([value for line in everything for value in line.ys], 0, 1)
    panels = [
        page.panel(
            lines(drawn, _steps_axis(run), y, f"{page.WAYS[way]}: hit at k over steps", named=True), page.WAYS[way]
        )
        for way, drawn in of_ways.items()
        if drawn
    ]
    return [page.section("Validation", page.panels(panels), "hit@k over the steps. Dotted: the start.")]


def _guard_section(run: _Run, config: Mapping[str, Any]) -> list[str]:
    panels = _guard_panels(run.steps, "step", _steps_axis(run)) if run.losses else []
    if not panels:
        return []
    note = "What was not to be forgotten, over the steps. Dotted: the start."
    return [page.section("Guard", page.panels(panels), note + _allowed(config))]


def _allowed(config: Mapping[str, Any]) -> str:
    most = _value(config, "max_loss")
    points = f"{100 * most:g}\xa0{'point' if most == 0.01 else 'points'}"
    return f" A loss of {points} was allowed." if math.isfinite(most) else ""


def _guard_panels(told: Sequence[Mapping[str, Any]], over: str, x: Axis, mark: float = math.nan) -> list[str]:
    """A panel for each data set of the guard; each on its own scale, since small losses matter."""
    panels = []
    for data, measures in _guarded(_names(told, _GUARD)).items():
        kinds = {name: page.way_of(measure) or "t2i" for name, measure in measures.items()}
        drawn = _drawable(
            _series(told, over, name, _measure_called(measure), kinds[name]) for name, measure in measures.items()
        )
        if not drawn:
            continue
        y = Axis.around([value for line in drawn for value in line.ys], 0, 1)
        x_name = "share, %" if over == "share" else over
        chart = lines(drawn, x, y, f"{page.plain(data, page.NAME)} over {over}s", x_name=x_name, mark=mark)
        legend = page.legend([(line.kind, "", line.name) for line in drawn if line.name])
        panels.append(page.panel(f"{legend}\n{chart}", page.plain(data, page.NAME)))
    return panels


def _won_and_lost(run: _Run) -> list[str]:
    """Every measure of the start and of the result, side by side."""
    before = run.before
    after, what = run.after
    names = [name for name in before if name in after]
    if not names or not (run.losses or run.end):
        return []
    groups = {"Validation": {name: name.removeprefix(_VAL) for name in names if name.startswith(_VAL)}}
    for data, measures in _guarded(name for name in names if name.startswith(_GUARD)).items():
        groups[f"Guard: {data}"] = measures
    shares = [name for name in names if _is_hundredth(name)]
    axis = Axis.around([value for name in shares for value in (before[name], after[name])], 0, 1)
    drawn, others = [], []
    for title, measures in groups.items():
        kept = {name: called for name, called in measures.items() if name in shares}
        drawn += [group(page.text(title, page.NAME))] if kept else []
        drawn += [_changed_row(name, called, before[name], after[name], axis) for name, called in kept.items()]
        others += [
            [
                f"{page.text(title, page.NAME)}: {page.text(_measure_called(called))}",
                *_changed(name, before[name], after[name]),
            ]
            for name, called in measures.items()
            if name not in kept
        ]
    panels = [page.panel(rows(drawn, axis_labels(axis)), kind="whole")] if drawn else []
    panels += [page.panel(page.table(["measure", "before", "after", "change"], others), kind="whole")] if others else []
    note = f"Hollow: the start. Filled: {what}; green is better, red worse. Without intervals: little may be chance."
    return [page.section("Won and lost", page.panels(panels), note)]


def _changed(name: str, before: float, after: float) -> list[str]:
    """Before, after and the change between them, coloured by what it is worth."""
    difference = after - before
    if _is_hundredth(name):
        less = page.difference("", difference)
    else:
        less = ("+" if difference > 0 else "") + _run_number(name, difference).replace("-", "−")
    kind = _worth(name, before, after)
    return [_run_number(name, before), _run_number(name, after), f'<b class="{kind}">{less}</b>']


def _worth(name: str, before: float, after: float) -> str:
    """Whether a change is good; of what looks the same as before: neither. Of ranks the lower are better."""
    if not math.isfinite(after - before) or _run_number(name, before) == _run_number(name, after):
        return "even"
    return "good" if (after > before) != name.endswith("_rank") else "bad"


def _changed_row(name: str, called: str, before: float, after: float, axis: Axis) -> str:
    cells = _changed(name, before, after)
    value = f"<span>{cells[0]} → {cells[1]}</span> <span>{cells[2]}</span>"
    known = all(map(math.isfinite, (before, after)))
    track = change(before, after, axis, _worth(name, before, after)) if known else whiskers([], axis)
    return row(page.text(_measure_called(called) or "score"), track, value)


def _tries_section(run: _Run, config: Mapping[str, Any]) -> list[str]:
    tries = sorted(run.tries, key=lambda one: _value(one, "share"))
    if not tries:
        return []
    panels = []
    target = _drawable([_series(tries, "share", "target", "target", "t2i")])
    if target and any(one != _value(line, "share") for one, line in zip(target[0].ys, tries, strict=True)):
        y = Axis.around(target[0].ys)
        chart = lines(target, SHARES, y, "target over shares", x_name="share, %", y_name="target", mark=run.share)
        panels.append(page.panel(chart, "Target", "The sum of all hit@k on validation."))
    panels += _guard_panels(tries, "share", SHARES, run.share)
    kept = f" Kept: {100 * run.share:g}\xa0%, the upright line." if math.isfinite(run.share) else ""
    note = "Mixtures of the new weights with those of the start. Dotted: the start." + kept + _allowed(config)
    return [page.section("How much of the new weights", page.panels(panels), note)]


def _test_section(run: _Run) -> list[str]:
    """hit@k and top-k of the tests; the rest is in the table."""
    shown = [name for name in _test_names(run) if re.search(r"hit@\d+$|top\d+$|mean_per_class$", name)]
    drawn = [
        row(page.text(name.replace("_", " "), page.NAME), share_bar(value, "t2i"), _run_number(name, value))
        for name in shown
        if math.isfinite(value := _value(run.end or {}, name))
    ]
    if not drawn:
        return []
    return [page.section("Tests", page.panel(rows(drawn, axis_labels(SHARES))), "Of the result as written.")]


def _test_names(run: _Run) -> list[str]:
    return [name for name in run.end or {} if name != "step" and not name.startswith((_VAL, _GUARD, _BEFORE))]


def _run_tables(run: _Run, config: Mapping[str, Any]) -> str:
    """Every number of the log, and every setting."""
    tables = []
    for called, over, told in (
        ("step", "step", run.steps),
        ("share", "share", run.tries),
        ("at the end, step", "step", [run.end] if run.end else []),
    ):
        names = [name for name in _names(told, "") if name != over]
        heads = [called, *(_run_number(over, _value(line, over)) for line in told)]
        cells = [[page.text(name), *(_run_number(name, _value(line, name)) for line in told)] for name in names]
        tables += [page.table(heads, cells)] if told else []
    settings = [[page.text(str(name)), page.text(_setting(value), 4 * page.SENTENCE)] for name, value in config.items()]
    tables += [page.table(["setting", ""], settings)] if settings else []
    if not tables:
        return ""
    return "<details>\n<summary>All numbers</summary>\n" + "\n".join(tables) + "\n</details>"


def _setting(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
