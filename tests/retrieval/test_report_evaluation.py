"""The page of an evaluation: its numbers and drawings against slow recounts, and what it makes of odd results."""

from __future__ import annotations

import base64
import html
import io
import math
import os
import re
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from indexes.vectors import as_vectors
from retrieval.errors import UsageError
from retrieval.evaluation import ClassificationDetails, Comparison, Evaluation, RetrievalDetails, Slice
from retrieval.index_evaluation import IndexScores
from retrieval.metrics import KS, difference, evaluate_classification, measure
from retrieval.pairs import PictureBytes, Record, checksum
from retrieval.ranks import rank_pairs
from retrieval.report import charts, evaluation_page, write_evaluation_page
from retrieval.report.charts import Axis, Point, frontier

VOID = {"meta", "img", "br"}


class Element:
    def __init__(self, tag, attributes, parent):
        self.tag, self.attributes, self.parent, self.children = tag, attributes, parent, []

    def __getitem__(self, name):
        return self.attributes[name]

    def walk(self):
        for child in self.children:
            if isinstance(child, Element):
                yield child
                yield from child.walk()

    def all(self, tag, *classes):
        return [
            e for e in self.walk() if e.tag == tag and set(classes) <= set((e.attributes.get("class") or "").split())
        ]

    @property
    def text(self):
        return "".join(child if isinstance(child, str) else child.text for child in self.children)


class Tree(HTMLParser):
    """A page as elements; every element that is opened must be closed in its place."""

    def __init__(self, page):
        super().__init__()
        self.root = self.here = Element("", {}, None)
        self.feed(page)
        self.close()
        assert self.here.tag in ("", "html")

    def handle_starttag(self, tag, attributes):
        element = Element(tag, dict(attributes), self.here)
        self.here.children.append(element)
        if tag not in VOID:
            self.here = element

    def handle_startendtag(self, tag, attributes):
        self.here.children.append(Element(tag, dict(attributes), self.here))

    def handle_endtag(self, tag):
        assert self.here.tag == tag, f"</{tag}> in <{self.here.tag}>"
        self.here = self.here.parent

    def handle_data(self, data):
        self.here.children.append(data)


def read(result):
    return Tree(evaluation_page(result)).root


def section(root, title):
    (found,) = [part for part in root.all("section") if [h.text for h in part.all("h2")] == [title]]
    return found


def titles(root):
    return [heading.text for heading in root.all("h2")]


def percent(value):
    return f"{100 * value:.1f}\xa0%"


def number(text):
    return float(text.rstrip("%"))


@pytest.fixture
def pictures(tmp_path):
    """Makes as many small pictures as asked for, each of its own colour."""

    def make(count):
        paths = []
        for i in range(count):
            path = tmp_path / f"{i:04}.png"
            Image.new("RGB", (9, 6), (37 * i % 256, 91 * i % 256, 130)).save(path)
            paths.append(path)
        return paths

    return make


def retrieval(records, images, texts, *, bootstrap=0, ks=KS, ties="pessimistic", pairs=None, slices=()):
    """What `evaluate` returns, from vectors; ``slices``: (name, texts, images)."""
    spoken = [text for record in records for text in record.texts]
    owner = np.repeat(np.arange(len(records)), [len(record.texts) for record in records])
    image_rows, text_rows = pairs or (owner, np.arange(len(owner)))
    ranking = rank_pairs(images, texts, image_rows, text_rows, ties)
    scores = measure(ranking, ks, bootstrap)
    parts = []
    for name, of_texts, of_images in slices:
        part = measure(ranking.select(of_texts, of_images), ks, bootstrap)
        parts.append(Slice(name, int(of_images.sum()), int(of_texts.sum()), part.metrics, part.intervals))
    details = RetrievalDetails(
        records, spoken, owner, image_rows, text_rows, as_vectors(images), as_vectors(texts), ranking
    )
    return Evaluation(
        "retrieval", "a-model", "f" * 64, len(records), len(spoken), checksum(records), scores.metrics,
        scores.intervals, details, tuple(parts), ties=ties,
    )  # fmt: skip


def noisy(paths, captions=3, noise=1.0, seed=0, **settings):
    """Captions scattered around their pictures: ranks of all kinds."""
    random = np.random.default_rng(seed)
    records = [Record(path, tuple(f"caption {i}.{j}" for j in range(captions))) for i, path in enumerate(paths)]
    images = random.normal(size=(len(paths), 12))
    texts = np.repeat(images, captions, axis=0) + noise * random.normal(size=(len(paths) * captions, 12))
    return retrieval(records, images, texts, **settings)


def slow_ranks(result):
    """(best rank of each text, best rank of each picture), by sorting."""
    details = result.details
    scores = details.image_vectors.astype(float) @ details.text_vectors.astype(float).T
    t2i = [1 + int((scores[:, t] > scores[o, t]).sum()) for t, o in enumerate(details.owner.tolist())]
    i2t = []
    for i, row in enumerate(scores):
        own = row[details.owner == i]
        if len(own):
            i2t.append(1 + int((row > own.max()).sum()))
    return t2i, i2t


def compared(one, other):
    """As `evaluate` compares: paired draws."""
    less = difference(*(measure(r.details.ranking, KS, 200 if one.intervals else 0) for r in (one, other)))
    return replace(one, comparison=Comparison(replace(other, model="another"), less.metrics, less.intervals))


# ---- numbers ---------------------------------------------------------------------------------------------------------


def test_the_head_says_what_was_measured(pictures):
    result = replace(noisy(pictures(30), bootstrap=50), note="a note")
    (head,) = read(result).all("header")
    for words in ("a-model", "30 pictures", "90 captions", result.checksum[:12], "f" * 12, "bootstrap", "a note"):
        assert words in head.text
    assert result.checksum[:13] not in head.text
    assert "no intervals" in read(noisy(pictures(3))).all("header")[0].text


