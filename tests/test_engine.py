"""The engine folder: complete or not there, and refused when anything in it was changed."""

import hashlib
import json
import os
import shutil
import signal

import goldens
import pytest
import tiny_engine
from tiny_engine import snapshot

from baichuan.engine import folder as engine
from baichuan.engine.folder import CONFIG_NAME, read_engine
from baichuan.engine.runtime import open_session
from baichuan.errors import BaichuanError, ConfigError, EngineError
from baichuan.parallel.comm import Solo, run_ranks
from baichuan.util import manifest, publishing

VERSION = "v1_7b"


@pytest.fixture
def folder(tmp_path):
    tiny_engine.build(tmp_path / "engine", VERSION)
    return tmp_path / "engine"


def rank_file(folder, rank=0):
    return read_engine(folder).rank_file(rank)


def refused(folder, match, **kwargs):
    with pytest.raises(BaichuanError, match=match) as error:
        open_session(folder, Solo(), **kwargs)
    assert "\n" not in str(error.value)


def test_a_whole_engine_opens(folder):
    assert open_session(folder, Solo(), VERSION).model.model_version == VERSION
    assert sorted(path.name for path in folder.iterdir()) == ["baichuan_float32_tp1_rank0.engine", CONFIG_NAME]
    values = json.loads((folder / CONFIG_NAME).read_text())
    assert values["builder_config"]["num_layers"] == 3
    assert values["plugin_config"]["gpt_attention_plugin"] == "float32"


def test_a_truncated_file_is_refused(folder):
    os.truncate(rank_file(folder), rank_file(folder).stat().st_size - 1)
    refused(folder, "truncated")


def test_a_file_that_cannot_be_read_is_refused(folder, monkeypatch):
    def unreadable(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(manifest.os, "preadv", unreadable)
    refused(folder, "cannot be read .Permission denied.")


def test_digests_are_of_each_chunk(tmp_path, monkeypatch):
    monkeypatch.setattr(manifest, "CHUNK_BYTES", 1000)
    monkeypatch.setattr(manifest, "READ_BYTES", 300)
    content = bytes(index % 251 for index in range(2500))
    (tmp_path / "file").write_bytes(content)
    expected = [hashlib.sha256(content[start : start + 1000]).hexdigest() for start in (0, 1000, 2000)]
    assert manifest.describe(tmp_path / "file") == {"bytes": 2500, "sha256": expected}


def test_digests_are_taken_while_a_file_is_written(tmp_path, monkeypatch):
    """Pieces may come in any order; a chunk's digest is taken once all of it is there."""
    monkeypatch.setattr(manifest, "CHUNK_BYTES", 1000)
    submit, submitted, seen = manifest.Describer._submit, [], []
    monkeypatch.setattr(
        manifest.Describer, "_submit", lambda self, chunk: submitted.append(chunk) or submit(self, chunk)
    )
    content, path = bytes(index % 251 for index in range(3500)), tmp_path / "file"
    with open(path, "wb", buffering=0) as file, manifest.Describer(path) as describer:
        for start, end in ((2100, 2250), (0, 700), (2250, 3500), (700, 2100)):
            file.seek(start)
            file.write(content[start:end])
            describer.wrote(start, end - start)
            seen.append(list(submitted))
        entry = describer.entry()
    assert seen == [[], [], [], [0, 1, 2]]
    expected = [hashlib.sha256(content[start : start + 1000]).hexdigest() for start in (0, 1000, 2000, 3000)]
    assert entry == {"bytes": 3500, "sha256": expected} == manifest.describe(path)


@pytest.mark.parametrize("place", [0, 9, -1])
def test_one_flipped_bit_is_refused(folder, place):
    content = bytearray(rank_file(folder).read_bytes())
    content[place] ^= 1
    rank_file(folder).write_bytes(content)
    refused(folder, "SHA-256")


def test_a_missing_file_is_refused(folder):
    rank_file(folder).unlink()
    refused(folder, "missing")


@pytest.mark.parametrize(
    ("old", "new"), [('"num_layers": 3', '"num_layers": 4'), ('"max_batch_size": 8', '"max_batch_size": 9')]
)
def test_an_edited_config_is_refused(folder, old, new):
    path = folder / CONFIG_NAME
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))
    refused(folder, "edited")


@pytest.mark.parametrize("content", ["", "[]", "{}", "not json", '{"baichuan": {"format": 99}}', "[" * 100000])
def test_a_config_that_is_no_engines_is_refused(folder, content):
    (folder / CONFIG_NAME).write_text(content)
    refused(folder, "build")


