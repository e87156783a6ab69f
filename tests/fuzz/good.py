"""The good inputs that are changed: small, and made by the scripts themselves."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import goldens
import hub_folders
import numpy as np

import build
import hf_baichuan_convert
import run
import summarize
from baichuan.config import ModelConfig
from benchmarks.random_adapter import write_adapter

IMPORTED = Path(__file__).resolve().parents[1] / "data/imported"
SIZES: dict[str, Any] = dict(num_layers=1, hidden_size=32, num_heads=2, intermediate_size=48, vocab_size=1000)
VERSIONS = {"safetensors": "v1_7b", "bin": "v2_13b"}
ARTICLES = [
    {"id": "1", "article": "Rain fell in the north for many days.", "highlights": "Rain fell."},
    {"id": "2", "article": "珠穆朗玛峰是世界最高的山峰。", "highlights": "珠峰最高。"},
]
LIMITS = ["--max_input_len", "64", "--max_output_len", "8", "--max_batch_size", "2", "--max_beam_width", "2"]
CALIBRATION = ["-p", "1", "--calib_size", "2", "--calib_max_length", "12"]


def quietly(main: Callable, *argv: str) -> None:
    with redirect_stdout(io.StringIO()):
        code = main([*argv, "--log_level", "error"])
    assert code == 0, argv


def model(form: str = "safetensors") -> ModelConfig:
    return ModelConfig(VERSIONS[form], dtype="float16", **SIZES)


def checkpoint(folder: Path, form: str = "safetensors", shards: int = 2) -> None:
    config = model(form)
    (folder / "config.json").write_text(json.dumps(hub_folders.hub_values(config)))
    hub_folders.write_weights(folder, hub_folders.tensors(config), form, shards)
    for name in ("tokenizer.model", "generation_config.json"):
        (folder / name).write_bytes((goldens.checkpoint(VERSIONS[form]) / name).read_bytes())


def articles(folder: Path) -> None:
    """The same articles in every format."""
    import pandas

    table = pandas.DataFrame(ARTICLES)
    (folder / "a.jsonl").write_text("".join(json.dumps(each) + "\n" for each in ARTICLES))
    (folder / "a.json").write_text(json.dumps(ARTICLES))
    (folder / "a.txt").write_text("".join(each["article"] + "\n" for each in ARTICLES))
    table.to_csv(folder / "a.csv", index=False)
    table.to_parquet(folder / "a.parquet")


def prompts(folder: Path) -> None:
    with open(folder / "p.csv", "w", newline="") as file:
        csv.writer(file).writerows([[1, 5, 9], [7, 8]])
    np.save(folder / "p.npy", np.array([[1, 5, 9], [7, 8, 0]], np.int32))
    (folder / "chat.txt").write_text("你好\n/help\n/reset\n/system Be brief.\nHello\n/exit\n")


def prompt_files(folder: Path) -> None:
    """An engine, the same prompts in every format, and what run.py made of them."""
    import pandas

    engine(folder)
    rows = [{"id": "a", "prompt": "Rain fell", "top_k": 2}, {"id": "b", "prompt": "珠峰", "top_k": 1}]
    chat = [{"role": role, "content": "hi"} for role in ("system", "user", "assistant", "user")]
    others = [{"prompt_ids": [1, 5, 9], "temperature": 0.5}, {"messages": chat[:2]}, {"messages": chat}]
    (folder / "f.jsonl").write_text("".join(json.dumps(each) + "\n" for each in [*rows, *others]))
    (folder / "f.txt").write_text("".join(each["prompt"] + "\n" for each in rows))
    table = pandas.DataFrame([*rows, *others]).astype({"top_k": "Int64"})
    table.to_parquet(folder / "f.parquet")
    lists = {name: table[name].map(json.dumps, na_action="ignore") for name in ("prompt_ids", "messages")}
    table.assign(**lists).to_csv(folder / "f.csv", index=False)
    files = ("--prompt_file", str(folder / "f.jsonl"), "--output_jsonl", str(folder / "results.jsonl"))
    quietly(run.main, "--engine_dir", str(folder / "engine"), "--max_output_len", "2", *files)


def binary(folder: Path, *flags: str) -> None:
    source = folder / "source"
    source.mkdir()
    checkpoint(source)
    articles(source)
    data = str(source / "a.jsonl")
    quietly(
        hf_baichuan_convert.main, "-i", str(source), "-o", str(folder), *flags, *CALIBRATION, "--calib_dataset", data
    )


def engine(folder: Path, *flags: str, form: str = "safetensors") -> None:
    source = folder / "source"
    source.mkdir()
    checkpoint(source, form)
    out = str(folder / "engine")
    quietly(build.main, "--model_dir", str(source), "--output_dir", out, "--no_self_check", *LIMITS, *flags)
    prompts(folder)
    articles(folder)
    (folder / "data").mkdir()
    articles(folder / "data")
    (folder / "data/a.txt").unlink()


def bare_engine(folder: Path) -> None:
    """An engine without a tokenizer."""
    engine(folder)
    for name in ("tokenizer.model", "generation_config.json"):
        (folder / "source" / name).unlink()
    again = ("--model_dir", str(folder / "source"), "--output_dir", str(folder / "engine"), "--no_self_check")
    quietly(build.main, *again, *LIMITS)
    checkpoint(folder / "source")


def reported(folder: Path) -> None:
    engine(folder)
    summary = ("--engine_dir", str(folder / "engine"), "--dataset_path", str(folder / "a.jsonl"), "--test_trt_llm")
    for name, length in (("one", "2"), ("two", "2")):
        where = ("--output_dir", str(folder / name), "--output_len", length, "--max_ite", "2")
        quietly(summarize.main, *summary, *where)


def outside(folder: Path) -> None:
    """Somebody else's files."""
    folder.mkdir()
    for name in ("secret.safetensors", "secret.bin", "secret.json"):
        (folder / name).write_bytes(b"secret")


def calibrated(folder: Path) -> None:
    """A checkpoint with articles, and its folder for an 8-bit KV cache and FP8."""
    binary(folder, "-kv")


def calibrated_int4(folder: Path) -> None:
    binary(folder, "--use_weight_only", "--weight_only_group_size", "0")


def smoothed(folder: Path) -> None:
    binary(folder, "-sq", "0.5")


def bin_checkpoint(folder: Path) -> None:
    checkpoint(folder, "bin")


def single_bin(folder: Path) -> None:
    checkpoint(folder, "bin", 0)


def with_articles(folder: Path) -> None:
    checkpoint(folder)
    articles(folder)


def with_adapter(folder: Path) -> None:
    checkpoint(folder)
    write_adapter(folder / "lora", model())


def int4_engine(folder: Path) -> None:
    engine(folder, "--use_weight_only", "--weight_only_precision", "int4")


def v2_engine(folder: Path) -> None:
    engine(folder, form="bin")


def imported(name: str) -> Callable[[Path], None]:
    """A checkpoint that another tool quantised."""

    def make(folder: Path) -> None:
        for file in ("config.json", "model.safetensors"):
            (folder / file).write_bytes((IMPORTED / name / file).read_bytes())

    return make