def test_the_large_numbers_are_the_metrics_and_the_whiskers_stand_where_they_belong(pictures):
    result = noisy(pictures(60), bootstrap=200)
    panels = read(result).all("section")[0].all("div", "panel")
    for panel, way in zip(panels[:2], ("t2i", "i2t"), strict=True):
        names = [f"{way}_hit@{k}" for k in KS]
        assert [b.text for b in panel.all("b", "number")] == [percent(result.metrics[name]) for name in names]
        values = [span.text for span in panel.all("span", "value")]
        ends = [result.intervals[name] for name in names]
        assert values[:3] == [f"{100 * low:.1f}–{100 * high:.1f}" for low, high in ends]
        marks = panel.all("g", "mark", way)
        for mark, name, (low, high) in zip(marks, names, ends, strict=True):
            (dot,), (line, *_) = mark.all("circle"), mark.all("line")
            assert number(dot["cx"]) == pytest.approx(100 * result.metrics[name], abs=0.006)
            assert [number(line["x1"]), number(line["x2"])] == pytest.approx([100 * low, 100 * high], abs=0.006)
        assert f"median rank\xa0{result.metrics[f'{way}_median_rank']:g}".removesuffix(".0") in panel.text
        assert f"MRR\xa0{percent(result.metrics[f'{way}_mrr'])}" in panel.text
    assert [b.text for b in panels[2].all("b", "number")] == [f"{result.metrics['rsum']:.3f}"]
    (dot,) = panels[2].all("circle")
    assert number(dot["cx"]) == pytest.approx(100 * result.metrics["rsum"] / 6, abs=0.006)


def test_every_measure_is_in_the_table(pictures):
    result = compared(noisy(pictures(40), bootstrap=200), noisy(pictures(40), noise=1.2, bootstrap=200))
    (table,) = read(result).all("details")[0].all("table")
    lines = {cells[0]: cells[1:] for cells in ([td.text for td in tr.all("td")] for tr in table.all("tr")[1:])}
    assert list(lines) == list(result.metrics)
    low, high = result.comparison.intervals["t2i_ndcg@5"]
    assert lines["t2i_ndcg@5"] == [
        percent(result.metrics["t2i_ndcg@5"]),
        "–".join(f"{100 * end:.1f}" for end in result.intervals["t2i_ndcg@5"]),
        percent(result.comparison.other.metrics["t2i_ndcg@5"]),
        f"{100 * result.comparison.differences['t2i_ndcg@5']:+.1f}".replace("-", "−"),
        f"{100 * low:+.1f} to {100 * high:+.1f}".replace("-", "−"),
    ]
    assert lines["i2t_mean_rank"][0] == f"{result.metrics['i2t_mean_rank']:,.1f}"


def test_the_histogram_against_a_slow_recount(pictures):
    result = noisy(pictures(140), captions=2, noise=2.5)
    both = slow_ranks(result)
    bins = [(1, 1), (2, 3), (4, 5), (6, 10), (11, 20), (21, 50), (51, 100), (101, math.inf)]
    panels = section(read(result), "Ranks of the first right answer").all("div", "panel")
    heights = []
    for panel, ranks in zip(panels, both, strict=True):
        expected = [sum(low <= rank <= high for rank in ranks) for low, high in bins]
        assert [int(text.text) for text in panel.all("text", "count")] == expected
        names = [text.text for text in panel.all("text") if "class" not in text.attributes]
        assert names == ["1", "2–3", "4–5", "6–10", "11–20", "21–50", "51–100", "101–…"]
        drawn = [number(bar["height"]) for bar in panel.all("rect")]
        tops = [number(bar["y"]) for bar in panel.all("rect")]
        assert [y + h for y, h in zip(tops, drawn, strict=True)] == pytest.approx([100] * 8, abs=0.02)
        heights.append(max(drawn))
        scale = [h * len(ranks) / count for h, count in zip(drawn, expected, strict=True) if count > 5]
        assert scale == pytest.approx([scale[0]] * len(scale), rel=0.01)  # both directions on one scale:
        assert scale[0] == pytest.approx(100 / max(_first_share(r) for r in both), rel=0.01)
    assert max(heights) == pytest.approx(100)


def _first_share(ranks):
    return max(np.bincount(np.searchsorted([1, 3, 5, 10, 20, 50, 100], ranks))) / len(ranks)


@pytest.mark.parametrize(
    ("count", "names"),
    [(1, ["1"]), (2, ["1", "2"]), (3, ["1", "2–3"]), (5, ["1", "2–3", "4–5"]), (8, ["1", "2–3", "4–5", "6–8"])],
)
def test_bins_end_with_the_number_of_pictures(pictures, count, names):
    result = noisy(pictures(count), noise=3)
    panel = section(read(result), "Ranks of the first right answer").all("div", "panel")[0]
    assert [text.text for text in panel.all("text") if "class" not in text.attributes] == names
    assert sum(int(text.text) for text in panel.all("text", "count")) == 3 * count


def test_halves_of_shared_places_fall_into_the_bin_that_holds_them(pictures):
    """Equal vectors: the right picture stands in the middle of three, at 2."""
    records = [Record(path, ("x",)) for path in pictures(4)]
    result = retrieval(records, [[1, 0], [1, 0], [0, 1], [0, 1]], [[1, 0], [1, 0], [0, 1], [0, 1]], ties="mean")
    assert result.metrics["t2i_mean_rank"] == 1.5
    root = read(result)
    panel = section(root, "Ranks of the first right answer").all("div", "panel")[0]
    assert [text.text for text in panel.all("text", "count")] == ["0", "4", "0"]
    assert "ties share the middle place" in root.all("header")[0].text
    assert "rank 1.5 of 4" in root.text


# ---- curves ----------------------------------------------------------------------------------------------------------


