"""config.json of a checkpoint in the hub's format: what model it describes, and which versions that can be."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from baichuan.config import PRESETS, VERSIONS, ModelConfig, from_json
from baichuan.errors import CheckpointError, ConfigError
from baichuan.model.position import ROPE_BASE

MAX_CONFIG_BYTES = 1 << 20
LENGTH_KEYS = ("max_position_embeddings", "model_max_length")

_FIELDS = {  # ours: the hub's
    "hidden_size": "hidden_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "intermediate_size": "intermediate_size",
    "vocab_size": "vocab_size",
    "hidden_act": "hidden_act",
    "rms_norm_eps": "rms_norm_eps",
}


def read_model_config(folder: Path, model_version: str, dtype: str) -> ModelConfig:
    """The model that `folder` holds, read as `model_version` with weights in `dtype`.

    Raises CheckpointError for a config.json that is unreadable, quantised or no Baichuan's, ConfigError for one
    that contradicts model_version.
    """
    path = folder / "config.json"
    values = read_json_object(path, MAX_CONFIG_BYTES)
    if values.get("model_type") != "baichuan":
        raise CheckpointError(
            f"{path} has model_type {values.get('model_type')!r}; only 'baichuan' checkpoints are read"
        )
    _refuse_quantised(path, values)
    refuse_other_rope(str(path), values)
    require_version(str(path), model_version, values)
    length_key = VERSIONS[model_version].length_keys[0]
    if missing := [key for key in (*_FIELDS.values(), length_key) if key not in values]:
        raise CheckpointError(f"{path} has no {missing[0]}; take config.json from the checkpoint's publisher again")
    fields = {ours: values[theirs] for ours, theirs in _FIELDS.items()}
    try:
        return from_json(
            ModelConfig, {"model_version": model_version, "max_positions": values[length_key], "dtype": dtype, **fields}
        )
    except ConfigError as error:
        raise ConfigError(f"{path} cannot be used: {error}") from None


def read_json_object(path: Path, max_bytes: int) -> dict:
    """The JSON object in a file of at most max_bytes.  Raises CheckpointError; a key given twice is an error too."""
    try:
        with open(path, "rb") as file:
            content = file.read(max_bytes + 1)
    except OSError as error:
        raise CheckpointError(
            f"{path} cannot be read ({error.strerror}); give the folder of a checkpoint in the hub's format"
        ) from None
    if len(content) > max_bytes:
        raise CheckpointError(f"{path} is larger than {max_bytes} bytes; it is not a checkpoint's file of this name")
    try:
        values = json.loads(content, object_pairs_hook=_unique, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not valid JSON ({error}); download it again") from None
    if not isinstance(values, dict):
        raise CheckpointError(f"{path} holds no JSON object; download it again")
    return values


def version_evidence(values: Mapping) -> dict[str, list[str]]:
    """What config.json's values say about the version: each piece of evidence -> the versions that it fits."""
    evidence = {}
    if architectures := values.get("architectures"):
        fitting = [name for name, version in VERSIONS.items() if [version.architecture] == architectures]
        evidence[f"architectures {architectures}"] = fitting
    for field in ("hidden_size", "vocab_size"):  # a released size says which, another size says nothing
        if fitting := [name for name, preset in PRESETS.items() if getattr(preset, field) == values.get(field)]:
            evidence[f"{field} {values[field]}"] = fitting
    keys = tuple(key for key in LENGTH_KEYS if values.get(key) is not None)
    fitting = [name for name, version in VERSIONS.items() if set(version.length_keys) == set(keys)]
    evidence[f"length in {' and '.join(keys) or 'no key'}"] = fitting
    if (named := values.get("model_version")) is not None:
        evidence[f"model_version {named!r}"] = [name for name in VERSIONS if name == named]
    return evidence


def fitting_versions(evidence: Mapping[str, list[str]]) -> list[str]:
    """The versions that all the evidence fits."""
    return [name for name in VERSIONS if all(name in fitting for fitting in evidence.values())]


def require_version(where: str, model_version: str, values: Mapping) -> None:
    """Raise ConfigError when something in config.json's values contradicts model_version; `where` names the file."""
    if model_version not in VERSIONS:
        raise ConfigError(f"model_version {model_version!r} is not known; use one of {', '.join(VERSIONS)}")
    evidence = version_evidence(values)
    against = [
        f"{what} (fits {', '.join(fitting) or 'no version'})"
        for what, fitting in evidence.items()
        if model_version not in fitting
    ]
    if against:
        fitting = fitting_versions(evidence)
        remedy = f"use --model_version {' or '.join(fitting)}" if fitting else "no version fits all of the file"
        raise ConfigError(f"{where} contradicts model_version {model_version}: {', '.join(against)}; {remedy}")


def refuse_other_rope(where: str, values: Mapping) -> None:
    """Raise CheckpointError when config.json's values ask for positions that no version has."""
    base = values.get("rope_theta", ROPE_BASE)
    if values.get("rope_scaling") is not None or base != ROPE_BASE:
        raise CheckpointError(
            f"{where} sets rope_theta {base} and rope_scaling {values.get('rope_scaling')}; "
            f"Baichuan's own positions (base {ROPE_BASE:g}, not scaled) are the only ones that are computed"
        )


def _refuse_quantised(path: Path, values: dict) -> None:
    quantisation = values.get("quantization_config")
    if quantisation is None:
        return
    settings = quantisation if isinstance(quantisation, dict) else {}
    name = settings.get("quant_method")
    if not name and any(key.startswith(("bnb_", "load_in_")) for key in settings):
        name = "bitsandbytes"
    raise CheckpointError(
        f"{path} describes a checkpoint quantised by {name or 'an unnamed method'}; "
        "take the float checkpoint that it was made from and let build.py quantise it"
    )


def _unique(pairs: list[tuple[str, object]]) -> dict:
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)!r} is there twice")
    return values


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON number")
