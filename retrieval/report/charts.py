"""Charts as SVG and HTML: data in, strings out, for the pages of :mod:`retrieval.report`. No script, no library.

Positions are percentages of whatever width there is, so that lines and type keep their size on a phone. Colours come
from the page's variables, which differ between light and dark; a class names what a mark stands for.
"""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

STYLE = """
  svg { display: block; overflow: visible; }
  svg text { fill: var(--quiet); font-size: .75rem; font-variant-numeric: tabular-nums; }
  .grid { stroke: var(--line); stroke-width: 1; shape-rendering: crispEdges; }
  .guide { stroke: var(--quiet); stroke-width: 1; stroke-dasharray: 2 3; }
  .t2i { color: var(--t2i); } .i2t { color: var(--i2t); } .good { color: var(--good); } .bad { color: var(--bad); }
  .even { color: var(--quiet); }
  .mark { stroke: currentColor; stroke-width: 2; fill: currentColor; }
  .other circle { fill: var(--paper); }
  .other line { stroke-opacity: .45; }
  .rows { display: grid; grid-template-columns: fit-content(45%) minmax(4rem, 1fr) auto; column-gap: 1rem;
    grid-auto-flow: dense; align-items: center; }
  .rows > svg { grid-column: 2; width: 100%; }
  .rows .label { grid-column: 1; overflow-wrap: anywhere; line-height: 1.25; }
  .rows .value { grid-column: 3; text-align: right; font-size: .82rem; color: var(--quiet);
    font-variant-numeric: tabular-nums; }
  .rows .value span { white-space: nowrap; margin-left: .9em; }
  .rows .group { grid-column: 1 / -1; font-weight: 600; padding-top: .7rem; }
  .plot { padding: 1.6rem .6rem 1.8rem 3rem; }
  .plot svg { width: 100%; height: 17rem; }
  .plot svg svg { height: 100%; overflow: hidden; }
  .plot path { vector-effect: non-scaling-stroke; fill: none; stroke: currentColor; stroke-width: 2;
    stroke-linejoin: round; }
  .plot path.band { fill: currentColor; stroke: none; fill-opacity: .16; }
  .plot path.other { stroke-dasharray: 6 4; }
  .plot path.chance { stroke: var(--quiet); stroke-width: 1.25; stroke-dasharray: 1.5 3; }
  .plot circle { fill: currentColor; }
  .plot .start { stroke: currentColor; stroke-width: 1.25; stroke-dasharray: 1.5 3; }
  .plot.lines svg svg { overflow: visible; }
  .plot .mark.other circle { fill: var(--card); } .plot.points text.end { fill: var(--ink); }
  .plot.named { padding-right: 3.6rem; } .plot text.end { fill: currentColor; }
  .bars { padding: 2.2rem 0 1.6rem; }
  .bars svg { width: 100%; height: 9rem; }
  .bars rect, .rows rect { fill: currentColor; }
  .bars .count { fill: var(--ink); }
  .bars .share { font-size: .68rem; }
  .map { overflow-x: auto; padding: .25rem; }
  .map text { font-size: .72rem; }
  .map .hit { fill: var(--t2i); } .map .miss { fill: var(--i2t); }
  .map .on { fill: var(--paper); }
  .map .off { fill: var(--ink); }
  @media (max-width: 44rem) {
    .rows { grid-template-columns: minmax(0, 1fr) fit-content(68%); column-gap: .7rem; }
    .rows .value { grid-column: 2; }
    .rows > svg { grid-column: 1 / -1; width: auto; margin: 0 .7rem; }
    .bars text, .bars .share { font-size: .6rem; } .plot text { font-size: .66rem; }
  }
"""