def points(path):
    return [tuple(map(float, pair.split(","))) for pair in path["d"].lstrip("M").split(" L")]


def test_curves_against_slow_shares(pictures):
    result = noisy(pictures(150), captions=2, noise=2)
    plot = section(read(result), "How far down one has to look")
    top = 300  # captions: the longest curve
    for way, ranks, items in zip(("t2i", "i2t"), slow_ranks(result), (150, 300), strict=True):
        (path,) = [path for path in plot.all("path", way) if "band" not in path["class"]]
        drawn = points(path)
        ks = [round(top ** (x / 100)) for x, _ in drawn]
        assert (ks[0], ks[-1]) == (1, items)
        assert set(range(1, 20)) <= set(ks)
        for k, (x, y) in zip(ks, drawn, strict=True):
            assert x == pytest.approx(100 * math.log(k) / math.log(top), abs=0.006)
            assert 100 - y == pytest.approx(100 * sum(rank <= k for rank in ranks) / len(ranks), abs=0.006)


def test_the_band_is_about_the_bootstrap_s_interval(pictures):
    result = noisy(pictures(250), captions=4, bootstrap=1000)
    plot = section(read(result), "How far down one has to look")
    for way in ("t2i", "i2t"):
        (band,) = plot.all("path", way, "band")
        drawn = points(band)
        half = len(drawn) // 2
        high = {round(1000 ** (x / 100)): 1 - y / 100 for x, y in drawn[:half]}
        low = {round(1000 ** (x / 100)): 1 - y / 100 for x, y in drawn[half:]}
        for k in KS:
            ends = result.intervals[f"{way}_hit@{k}"]
            assert (low[k], high[k]) == pytest.approx(ends, abs=0.15 * (ends[1] - ends[0]) + 0.002)


def test_chance_is_that_of_a_random_order(pictures):
    paths = pictures(12)
    records = [Record(path, tuple(f"{i}{j}" for j in range(i % 4))) for i, path in enumerate(paths)]
    count = sum(len(record.texts) for record in records)
    random = np.random.default_rng(0)
    result = retrieval(records, random.normal(size=(12, 5)), random.normal(size=(count, 5)))
    t2i, i2t = section(read(result), "How far down one has to look").all("path", "chance")[-2:]
    for x, y in points(t2i):
        assert 1 - y / 100 == pytest.approx(round(count ** (x / 100)) / 12, abs=1e-4)
    owned = [len(record.texts) for record in records if record.texts]
    for x, y in points(i2t):
        k = round(count ** (x / 100))
        hit = np.mean([1 - math.comb(count - n, k) / math.comb(count, k) for n in owned])
        assert 1 - y / 100 == pytest.approx(hit, abs=1e-4)


# ---- slices and comparisons ------------------------------------------------------------------------------------------


def test_slices(pictures):
    random = np.random.default_rng(1)
    texts, chosen = random.random(150) < 0.4, random.random(50) < 0.5
    slices = [
        ("length=short", texts, np.zeros(50, bool)),
        ("length=long", ~texts, np.zeros(50, bool)),
        ("camera=a<b", np.repeat(chosen, 3), chosen),
    ]
    result = noisy(pictures(50), bootstrap=100, slices=slices)
    part = section(read(result), "Slices")
    assert [span.text for span in part.all("span", "group")] == ["length", "camera"]
    assert [span.text for span in part.all("span", "label")] == ["short", "long", "a<b", ""]
    values = [span.text for span in part.all("span", "value")]
    assert values[0] == f"{percent(result.slices[0].metrics['t2i_hit@10'])} {texts.sum()} captions"
    assert values[2] == (
        f"{percent(result.slices[2].metrics['t2i_hit@10'])} {percent(result.slices[2].metrics['i2t_hit@10'])} "
        f"{chosen.sum()} pictures {3 * chosen.sum()} captions"
    )
    ends = [float(text.text.rstrip("\xa0%")) for text in part.all("text")]

    def at(share):
        return 100 * (100 * share - ends[0]) / (ends[-1] - ends[0])

    marks = part.all("g", "mark")
    assert [mark["class"] for mark in marks] == ["mark t2i", "mark t2i", "mark t2i", "mark i2t"]
    shares = [one.metrics["t2i_hit@10"] for one in result.slices] + [result.slices[2].metrics["i2t_hit@10"]]
    assert [number(mark.all("circle")[0]["cx"]) for mark in marks] == pytest.approx([at(s) for s in shares], abs=0.01)
    (guide,) = {number(line["x1"]) for line in part.all("line", "guide")}
    assert guide == pytest.approx(at(result.metrics["t2i_hit@10"]), abs=0.01)


def test_a_comparison_is_coloured_by_where_zero_lies(pictures):
    paths = pictures(80)
    result = compared(noisy(paths, noise=1.1, bootstrap=200), noisy(paths, noise=1.3, bootstrap=200))
    result.comparison.intervals["i2t_hit@1"] = (-0.2, -0.1)  # one that is worse, too
    result.comparison.differences["i2t_hit@1"] = -0.15
    root = read(result)
    part = section(root, "Difference")
    found, kinds = result.comparison.differences, {}
    for label, value, mark in zip(
        part.all("span", "label"), part.all("span", "value"), part.all("g", "mark"), strict=False
    ):
        kinds[label.text] = mark["class"].split()[1]
        name = {"Text → image": "t2i_", "Image → text": "i2t_"}[label.text[:12]] + label.text[13:]
        name = name.replace("nDCG", "ndcg").replace("mAP", "map").replace("MRR", "mrr").replace("R-p", "r_p")
        low, high = result.comparison.intervals[name]
        assert value.text.startswith(f"{100 * found[name]:+.1f}".replace("-", "−"))
        assert kinds[label.text] == ("even" if low <= 0 <= high else "good" if low > 0 else "bad")
    assert kinds["Image → text hit@1"] == "bad"
    assert "good" in kinds.values()
    assert "Text → image hit@1" in kinds
    assert "Text → image recall@1" not in kinds  # the same line again
    (zero,) = {line["x1"] for line in part.all("line", "guide")}
    ticks = [text for text in part.all("text") if text.text == "0"]
    assert [tick["x"] for tick in ticks] == [zero]
    assert len(section(root, "How far down one has to look").all("path", "other")) == 2
    other = root.all("section")[0].all("g", "mark", "other")
    assert [number(mark.all("circle")[0]["cx"]) for mark in other[:3]] == pytest.approx(
        [100 * result.comparison.other.metrics[f"t2i_hit@{k}"] for k in KS], abs=0.006
    )
    assert "a-model against another" in root.all("h1")[0].text


