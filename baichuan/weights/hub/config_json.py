"""config.json of a checkpoint in the hub's format: the model that it describes."""

from __future__ import annotations

from pathlib import Path

from baichuan.config import VERSIONS, ModelConfig, from_json
from baichuan.errors import CheckpointError, ConfigError
from baichuan.util.files import read_at_most
from baichuan.util.strict_json import strict_json
from baichuan.weights.hub.rope import read_rope
from baichuan.weights.hub.version import config_evidence, decide_version, tokenizer_evidence
from baichuan.weights.imported.formats import Format, format_of

MAX_CONFIG_BYTES = 1 << 20

SIZES = {  # ModelConfig's field: the hub's key
    "hidden_size": "hidden_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "intermediate_size": "intermediate_size",
    "vocab_size": "vocab_size",
}
_FIELDS = SIZES | {"hidden_act": "hidden_act", "rms_norm_eps": "rms_norm_eps"}


def read_model_config(folder: Path, model_version: str | None, dtype: str) -> ModelConfig:
    """The model that `folder` holds, with weights in `dtype`.  model_version: None = what the folder proves.

    Raises CheckpointError for a config.json that is unreadable, quantised or no Baichuan's, ConfigError for a folder
    that contradicts model_version or leaves it open.
    """
    path = folder / "config.json"
    values = read_json_object(path, MAX_CONFIG_BYTES)
    if values.get("model_type") != "baichuan":
        raise CheckpointError(
            f"{path} has model_type {values.get('model_type')!r}; only 'baichuan' checkpoints are read"
        )
    format_of(str(path), values)
    rope_theta, rope_factor = read_rope(str(path), values)
    model_version = decide_version(str(path), model_version, config_evidence(values) | tokenizer_evidence(folder))
    length_key = VERSIONS[model_version].length_keys[0]
    if missing := [key for key in (*_FIELDS.values(), length_key) if key not in values]:
        raise CheckpointError(f"{path} has no {missing[0]}; take config.json from the checkpoint's publisher again")
    fields = {ours: values[theirs] for ours, theirs in _FIELDS.items()}
    fields |= {"model_version": model_version, "max_positions": values[length_key], "dtype": dtype}
    try:
        return from_json(ModelConfig, fields | {"rope_theta": rope_theta, "rope_factor": rope_factor})
    except ConfigError as error:
        raise ConfigError(f"{path} cannot be used: {error}") from None


def read_format(folder: Path) -> Format | None:
    """How the checkpoint in `folder` is quantised; None where it is not.  Raises CheckpointError; see format_of."""
    path = folder / "config.json"
    return format_of(str(path), read_json_object(path, MAX_CONFIG_BYTES)) if path.is_file() else None


def folder_evidence(folder: Path) -> dict[str, list[str]]:
    """What config.json and tokenizer.model prove of the version; see version.py."""
    return config_evidence(read_json_object(folder / "config.json", MAX_CONFIG_BYTES)) | tokenizer_evidence(folder)


def read_json_object(path: Path, max_bytes: int) -> dict:
    """The JSON object in a file of at most max_bytes.  Raises CheckpointError; a key given twice is an error too."""
    try:
        content = read_at_most(path, max_bytes)
    except OSError as error:
        raise CheckpointError(
            f"{path} cannot be read ({error.strerror}); give the folder of a checkpoint in the hub's format"
        ) from None
    try:
        values = strict_json(content)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not valid JSON ({error}); download it again") from None
    if not isinstance(values, dict):
        raise CheckpointError(f"{path} holds no JSON object; download it again")
    return values
