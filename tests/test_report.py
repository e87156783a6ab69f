"""What an evaluation leaves behind: its JSON, its texts, and a page that needs nothing else and escapes everything."""

from __future__ import annotations

import copy
import json
import math
import re

import pytest
from bigram_side import BigramSide, evaluation_of
from html_page import Page

from baichuan.config import SamplingConfig
from baichuan.errors import ConfigError
from baichuan.evaluation import html_report, report
from baichuan.evaluation.datasets import Sample
from baichuan.evaluation.request import Request
from baichuan.evaluation.rouge import KINDS, Rouge
from baichuan.evaluation.wording import conditions_text, decoding, speed_text

NASTY = "</div><script>alert(1)</script>&amp; \"x\" 'y' <img src=http://e.example/a.png>"
SAMPLING = SamplingConfig(top_k=1, repetition_penalty=1.0)
SETTINGS = {
    "dataset": "data/articles.jsonl",
    "scored_tokens_limit": None,
    "batch_size": 2,
    "output_len": 12,
    "max_input_length": 40,
    "decoding": decoding(SAMPLING),
    "sampling": {"top_k": 1},
}


@pytest.fixture(scope="module")
def rouge() -> Rouge:
    return Rouge()


def run(rouge, answers=("the river rose", "the river fell"), samples=None, **request):
    samples = samples or [
        Sample("one", "Rain for days. The river rose. " * 3, "The river rose."),
        Sample("two", "It is dry.", "No rain."),
        Sample("three", "Snow.", "Snow fell."),
    ]
    sides = [BigramSide(f"s{i}", i, answer=lambda prompt, text=text: text) for i, text in enumerate(answers)]
    evaluation = evaluation_of(sides, samples, Request(SAMPLING, 2, 20, 12, 40, **request), rouge, scoring=True)
    for tasks in evaluation.batches():
        evaluation.run(tasks)
    return evaluation


def written(evaluation, folder, settings=SETTINGS, complete=True):
    samples = [report.sample_values(sample) for sample in evaluation.samples]
    page = report.write(folder, report.results(evaluation, settings, complete), samples)[0]
    return report.read_results(folder / "results.json"), page.read_text(encoding="utf-8")


def test_results_hold_every_figure(rouge, tmp_path):
    evaluation = run(rouge, eval_ppl=True)
    values, _ = written(evaluation, tmp_path)
    assert (values["articles"], values["batches"], values["articles_cut"], values["complete"]) == (3, 2, 1, True)
    for side in values["sides"]:
        figures = evaluation.figures(side["key"])
        for kind in KINDS:
            assert side["rouge"][kind] == vars(figures.rouge[kind])
        assert (side["latency_s"], side["perplexity"]) == (figures.latency_s, figures.perplexity)
        assert side["new_tokens"] == 3 * 12  # the answers are cut at 12 tokens
        assert side["tokens_per_s"] == pytest.approx(side["new_tokens"] / side["latency_s"])
        assert side["agreement"] == (vars(figures.agreement) if figures.agreement else None)
    assert values["reference"] == "s1" and values["sides"][0]["agreement"] and not values["sides"][1]["agreement"]
    assert values["settings"] == SETTINGS
    assert {"baichuan", "python", "torch", "transformers", "rouge_score", "evaluate"} <= set(values["versions"])