def test_a_comparison_without_intervals_claims_nothing(pictures):
    paths = pictures(20)
    part = section(read(compared(noisy(paths), noisy(paths, noise=2))), "Difference")
    assert {mark["class"] for mark in part.all("g", "mark")} == {"mark even"}
    assert "more than chance" in part.text


def test_an_interval_that_is_not_known_decides_nothing(pictures):
    paths = pictures(20)
    result = compared(noisy(paths, bootstrap=50), noisy(paths, noise=2, bootstrap=50))
    result.comparison.intervals["t2i_hit@1"] = (math.nan, math.nan)
    result.intervals["t2i_hit@1"] = (math.nan, math.nan)
    root = read(result)
    mark = section(root, "Difference").all("g", "mark")[0]
    assert mark["class"] == "mark even"
    assert not mark.all("line")
    assert "nan" not in re.sub('base64,[^"]*', "", evaluation_page(result))


# ---- through an index ------------------------------------------------------------------------------------------------


def index_scores(way, name, speed, recall, size=0, asked=None):
    metrics = {f"{way}_{measure}@{k}": recall * k / 10 for measure in ("hit", "recall") for k in (1, 10)}
    return IndexScores(way, asked or name, name, 1234, metrics, recall, {"text": 0.5}, 1, 0, speed, size)


def test_indexes_as_a_table_and_a_plot_for_each_direction(pictures):
    t2i = [
        index_scores("t2i", "exact", 100.0, 1.0),
        index_scores("t2i", "exact", 100.0, 1.0, asked="auto"),
        index_scores("t2i", "IVF4,<Flat>", 1000.0, 0.96, 2_500_000),
        index_scores("t2i", "PQ8", 500.0, 0.93, 100),
    ]
    result = replace(noisy(pictures(6)), indexes=(*t2i, index_scores("i2t", "exact", 7.0, 1.0)))
    part = section(read(result), "Through an index")
    panels = part.all("div", "panel")
    assert [panel.all("h3")[0].text for panel in panels] == ["Text → image", "Image → text"]
    assert "1,234 pictures" in panels[0].text
    assert "1,234 captions" in panels[1].text
    lines = [[cell.text for cell in line.all("td")] for line in panels[0].all("tr")[1:]]
    assert lines[2] == ["IVF4,<Flat>", percent(0.096), percent(0.96), percent(0.96), "1,000", "2.50"]
    assert [line[0] for line in lines] == ["exact", "auto: exact", "IVF4,<Flat>", "PQ8"]
    marks = panels[0].all("g", "mark")
    assert [bool(set(mark["class"].split()) & {"other"}) for mark in marks] == [False, False, True]
    circles = [mark.all("circle")[0] for mark in marks]
    low, high = math.log(80), math.log(1250)
    for circle, scores in zip(circles, (t2i[0], *t2i[2:]), strict=True):
        assert number(circle["cx"]) == pytest.approx(
            100 * (math.log(scores.queries_per_second) - low) / (high - low), abs=0.01
        )
        assert scores.name in circle.text
        assert number(circle["cy"]) == pytest.approx(100 * (1 - scores.recall) / 0.08, abs=0.01)
    (front,) = [path for path in panels[0].all("path") if path["class"] == "t2i"]
    assert front["d"].count(",") == 2
    names = [words.text for words in panels[0].all("text", "end")]
    assert names == ["exact", "IVF4,<Flat>", "PQ8"]
    assert len(panels[1].all("circle")) == 1


def test_without_indexes_there_is_no_such_section(pictures):
    assert "Through an index" not in titles(read(noisy(pictures(4))))


def test_the_front_against_a_slow_count():
    random = np.random.default_rng(0)
    for count in (1, 2, 5, 40):
        points = [Point(str(i), float(x), float(y)) for i, (x, y) in enumerate(random.integers(1, 6, (count, 2)))]
        points = list({(point.x, point.y): point for point in points}.values())
        slow = [a for a in points if not any(b is not a and b.x >= a.x and b.y >= a.y for b in points)]
        assert frontier(points) == sorted(slow, key=lambda point: point.x)


def test_names_of_points_hide_neither_points_nor_each_other():
    random = np.random.default_rng(1)
    for _ in range(50):
        places = [(float(x), float(y), "n" * int(n)) for x, y, n in random.integers((0, 0, 3), (100, 100, 18), (6, 3))]
        found = charts._beside(places)
        boxes = []
        for (left, height, name), (at, _, same, left_of) in zip(places, found, strict=True):
            assert (at, same) == (left, name)
            assert 0 <= height <= 100
            width = charts._WIDE * (len(name) + 1)
            begin = left - charts._ROUND - width if left_of else left + charts._ROUND
            assert begin >= 0
            assert begin + width <= 100
            boxes.append((begin, begin + width))
        heights = [height for _, height, _, _ in found]
        for i, (begin, end) in enumerate(boxes):
            for j, (start, stop) in enumerate(boxes):
                apart = begin >= stop or end <= start or abs(heights[i] - heights[j]) >= charts._APART
                assert i == j or apart
            for j, (left, height, _) in enumerate(places):
                apart = begin >= left + charts._ROUND or end <= left - charts._ROUND
                assert i == j or apart or abs(heights[i] - height) >= charts._APART


