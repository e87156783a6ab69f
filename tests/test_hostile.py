"""Files that somebody made to do harm: nothing leaves their folder, nothing steers the terminal."""

from __future__ import annotations

import json
import logging
import os
import shutil
import warnings
from pathlib import Path

import goldens
import hub_folders
import pytest
import tiny_engine
import torch
from hub_folders import both_formats

import build
import summarize
from baichuan.cli.common import configure_logging
from baichuan.engine.folder import read_engine
from baichuan.errors import BaichuanError, CheckpointError, ConfigError, EngineError
from baichuan.evaluation import report
from baichuan.evaluation.report import FORMAT, read_results
from baichuan.evaluation.rouge import KINDS
from baichuan.generation.token_files import read_prompts
from baichuan.hf_model import loading
from baichuan.hf_model.modeling import load_hf_model
from baichuan.parallel.comm import Solo
from baichuan.text.printable import UNSAFE
from baichuan.text.texts import read_texts
from baichuan.text.tokenizer import Tokenizer
from baichuan.util import manifest
from baichuan.weights.binary.config_ini import BinaryConfig
from baichuan.weights.hub.checkpoint import open_checkpoint, read_model_config

VERSION = "v1_7b"
CONFIG = hub_folders.small_config(VERSION)
HOSTILE_NAME = "a\n\x1b[31mb"