# ---- scales ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Axis:
    """A linear scale with its ticks."""

    low: float
    high: float
    step: float

    @classmethod
    def around(cls, values: Iterable[float], least: float = -math.inf, most: float = math.inf) -> Axis:
        """The smallest scale of round numbers that holds all values, about four steps long; NaN is passed over."""
        finite = [value for value in values if math.isfinite(value)] or [0.0]
        step = _round_step(max((max(finite) - min(finite)) / 4, 0.01))
        low = max(least, math.floor(min(finite) / step + 1e-9) * step)
        high = min(most, math.ceil(max(finite) / step - 1e-9) * step)
        if high - low < step:  # one value, on a tick
            low, high = (low - step, high) if high + step > most else (low, low + step)
        return cls(low, high, step)

    @property
    def ticks(self) -> list[float]:
        """From low to high."""
        count = math.floor((self.high - self.low) / self.step + 1e-6)
        return [round(self.low + i * self.step, 9) for i in range(count + 1)]

    def at(self, value: float) -> str:
        """Where a value stands, as a percentage; what lies outside stands at the end."""
        return f"{self.place(value):.2f}%"

    def place(self, value: float) -> float:
        """Where a value stands between 0 and 100."""
        return 100 * min(1.0, max(0.0, (value - self.low) / (self.high - self.low)))


SHARES = Axis(0, 1, 0.25)


def counted(most: float) -> Axis:
    """From 0 to a number of things, with ticks at whole numbers."""
    top = max(1.0, most)
    return Axis(0, top, max(1.0, _round_step(top / 5)))


def _round_step(least: float) -> float:
    """The smallest of 1, 2, 5 times a power of ten that is no less."""
    power = 10.0 ** math.floor(math.log10(least))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= least * (1 - 1e-9))


def _hundredths(value: float) -> str:
    return f"{round(100 * value, 4):g}".replace("-", "−")


# ---- rows: a label, a track, a number --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Dot:
    """A value with its interval, as a mark on a track."""

    value: float
    interval: tuple[float, float] | None = None
    kind: str = "t2i"  # CSS classes: what colour, and `other` for a hollow one
    lane: int = 0


def row(label: str, track: str, value: str = "") -> str:
    """One line of :func:`rows`; all three are HTML. On a narrow screen the track is under the other two."""
    return f'<span class="label">{label}</span><span class="value">{value}</span>{track}'


def group(label: str) -> str:
    """A heading between rows."""
    return f'<span class="group">{label}</span>'


def rows(lines: Sequence[str], axis: str) -> str:
    """Rows with common columns, and the axis under their tracks."""
    return '<div class="rows">\n' + "\n".join([*lines, row("", axis)]) + "\n</div>"


def whiskers(dots: Sequence[Dot], axis: Axis, guide: float | None = None) -> str:
    """A track: dots with the lines of their intervals, each lane below the last; a dotted line at the guide.

    A value that is NaN has no dot, and an interval with a NaN end no line.
    """
    height = 14 * max([dot.lane for dot in dots], default=0) + 28
    parts = [_upright("grid", axis.at(tick)) for tick in axis.ticks]
    if guide is not None and math.isfinite(guide):
        parts.append(_upright("guide", axis.at(guide)))
    for dot in dots:
        if not math.isfinite(dot.value):
            continue
        y = 14 * (dot.lane + 1)
        line = ""
        if dot.interval and all(map(math.isfinite, dot.interval)):
            ends = [axis.at(end) for end in dot.interval]
            line = f'<line x1="{ends[0]}" y1="{y}" x2="{ends[1]}" y2="{y}"/>'
            line += "".join(f'<line x1="{end}" y1="{y - 5}" x2="{end}" y2="{y + 5}"/>' for end in ends)
        parts.append(f'<g class="mark {dot.kind}">{line}<circle cx="{axis.at(dot.value)}" cy="{y}" r="3"/></g>')
    return f'<svg height="{height}" aria-hidden="true">{"".join(parts)}</svg>'


def change(before: float, after: float, axis: Axis, kind: str) -> str:
    """A track: a hollow dot where something was, a line from there, and a dot where it is now."""
    old, new = axis.at(before), axis.at(after)
    grid = "".join(_upright("grid", axis.at(tick)) for tick in axis.ticks)
    return (
        f'<svg height="28" aria-hidden="true">{grid}'
        f'<g class="mark {kind}"><line x1="{old}" y1="14" x2="{new}" y2="14"/></g>'
        f'<g class="mark other even"><circle cx="{old}" cy="14" r="3"/></g>'
        f'<g class="mark {kind}"><circle cx="{new}" cy="14" r="3.5"/></g></svg>'
    )