# ---- examples --------------------------------------------------------------------------------------------------------


def caption_of(figure):
    return figure.all("figcaption")[0].text


def picture_of(element):
    return element.all("title")[0].text


def test_the_worst_sentences_are_those_of_the_largest_ranks(pictures):
    result = noisy(pictures(120), noise=2)
    ranks, _ = slow_ranks(result)
    details = result.details
    expected = sorted(range(len(ranks)), key=lambda t: (-ranks[t], t))[:8]
    cases = section(read(result), "Text → image: worst sentences").all("article")
    assert [case.all("p", "words")[0].text for case in cases] == [details.texts[t] for t in expected]
    for case, text in zip(cases, expected, strict=True):
        assert f"rank {ranks[text]} of 120" in case.text
        scores = details.image_vectors.astype(float) @ details.text_vectors[text].astype(float)
        owner = int(details.owner[text])
        own, *found = case.all("figure")
        assert picture_of(own) == f"{owner:04}.png"
        assert caption_of(own) == f"{ranks[text]} · {scores[owner]:.3f}".replace("-", "−")
        best = np.argsort(-scores)[:4].tolist()
        assert [picture_of(figure) for figure in found] == [f"{row:04}.png" for row in best]
        assert [caption_of(figure) for figure in found] == [f"{i} · {scores[r]:.3f}" for i, r in enumerate(best, 1)]
        outlined = [picture_of(figure) for figure in case.all("figure", "right")]
        assert set(outlined) == {f"{owner:04}.png"}


def test_the_best_sentences_have_the_widest_margins(pictures):
    result = noisy(pictures(60), noise=0.5)
    details = result.details
    scores = details.text_vectors.astype(float) @ details.image_vectors.astype(float).T
    margins = []
    for text, row in enumerate(scores):
        own = row[details.owner[text]]
        margins.append(own - np.delete(row, details.owner[text]).max())
    expected = np.argsort(-np.array(margins))[:4]
    cases = section(read(result), "Text → image: best sentences").all("article")
    assert [case.all("p", "words")[0].text for case in cases] == [details.texts[t] for t in expected]
    for case in cases:
        assert [("right" in figure["class"]) for figure in case.all("figure")] == [True, False, False, False]


def test_the_best_pictures_have_the_widest_margins_over_wrong_captions(pictures):
    """Own captions beside the best one are no rivals."""
    result = noisy(pictures(60), captions=5, noise=0.6)
    details = result.details
    scores = details.image_vectors.astype(float) @ details.text_vectors.astype(float).T
    margins = [row[details.owner == i].max() - row[details.owner != i].max() for i, row in enumerate(scores)]
    cards = section(read(result), "Image → text: best pictures").all("article")
    assert [picture_of(card) for card in cards] == [f"{i:04}.png" for i in np.argsort(-np.array(margins))[:4]]


def test_the_worst_pictures_with_their_best_captions(pictures):
    result = noisy(pictures(120), noise=2)
    _, ranks = slow_ranks(result)
    details = result.details
    cards = section(read(result), "Image → text: worst pictures").all("article")
    expected = sorted(range(120), key=lambda i: (-ranks[i], i))[:8]
    assert [picture_of(card) for card in cards] == [f"{i:04}.png" for i in expected]
    for card, image in zip(cards, expected, strict=True):
        scores = details.text_vectors.astype(float) @ details.image_vectors[image].astype(float)
        own = max(np.flatnonzero(details.owner == image), key=lambda t: scores[t])
        order = [own, *np.argsort(-scores)[:4]]
        places = [ranks[image], 1, 2, 3, 4]
        assert [li.text for li in card.all("li")] == [
            f"{place}{details.texts[t]}{scores[t]:.3f}".replace("-", "−")
            for place, t in zip(places, order, strict=True)
        ]
        assert card.all("li", "right")[0] is card.all("li")[0]


def test_texts_of_several_pictures(pictures):
    """Merged captions: the right picture that is shown is the one that comes first."""
    paths = pictures(4)
    records = [Record(paths[0], ("both",)), Record(paths[1]), Record(paths[2]), Record(paths[3])]
    result = retrieval(
        records,
        [[1, 0, 0], [0.8, 0.6, 0], [0, 1, 0], [0, 0, 1]],
        [[0.1, 0.9, 0.2]],
        pairs=(np.array([0, 1]), np.array([0, 0])),
    )
    (case,) = section(read(result), "Text → image: worst sentences").all("article")
    assert picture_of(case.all("figure")[0]) == "0001.png"
    assert [("right" in figure["class"]) for figure in case.all("figure")[1:]] == [False, True, False, True]


# ---- the file --------------------------------------------------------------------------------------------------------


def embedded(root):
    return [element["href"] for element in root.all("image")]


def test_each_picture_is_in_the_page_once_and_small(tmp_path):
    random = np.random.default_rng(0)
    paths = []
    for i in range(1000):
        path = tmp_path / f"{i}.jpg"
        noise = Image.fromarray(random.integers(0, 256, (60, 80, 3), np.uint8))
        noise.resize((400, 300), Image.Resampling.BICUBIC).save(path, quality=70)
        paths.append(path)
    page = evaluation_page(noisy(paths, captions=5, noise=2.5, bootstrap=20))
    assert len(page) < 3_000_000
    root = Tree(page).root
    hrefs = embedded(root)
    assert 20 < len(hrefs) == len(set(hrefs))
    shown = [use["href"] for use in root.all("use")]
    assert {f"#{symbol['id']}" for symbol in root.all("symbol")} == set(shown)
    for href, symbol in zip(hrefs, root.all("symbol"), strict=True):
        kind, _, data = href.partition(",")
        assert kind == "data:image/jpeg;base64"
        thumbnail = Image.open(io.BytesIO(base64.b64decode(data)))
        assert symbol["viewbox"] == f"0 0 {thumbnail.width} {thumbnail.height}" == "0 0 200 150"


