"""The rotary positions that config.json asks for, in every form that transformers has written them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from baichuan.config import ModelConfig
from baichuan.errors import CheckpointError

KINDS = ("default", "linear")
ROPE_KEYS = ("rope_theta", "rope_scaling", "rope_parameters")


def read_rope(where: str, values: Mapping[str, Any]) -> tuple[float, float]:
    """ModelConfig's rope_theta and rope_factor by config.json's values; `where` names the file.

    rope_theta stands alone, or with the scaling in rope_parameters (transformers 5); rope_scaling (transformers 4)
    names its kind `type` or `rope_type`.  Raises CheckpointError for anything that would not be computed.
    """
    parameters = dict(_settings(where, "rope_scaling", values)) | dict(_settings(where, "rope_parameters", values))
    theta = parameters.pop("rope_theta", values.get("rope_theta"))
    if values.get("rope_theta") not in (None, theta):
        raise CheckpointError(f"{where} sets rope_theta to {values['rope_theta']} and to {theta}; remove the wrong one")
    kinds = {str(parameters.pop(key)) for key in ("type", "rope_type") if key in parameters} or {KINDS[0]}
    kind = min(kinds)
    if len(kinds) > 1 or kind not in KINDS:
        raise CheckpointError(
            f"{where} asks for rope_scaling {' and '.join(sorted(kinds))!r}; RoPE is computed without scaling or with "
            "'linear'" + (", as dynamic scaling would rotate a text's earlier keys anew" if kind == "dynamic" else "")
        )
    factor = parameters.pop("factor", None) if kind == "linear" else None
    if kind == "linear" and factor is None:
        raise CheckpointError(f"{where} asks for linear rope_scaling without a factor; add it")
    if unknown := [key for key, value in parameters.items() if value is not None]:
        raise CheckpointError(f"{where} sets {unknown[0]} for RoPE ({kind}), which would not be computed; remove it")
    return (
        _number(where, "rope_theta", theta, ModelConfig.rope_theta),
        _number(where, "rope_scaling's factor", factor, ModelConfig.rope_factor),
    )


def _settings(where: str, key: str, values: Mapping[str, Any]) -> Mapping[str, Any]:
    found = values.get(key)
    if found is None:
        return {}
    if not isinstance(found, Mapping):
        raise CheckpointError(f"{where} has {key} {str(found)[:40]!r}, which is no object; remove it")
    return found


def _number(where: str, name: str, value: Any, default: float) -> float:
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 1 <= value <= 1e12:
        raise CheckpointError(f"{where} sets {name} to {str(value)[:40]!r}; it is a number, 1 at least")
    return float(value)
