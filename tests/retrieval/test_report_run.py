"""The page of a training run: its numbers and lines where the log has them, and what it makes of odd logs."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from retrieval.errors import UsageError
from retrieval.report import run_page, write_run_page
from retrieval.report.charts import Axis, Line, lines
from tests.retrieval.test_report_evaluation import Tree, number, points, section, titles

CONFIG = {
    "model": "a-model", "objective": "siglip", "train": "lora", "epochs": 5, "batch_size": 64, "seed": 7,
    "max_loss": 0.02, "sources": [{"pairs": "x.jsonl"}],
}  # fmt: skip


def measures(hit, top1, information=2.0):
    """On validation, both ways, and on a guard of captions and one of labels."""
    val = {
        f"val_{way}_{name}": value
        for way, less in (("t2i", 0), ("i2t", 0.05))
        for name, value in (
            ("hit@1", hit - less),
            ("hit@5", hit + 0.2 - less),
            ("hit@10", hit + 0.3 - less),
            ("median_rank", 8 - 10 * hit),
        )
    }
    guard = {"guard_my_coco_t2i_hit@10": top1 - 0.1, "guard_my_coco_i2t_hit@10": top1 - 0.2, "guard_pets_top1": top1}
    return {**val, "val_mutual_information": information, **guard}


def log(*, tries=True, end=True):
    start = measures(0.2, 0.9)
    told = [{"step": 0, **start}]
    told += [
        {"step": 10 * n, "loss": 4 - 0.5 * n, "scale": 14.3, **measures(0.2 + 0.05 * n, 0.9 - 0.02 * n, 2 + 0.1 * n)}
        for n in range(1, 5)
    ]
    after = measures(0.35, 0.88, 2.5)
    guard = {name: value for name, value in after.items() if name.startswith("guard_")}
    hits = sum(value for name, value in after.items() if "val_" in name and "hit@" in name)
    if tries:
        for share, target in ((0.0, hits - 0.6), (0.5, hits), (1.0, hits + 0.3)):
            scores = {name: value - (share - 0.5) * 0.04 for name, value in guard.items()}
            told.append({"share": share, "target": target, **scores})
    if end:
        told.append({"step": 40, **{f"before_{name}": value for name, value in start.items()}, **after})
    return told


def read(told, config=CONFIG, **settings):
    return Tree(run_page("a-run", told, config, **settings)).root


def panel(part, title):
    (found,) = [one for one in part.all("div", "panel") if [h.text for h in one.all("h3")] == [title]]
    return found


def cells(table):
    return {line[0]: line[1:] for line in ([cell.text for cell in tr.all("td")] for tr in table.all("tr")[1:])}


# ---- numbers ---------------------------------------------------------------------------------------------------------


def test_the_head_says_what_was_done():
    (head,) = read(log()).all("header")
    for words in (
        "a-run",
        "began with a-model",
        "objective siglip",
        "trained: lora",
        "5 epochs",
        "batch of 64",
        "seed 7",
    ):
        assert words in head.text
    assert "not done" not in head.text
    towers = {"model": "", "image_tower": "lite2", "text_tower": "minilm", "epochs": 1}
    (head,) = read(log(end=False), towers).all("header")
    assert "began with lite2 + minilm · 1 epoch · not done: logged up to step 40" in head.text


def test_the_loss_and_the_information_stand_where_they_belong():
    root = read(log())
    loss, information = panel(root, "Loss"), panel(root, "Mutual information")
    (path,) = loss.all("path")
    drawn = points(path)
    assert [x for x, _ in drawn] == [25, 50, 75, 100]  # nothing is measured before the first step
    scale = Axis.around([3.5, 2.0])
    ys = [100 - 100 * (loss - scale.low) / (scale.high - scale.low) for loss in (3.5, 3.0, 2.5, 2.0)]
    assert [y for _, y in drawn] == pytest.approx(ys, abs=0.006)
    assert drawn[-1] == (100, pytest.approx(100))
    assert not loss.all("line", "start")
    (path,) = information.all("path")
    assert [x for x, _ in points(path)] == [0, 25, 50, 75, 100]
    (dotted,) = information.all("line", "start")
    assert number(dotted["y1"]) == number(dotted["y2"]) == pytest.approx(points(path)[0][1], abs=0.006)
    assert dotted["x2"] == "100%"
    assert "nats" in [text.text for text in information.all("text")]


def test_validation_both_ways_on_one_scale_with_the_start_dotted():
    part = section(read(log()), "Validation")
    scale = Axis.around([0.15, 0.7], 0, 1)
    for title, way, first in (("Text → image", "t2i", 0.2), ("Image → text", "i2t", 0.15)):
        one = panel(part, title)
        for path, dotted, more in zip(one.all("path", way), one.all("line", "start", way), (0, 0.2, 0.3), strict=True):
            expected = [100 - scale.place(first + more + 0.05 * n) for n in range(5)]
            assert [y for _, y in points(path)] == pytest.approx(expected, abs=0.006)
            assert number(dotted["y1"]) == pytest.approx(expected[0], abs=0.006)
        ends = [(text.text, number(text["y"])) for text in one.all("text", "end")]
        last = [(f"hit@{k}", points(path)[-1][1]) for k, path in zip((1, 5, 10), one.all("path", way), strict=True)]
        assert sorted(ends) == sorted(last)
        told = f"hit@10, step 40: {100 * (first + 0.5):g}"
        assert told in [words.text for words in one.all("title")]


def test_the_guard_is_a_panel_for_each_of_its_data():
    part = section(read(log()), "Guard")
    assert [heading.text for heading in part.all("h3")] == ["my_coco", "pets"]
    assert "2\xa0points" in part.text
    one = panel(part, "my_coco")
    assert [span.text for span in one.all("div", "legend")[0].all("span")] == [
        "Text → image hit@10",
        "Image → text hit@10",
    ]
    scale = Axis.around([0.8, 0.62], 0, 1)
    (path,) = one.all("div", "plot")[0].all("path", "i2t")
    assert [y for _, y in points(path)] == pytest.approx(
        [100 - scale.place(0.7 - 0.02 * n) for n in range(5)], abs=0.006
    )
    (dotted,) = one.all("line", "start", "i2t")
    assert number(dotted["y1"]) == pytest.approx(100 - scale.place(0.7), abs=0.006)


def test_won_and_lost():
    part = section(read(log()), "Won and lost")
    assert "the weights that were kept" in part.text
    assert [span.text for span in part.all("span", "group")] == ["Validation", "Guard: my_coco", "Guard: pets"]
    labels = [span.text for span in part.all("span", "label")]
    values = [span.text for span in part.all("span", "value")]
    told = dict(zip(labels[:6], values, strict=False))
    assert told["Text → image hit@1"] == "20.0\xa0% → 35.0\xa0% +15.0"
    assert (labels[8], values[8]) == ("top-1", "90.0\xa0% → 88.0\xa0% −2.0")
    assert [b["class"] for b in part.all("b")[:9]] == ["good"] * 6 + ["bad"] * 3
    scale = Axis.around([0.15, 0.9], 0, 1)
    track = part.all("div", "rows")[0].all("svg")[8]
    (old,) = track.all("g", "other")[0].all("circle")
    (new,) = track.all("g", "bad")[1].all("circle")
    assert (number(old["cx"]), number(new["cx"])) == pytest.approx((scale.place(0.9), scale.place(0.88)), abs=0.006)
    (table,) = part.all("table")
    assert cells(table) == {
        "Validation: Text → image median rank": ["6", "4.5", "−1.5"],
        "Validation: Image → text median rank": ["6", "4.5", "−1.5"],
        "Validation: mutual information, nats": ["2", "2.5", "+0.5"],
    }
    assert [b["class"] for b in table.all("b")] == ["good"] * 3  # of ranks the lower are better


def test_what_looks_the_same_is_neither_won_nor_lost():
    told = [{"step": 0, "val_t2i_hit@1": 0.5}, {"step": 1, "loss": 1.0, "val_t2i_hit@1": 0.5001}]
    part = section(read(told), "Won and lost")
    assert [b["class"] for b in part.all("b")] == ["even"]
    assert "the last weights;" in part.text


def test_tests_and_the_last_weights_where_the_end_has_no_validation():
    told = [*log(end=False), {"step": 40, "coco_t2i_hit@10": 0.615, "coco_t2i_median_rank": 6.0, "coco_rsum": 2.5}]
    root = read(told)
    part = section(root, "Tests")
    assert [span.text for span in part.all("span", "label")] == ["coco t2i hit@10", ""]
    assert [rect["width"] for rect in part.all("rect")] == ["61.50%"]
    part = section(root, "Won and lost")
    assert "before they were mixed" in part.text
    assert "20.0\xa0% → 40.0\xa0% +20.0" in part.text
    assert cells(root.all("details")[0].all("table")[2]) == {
        "coco_t2i_hit@10": ["61.5\xa0%"],
        "coco_t2i_median_rank": ["6"],
        "coco_rsum": ["2.5"],
    }


def test_the_tries_and_the_share_that_was_kept():
    part = section(read(log()), "How much of the new weights")
    assert [heading.text for heading in part.all("h3")] == ["Target", "my_coco", "pets"]
    assert "Kept: 50\xa0%" in part.text
    for one in part.all("div", "panel"):
        assert [guide["x1"] for guide in one.all("line", "guide")] == ["50.00%"]
        path = one.all("div", "plot")[0].all("path")[0]
        assert [x for x, _ in points(path)] == [0, 50, 100]
        dotted = one.all("line", "start")[0]
        assert number(dotted["y1"]) == pytest.approx(points(path)[0][1], abs=0.006)
    (path,) = panel(part, "pets").all("div", "plot")[0].all("path")
    scale = Axis.around([0.9, 0.86], 0, 1)
    assert [y for _, y in points(path)] == pytest.approx([100 - scale.place(v) for v in (0.9, 0.88, 0.86)], abs=0.006)


@pytest.mark.parametrize(("share", "at"), [(0.25, ["25.00%"]), (0.0, ["0.00%"]), (math.nan, []), (3.0, [])])
def test_the_share_can_be_given(share, at):
    part = section(read(log(), share=share), "How much of the new weights")
    assert [guide["x1"] for guide in panel(part, "pets").all("line", "guide")] == at


def test_no_share_is_marked_where_two_tries_are_alike_or_none_is():
    told = log()
    twice = [*told[:6], {**told[6], "share": 0.75}, *told[6:]]
    for odd in (twice, told[:-1], [*told[:-1], {"step": 40}]):
        part = section(read(odd), "How much of the new weights")
        assert not part.all("line", "guide")
        assert "Kept" not in part.text


def test_a_target_that_is_only_the_share_is_not_drawn():
    told = [{**line, "target": line["share"]} if "share" in line else line for line in log()]
    part = section(read(told), "How much of the new weights")
    assert [heading.text for heading in part.all("h3")] == ["my_coco", "pets"]


def test_all_numbers_are_in_the_tables():
    told = log()
    steps, tries, end, settings = read(told).all("details")[0].all("table")
    assert [head.text for head in steps.all("th")] == ["step", "0", "10", "20", "30", "40"]
    found = cells(steps)
    assert set(found) == set(told[1]) - {"step"}
    assert found["loss"] == ["–", "3.5", "3", "2.5", "2"]
    assert found["guard_pets_top1"] == ["90.0\xa0%", "88.0\xa0%", "86.0\xa0%", "84.0\xa0%", "82.0\xa0%"]
    assert [head.text for head in tries.all("th")] == ["share", "0", "0.5", "1"]
    assert cells(tries)["guard_pets_top1"] == ["90.0\xa0%", "88.0\xa0%", "86.0\xa0%"]
    assert set(cells(end)) == set(told[-1]) - {"step"}
    assert cells(settings)["sources"] == [json.dumps(CONFIG["sources"])]
    assert list(cells(settings)) == list(CONFIG)


# ---- odd logs --------------------------------------------------------------------------------------------------------


def test_an_empty_log():
    root = read([], {})
    assert titles(root) == ["Loss"]
    assert "Nothing has been logged yet." in root.text
    assert not root.all("details")


def test_only_the_start():
    root = read(log()[:1])
    assert titles(root) == ["Loss"]
    assert "No loss has been logged yet." in root.text
    assert "not done: logged up to step 0" in root.text
    assert cells(root.all("table")[0])["val_t2i_hit@1"] == ["20.0\xa0%"]


def test_only_an_end():
    assert "No loss has been logged yet." in read([{"step": 4, "coco_t2i_hit@1": 0.5}]).text


def test_neither_validation_nor_guard():
    root = read([{"step": 0}, {"step": 1, "loss": 2.0, "scale": 20.0}, {"step": 1}])
    assert [heading.text for heading in root.all("h3")] == ["Loss"]
    assert not titles(root)
    assert "no validation pairs · no guard against forgetting" in root.text
    (path,) = root.all("path")
    assert points(path) == [(100, 100)]
    assert len(root.all("circle")) == 1  # a line of one point shows nothing


def test_what_is_no_number_is_a_gap():
    told = log()
    told[2] = {
        **told[2],
        "loss": math.nan,
        "val_t2i_hit@1": None,
        "guard_pets_top1": "?",
        "val_mutual_information": True,
    }
    root = read(told)
    (path,) = panel(root, "Loss").all("path")
    assert path["d"].count("M") == 2
    assert len(panel(root, "Loss").all("circle")) == 3
    assert "nan" not in root.text.lower()
    assert cells(root.all("details")[0].all("table")[0])["loss"] == ["–", "3.5", "–", "2.5", "2"]


def test_nothing_but_nan():
    told = [{name: value if name in ("step", "share") else math.nan for name, value in line.items()} for line in log()]
    root = read(told)
    assert "The loss was never a number." in root.text
    assert titles(root) == ["Loss", "Won and lost", "How much of the new weights"]
    assert not root.all("circle")
    assert {span.text for span in root.all("b")} == {"–"}


def test_a_guard_whose_measure_is_of_no_known_kind():
    told = [{"step": 0, "guard_odd": 0.5}, {"step": 2, "loss": 1.0, "guard_odd": 0.25}]
    root = read(told)
    assert [heading.text for heading in section(root, "Guard").all("h3")] == ["odd"]
    assert "50.0\xa0% → 25.0\xa0% −25.0" in section(root, "Won and lost").text


def test_whatever_a_user_gives_is_escaped():
    bad = "<script>alert('&')</script>"
    told = [
        {"step": 0, f"guard_{bad}_top1": 0.5, f"val_{bad}": 0.5},
        {"step": 1, "loss": 1.0, bad: bad, f"guard_{bad}_top1": 0.4, f"val_{bad}": 0.5},
        {"share": 0.0, "target": 1.0, f"guard_{bad}_top1": 0.5},
        {"step": 1, f"{bad}_t2i_hit@1": 0.5, f"val_{bad}": 0.5},
    ]
    config = dict.fromkeys((*CONFIG, bad), bad)
    page = run_page(bad + "\udcff", told, config)
    page.encode("utf-8")
    assert "<script" not in page
    assert bad in Tree(page).root.text


def test_the_page_needs_nothing_else(tmp_path):
    file = write_run_page("a-run", log(), CONFIG, tmp_path / "run.html", share=0.5)
    page = file.read_text("utf-8")
    assert page == run_page("a-run", log(), CONFIG, share=0.5)
    assert "<script" not in page
    assert "http" not in page.replace("http-equiv", "")
    assert "prefers-color-scheme: dark" in page
    with pytest.raises(UsageError, match="cannot be written"):
        write_run_page("a-run", log(), CONFIG, tmp_path / "none" / "run.html")


# ---- the chart -------------------------------------------------------------------------------------------------------


def test_names_at_the_ends_of_lines_are_not_written_over_each_other():
    drawn = [Line(f"{i}", [0, 1], [0.5, y]) for i, y in enumerate((0.01, 0.0, 0.02, 1.0, math.nan))]
    root = Tree(lines(drawn, Axis(0, 1, 1), Axis(0, 1, 0.5), "x", named=True)).root
    ends = {text.text: number(text["y"]) for text in root.all("text", "end")}
    assert ends["3"] == 0
    assert max(ends.values()) <= 100
    heights = [ends[name] for name in ("2", "0", "1")]
    assert min(np.diff(heights)) >= 6.4


def test_steps_are_whole_numbers():
    for steps in (1, 2, 3, 7, 40, 12345):
        told = [{"step": 0}, {"step": steps, "loss": 1.0}]
        labels = [text.text for text in panel(read(told), "Loss").all("text") if text.attributes.get("y") == "100%"]
        ticks = [int(label.replace(",", "")) for label in labels if label != "step"]
        assert ticks[0] == 0
        assert 2 <= len(ticks) <= 7
        assert ticks[-1] <= steps