def test_the_same_picture_under_two_names_is_embedded_once(tmp_path):
    data = io.BytesIO()
    Image.new("RGB", (5, 5), "red").save(data, "PNG")
    records = [Record(PictureBytes(f"{i}.png", data.getvalue()), (f"{i}",)) for i in range(6)]
    random = np.random.default_rng(0)
    root = read(retrieval(records, random.normal(size=(6, 4)), random.normal(size=(6, 4))))
    assert len(embedded(root)) == 1
    assert len({use["href"] for use in root.all("use")}) == 1


def test_the_same_result_gives_the_same_page(pictures):
    paths = pictures(40)
    assert evaluation_page(noisy(paths, bootstrap=50)) == evaluation_page(noisy(paths, bootstrap=50))


def test_nothing_is_fetched_and_nothing_is_run(pictures):
    paths = pictures(30)
    page = evaluation_page(compared(noisy(paths, bootstrap=50), noisy(paths, noise=2, bootstrap=50)))
    assert not re.search(r"https?:|<script|<link|@import|url\(|\son[a-z]+=", page)
    assert "prefers-color-scheme: dark" in page


NASTY = [
    "<script>alert(1)</script>",
    "a & b &amp; <i>c</i>",
    "\"quoted\" 'too'",
    "{x} {0} %s",
    "猫 🐈",
    "</title></svg>",
]


def test_captions_names_and_models_come_out_as_they_were_given(tmp_path):
    names = [*NASTY, os.fsdecode(b"caf\xe9.png"), "\udcff"]
    records = []
    for i, name in enumerate(names):
        data = io.BytesIO()
        Image.new("RGB", (3, 3), (30 * i, 0, 0)).save(data, "PNG")
        records.append(Record(PictureBytes(name, data.getvalue()), (f"{name} said", "words " * 20_000)))
    random = np.random.default_rng(3)
    result = retrieval(
        records, random.normal(size=(8, 4)), random.normal(size=(16, 4)),
        slices=[(f"{name}={name}", np.ones(16, bool), np.ones(8, bool)) for name in names],
    )  # fmt: skip
    result = replace(result, model=NASTY[0], note=NASTY[1])
    page = evaluation_page(result)
    page.encode("utf-8")
    assert len(page) < 400_000
    root = Tree(page).root
    assert not root.all("script")
    assert not root.all("i")
    assert root.all("title")[0].text == f"Diptych: {NASTY[0]}, retrieval"
    assert root.all("h1")[0].text == NASTY[0]
    assert NASTY[1] in root.all("header")[0].text
    shown = {title.text for title in root.walk() if isinstance(title, Element) and title.tag == "title"}
    assert {*NASTY, "caf\\udce9.png", "\\udcff"} <= shown
    sentences = {words.text for words in root.all("span", "words") + root.all("p", "words")}
    assert {f"{name} said" for name in NASTY} <= sentences
    assert all(len(sentence) <= 280 for sentence in sentences)
    assert [span.text for span in section(root, "Slices").all("span", "group")][:6] == [
        n.partition("=")[0] for n in NASTY
    ]


def test_pictures_that_are_gone_or_damaged_leave_the_rest(pictures):
    paths = pictures(5)
    result = noisy(paths, noise=2)
    paths[1].unlink()
    paths[2].write_text("no picture")
    root = read(result)
    assert len(embedded(root)) == 3
    unreadable = [tile for tile in root.all("svg", "tile") if "unreadable" in tile.text]
    assert {picture_of(tile) for tile in unreadable} == {"0001.png", "0002.png"}


def test_written_where_asked_or_to_a_new_temporary_file(pictures, tmp_path, monkeypatch):
    result = noisy(pictures(4))
    target = tmp_path / "page.html"
    assert write_evaluation_page(result, target) == target
    assert target.read_text("utf-8") == evaluation_page(result)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert write_evaluation_page(result).parent == tmp_path
    with pytest.raises(UsageError, match="cannot be written"):
        write_evaluation_page(result, tmp_path)


# ---- retrieval: at the edges -----------------------------------------------------------------------------------------


def test_a_single_picture(pictures):
    (path,) = pictures(1)
    root = read(retrieval([Record(path, ("a",))], [[1.0, 0]], [[0.6, 0.8]], bootstrap=20))
    assert [b.text for b in root.all("section")[0].all("b", "number")] == ["100.0\xa0%"] * 6 + ["6.000"]
    assert "How far down one has to look" not in titles(root)  # one place: no distance
    assert "Every first right answer is the first of all." in root.text


def test_all_ranks_one(pictures):
    result = noisy(pictures(20), noise=0.01, bootstrap=50, slices=[("all=1", np.ones(60, bool), np.ones(20, bool))])
    assert result.metrics["rsum"] == 6
    root = read(result)
    for way in ("Text → image: worst sentences", "Image → text: worst pictures"):
        part = section(root, way)
        assert not part.all("article")
        assert "Every first right answer is the first of all." in part.text
    marks = section(root, "Slices").all("g", "mark")
    assert {mark.all("circle")[0]["cx"] for mark in marks} == {"100.00%"}


def test_nothing_found_first_has_no_best(pictures):
    records = [Record(path, ("x",)) for path in pictures(3)]
    result = retrieval(records, np.ones((3, 2)), np.ones((3, 2)))  # all tied: each stands last
    root = read(result)
    assert result.metrics["t2i_hit@1"] == 0
    assert not [title for title in titles(root) if "best" in title]
    assert "rank 3 of 3" in root.text


