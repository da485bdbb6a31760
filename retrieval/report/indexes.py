"""The part of an evaluation's page that shows retrieval through FAISS indexes."""

from __future__ import annotations

from collections.abc import Sequence

from indexes.choice import EXACT
from retrieval.index_evaluation import IndexScores
from retrieval.report import page
from retrieval.report.charts import Axis, Point, scatter

_NOTE = (
    "Found: the share of the ten nearest that exact search finds, with queries the index was not tuned on. Filled: no "
    "other one is both faster and finds more. MB: beside the vectors themselves. One query at a time."
)


def index_section(indexes: Sequence[IndexScores]) -> list[str]:
    """A plot for each direction, and the numbers."""
    if not indexes:
        return []
    panels = []
    for way in dict.fromkeys(scores.way for scores in indexes):
        mine = [scores for scores in indexes if scores.way == way]
        shown = [name for name in mine[0].metrics if name.startswith(f"{way}_hit@")]
        heads = ["index", *(name.removeprefix(f"{way}_") for name in shown), "found", "queries/s", "MB"]
        lines = [
            [
                page.text(scores.name, page.NAME),
                *(page.number(name, scores.metrics[name]) for name in shown),
                page.number("found", scores.recall),
                f"{scores.queries_per_second:,.0f}",
                f"{scores.bytes / 1e6:,.2f}",
            ]
            for scores in mine
        ]
        what = "pictures" if way == "t2i" else "captions"
        content = _pareto(mine, way) + "\n" + page.table(heads, lines)
        panels.append(page.panel(content, page.WAYS[way], f"{mine[0].rows:,} {what}"))
    return [page.section("Through an index", page.panels(panels), _NOTE)]


def _pareto(indexes: Sequence[IndexScores], way: str) -> str:
    points = [
        Point(
            page.plain(scores.name, page.NAME),
            scores.queries_per_second,
            scores.recall,
            f"{page.plain(scores.name)}: found {page.number('found', scores.recall)}, "
            f"{scores.queries_per_second:,.0f} queries/s, {scores.bytes / 1e6:,.2f} MB",
        )
        for scores in indexes
        if scores.asked == scores.kind or scores.kind != EXACT  # exact search stands there already
    ]
    axis = Axis.around([1.0, *(point.y for point in points)], 0, 1)
    label = "share of the nearest that is found, over queries a second"
    return scatter(points, axis, label, x_name="queries/s", y_name="% found", kind=way)