def test_summaries_hold_the_texts_of_both_sides(rouge, tmp_path):
    evaluation = run(rouge)
    written(evaluation, tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "summaries.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [line["id"] for line in lines] == ["one", "two", "three"]
    ours = lines[0]["summaries"]["s0"]
    assert ours["text"] == "the river ro" and ours["identical_prefix"] == 10
    assert lines[0]["left_out_tokens"] == len(lines[0]["article"] + " TL;DR:") - 40
    assert lines[1]["highlights"] == "No rain." and lines[1]["left_out_tokens"] == 0


def test_the_page_is_well_formed_and_asks_for_nothing(rouge, tmp_path):
    _, html = written(run(rouge), tmp_path)
    page = Page(html)
    assert not {"script", "link", "img", "iframe", "object", "base"} & {tag for tag, _ in page.tags}
    for _, attributes in page.tags:
        assert not {"src", "href", "srcset", "action", "data"} & set(attributes)
        assert not any(name.startswith("on") for name in attributes)
    assert not re.search(r"url\(|@import|https?:|//", html.split("</style>")[0])
    policy = next(attributes["content"] for _, attributes in page.tags if "http-equiv" in attributes)
    assert "default-src 'none'" in policy
    assert "prefers-color-scheme: dark" in html
    assert {tag for tag, _ in page.tags} >= {"svg", "rect", "details", "table"}


def test_everything_is_escaped(rouge, tmp_path):
    evaluation = run(rouge, answers=(NASTY[:12], NASTY[6:18]), samples=[Sample(NASTY, NASTY, NASTY)])
    for side in evaluation.sides:
        side.label = side.facts["device"] = side.facts["dtype"] = NASTY
    settings = {**dict.fromkeys(SETTINGS, NASTY), NASTY: {NASTY: NASTY}}
    _, html = written(evaluation, tmp_path, settings)
    page = Page(html)
    assert not {"script", "img"} & {tag for tag, _ in page.tags}
    shown = "".join(page.texts)
    assert shown.count("<script>alert(1)</script>") > 10 and "&amp; \"x\" 'y'" in shown


def test_control_characters_do_not_reach_the_page():
    assert html_report.text("a\x00b\x1bc\x9fd\te\n") == "a\ufffdb\ufffdc\ufffdd\te\n"


def test_the_page_shows_figures_texts_and_where_the_sides_part(rouge, tmp_path):
    values, html = written(run(rouge, eval_ppl=True), tmp_path)
    shown = "".join(Page(html).texts)
    for side in values["sides"]:
        assert side["label"] in shown and f"{side['perplexity']:.4f}" in shown
        assert f"{side['rouge']['rouge1']['value']:.2f}" in shown
    assert "1 of them cut to their end" in shown and "they part at token 11" in shown
    assert "the river <mark>ro</mark>" in html and "the river <mark>fe</mark>" in html
    assert "character by character" in shown and "not complete" not in shown
    assert "The run is not complete" in written(run(rouge), tmp_path, complete=False)[1]


def test_one_side_alone_has_neither_agreement_nor_marks(rouge, tmp_path):
    values, html = written(run(rouge, answers=("the river rose",)), tmp_path)
    assert values["sides"][0]["agreement"] is None and values["sides"][0]["perplexity"] is None
    assert "Agreement" not in html and "<mark>" not in html and ">–<" in html


def test_long_runs_show_their_first_articles(rouge, tmp_path, monkeypatch):
    monkeypatch.setattr(html_report, "MAX_ARTICLES", 2)
    _, html = written(run(rouge), tmp_path)
    assert html.count("<details") == 2 and "The first 2 of 3" in html
    assert len((tmp_path / "summaries.jsonl").read_text().splitlines()) == 3


def test_what_is_not_finite_is_text_in_json_and_on_the_page(rouge, tmp_path):
    evaluation = run(rouge, eval_ppl=True)
    evaluation.sides[0].table.fill_(math.nan)
    evaluation.run(evaluation.batches()[0])
    values, html = written(evaluation, tmp_path)
    first = values["sides"][0]
    assert first["perplexity"] == first["agreement"]["mean_kl"] == "nan"
    assert "<span>nan</span></td>" in html and "nan" in report.figures_table(values)
    assert isinstance(values["sides"][1]["perplexity"], float)


def test_tables(rouge, tmp_path):
    values, _ = written(run(rouge, eval_ppl=True), tmp_path)
    first = values["sides"][0]
    lines = report.figures_table(values).splitlines()
    assert len({len(line) for line in lines}) == 1
    assert lines[0].split("  ")[-1] == "side s1" and f"{first['rouge']['rouge1']['value']:.2f} [" in lines[1]


def test_the_comparison_has_each_engine_and_the_transformers_model_once(rouge, tmp_path):
    first, _ = written(run(rouge, eval_ppl=True), tmp_path)
    for side, key, label in zip(first["sides"], ("engine", "hf"), ("engine, a", "Hugging Face, b"), strict=True):
        side["key"], side["label"] = key, label
    second = copy.deepcopy(first)
    second["sides"][0]["label"] = "engine, c"
    alone = {**first, "sides": [{**first["sides"][0], "agreement": None}]}
    rows = report.comparison_table([first, second, alone]).splitlines()
    assert [re.split("  +", row)[0] for row in rows] == [
        "",
        "",
        "engine, a",
        "Hugging Face, b",
        "engine, c",
        "engine, a",
    ]
    side = first["sides"][0]
    figures = [
        *(f"{side['rouge'][kind]['value']:.2f}" for kind in ("rouge1", "rougeL")),
        f"{side['perplexity']:.4f}",
        f"{side['agreement']['mean_kl']:.2e}",
        "0 of 3",
        f"{side['tokens_per_s']:.1f}",
        "5.0",
    ]
    assert re.split("  +", rows[2])[1:] == figures
    assert re.split("  +", rows[3])[4] == re.split("  +", rows[5])[4] == "–"


def test_articles_on_which_the_sides_part_come_first(rouge, tmp_path):
    def side(key, **answers):
        return BigramSide(key, answer=lambda prompt: answers[bytes(prompt).decode().split(".")[0]])

    sides = [
        side("engine", one="alike", two="they part", three="x"),
        side("hf", one="alike", two="they meet", three="y"),
    ]
    samples = [Sample(name, f"{name}.", "Words.") for name in ("one", "two", "three")]
    evaluation = evaluation_of(sides, samples, Request(SAMPLING, 3, 20, 12, 40), rouge, scoring=True)
    evaluation.run(evaluation.batches()[0])
    _, html = written(evaluation, tmp_path)
    assert re.findall(r"<summary>(\w+)", html) == ["three", "two", "one"] and "On 2 of 3 the two part" in html


def test_an_index_leads_from_every_precision_to_its_report(rouge, tmp_path):
    sides = [BigramSide(f"engine_{n}", n) for n in (1, 2)] + [BigramSide("hf", 3)]
    evaluation = evaluation_of(sides, [Sample("1", "abc.", "xyz")], Request(SAMPLING, 1, 1, 5, 40), rouge, True)
    evaluation.run(evaluation.batches()[0])
    values, html = written(evaluation, tmp_path)
    page = Page(html)
    links = [attributes["href"] for tag, attributes in page.tags if tag == "a"]
    assert links == [report.page_name(side) for side in values["sides"][:2]]
    assert all(link.endswith("-on-a-cpu.html") and (tmp_path / link).is_file() for link in links)
    assert [tag for tag, _ in page.tags].count("svg") == 4
    assert len(re.findall("<rect", html)) == 3 * 3 + 2, "bytes, speed and ROUGE of each, KL of those with a reference"


def test_speeds_are_compared_only_where_weights_outgrow_the_cache(rouge):
    evaluation = run(rouge)
    evaluation.sides[0].facts["quant"] = {"weights": "none"}
    values = report.results(evaluation, SETTINGS, True)
    ratio = values["sides"][1]["tokens_per_s"] / values["sides"][0]["tokens_per_s"]
    assert speed_text(values) == f"Tokens/s over those of side s0: {ratio:.2f} for side s1."
    for side in values["sides"]:
        side["cache_bytes"] = 3_000_000
    assert "do not rank precisions here" in speed_text(values) and "5.0 MB" in speed_text(values)
    values["sides"][0]["device"] = "another"
    assert speed_text(values) is None
    assert conditions_text(values).startswith("side s0 on another with 1 thread; side s1 on a CPU with 1 thread; ")


def test_only_runs_over_the_same_articles_are_compared(rouge, tmp_path, capsys):
    folders = [tmp_path / name for name in "abc"]
    for folder in folders:
        folder.mkdir()
    written(run(rouge), folders[0])
    written(run(rouge), folders[1], {**SETTINGS, "batch_size": 1})
    written(run(rouge), folders[2], {**SETTINGS, "output_len": 13})
    paths = [str(folder / "results.json") for folder in folders]
    assert report.main(paths[:2]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 6
    assert report.main(paths) == 2
    assert "output_len is 12 in one run and 13 in another" in capsys.readouterr().err
    written(run(rouge, samples=[Sample("1", "a", "b")]), folders[1])
    assert report.main(paths[:2]) == 2
    assert "over 3 articles and another over 1" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "sentence"),
    [("{", "is not JSON"), ("[]", "was not written by"), ('{"format": 0}', "was not written by")],
)
def test_files_that_are_no_results(tmp_path, content, sentence, monkeypatch):
    path = tmp_path / "results.json"
    with pytest.raises(ConfigError, match="cannot be read"):
        report.read_results(path)
    path.write_text(content)
    with pytest.raises(ConfigError, match=sentence):
        report.read_results(path)
    monkeypatch.setattr(report, "MAX_RESULTS_BYTES", 0)
    with pytest.raises(ConfigError, match="larger than 0 bytes"):
        report.read_results(path)