def test_other_ks_and_a_slice_without_any_query_of_a_way(pictures):
    nobody = np.zeros(20, bool)
    slices = [("length=1", np.ones(60, bool), nobody), ("length=2", np.zeros(60, bool), nobody)]
    root = read(noisy(pictures(20), ks=(3, 7), slices=slices))
    assert [span.text for span in root.all("section")[0].all("span", "name")] == ["hit@3", "hit@7"] * 2 + ["rsum"]
    part = section(root, "Slices")
    assert "Text → image hit@7" in part.text
    assert "Image → text" not in part.text
    assert len(part.all("g", "mark")) == 1


def test_a_thousand_ks_are_enough(pictures, monkeypatch):
    monkeypatch.setattr("retrieval.report.evaluation._CURVE", 10)
    plot = section(read(noisy(pictures(30))), "How far down one has to look")
    assert max(x for path in plot.all("path", "t2i") for x, _ in points(path)) == 100
    assert [text.text for text in plot.all("text")][-1] == "10"


def test_of_very_many_good_answers_some_are_looked_at(pictures, monkeypatch):
    monkeypatch.setattr("retrieval.report.evaluation._PROBED", 5)
    result = noisy(pictures(20), noise=0.1)
    assert len(section(read(result), "Text → image: best sentences").all("article")) == 4


# ---- classification --------------------------------------------------------------------------------------------------


def classification(paths, names, scores, right, *, bootstrap=0):
    scores, right = np.asarray(scores, np.float32), np.asarray(right, bool)
    labels = [tuple(names[i] for i in np.flatnonzero(row)) for row in right]
    records = [Record(path, labels=of) for path, of in zip(paths, labels, strict=True)]
    result = evaluate_classification(scores, right, (1, 5), bootstrap)
    return Evaluation(
        "classification", "a-model", "f" * 64, len(records), len(names), checksum(records), result.metrics,
        result.intervals, ClassificationDetails(records, names, scores, right, result),
    )  # fmt: skip


def random_classes(paths, classes, seed=0, bootstrap=0, signal=1.0):
    random = np.random.default_rng(seed)
    label = np.arange(len(paths)) % classes
    right = label[:, None] == np.arange(classes)
    scores = random.normal(size=(len(paths), classes)) + signal * right
    return classification(paths, [f"class {i:03}" for i in range(classes)], scores, right, bootstrap=bootstrap)


def test_classification_s_headline(pictures):
    result = random_classes(pictures(60), 7, bootstrap=100)
    root = read(result)
    panel = root.all("section")[0]
    names = ["top1", "top5", "mean_per_class"]
    assert [span.text for span in panel.all("span", "name")] == ["top-1", "top-5", "mean per class"]
    assert [b.text for b in panel.all("b", "number")] == [percent(result.metrics[name]) for name in names]
    lines = [mark.all("line")[0] for mark in panel.all("g", "mark")]
    assert [number(line["x1"]) for line in lines] == pytest.approx(
        [100 * result.intervals[name][0] for name in names], abs=0.006
    )
    assert "60 pictures · 7 classes" in root.all("header")[0].text


def test_the_heat_map_is_the_confusion_matrix(pictures):
    result = random_classes(pictures(90), 9)
    details = result.details
    label, guess = np.arange(90) % 9, details.scores.argmax(axis=1)
    expected = {}
    for one, other in zip(label.tolist(), guess.tolist(), strict=True):
        key = (f"class {one:03}", f"class {other:03}")
        expected[key] = expected.get(key, 0) + 1
    (drawing,) = section(read(result), "What is taken for what").all("div", "map")
    found = {}
    for cell in drawing.all("rect"):
        pair, _, counts = picture_of(cell).partition(": ")
        one, _, other = pair.partition(" → ")
        found[one, other] = int(counts.split(" of ")[0])
        assert counts.split(" of ")[1].startswith(f"10 ({found[one, other] / 10:.1%}")
        assert float(cell["fill-opacity"]) == pytest.approx(0.1 + 0.09 * found[one, other], abs=0.006)
        assert (cell["class"] == "hit") == (one == other)
    assert found == expected
    assert {text.text for text in drawing.all("text") if text.all("title")} == {f"class {i:03}" * 2 for i in range(9)}


def test_of_many_classes_the_most_confused(pictures):
    result = random_classes(pictures(200), 50, signal=2)
    wrong = result.details.result.confusion.copy()
    np.fill_diagonal(wrong, 0)
    confused = sorted(range(50), key=lambda c: (-(wrong[c].sum() + wrong[:, c].sum()), c))[:30]
    part = section(read(result), "What is taken for what")
    assert "The 30 most confused of 50 classes." in part.text
    labels = [text.all("title")[0].text for text in part.all("text") if text.all("title")]
    assert labels[::2] == [f"class {c:03}" for c in sorted(confused)]


def test_most_confused_pairs(pictures):
    result = random_classes(pictures(120), 6)
    details = result.details
    label, guess = np.arange(120) % 6, details.scores.argmax(axis=1)
    counts = {}
    for one, other in zip(label.tolist(), guess.tolist(), strict=True):
        if one != other:
            counts[one, other] = counts.get((one, other), 0) + 1
    expected = sorted(counts, key=lambda pair: (-counts[pair], pair))[:12]
    figures = section(read(result), "Most confused").all("figure")
    assert [caption_of(figure) for figure in figures] == [
        f"class {one:03} → class {other:03}{counts[one, other]} of 20" for one, other in expected
    ]
    for figure, (one, other) in zip(figures, expected, strict=True):
        rows = [r for r in range(120) if (label[r], guess[r]) == (one, other)]
        example = max(rows, key=lambda r: details.scores[r, other] - details.scores[r, one])
        assert picture_of(figure) == f"{example:04}.png"