def share_bar(share: float, kind: str) -> str:
    """A track: one bar from 0 to a share of 1."""
    grid = "".join(_upright("grid", SHARES.at(tick)) for tick in SHARES.ticks)
    return (
        f'<svg height="22" aria-hidden="true">{grid}'
        f'<rect class="{kind}" y="5" width="{SHARES.at(share)}" height="12" rx="2"/></svg>'
    )


def axis_labels(axis: Axis, *, signed: bool = False, plain: bool = False) -> str:
    """The numbers under a track: in hundredths unless they are plain, with a sign if it matters."""
    labels = [f"{tick:g}" if plain else _hundredths(tick) for tick in axis.ticks]
    if signed:
        labels = [f"+{label}" if tick > 0 else label for label, tick in zip(labels, axis.ticks, strict=True)]
    elif not plain:
        labels[-1] += "\xa0%"
    texts = [_text(axis.at(tick), "12", label) for label, tick in zip(labels, axis.ticks, strict=True)]
    return f'<svg height="18" aria-hidden="true">{"".join(texts)}</svg>'


def _upright(kind: str, x: str) -> str:
    return f'<line class="{kind}" x1="{x}" x2="{x}" y2="100%"/>'


def _text(x: str, y: str, words: str, attributes: str = 'text-anchor="middle"') -> str:
    return f'<text x="{x}" y="{y}" {attributes}>{html.escape(words)}</text>'


# ---- curves ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Curve:
    """Shares over k = 1, …, with a band around them if it is known."""

    ks: Sequence[int]
    shares: Sequence[float]
    band: Sequence[tuple[float, float]] = ()
    kind: str = "t2i"  # CSS classes


def curves(lines: Sequence[Curve], label: str) -> str:
    """Shares between 0 and 1 over k on a logarithmic axis, which ends with the longest curve (from 2 on)."""
    top = max(max(line.ks) for line in lines)

    def point(k: int, share: float) -> str:
        return f"{100 * math.log(k) / math.log(top):.2f},{100 - 100 * share:.2f}"

    def path(points: Iterable[str], kind: str) -> str:
        return f'<path class="{kind}" d="M{" L".join(points)}"/>'

    drawn = []
    for line in lines:
        if line.band:
            there = [point(k, high) for k, (_, high) in zip(line.ks, line.band, strict=True)]
            back = [point(k, low) for k, (low, _) in zip(line.ks, line.band, strict=True)]
            drawn.append(path([*there, *back[::-1]], f"band {line.kind}"))
    drawn += [path(map(point, line.ks, line.shares), line.kind) for line in lines]
    parts = []
    for share in SHARES.ticks:
        y = f"{100 - 100 * share:g}%"
        parts.append(f'<line class="grid" x2="100%" y1="{y}" y2="{y}"/>')
        parts.append(_text("-8", y, _hundredths(share), 'text-anchor="end" dy=".32em"'))
    parts.append(_text("-8", "-14", "% of queries", 'text-anchor="start" dx="-24"'))
    for k in (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000):
        if k <= top:
            x = f"{100 * math.log(k) / math.log(top):.2f}%"
            parts += [_upright("grid", x), _text(x, "100%", f"{k}", 'text-anchor="middle" dy="1.5em"')]
    inside = f'<svg width="100%" height="100%" viewBox="0 0 100 100" preserveAspectRatio="none">{"".join(drawn)}</svg>'
    return f'<div class="plot"><svg role="img" aria-label="{html.escape(label)}">{"".join(parts)}{inside}</svg></div>'


# ---- lines -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Line:
    """Values over something that is counted; NaN leaves a gap."""

    name: str
    xs: Sequence[float]
    ys: Sequence[float]
    kind: str = "t2i"  # CSS classes
    start: float = math.nan  # a dotted line across at this height


_APART = 6.5  # between the names of lines, in hundredths of the height


