"""The reference tokenizers and what the original code makes of them: ../shared/tokenizers and ../shared/goldens."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import pytest

from baichuan.text.tokenizer import Tokenizer

SHARED = Path(__file__).resolve().parents[2] / "shared"
# The reference's name of each model -> its tokenizer.model, or the folder that holds it.
MODELS = {
    "real_v2": SHARED / "tokenizers/baichuan2_125696.model",
    "rebuilt_v1": SHARED / "tokenizers/baichuan1_64000.model",
    "tiny_v2": SHARED / "goldens/v2_13b/checkpoint",
    "tiny_v1": SHARED / "goldens/v1_7b/checkpoint",
}
REAL = {"v1": "rebuilt_v1", "v2": "real_v2"}


@cache
def tokenizer(name: str) -> Tokenizer:
    if not MODELS[name].exists():
        pytest.skip(f"the reference tokenizer {name} is not beside this checkout")
    return Tokenizer(MODELS[name])


@cache
def reference(file: str) -> dict:
    path = SHARED / "tokenizers" / file
    if not path.exists():
        pytest.skip(f"the reference ids {file} are not beside this checkout")
    return json.loads(path.read_text(encoding="utf-8"))


def original(name: str) -> dict:
    """What the original tokenizer and chat code gave for the model `name`."""
    return reference("tokenizer_and_chat.json")[name]