def test_worst_and_best_classes(pictures):
    result = random_classes(pictures(200), 40)
    per_class = result.details.result.per_class
    worst, best = section(read(result), "Classes").all("div", "panel")
    for panel, order in ((worst, 1), (best, -1)):
        labels = [span.text for span in panel.all("span", "label")][:-1]
        shares = [per_class[int(label.split()[1])] for label in labels]
        assert len(labels) == 15
        assert shares == sorted(shares, reverse=order < 0)
        assert [span.text for span in panel.all("span", "value")][:-1] == [f"{percent(share)} of 5" for share in shares]
        assert [number(bar["width"]) for bar in panel.all("rect")] == pytest.approx([100 * share for share in shares])
        extreme = sorted(per_class, reverse=order < 0)[:15]
        assert shares == pytest.approx(extreme)


def test_worst_pictures_and_confident_mistakes(pictures):
    result = random_classes(pictures(80), 12)
    details = result.details
    label = np.arange(80) % 12
    own = details.scores[np.arange(80), label]
    ranks = 1 + (details.scores > own[:, None]).sum(axis=1)
    root = read(result)
    cards = section(root, "Worst pictures").all("article")
    worst = sorted(range(80), key=lambda r: (-ranks[r], r))[:8]
    assert [picture_of(card) for card in cards] == [f"{r:04}.png" for r in worst]
    for card, row in zip(cards, worst, strict=True):
        guesses = np.argsort(-details.scores[row])[:4]
        expected = [(ranks[row], label[row]), *enumerate(guesses, 1)]
        assert [li.text for li in card.all("li")] == [
            f"{place}class {c:03}{details.scores[row, c]:.3f}".replace("-", "−") for place, c in expected
        ]
    gaps = details.scores.max(axis=1) - own
    confident = sorted(range(80), key=lambda r: (-gaps[r], r))[:8]
    cards = section(root, "Most confident mistakes").all("article")
    assert [picture_of(card) for card in cards] == [f"{r:04}.png" for r in confident]


def test_several_right_labels_and_a_class_without_pictures(pictures):
    names = ["cat", "dog", "nobody", "horse"]
    scores = [[0.1, 0.2, 0.9, 0.3], [0.9, 0.1, 0.2, 0.3]]
    result = classification(pictures(2), names, scores, [[1, 1, 0, 0], [1, 0, 0, 0]])
    assert np.isnan(result.details.result.per_class[[2, 3]]).all()
    root = read(result)
    assert "2 classes have no picture." in root.text
    (card,) = section(root, "Worst pictures").all("article")
    assert card.all("li")[0].text == "3cat, dog0.200"
    assert "mAP" in root.all("section")[0].text


@pytest.mark.parametrize("count", [1, 5])
def test_one_class(pictures, count):
    result = classification(pictures(count), ["it"], np.full((count, 1), 0.3), np.ones((count, 1)), bootstrap=20)
    root = read(result)
    assert [b.text for b in root.all("section")[0].all("b", "number")] == ["100.0\xa0%"] * 3
    assert "There is no mistake." in root.text
    assert "Most confused" not in titles(root)


def test_constant_scores(pictures):
    """A tie is a mistake: everything is wrong, and nothing breaks."""
    result = classification(pictures(6), ["a", "b", "c"], np.zeros((6, 3)), np.arange(6)[:, None] % 3 == np.arange(3))
    root = read(result)
    assert root.all("b", "number")[0].text == "0.0\xa0%"
    assert len(section(root, "Worst pictures").all("article")) == 6


def test_class_names_come_out_as_they_were_given(pictures):
    names = [*NASTY, "long " * 1000, "\udcff"]
    random = np.random.default_rng(0)
    result = classification(
        pictures(32), names, random.normal(size=(32, 8)), np.arange(32)[:, None] % 8 == np.arange(8)
    )
    page = evaluation_page(result)
    page.encode("utf-8")
    root = Tree(page).root
    assert not root.all("script")
    assert not root.all("i")
    shown = {title.text for title in section(root, "What is taken for what").all("title")}
    assert {*NASTY, "\\udcff"} <= shown
    assert html.escape("a & b &amp; <i>c</i>") in page


def test_classification_compared_and_sliced(pictures):
    paths = pictures(60)
    one, other = (random_classes(paths, 5, bootstrap=100, signal=s) for s in (3, 0.1))
    less = difference(*(evaluate_classification(r.details.scores, r.details.right, (1, 5), 100) for r in (one, other)))
    chosen = np.arange(60) < 20
    of_part = evaluate_classification(one.details.scores[chosen], one.details.right[chosen], (1, 5), 100)
    result = replace(
        one,
        comparison=Comparison(other, less.metrics, less.intervals),
        slices=(Slice("half=first", 20, 5, of_part.metrics, of_part.intervals),),
    )
    root = read(result)
    part = section(root, "Difference")
    assert [span.text for span in part.all("span", "label")][:3] == ["top-1", "top-5", "mean per class"]
    assert part.all("g", "mark")[0]["class"] == "mark good"
    assert section(root, "Slices").all("span", "value")[0].text == f"{percent(of_part.metrics['top1'])} 20 pictures"


# ---- scales ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "values",
    [
        [0.5],
        [0.0],
        [1.0],
        [0.3, 0.31],
        [0.2, 0.9],
        [0, 1],
        [-0.02, 0.03],
        [0.123, 0.124],
        [],
        [math.nan],
        [0.7, math.nan],
    ],
)
def test_a_scale_holds_its_values_between_round_ticks(values):
    axis = Axis.around(values, -1, 1)
    finite = [value for value in values if math.isfinite(value)]
    assert axis.low < axis.high
    assert all(axis.low - 1e-9 <= value <= axis.high + 1e-9 for value in finite)
    assert 2 <= len(axis.ticks) <= 7
    assert axis.ticks[0] == pytest.approx(axis.low)
    assert axis.ticks[-1] == pytest.approx(axis.high)
    assert np.diff(axis.ticks) == pytest.approx(axis.step)
    assert re.fullmatch(r"[125]e[+-]\d+", f"{axis.step:.0e}")
