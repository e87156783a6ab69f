"""generation_config.json: how a checkpoint's publisher wants its tokens chosen.  With tokenizer.model it is what a
checkpoint's text needs besides weights; both travel together."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from baichuan.config import SamplingConfig
from baichuan.errors import CheckpointError, ConfigError
from baichuan.text.tokenizer import MODEL_NAME
from baichuan.util.files import read_at_most
from baichuan.util.strict_json import strict_json

CONFIG_NAME = "generation_config.json"
MAX_CONFIG_BYTES = 1 << 20
TEXT_FILES = (MODEL_NAME, CONFIG_NAME)
SAMPLING_KEYS = {"temperature": (int, float), "top_k": int, "top_p": (int, float), "repetition_penalty": (int, float)}
GREEDY = {"top_k": 1, "top_p": 0.0, "temperature": 1.0}
SAMPLING_DEFAULTS = {
    "v1_7b": SamplingConfig(top_k=1, top_p=0.0, temperature=1.0),
    "v1_13b": SamplingConfig(),
    "v2_7b": SamplingConfig(repetition_penalty=1.05),
    "v2_13b": SamplingConfig(repetition_penalty=1.05),
}


def copy_text_files(source: Path, target: Path) -> list[Path]:
    """Copy those of TEXT_FILES that are in `source`; returns the copies."""
    return [Path(shutil.copyfile(source / name, target / name)) for name in TEXT_FILES if (source / name).is_file()]


def read_settings(folder: Path) -> dict:
    """generation_config.json's values, none where there is no such file.  Raises CheckpointError."""
    file = folder / CONFIG_NAME
    try:
        content = read_at_most(file, MAX_CONFIG_BYTES)
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read ({error.strerror}); make it readable") from None
    try:
        values = strict_json(content)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{file} is not valid JSON ({error}); copy the checkpoint's {CONFIG_NAME} again"
        ) from None
    if not isinstance(values, dict):
        raise CheckpointError(f"{file} is not a JSON object; copy the checkpoint's {CONFIG_NAME} again")
    return values


def sampling_defaults(model_version: str, folder: Path | None) -> SamplingConfig:
    """How tokens are chosen where no flag says: the version's way, with what the folder's generation_config.json sets.

    Raises CheckpointError for a value that cannot be used.
    """
    if folder is None:
        return SAMPLING_DEFAULTS[model_version]
    values = read_settings(folder)
    given = {key: values[key] for key in SAMPLING_KEYS if values.get(key) is not None}
    if values.get("do_sample") is False:
        given |= GREEDY
    ends = values.get("eos_token_id")
    ends = ends if isinstance(ends, list) else [] if ends is None else [ends]
    wrong = [key for key, value in given.items() if not _is(value, SAMPLING_KEYS[key])]
    if not all(_is(end, int) and end >= 0 for end in ends):
        wrong.append("eos_token_id")
    if wrong:
        raise CheckpointError(f"{folder / CONFIG_NAME} has {wrong[0]} {values[wrong[0]]!r}; correct it, or remove it")
    try:
        return replace(SAMPLING_DEFAULTS[model_version], **given, **_ends(ends))
    except ConfigError as error:
        raise CheckpointError(f"{folder / CONFIG_NAME} cannot be used: {error}") from None


def _ends(ids: list[int]) -> Mapping:
    return {"eos_id": ids[0], "stop_ids": tuple(ids[1:])} if ids else {}


def _is(value, kind) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)
