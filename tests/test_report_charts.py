"""The reports' charts and tables as texts: to scale, and nothing overlaps."""

from __future__ import annotations

import re
from itertools import combinations

import pytest
from html_page import Page

from baichuan.evaluation.svg_chart import LETTER, WIDTH, Axis, Bar, bar_chart, tick_step
from baichuan.evaluation.text_table import table


def test_bars_and_whiskers_are_to_scale():
    svg = bar_chart("T", {"A": [Bar("side0", "a", 20.0, 10.0, 40.0), Bar("side1", "b", 5.0)]})
    widths = [float(attributes["width"]) for tag, attributes in Page(svg).tags if tag == "rect"]
    assert widths[0] == pytest.approx(4 * widths[1], abs=0.3)  # coordinates have one decimal
    left, right = re.search(r'd="M([\d.]+) [\d.]+H([\d.]+)', svg).groups()
    start = float(next(attributes["x"] for tag, attributes in Page(svg).tags if tag == "rect"))
    assert float(left) - start == pytest.approx(widths[0] / 2, abs=0.2)
    assert float(right) - start == pytest.approx(widths[0] * 2, abs=0.2)
    assert svg.count('class="whisker"') == 1


@pytest.mark.parametrize(
    "name", ["short", "a name that is longer than the place beside its bar, and than a telephone is wide"]
)
def test_names_and_values_stay_inside_and_apart(name):
    svg = bar_chart("T", {name: [Bar("side0", "a", 87.0, 80.0, 100.0)], "other": [Bar("side0", "b", 1.0)]})
    boxes = []
    texts = re.findall(r'<text [^>]*?x="([\d.]+)" y="([\d.]+)"(?: text-anchor="(\w+)")?>([^<]+)', svg)
    for x, y, anchor, words in texts:
        start = float(x) - LETTER * len(words) * {"end": 1, "middle": 0.5}.get(anchor, 0)
        boxes.append((words, start, start + LETTER * len(words), float(y)))
    assert {"other", "87.0", "1.0", "100"} <= {words for words, *_ in boxes}
    assert name in " ".join(words for words, *_ in boxes)
    for words, start, end, _ in boxes:
        assert start >= 0 and end <= WIDTH, words
    for (one, a, b, y), (other, c, d, z) in combinations(boxes, 2):
        assert b <= c or d <= a or abs(y - z) >= 11, (one, other)


@pytest.mark.parametrize(
    ("largest", "step"),
    [(0, 1), (0.03, 0.005), (0.5, 0.1), (6.0, 1), (6.1, 2), (26.1, 5), (87, 20), (120.0, 20), (123.4, 50)],
)
def test_axes_end_at_round_numbers(largest, step):
    axis = Axis(largest, left=0, pixels=100)
    assert tick_step(largest) == axis.step == pytest.approx(step)
    assert (
        axis.ticks <= 6
        and axis.scale * largest <= 100 + 1e-9
        and axis.scale * axis.step * axis.ticks == pytest.approx(100)
    )


def test_tables_keep_to_100_columns():
    name = "engine, float16, INT4 weight-only, groups of 32, INT8 KV cache, 2 ranks"
    rows = [[name, *["12345678"] * 7], ["b", *["1"] * 7]]
    lines = table(["", *(f"a column {n}" for n in range(7))], rows).splitlines()
    assert max(map(len, lines)) <= 100 and len(lines) == 2 + 3 + 1
    assert " ".join(line[:30].strip() for line in lines[2:5]) == name and lines[5].startswith("b ")
    assert lines[0].split() == ["a", "column"] * 7 and lines[2].split()[-7:] == ["12345678"] * 7
