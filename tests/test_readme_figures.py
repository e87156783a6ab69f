"""The figures of README.md, README.zh.md and docs/ are those that were measured."""

from __future__ import annotations

import json
import re

import pytest
from readme_texts import CHINESE, README, ROOT

from benchmarks import readme_table

VLLM_MS = 7.98  # a step of Baichuan2-13B in float16 at batch 1, docs/performance.md's


@pytest.mark.parametrize("name", readme_table.HEADS)
def test_the_table_is_the_measurements(name):
    text = (ROOT / name).read_text(encoding="utf-8")
    table = readme_table.table(readme_table.HEADS[name])
    assert readme_table.with_table(text, table) == text, "python benchmarks/readme_table.py --write"
    assert table.count("\n") == 22 and re.search(r"^\| v2_7b \| float16 \| 15.01 \|", table, re.MULTILINE)
    changed = table.replace("15.01", "15.02")
    assert readme_table.with_table(text, changed) != text
    precisions = readme_table.quality_table(readme_table.QUALITY_HEADS[name])
    assert readme_table.with_table(text, precisions, readme_table.QUALITY_BEGIN) == text
    assert re.search(r"^\| INT4 g32, GPTQ \| 4.75 \| 10.06 \|", precisions, re.MULTILINE)


def test_the_table_of_gpus_is_the_measurements():
    text, table = (ROOT / readme_table.PERFORMANCE).read_text(encoding="utf-8"), readme_table.gpu_table()
    assert readme_table.with_table(text, table) == text, "python benchmarks/readme_table.py --write"
    results = json.loads((ROOT / "docs" / "performance.json").read_text(encoding="utf-8"))["results"]
    newest = {(each["model_version"], each["precision"], each["tp_size"], each["batch_size"]): each for each in results}
    for tp_size in (1, 2, 4):
        rates = [batch * 1e3 / newest["v2_13b", "int8", tp_size, batch]["step_ms"] for batch in (1, 64)]
        row = re.search(r"^\| INT8 \| (.*) \|$", table, re.MULTILINE)[1].split(" | ")
        place = (1, 2, 4).index(tp_size)
        assert [row[place], row[place + 3]] == [f"{rate:,.0f}" for rate in rates]


def test_the_figures_are_the_measurements():
    speeds = readme_table.read_speeds(ROOT / "docs" / "performance.json")
    performance = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
    one, many, int4 = (
        speeds["v2_13b", precision, batch] for precision, batch in (("float16", 1), ("float16", 64), ("int4", 1))
    )
    assert f"| float16 | 1 | {1e3 / one:.2f} (" in performance and f"| 100 % | vLLM {VLLM_MS} |" in performance
    for text in (README, CHINESE):
        opening = text.partition("\n## ")[0]
        for figure in (f"{one:.0f}", f"{many:,.0f}", f"{int4:.0f}", f"{VLLM_MS / (1e3 / one):.2f}", "H200"):
            assert figure in opening, figure


def test_the_gains_of_groups_are_the_measurements():
    accuracy = (ROOT / "docs" / "accuracy.md").read_text(encoding="utf-8")
    for group in (32, 64):
        row = re.search(rf"^\| INT4 in groups of {group}: KL below per channel (.*)$", accuracy, re.MULTILINE)[1]
        low, high = re.findall(r"\d+", row)[2:]  # the gains on texts that are new to the models
        assert f"{low} to {high} % lower" in " ".join(README.split())
        assert f"低 {low}% 至 {high}%" in CHINESE


def test_the_real_model_s_figures_are_the_measurements():
    accuracy = (ROOT / "docs" / "accuracy.md").read_text(encoding="utf-8")
    rows = {"float16": "float16", "INT8": "INT8 weight-only", "FP8": "FP8, pt + pc"}
    for method in ("GPTQ", "AWQ"):
        rows |= {f"INT4 g{size}, {method}": f"INT4 by {method}, groups of {size}" for size in (32, 64)}
    rows |= {f"INT4 g{size}": f"INT4 weight-only, groups of {size}" for size in (32, 64)}
    for ours, measured in rows.items():
        kl, _, perplexity = re.search(
            rf"^\| {re.escape(measured)} \| ([^|]+) \| ([^|]+) \| ([^|]+) \|", accuracy, re.M
        ).groups()
        for text in (README, CHINESE):
            assert re.search(rf"^\| {re.escape(ours)} \|.* \| {kl} \| {perplexity} \|$", text, re.M), ours


def test_a_walk_fills_its_cells(tmp_path):
    (tmp_path / "walk.md").write_text(
        "# The walk\n\nv1_7b, 32 layers; 1 x NVIDIA H200; torch 2.11.0\n\n| command | s | host GB |\n|---|---:|---:|\n"
        "| build int8 | 33.1 | 2.0 | 0.5 | 7.5 | self-check |\n| run int8 | 21.0 | 3.0 | 9.9 |  | decode |\n"
        "\nv2_13b, 3 layers (small); no GPU; torch 2.13.0\n\n| build int8 | 1.0 | 1.0 |  |  |  |\n"
    )
    walk = readme_table.read_walk(tmp_path / "walk.md")
    assert walk["v1_7b", "build int8"][0] == "33.1" and walk["v1_7b", "run int8"][2] == "9.9"
    assert not [key for key in walk if key[0] == "v2_13b"] and not readme_table.read_walk(tmp_path / "none.md")
