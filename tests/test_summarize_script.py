"""summarize.py as its users start it: flags, what it prints and writes, exit codes, mpirun, Ctrl-C."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import goldens
import pytest
import scripts
from tiny_engine import SAMPLES, engine

import summarize
from baichuan.cli.common import only_rank_zero
from baichuan.engine.folder import Engine, read_engine
from baichuan.errors import BaichuanError, ConfigError
from baichuan.parallel.comm import run_ranks

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def articles(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("data") / "articles.jsonl"
    rows = [{"id": s.id, "article": s.article, "highlights": s.highlights} for s in SAMPLES[:4]]
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return path


def flags(built: Engine, version: str, articles: Path, *more: str) -> list[str]:
    checkpoint = str(goldens.checkpoint(version))
    given = ["--test_trt_llm", "--test_hf", "--data_type", "fp32", "--hf_model_dir", checkpoint, "--output_len", "12"]
    return [*given, "--engine_dir", str(built.folder), "--dataset_path", str(articles), *more]


def test_the_script_prints_and_saves(articles, tmp_path, capsys):
    more = ["--batch_size", "3", "--eval_ppl", "--output_dir", str(tmp_path / "new/out")]
    assert summarize.main(flags(engine("v2_13b"), "v2_13b", articles, *more)) == 0
    out, err = capsys.readouterr()
    assert f"Article: {SAMPLES[0].article}" in out and f"Highlights: {SAMPLES[0].highlights}" in out
    assert "Summary (engine, float32; Hugging Face, float32): " in out
    assert "4 of 4 summaries are identical" in out and "greedy decoding" in out
    values = json.loads((tmp_path / "new/out/results.json").read_text(encoding="utf-8"))
    assert values["complete"] and [side["key"] for side in values["sides"]] == ["engine", "hf"]
    folder = engine("v2_13b").folder
    assert values["sides"][0]["bytes"] == sum(path.stat().st_size for path in folder.glob("*.engine"))
    assert values["settings"]["sampling"]["repetition_penalty"] == 1.0
    report, *others = (tmp_path / "new/out").glob("*.html")
    assert not others and report.name.startswith("float32-on-") and report.stat().st_size > 5000
    assert f"the report is {report}" in err


def test_what_the_transformers_side_alone_needs_is_said_to_be_left_out(articles, tmp_path, capsys):
    given = flags(read_engine(scripts.built(tmp_path, "v2_13b")), "v2_13b", articles)
    given.remove("--test_hf")
    given[given.index("--data_type") + 1] = "fp16"
    assert summarize.main(given) == 0
    err = capsys.readouterr().err
    assert "the engine has its own tokenizer" in err and "data_type fp16 is for --test_hf" in err


def test_several_engines_are_sides_of_one_run(articles, tmp_path, capsys):
    """The transformers model is measured once, beside all of them."""
    built = [engine("v2_13b"), engine("v2_13b", 1, "int4")]
    given = flags(built[0], "v2_13b", articles, "--output_dir", str(tmp_path))
    given.insert(given.index("--engine_dir") + 2, str(built[1].folder))
    assert summarize.main(given) == 0
    out = capsys.readouterr().out
    assert out.count("Hugging Face") == 2, "one summary and one line of the table"
    assert max(map(len, out[out.index("4 articles;") :].splitlines())) <= 100
    values = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    assert [side["key"] for side in values["sides"]] == ["engine_1", "engine_2", "hf"] and values["reference"] == "hf"
    exact, coarse, none = (side["agreement"] for side in values["sides"])
    assert exact["mean_kl"] < 1e-7 < 1e-4 < coarse["mean_kl"] and none is None
    index = (tmp_path / "index.html").read_text(encoding="utf-8")
    links = re.findall(r'<a href="([^"]+)">', index)
    assert len(set(links)) == 2 and all((tmp_path / link).is_file() for link in links)


def test_engines_of_two_checkpoints_are_not_compared(articles, capsys):
    given = flags(engine("v2_13b"), "v2_13b", articles)
    given.insert(given.index("--engine_dir") + 2, str(engine("v1_7b").folder))
    assert summarize.main(given) == 2
    assert "model_version has 2 values (v2_13b in" in capsys.readouterr().err


def test_two_engines_of_one_kind_are_told_apart_by_their_folders(articles, tmp_path):
    given = flags(engine("v1_7b"), "v1_7b", articles, "--output_dir", str(tmp_path), "--max_ite", "1")
    shutil.copytree(engine("v1_7b").folder, tmp_path / "copy")
    given.insert(given.index("--engine_dir") + 2, str(tmp_path / "copy"))
    assert summarize.main(given) == 0
    labels = [side["label"] for side in json.loads((tmp_path / "results.json").read_text())["sides"]]
    assert labels[0].endswith(str(engine("v1_7b").folder)) and labels[1].endswith("copy")
    assert len(list(tmp_path.glob("*.html"))) == 3


def test_each_side_alone(articles, capsys):
    both = flags(engine("v1_7b"), "v1_7b", articles)
    assert summarize.main([flag for flag in both if flag != "--test_hf"]) == 0
    assert "Hugging Face" not in capsys.readouterr().out
    assert summarize.main([*(flag for flag in both if flag != "--test_trt_llm"), "--model_version", "v1_7b"]) == 0
    assert "engine, float32" not in capsys.readouterr().out


def test_the_old_spelling_of_the_checkpoints_flag(articles):
    given = flags(engine("v1_7b"), "v1_7b", articles)
    given[given.index("--hf_model_dir")] = "--hf_model_location"
    assert summarize.main([*given, "--max_ite", "1"]) == 0


@pytest.mark.parametrize(("threshold", "code"), [("0", 0), ("100", 1)])
def test_check_accuracy(articles, capsys, threshold, code):
    more = ["--check_accuracy", "--tensorrt_llm_rouge1_threshold", threshold]
    assert summarize.main(flags(engine("v1_7b"), "v1_7b", articles, *more)) == code
    sentence = "ROUGE-1 of engine, float32 is"
    assert (sentence in capsys.readouterr().err) == bool(code)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda given: given[2:], "nothing to measure; give --test_trt_llm, --test_hf, or both"),
        (lambda given: [*given, "--max_ite", "0"], "max_ite 0 is out of range"),
        (lambda given: [*given, "--output_len", "65"], "max_output_len 65 is out of the engine's range 1 to 64"),
        (lambda given: [*given, "--batch_size", "9", "--max_ite", "1"], None),  # four articles are one batch of four
        (lambda given: [*given, "--num_beams", "2", "--top_k", "3"], "num_beams 2 searches and does not sample"),
        (lambda given: [*given, "--num_beams", "5"], "num_beams 5 exceeds the engine's max_beam_width 4"),
        (lambda given: [*given, "--num_beams", "2", "--repetition_penalty", "1.2"], "leave one out, or --test_hf"),
        (lambda given: [*given, "--dataset_path", "/nowhere.json"], "dataset_path /nowhere.json does not exist"),
        (lambda given: [*given, "--model_version", "v1_13b"], "holds a v1_7b model, not v1_13b"),
        (lambda given: [*given, "--engine_dir", "/nowhere"], "build an engine into /nowhere first"),
        (lambda given: [*given, "--tokenizer_dir", "/nowhere"], "there is no tokenizer at /nowhere"),
        (lambda given: [*given, "--output_dir", "/proc/none"], "output_dir /proc/none cannot be made"),
    ],
)
def test_wrong_flags_give_one_sentence(articles, capsys, change, sentence):
    code = summarize.main(change(flags(engine("v1_7b"), "v1_7b", articles)))
    err = capsys.readouterr().err
    if sentence is None:
        assert code == 0
    else:
        assert code == 2 and sentence in err.splitlines()[-1] and "error: " in err.splitlines()[-1]


def test_an_article_that_is_longer_than_the_engine_takes_is_named_with_the_flag_that_cuts_it(tmp_path, capsys):
    path = tmp_path / "long.jsonl"
    path.write_text(json.dumps({"id": "n", "article": "many " * 300, "highlights": "many"}))
    given = flags(engine("v1_7b"), "v1_7b", path)
    assert summarize.main(given) == 2
    said = capsys.readouterr().err
    assert "article n makes a prompt of " in said and "takes 1 to 256; give --max_input_length 256" in said
    assert summarize.main([*given, "--max_input_length", "256"]) == 0


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        (["--test_hf"], "--test_hf needs a checkpoint"),
        (["--test_hf", "--hf_model_dir", "x", "--check_accuracy"], "--check_accuracy is for --test_trt_llm"),
        (["--test_hf", "--hf_model_dir", "x", "--data_type", "int8"], "invalid choice"),
        (["--test_trt_llm", "--tensorrt_llm_rouge1_threshold", "20"], "is what --check_accuracy judges by; add that"),
        (
            ["--test_trt_llm", "--check_accuracy", "--tensorrt_llm_rouge1_threshold", "nan"],
            "threshold nan is out of range",
        ),
        (["--test_trt_llm", "--engine_dir", "x", "y", "./x"], "x is given twice; name each engine once"),
    ],
)
def test_flags_that_lack_another(given, sentence, capsys):
    try:
        assert summarize.main(given) == 2
    except SystemExit as stop:  # argparse's own
        assert stop.code == 2
    assert sentence in capsys.readouterr().err


def test_what_this_machine_lacks(articles, capsys, monkeypatch):
    given = flags(engine("v1_7b"), "v1_7b", articles)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert summarize.main([*given, "--hf_device", "cuda"]) == 2
    assert "device cuda needs a GPU" in capsys.readouterr().err
    monkeypatch.setattr("baichuan.cli.summarize.float32_bytes", lambda model: 1 << 60)
    assert summarize.main(given) == 2
    assert "the transformers model in fp32 needs 1152921504.61 GB of host memory" in capsys.readouterr().err


def test_defaults_are_the_old_examples(monkeypatch):
    seen = {}

    def stop(parser, argv, body, engines=None):
        seen.update(vars(parser.parse_args(argv)))
        return 0

    monkeypatch.setattr(summarize, "run_script", stop)
    summarize.main([])
    expected = dict(
        data_type="fp16", batch_size=None, max_ite=20, output_len=100, max_input_length=923, num_beams=1, top_k=1
    )
    assert expected.items() <= seen.items() and seen["tensorrt_llm_rouge1_threshold"] == 15.0
    assert (seen["temperature"], seen["repetition_penalty"]) == (1.0, 1.0)


def command(given: list[str], ranks: int = 1) -> list[str]:
    script = [sys.executable, str(ROOT / "summarize.py"), *given]
    if ranks == 1:
        return script
    mpirun = Path(sys.executable).parent / "mpirun"
    return [str(mpirun), "-n", str(ranks), "--allow-run-as-root", "--oversubscribe", *script]


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1"}


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_under_mpirun_rank_zero_alone_prints_and_every_rank_gives_the_verdict(articles, tmp_path):
    more = ["--output_dir", str(tmp_path), "--check_accuracy", "--tensorrt_llm_rouge1_threshold", "100"]
    given = flags(engine("v1_7b", 2), "v1_7b", articles, *more)
    done = subprocess.run(command(given, 2), env=environment(), capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 1, done.stderr
    assert done.stdout.count("Article: ") == done.stdout.count("4 of 4 summaries are identical") == 1
    assert done.stderr.count("ROUGE-1 of engine, float32") == 1
    assert json.loads((tmp_path / "results.json").read_text())["settings"]["world_size"] == 2
    # An error of rank 0 alone is every rank's: nobody waits for it.
    wrong = flags(engine("v1_7b", 2), "v1_7b", tmp_path / "none.json")
    done = subprocess.run(
        command(wrong, 2), env=environment(), capture_output=True, text=True, timeout=60, cwd=tmp_path
    )
    assert done.returncode == 2 and "none.json does not exist" in done.stderr


@pytest.mark.slow
@pytest.mark.timeout(120)
@pytest.mark.parametrize(("by", "before"), [(signal.SIGINT, False), (signal.SIGTERM, True)])
def test_a_run_that_is_stopped_leaves_the_report_and_the_complete_one_before(articles, tmp_path, by, before):
    rows = articles.read_text().splitlines() * 500
    (tmp_path / "many.jsonl").write_text("\n".join(rows))
    more = ["--output_dir", str(tmp_path), "--max_ite", "2000"]
    given = flags(engine("v1_7b"), "v1_7b", tmp_path / "many.jsonl", *more)
    if before:
        assert summarize.main(flags(engine("v1_7b"), "v1_7b", articles, "--output_dir", str(tmp_path))) == 0
        old = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    process = subprocess.Popen(
        command(given), env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    for line in process.stdout:
        if line.startswith("Summary ("):
            break
    process.send_signal(by)
    out, err = process.communicate(timeout=60)
    if before:  # the complete report stays
        assert {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()} == old
    folder = tmp_path / "unfinished" if before else tmp_path
    values = json.loads((folder / "results.json").read_text())
    assert process.returncode == 2 and f"stopped by {'Ctrl-C' if by == signal.SIGINT else 'SIGTERM'}" in err
    assert values["complete"] is False and 1 <= values["articles"] < 2000
    assert f"{values['articles']} articles of 2000, the run was stopped" in out


def test_an_error_in_one_rank_is_every_ranks():
    def fail(comm):
        def make():
            raise ConfigError("x is wrong; make it right")

        with pytest.raises(BaichuanError, match="x is wrong"):
            only_rank_zero(comm, make)
        return only_rank_zero(comm, lambda: comm.rank)

    assert run_ranks(2, fail) == [0, None]