def lines(
    drawn: Sequence[Line],
    x: Axis,
    y: Axis,
    label: str,
    *,
    x_name: str = "step",
    y_name: str = "%",
    named: bool = False,
    mark: float = math.nan,
) -> str:
    """Lines with a dot at each value, over a linear axis. An axis named ``%`` is in hundredths.

    Args:
        drawn: the lines; one that has no number is left out.
        x: the scale below.
        y: the scale on the left.
        label: what it shows, for who cannot see it.
        x_name: beside the numbers below.
        y_name: above the numbers on the left.
        named: write each line's name at its end.
        mark: a place on the axis below, for an upright dotted line.
    """
    parts = []
    for tick in y.ticks:
        height = f"{100 - y.place(tick):.2f}%"
        parts.append(f'<line class="grid" x2="100%" y1="{height}" y2="{height}"/>')
        parts.append(_text("-8", height, _reading(tick, y_name), 'text-anchor="end" dy=".32em"'))
    parts.append(_text("-8", "-14", y_name, 'text-anchor="start" dx="-24"'))
    parts.append(_text("-8", "100%", x_name, 'text-anchor="end" dy="1.5em"'))
    for tick in x.ticks:
        words = _reading(tick, x_name)
        parts += [_upright("grid", x.at(tick)), _text(x.at(tick), "100%", words, 'text-anchor="middle" dy="1.5em"')]
    if math.isfinite(mark):
        parts.append(_upright("guide", x.at(mark)))
    paths, ends = [], []
    for line in drawn:
        runs = _unbroken(line)
        if not runs:
            continue
        if math.isfinite(line.start):
            height = f"{100 - y.place(line.start):.2f}%"
            parts.append(f'<line class="start {line.kind}" x2="100%" y1="{height}" y2="{height}"/>')
        places = [" L".join(f"{x.place(a):.2f},{100 - y.place(b):.2f}" for a, b in run) for run in runs]
        paths.append(f'<path class="{line.kind}" d="M{" M".join(places)}"/>')
        for a, b in (point for run in runs for point in run):
            told = f"{line.name}, {x_name} {_reading(a, x_name)}: {_reading(b, y_name)}"
            parts.append(
                f'<circle class="{line.kind}" cx="{x.at(a)}" cy="{100 - y.place(b):.2f}%" r="2.5">'
                f"<title>{html.escape(told)}</title></circle>"
            )
        ends.append((100 - y.place(runs[-1][-1][1]), line))
    if named:
        parts += [
            _text("100%", f"{height:.2f}%", line.name, f'class="end {line.kind}" dx="8" dy=".32em"')
            for height, line in _spread(ends)
        ]
    inside = f'<svg width="100%" height="100%" viewBox="0 0 100 100" preserveAspectRatio="none">{"".join(paths)}</svg>'
    kind = "plot lines named" if named else "plot lines"
    return f'<div class="{kind}"><svg role="img" aria-label="{html.escape(label)}">{"".join(parts)}{inside}</svg></div>'


def _reading(value: float, name: str) -> str:
    return _hundredths(value) if "%" in name else f"{round(value, 4):,.15g}".replace("-", "−")


def _unbroken(line: Line) -> list[list[tuple[float, float]]]:
    """The points of a line, in stretches without a gap."""
    runs: list[list[tuple[float, float]]] = [[]]
    for point in zip(line.xs, line.ys, strict=True):
        if all(map(math.isfinite, point)):
            runs[-1].append(point)
        elif runs[-1]:
            runs.append([])
    return [run for run in runs if run]


def _spread(ends: Sequence[tuple[float, Line]]) -> list[tuple[float, Line]]:
    """Heights from the top down, pushed apart where two would be written over each other."""
    placed: list[tuple[float, Line]] = []
    for height, line in sorted(ends, key=lambda end: end[0]):
        placed.append((max(height, placed[-1][0] + _APART) if placed else height, line))
    over = max(0.0, placed[-1][0] - 100) if placed else 0.0
    return [
        (min(height, 100 - _APART * (len(placed) - 1 - i)) if over else height, line)
        for i, (height, line) in enumerate(placed)
    ]


# ---- points ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Point:
    """Something that is measured twice: by what stands below and by what stands on the left."""

    name: str
    x: float
    y: float
    told: str = ""  # when one points at it


def frontier(points: Sequence[Point]) -> list[Point]:
    """The Pareto front: those than which none is better both ways, more being better. From the left to the right."""
    best: list[Point] = []
    for point in sorted(points, key=lambda point: (-point.x, -point.y)):
        if not best or point.y > best[-1].y:
            best.append(point)
    return best[::-1]


