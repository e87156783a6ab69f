"""The binary folder's config.ini: the conversion's arguments and the fields of the hub's config.json, as text."""

from __future__ import annotations

import configparser
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from baichuan.config import VERSIONS, ModelConfig, WeightOnly
from baichuan.errors import CheckpointError
from baichuan.util import manifest
from baichuan.util.files import read_at_most
from baichuan.weights.binary.layout import CONFIG_NAME
from baichuan.weights.hub.config_json import SIZES
from baichuan.weights.hub.version import LENGTH_KEYS, config_evidence, decide_version, tokenizer_evidence
from baichuan.weights.mistaken_path import recognise

SECTION = "baichuan"
MAX_BYTES = 1 << 20
SEAL = "sha256"  # ours alone: the old script's files have none
PRECISION_KEY, GROUP_SIZE_KEY = "weight_only_precision", "weight_only_group_size"
SYMMETRIC_KEY = "weight_only_symmetric"
BY_MODE_KEY = "smoothquant_by_mode"
PLAIN_KEY = re.compile(r"[A-Za-z_][\w.-]*", re.ASCII)


class BinaryConfig:
    """config.ini of a folder, every value checked when it is asked for.  Raises CheckpointError."""

    def __init__(self, folder: Path):
        self.file = folder / CONFIG_NAME
        if mistake := recognise(folder, "binary folder"):
            raise CheckpointError(f"bin_model_dir {folder} {mistake}")
        parser = configparser.ConfigParser(interpolation=None)
        try:
            parser.read_string(read_at_most(self.file, MAX_BYTES).decode())
            self.values = dict(parser[SECTION])
        except OSError as error:
            raise CheckpointError(
                f"{self.file} cannot be read ({error.strerror}); --bin_model_dir is a folder that "
                "hf_baichuan_convert.py has finished, such as OUT/1-gpu"
            ) from None
        except (configparser.Error, UnicodeDecodeError, KeyError) as error:
            reason = " ".join(str(error).split())
            raise CheckpointError(f"{self.file} is damaged ({reason}); convert the checkpoint again") from None
        if SEAL in self.values and not manifest.sealed(self.values):
            raise CheckpointError(f"{self.file} was edited after the conversion; convert the checkpoint again")

    def __contains__(self, key: str) -> bool:
        return key in self.values

    @property
    def smoothed(self) -> bool:
        """The folder's weights and norms are smoothed (-sq with a number)."""
        return self.text("smoothquant") != "None" and not self.smoothed_by_mode

    @property
    def smoothed_by_mode(self) -> bool:
        """The folder has what smooths its weights in each mode (-sq auto)."""
        return self.text(BY_MODE_KEY, "False") == "True"

    @property
    def weight_only(self) -> WeightOnly | None:
        """The form of the calibrated integers that the folder holds, if any."""
        precision = self.text(PRECISION_KEY, "None")
        if precision == "None":
            return None
        if precision not in ("int8", "int4"):
            raise CheckpointError(f"{self.file} says {PRECISION_KEY} = {precision}; it is int8, int4 or None")
        return WeightOnly(precision, self.integer(GROUP_SIZE_KEY), self.text(SYMMETRIC_KEY) == "True")

    def text(self, key: str, default: str | None = None) -> str:
        value = self.values.get(key, default)
        if value is None:
            raise CheckpointError(f"{self.file} has no {key}; convert the checkpoint again")
        return value

    def integer(self, key: str) -> int:
        return self._parsed(int, key, self.text(key))

    def number(self, key: str, default: float) -> float:
        return self._parsed(float, key, self.text(key, str(default)))

    def evidence(self) -> dict[str, Any]:
        """The values that version.config_evidence reads, in config.json's form."""
        values = {key: self.integer(key) for key in ("hidden_size", "vocab_size")}
        values |= {key: self.integer(key) for key in LENGTH_KEYS if key in self}
        names = re.findall(r"\w+ForCausalLM", self.text("architectures", ""))  # str() of a list
        return values | {"architectures": names} | {k: v for k, v in self.values.items() if k == "model_version"}

    def _parsed(self, kind: Callable, key: str, text: str):
        try:
            return kind(text)
        except ValueError:
            raise CheckpointError(
                f"{self.file} says {key} = {text[:40]!r}, which is no number; convert the checkpoint again"
            ) from None


def write_binary_config(folder: Path, values: Mapping[str, Any]) -> None:
    """Write config.ini, values as str() gives them.  A key that the format cannot hold comes from the hub's config.json
    and is left out, as no reader needs it."""
    parser = configparser.ConfigParser(interpolation=None)
    texts = {key.lower(): _storable(str(value)) for key, value in values.items() if PLAIN_KEY.fullmatch(key)}
    texts.pop(SEAL, None)
    parser[SECTION] = manifest.seal(texts)
    with open(folder / CONFIG_NAME, "w", encoding="utf-8") as file:
        parser.write(file)


def _storable(text: str) -> str:
    """The text on one line, with lone surrogates escaped."""
    return " ".join(text.encode("utf-8", "backslashreplace").decode().split())


def read_binary_model(folder: Path, model_version: str | None, dtype: str) -> ModelConfig:
    """The model that config.ini describes.  model_version: None = the one that the conversion recorded.

    Raises ConfigError where the folder contradicts model_version or leaves it open.
    """
    config = BinaryConfig(folder)
    evidence = config_evidence(config.evidence()) | tokenizer_evidence(folder)
    model_version = decide_version(str(config.file), model_version, evidence)
    lengths = [key for key in VERSIONS[model_version].length_keys if key in config]
    return ModelConfig(
        model_version,
        **{field: config.integer(key) for field, key in SIZES.items()},
        **({"max_positions": config.integer(lengths[0])} if lengths else {}),
        hidden_act=config.text("hidden_act"),
        rms_norm_eps=config.number("rms_norm_eps", 1e-6),
        rope_theta=config.number("rope_theta", ModelConfig.rope_theta),
        rope_factor=config.number("rope_factor", ModelConfig.rope_factor),
        dtype=dtype,
    )