def checkpoint(folder: Path, form: str = "safetensors", shards: int = 2) -> dict[str, str]:
    """A checkpoint; its index's weight_map."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(hub_folders.hub_values(CONFIG)))
    return hub_folders.write_weights(folder, hub_folders.tensors(CONFIG), form, shards)


# Out of the folder


@both_formats
def test_the_transformers_model_is_not_read_from_outside_its_folder(form, tmp_path):
    where = checkpoint(tmp_path / "inside", form)
    load_hf_model(tmp_path / "inside", VERSION)
    stolen = sorted(set(where.values()))[0]
    (tmp_path / "inside" / stolen).rename(tmp_path / stolen)
    for target in (f"../{stolen}", str(tmp_path / stolen)):
        changed = {name: target if shard == stolen else shard for name, shard in where.items()}
        hub_folders.write_index(tmp_path / "inside", form, changed)
        with pytest.raises(CheckpointError, match="a shard is a file of the same folder"):
            load_hf_model(tmp_path / "inside", VERSION)


@both_formats
def test_groups_for_a_gpu_are_the_whole_checkpoint(form, tmp_path, monkeypatch):
    checkpoint(tmp_path, form)
    expected = load_hf_model(tmp_path, VERSION).state_dict()
    monkeypatch.setattr("baichuan.executors.cuda.load.load_on_gpu", lambda tensors, device: tensors)
    monkeypatch.setattr(loading, "GROUP_BYTES", 5000)
    tensors = open_checkpoint(tmp_path, CONFIG)
    assert len(list(loading._groups(tensors))) > 3
    found = loading.read_on_gpu(tensors, torch.float32, torch.device("cpu"))
    assert found.keys() == expected.keys() and all(found[name].equal(expected[name]) for name in found)


# To the terminal


@pytest.mark.parametrize("name", ["build", "summarize"])
def test_a_shards_name_is_shown_and_not_obeyed(name, tmp_path, capsys):
    for file in ("config.json", "tokenizer.model"):
        shutil.copy(goldens.checkpoint(VERSION) / file, tmp_path)
    hub_folders.write_index(tmp_path, "safetensors", {"lm_head.weight": HOSTILE_NAME})
    (tmp_path / "articles.jsonl").write_text('{"article": "Rain.", "highlights": "Rain."}\n')
    if name == "build":
        code = build.main(["--model_dir", str(tmp_path), "--output_dir", str(tmp_path / "engine")])
    else:
        given = ["--test_hf", "--hf_model_dir", str(tmp_path), "--dataset_path", str(tmp_path / "articles.jsonl")]
        code = summarize.main(given)
    err = capsys.readouterr().err
    assert code == 2 and not UNSAFE.search(err), err
    assert "points at" in err.splitlines()[-1] and r"\x1b[31mb" in err.splitlines()[-1]


def test_messages_of_ours_and_of_libraries_are_shown_and_not_obeyed(capfd):
    configure_logging("info", Solo())
    logging.getLogger("baichuan.x").info("reading %s", HOSTILE_NAME)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        logging.captureWarnings(False)
        logging.captureWarnings(True)
        warnings.warn(HOSTILE_NAME, stacklevel=1)
        logging.captureWarnings(False)
    err = capfd.readouterr().err
    assert err.count(r"\x1b[31mb") >= 2 and not UNSAFE.search(err)


def test_what_datasets_says_of_a_file_is_not_obeyed(tmp_path, capfd):
    configure_logging("info", Solo())
    (tmp_path / "texts.json").write_text('{"\x1b[31m": 1')
    with pytest.raises(ConfigError):
        read_texts(str(tmp_path / "texts.json"), 1, "--calib_dataset")
    logging.getLogger("datasets").error("cannot read %s", HOSTILE_NAME)
    err = capfd.readouterr().err
    assert r"\x1b[31mb" in err and not UNSAFE.search(err)


# In place of small files


READERS = {
    "config.json of a checkpoint": lambda folder: read_model_config(folder, VERSION, "float32"),
    "config.json of an engine": read_engine,
    "config.ini": BinaryConfig,
    "tokenizer.model": lambda folder: Tokenizer(folder / "tokenizer.model"),
    "prompts.csv": lambda folder: read_prompts(folder / "prompts.csv", 0),
    "prompts.npy": lambda folder: read_prompts(folder / "prompts.npy", 0),
    "results.json": lambda folder: read_results(folder / "results.json"),
}


@pytest.mark.parametrize("kind", ["pipe", "device"])
@pytest.mark.parametrize("name", READERS)
@pytest.mark.timeout(20)
def test_a_pipe_or_a_device_in_place_of_a_file_is_refused_at_once(name, kind, tmp_path):
    path = tmp_path / name.split()[0]
    os.mkfifo(path) if kind == "pipe" else path.symlink_to("/dev/zero")
    with pytest.raises(BaichuanError, match="not a regular file|there is no tokenizer"):
        READERS[name](tmp_path)


CHANGED = [("sides", None), ("sides", [{}]), ("sides", [3]), ("settings", None), ("settings", [])]


@pytest.mark.parametrize(("key", "value"), CHANGED)
def test_a_report_that_was_changed(key, value, tmp_path, capsys):
    figures = {"key": "engine", "label": "x", "rouge": {kind: {"value": 1.0} for kind in KINDS}, "agreement": None}
    side = {**figures, "perplexity": None, "tokens_per_s": 1.0, "bytes": 5}
    values = {"format": FORMAT, "sides": [side], "settings": {}, "articles": 1}
    path = tmp_path / "results.json"
    path.write_text(json.dumps(values))
    assert report.main([str(path)] * 2) == 0
    (tmp_path / "long.json").write_text(json.dumps(values | {"articles": "9" * 10_000}))
    capsys.readouterr()
    assert report.main([str(path), str(tmp_path / "long.json")]) == 2
    assert "[...]" in (said := capsys.readouterr().err) and len(said) < 2500
    path.write_text(json.dumps(values | {key: value}))
    assert report.main([str(path)] * 2) == 2
    assert "was changed after summarize.py wrote it" in capsys.readouterr().err


def test_a_deeply_nested_report_is_one_sentence(tmp_path):
    (tmp_path / "results.json").write_text("[" * 100_000)
    with pytest.raises(ConfigError, match="is not JSON"):
        read_results(tmp_path / "results.json")


FORGED = [("files", None), ("files", []), ("text_files", None), ("contract", None), ("dummy", "no"), ("model", None)]
FORGED += [("build", []), ("quant", 3), ("files", {"x": None}), ("model", {"num_layers": "2"}), ("version", None)]


@pytest.mark.parametrize(("key", "value"), FORGED)
def test_an_engines_config_that_is_sealed_again(key, value, tmp_path):
    tiny_engine.build(tmp_path, VERSION)
    values = json.loads((tmp_path / "config.json").read_text())
    values.pop("sha256")
    values["baichuan"][key] = value
    (tmp_path / "config.json").write_text(json.dumps(manifest.seal(values)))
    if key == "version":  # says nothing of the files: the negative control
        read_engine(tmp_path)
        return
    with pytest.raises(EngineError, match="cannot be used|does not list one file"):
        read_engine(tmp_path)


@pytest.mark.parametrize("value", ["x", "", "-1", "1e3", "9" * 5000, "2\x1b[31m"])
def test_a_launchers_variable_that_is_no_number(value, monkeypatch, capsys):
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", value)
    assert build.main(["--output_dir", "nowhere"]) == 2
    error = capsys.readouterr().err
    assert "OMPI_COMM_WORLD_SIZE is" in error and error.count("\n") == 1 and not UNSAFE.search(error)