def scatter(points: Sequence[Point], y: Axis, label: str, *, x_name: str, y_name: str, kind: str = "t2i") -> str:
    """Named points over a logarithmic axis, those of the Pareto front filled and joined. ``%`` is in hundredths."""
    low, high = min(point.x for point in points), max(point.x for point in points)
    low, high = low / 1.25, high * 1.25

    def across(value: float) -> float:
        return 100 * math.log(value / low) / math.log(high / low)

    parts = []
    for tick in y.ticks:
        height = f"{100 - y.place(tick):.2f}%"
        parts.append(f'<line class="grid" x2="100%" y1="{height}" y2="{height}"/>')
        parts.append(_text("-8", height, _reading(tick, y_name), 'text-anchor="end" dy=".32em"'))
    parts.append(_text("-8", "-14", y_name, 'text-anchor="start" dx="-24"'))
    parts.append(_text("100%", "-14", f"{x_name} →", 'text-anchor="end"'))
    for tick in _round_numbers(low, high):
        at = f"{across(tick):.2f}%"
        parts += [_upright("grid", at), _text(at, "100%", f"{tick:,.15g}", 'text-anchor="middle" dy="1.5em"')]
    best = frontier(points)
    path = " L".join(f"{across(point.x):.2f},{100 - y.place(point.y):.2f}" for point in best)
    for point in points:
        hollow = "" if point in best else " other"
        circle = f'<circle cx="{across(point.x):.2f}%" cy="{100 - y.place(point.y):.2f}%" r="4">'
        parts.append(f'<g class="mark {kind}{hollow}">{circle}<title>{html.escape(point.told)}</title></circle></g>')
    places = [(across(point.x), 100 - y.place(point.y), point.name) for point in points]
    for left, top, name, left_of in _beside(places):
        attributes = f'text-anchor="{"end" if left_of else "start"}" dx="{-9 if left_of else 9}" dy=".32em"'
        parts.append(_text(f"{left:.2f}%", f"{top:.2f}%", name, f'class="end" {attributes}'))
    inside = (  # under the points
        '<svg width="100%" height="100%" viewBox="0 0 100 100" preserveAspectRatio="none">'
        f'<path class="{kind}" d="M{path}"/></svg>'
    )
    drawn = f'<svg role="img" aria-label="{html.escape(label)}">{inside}{"".join(parts)}</svg>'
    return f'<div class="plot lines points">{drawn}</div>'


_WIDE, _ROUND = 1.5, 2.0  # a letter, and from the middle of a point to its edge, in hundredths of a panel's plot


def _beside(places: Sequence[tuple[float, float, str]]) -> list[tuple[float, float, str, bool]]:
    """Where the names of points are written: beside them, as near as they hide no other point and no other name.

    Args:
        places: from the left and from above, in hundredths, and the name.

    Returns:
        The same with the name's height, and whether it is written to the left of its point.
    """
    taken = [(left - _ROUND, left + _ROUND, height) for left, height, _ in places]  # from, to, height
    out = []
    for own, (left, height, name) in enumerate(places):
        width = _WIDE * (len(name) + 1)
        others = [*taken[:own], *taken[own + 1 :]]
        spots = [
            (begin, height + sign * step * _APART)
            for step in range(len(places) + 1)
            for sign in ((1, -1) if step else (1,))
            for begin in (left + _ROUND, left - _ROUND - width)
        ]
        inside = [(begin, at) for begin, at in spots if begin >= 0 and begin + width <= 100 and 0 <= at <= 100]
        free = (
            (begin, at)
            for begin, at in inside
            if all(abs(at - other) >= _APART or begin >= end or begin + width <= start for start, end, other in others)
        )
        begin, at = next(free, spots[0])
        taken.append((begin, begin + width, at))
        out.append((left, at, name, begin < left))
    return out


def _round_numbers(low: float, high: float) -> list[float]:
    """1, 2 and 5 times powers of ten, or the powers alone where there are many."""
    powers = [10.0**n for n in range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)]
    factors = (1, 2, 5) if high < 100 * low else (1,)
    return [factor * power for power in powers for factor in factors if low <= factor * power <= high]


# ---- bars ------------------------------------------------------------------------------------------------------------