@pytest.mark.parametrize("names", [[], ["baichuan_float32_tp1_rank0.engine", "../notes.txt"]])
def test_a_sealed_config_that_names_other_files_is_refused_and_deletes_none(folder, names):
    path, notes = folder / CONFIG_NAME, folder.parent / "notes.txt"
    notes.write_text("not the engine's")
    values = json.loads(path.read_text())
    entry = {"bytes": 0, "sha256": []}
    values["baichuan"]["files"] = {name: values["baichuan"]["files"].get(name, entry) for name in names}
    del values["sha256"]
    path.write_text(json.dumps(manifest.seal(values)))
    refused(folder, "one file per rank")
    tiny_engine.build(folder, VERSION)  # replaces the engine before, and deletes its files
    assert notes.exists()


def test_a_huge_config_is_refused(folder):
    os.truncate(folder / CONFIG_NAME, engine.MAX_CONFIG_BYTES + 1)
    refused(folder, "larger")


def test_a_config_nested_as_deeply_as_can_be_read_is_refused(folder):
    for depth in range(900, 1000):
        deep = "[" * depth + "]" * depth
        values = json.dumps({"baichuan": {"format": engine.FORMAT, "contract": 0}})
        (folder / CONFIG_NAME).write_text(values.replace("0}", f"{deep}}}"))
        refused(folder, "was edited|is not JSON")


def test_no_folder_at_all(tmp_path):
    refused(tmp_path / "nothing", "build an engine")


def test_another_version_and_another_world_are_refused(folder):
    refused(folder, "v1_7b model, not v2_7b", model_version="v2_7b")
    with pytest.raises(EngineError, match="built for 1 rank"):
        run_ranks(2, lambda comm: open_session(folder, comm))


def test_one_bad_rank_file_stops_every_rank(tmp_path):
    tiny_engine.build(tmp_path, VERSION, tp_size=2)
    rank_file(tmp_path, 1).unlink()
    sentences = []

    def run(comm):
        try:
            open_session(tmp_path, comm)
        except EngineError as error:
            sentences.append(str(error))

    run_ranks(2, run)
    assert len(sentences) == 2 and "rank1" in sentences[0] == sentences[1]


def test_a_new_engine_replaces_the_old_one_and_its_files(tmp_path):
    tiny_engine.build(tmp_path, VERSION, tp_size=2)
    (tmp_path / "notes.txt").write_text("the user's own")
    left = tmp_path.parent / f".{tmp_path.name}.building-x"  # by a build whose process is gone
    left.mkdir()
    tiny_engine.build(tmp_path, VERSION)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["baichuan_float32_tp1_rank0.engine", CONFIG_NAME, "notes.txt"] and not left.exists()


def test_the_same_checkpoint_gives_the_same_bytes(folder, tmp_path):
    tiny_engine.build(tmp_path / "again", VERSION)
    assert read_engine(folder).files == read_engine(tmp_path / "again").files


def test_an_output_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be made"):
        tiny_engine.build(tmp_path / "file" / "engine", VERSION)


def test_a_checkpoint_is_not_built_over(tmp_path):
    """Its config.json would be the engine's."""
    shutil.copytree(goldens.checkpoint(VERSION), tmp_path / "checkpoint")
    before = snapshot(tmp_path / "checkpoint")
    with pytest.raises(ConfigError, match="is not an engine's and would be overwritten"):
        tiny_engine.build(tmp_path / "checkpoint", VERSION)
    assert snapshot(tmp_path / "checkpoint") == before


def test_a_broken_engine_is_built_over(folder):
    (folder / CONFIG_NAME).write_text((folder / CONFIG_NAME).read_text()[:-9])
    tiny_engine.build(folder, VERSION)
    open_session(folder, Solo(), VERSION)


def test_ctrl_c_between_the_renames_waits_for_the_last(folder, monkeypatch):
    rename, renamed = os.replace, []

    def replace(old, new):
        rename(old, new)
        renamed.append(new)
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(os, "replace", replace)
    monkeypatch.setattr(publishing, "_exchange", lambda *_: False)  # as on a file system that cannot
    tiny_engine.build(folder, "v2_13b", tp_size=2)
    assert len(renamed) == 3
    monkeypatch.undo()
    assert {path.name for path in folder.iterdir()} == {CONFIG_NAME, *read_engine(folder).files}
    for rank in (0, 1):
        manifest.verify(rank_file(folder, rank), read_engine(folder).files[rank_file(folder, rank).name])
