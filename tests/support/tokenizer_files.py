"""The tokenizers that tests read, and what the original code makes of texts: tests/data/tokenizers and its goldens.

The released tokenizers are their publisher's and lie outside; the environment variable names their folder.
"""

from __future__ import annotations

import json
import os
from functools import cache
from pathlib import Path

import pytest
from named_skips import RELEASED_FOLDER

from baichuan.text.tokenizer import Tokenizer

DATA = Path(__file__).resolve().parents[1] / "data"
# Name of each model -> its tokenizer.model, or the folder that holds it.
TINY = {
    "tiny_v1": DATA / "goldens/v1_7b/checkpoint",
    "tiny_v2": DATA / "goldens/v2_13b/checkpoint",
}
SMALL = {
    "small_v1": DATA / "tokenizers/small_v1.model",
    "small_v2": DATA / "tokenizers/small_v2.model",
}
_released = Path(os.environ.get(RELEASED_FOLDER, "/nowhere"))
RELEASED = {
    "released_v1": _released / "baichuan1_64000.model",
    "released_v2": _released / "baichuan2_125696.model",
}
MODELS = TINY | SMALL | RELEASED


def each(*groups: dict[str, Path]) -> list:
    """Parameters: the names of the groups' models, those of the released ones marked."""
    marks = {name: pytest.mark.released_tokenizers for name in RELEASED}
    return [pytest.param(name, marks=marks.get(name, ())) for group in groups for name in group]


@cache
def tokenizer(name: str) -> Tokenizer:
    return Tokenizer(MODELS[name])


@cache
def reference(file: str) -> dict:
    return json.loads((DATA / "tokenizers" / file).read_text(encoding="utf-8"))


def original(name: str) -> dict:
    """What the original tokenizer and chat code gave for the model `name`."""
    return reference("original.json")[name]
