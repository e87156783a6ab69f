"""Files that run.py refuses in one sentence: token ids that are none, and an engine that somebody edited."""

from __future__ import annotations

import io
import json
import shutil

import numpy as np
import pytest
import scripts
from scripts import refused

import run
from baichuan.engine.folder import CONFIG_NAME


def npy(array: np.ndarray, save=np.save) -> bytes:
    file = io.BytesIO()
    save(file, array)
    return file.getvalue()


BAD_FILES = {
    "csv": {
        "empty": (b"", "holds no prompt"),
        "blank": (b"\n , \n", "holds no prompt"),
        "text": (b"5,six\n", "'six'"),
        "floats": (b"5,6.0\n", "'6.0'"),
        "binary": (b"\xff\xfe5\x00", "does not hold token ids"),
        "nul": (b"5,\x006\n", "does not hold token ids"),
        "out of range": (b"5,1000\n", "id 1000"),
        "negative": (b"-1\n", "id -1"),
        "enormous": (b"9" * 30, "id 999999"),
        "more digits than Python reads": (b"9" * 5000, "does not hold token ids"),
        "too long": (b"5," * 128 + b"5\n", "the prompt has 129 tokens and the engine takes 1 to 128"),
    },
    "npy": {
        "empty": (b"", "does not hold token ids"),
        "text": (b"5,6\n", "does not hold token ids"),
        "truncated": (npy(np.arange(50))[:-9], "does not hold token ids"),
        "header only": (npy(np.arange(50))[:20], "does not hold token ids"),
        "zip": (npy(np.arange(4), np.savez), "does not hold token ids"),
        "objects": (npy(np.array([[1], [2, 3]], dtype=object)), "does not hold token ids"),
        "floats": (npy(np.ones(3)), "type float64"),
        "bool": (npy(np.ones(3, bool)), "type bool"),
        "strings": (npy(np.array(["5"])), "does not hold token ids"),
        "3 dimensions": (npy(np.ones((2, 2, 2), int)), "3 dimensions"),
        "0 dimensions": (npy(np.array(5)), "0 dimensions"),
        "no rows": (npy(np.zeros((0, 4), int)), "input_tokens"),
        "only padding": (npy(np.zeros((2, 4), int)), "holds no prompt"),
        "out of range": (npy(np.array([[5, 2**63]], np.uint64)), "id 9223372036854775808"),
        "negative": (npy(np.array([[5, -7]])), "id -7"),
    },
}


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind, files in BAD_FILES.items() for name in files])
def test_bad_files_of_tokens(engine, tmp_path, capsys, kind, name):
    content, sentence = BAD_FILES[kind][name]
    (tmp_path / f"bad.{kind}").write_bytes(content)
    refused(run.main, scripts.run_flags(engine, tmp_path / f"bad.{kind}", tmp_path), sentence, capsys)
    assert len(list(tmp_path.iterdir())) == 1


def test_an_edited_config_is_refused(engine, prompts, tmp_path, capsys):
    shutil.copytree(engine, tmp_path / "engine")
    path = tmp_path / "engine" / CONFIG_NAME
    values = json.loads(path.read_text())
    values["builder_config"]["max_output_len"] = 1000
    path.write_text(json.dumps(values))
    refused(run.main, scripts.run_flags(tmp_path / "engine", prompts, tmp_path), "was edited after the build", capsys)