def histogram(names: Sequence[str], counts: Sequence[int], kind: str, most: float = 1.0) -> str:
    """Upright bars with their counts and shares above them, as high as their shares of all, in parts of ``most``."""
    total, width = max(1, sum(counts)), 100 / len(names)
    parts = ['<line class="grid" x2="100%" y1="100%" y2="100%"/>']
    for i, (name, count) in enumerate(zip(names, counts, strict=True)):
        share = count / total
        height, middle = 100 * share / most, f"{width * (i + 0.5):.2f}%"
        parts.append(
            f'<rect class="{kind}" x="{width * (i + 0.12):.2f}%" y="{100 - height:.2f}%" width="{width * 0.76:.2f}%" '
            f'height="{height:.2f}%"><title>rank {html.escape(name)}: {count:,} ({share:.1%})</title></rect>'
        )
        top = f"{100 - height:.2f}%"
        parts.append(_text(middle, top, f"{count:,}", 'class="count" text-anchor="middle" dy="-1.5em"'))
        parts.append(_text(middle, top, f"{100 * share:.1f}\xa0%", 'class="share" text-anchor="middle" dy="-.45em"'))
        parts.append(_text(middle, "100%", name, 'text-anchor="middle" dy="1.4em"'))
    return f'<div class="bars"><svg role="img" aria-label="histogram of ranks">{"".join(parts)}</svg></div>'


# ---- the heat map ----------------------------------------------------------------------------------------------------

_LETTER = 6.6  # pixels of a letter of a label, on average
_LABEL = 20  # letters


def heat_map(names: Sequence[str], counts: NDArray[np.int64], totals: Sequence[int]) -> str:
    """What was taken for what: rows by right class, columns by guess, as dark as their share of the row's total.

    Args:
        names: of C classes.
        counts: (C, C).
        totals: (C,) how many rows of each class there are in all; they may have had guesses that are not shown.
    """
    cell = 34 if len(names) <= 12 else 23 if len(names) <= 30 else 18
    short = [name if len(name) <= _LABEL else name[: _LABEL - 1] + "…" for name in names]
    gutter = round(_LETTER * max(map(len, short))) + 14
    side, slope = cell * len(names), round(gutter * 0.72)
    lattice = "".join(
        f"M{gutter + i * cell} {slope}v{side}M{gutter} {slope + i * cell}h{side}" for i in range(len(names) + 1)
    )
    parts = [f'<path class="grid" d="{lattice}"/>']
    for i, (name, label) in enumerate(zip(names, short, strict=True)):
        middle = round(cell * (i + 0.5))
        title = f"<title>{html.escape(name)}</title>"
        words = html.escape(label) + title
        x, y = gutter + middle, slope - 6
        parts.append(f'<text x="{gutter - 6}" y="{slope + middle}" text-anchor="end" dy=".35em">{words}</text>')
        parts.append(f'<text transform="translate({x + 3} {y}) rotate(-45)">{words}</text>')
    for row, column in zip(*_nonzero(counts), strict=True):
        count, total = int(counts[row, column]), max(1, totals[row])
        x, y = gutter + cell * column, slope + cell * row
        right = row == column
        share = count / total
        title = f"{names[row]} → {names[column]}: {count:,} of {total:,} ({share:.1%})"
        parts.append(
            f'<rect class="{"hit" if right else "miss"}" x="{x + 0.5}" y="{y + 0.5}" width="{cell - 1}" '
            f'height="{cell - 1}" fill-opacity="{0.1 + 0.9 * share:.2f}"><title>{html.escape(title)}</title></rect>'
        )
        if cell > 30:
            tone = "on" if share > 0.55 else "off"
            attributes = f'class="{tone}" text-anchor="middle" dy=".35em" pointer-events="none"'
            parts.append(_text(f"{x + cell / 2:g}", f"{y + cell / 2:g}", f"{count:,}", attributes))
    width, height = gutter + side + slope, slope + side + 4
    return (
        f'<div class="map"><svg role="img" aria-label="confusion matrix" width="{width}" height="{height}">'
        f"{''.join(parts)}</svg></div>"
    )


def _nonzero(counts: NDArray[np.int64]) -> tuple[Any, ...]:
    return tuple(places.tolist() for places in np.nonzero(counts))
