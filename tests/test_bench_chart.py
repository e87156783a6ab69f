"""The chart of decode steps: what is long is drawn long, and nothing is written over anything else."""

import json
from itertools import combinations
from xml.etree import ElementTree

import pytest

from baichuan.evaluation.svg_chart import LETTER
from benchmarks import chart
from benchmarks.random_weights import PRECISIONS

SVG = "{http://www.w3.org/2000/svg}"


def result(version="v2_13b", precision="float16", batch=1, tp=1, step=6.7, limit=6.4, cache="none"):
    return {
        "model_version": version,
        "precision": precision,
        "kv_cache": cache,
        "batch_size": batch,
        "tp_size": tp,
        "step_ms": step,
        "limit_ms": limit,
    }


def drawn(tmp_path, *results):
    (tmp_path / "a.json").write_text(json.dumps({"gpu": "NVIDIA H200", "results": results}))
    assert chart.main([str(tmp_path / "a.json"), "--output", str(tmp_path / "a.svg")]) == 0
    return ElementTree.parse(tmp_path / "a.svg").getroot()


def of_class(root, name, tag):
    return [each for each in root.iter(SVG + tag) if each.get("class") == name][1:]  # the first is the legend's


MANY = [
    result(),
    result(precision="int4_g128", step=2.4, limit=1.9, cache="int8"),
    result(precision="smooth_quant_per_token", step=3.8, limit=3.4),
    result(tp=4, step=2.4, limit=1.6),
    result(batch=64, step=11.2, limit=8.8),
    result(batch=64, precision="int4", step=0.9, limit=0.4),
    result("v1_7b", batch=64, step=7.3, limit=4.8),
    result(batch=1024, step=123.4, limit=40.0),
]


def test_lengths_are_the_times(tmp_path):
    root = drawn(tmp_path, *MANY)
    bars, limits, peers = (
        of_class(root, "bar", "rect"),
        of_class(root, "limit", "path"),
        of_class(root, "peer", "circle"),
    )
    widths = [float(bar.get("width")) for bar in bars]
    assert widths[1] / widths[0] == pytest.approx(2.4 / 6.7, abs=1e-3)
    scale, left = widths[0] / 6.7, float(bars[0].get("x"))
    assert float(limits[0].get("d").split()[0][1:]) == pytest.approx(left + 6.4 * scale, abs=0.2)
    assert float(peers[0].get("cx")) == pytest.approx(left + 7.98 * scale, abs=0.2)
    assert len(peers) == 5, "two precisions and several GPUs have no peer"


def test_no_text_lies_on_another_or_outside(tmp_path):
    root = drawn(tmp_path, *MANY)
    width, height = (float(root.get(name)) for name in ("width", "height"))
    boxes = []
    for text in root.iter(SVG + "text"):
        length, x, y = LETTER * len(text.text), float(text.get("x")), float(text.get("y"))
        length *= {"tick": 0.85, "title": 1.23}.get(text.get("class"), 1)
        left = x - length * {"end": 1, "middle": 0.5}.get(text.get("text-anchor"), 0)
        boxes.append((text.text, left, left + length, y - 10, y + 3))
    for name, left, right, top, bottom in boxes:
        assert left >= 0 and right <= width and top >= 0 and bottom <= height, name
    for (one, a, b, c, d), (other, e, f, g, h) in combinations(boxes, 2):
        assert b <= e or f <= a or d <= g or h <= c, (one, other)


def test_of_two_results_for_one_bar_the_later_counts(tmp_path):
    root = drawn(tmp_path, result(step=9.0), result(step=6.7))
    assert len(of_class(root, "bar", "rect")) == 1
    assert "6.70 ms" in [text.text for text in root.iter(SVG + "text")]


def test_every_precision_has_a_name():
    assert set(chart.PRECISIONS) == set(PRECISIONS)


def test_a_file_that_is_none_is_refused(tmp_path, capsys):
    (tmp_path / "a.json").write_text("{")
    assert chart.main([str(tmp_path / "a.json")]) == 2
    assert "bench_generate.py --json" in capsys.readouterr().err
