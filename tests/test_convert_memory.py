"""The conversion of a 7B-shaped checkpoint streams: how much anonymous memory its processes take together."""

import json
import shutil
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from goldens import checkpoint as golden_checkpoint
from process_memory import peak_anonymous_bytes

from baichuan.config import PRESETS
from baichuan.weights.dummy import dummy_checkpoint
from baichuan.weights.rank_tensors import as_stored
from baichuan.weights.tensor_file import write_tensors

MODEL = replace(PRESETS["v2_7b"], num_layers=4, vocab_size=1000, dtype="float16")
LAYER_BYTES = 2 * (4 * MODEL.hidden_size**2 + 3 * MODEL.hidden_size * MODEL.intermediate_size)
LIMIT_BYTES = 2 * LAYER_BYTES + 2e9
TEXTS, LENGTH = 4, 256


@pytest.fixture
def checkpoint(tmp_path):
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    shutil.copy(golden_checkpoint("v2_13b") / "tokenizer.model", folder)
    config = {
        "architectures": ["BaichuanForCausalLM"],
        "model_type": "baichuan",
        "hidden_size": MODEL.hidden_size,
        "num_hidden_layers": MODEL.num_layers,
        "num_attention_heads": MODEL.num_heads,
        "intermediate_size": MODEL.intermediate_size,
        "vocab_size": MODEL.vocab_size,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 4096,
        "model_max_length": 4096,
    }
    (folder / "config.json").write_text(json.dumps(config))
    plan = [as_stored(name, source) for name, source in dummy_checkpoint(MODEL).items()]
    write_tensors(folder / "model.safetensors", plan, lambda size: None)
    yield folder
    for name in ("checkpoint", "out"):  # gigabytes, which pytest would keep
        shutil.rmtree(tmp_path / name, ignore_errors=True)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="counts memory in /proc")
def test_peak_memory_of_a_7b_shape(checkpoint, tmp_path):
    texts = tmp_path / "texts.txt"
    texts.write_text("\n".join("a text of some length " * 60 for _ in range(TEXTS)))
    flags = ["-i", checkpoint, "-o", tmp_path / "out", "-sq", "0.8", "-tp", "2", "-t", "fp16", "-p", "4"]
    calibration = ["--calib_dataset", texts, "--calib_size", TEXTS, "--calib_max_length", LENGTH]
    root = Path(__file__).resolve().parents[1]
    command = [sys.executable, root / "hf_baichuan_convert.py", *flags, *calibration]
    started = time.monotonic()
    peak = peak_anonymous_bytes(list(map(str, command)))
    print(f"peak {peak / 1e9:.2f} GB of {LIMIT_BYTES / 1e9:.2f} GB in {time.monotonic() - started:.0f} s")
    assert LAYER_BYTES < peak < LIMIT_BYTES, "a layer in float32 is needed; less means that nothing was measured"
