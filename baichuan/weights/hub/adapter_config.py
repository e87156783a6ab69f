"""adapter_config.json of a LoRA adapter by PEFT: what of it is used, and what is refused because it would not be."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from baichuan.errors import CheckpointError
from baichuan.weights.hub.config_json import MAX_CONFIG_BYTES, read_json_object

NAME = "adapter_config.json"
USED = ("peft_type", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "target_modules")
# They describe the training, or what the file of weights itself shows.
WITHOUT_EFFECT = (
    *("base_model_name_or_path", "revision", "task_type", "peft_version", "auto_mapping", "inference_mode"),
    *("lora_dropout", "modules_to_save", "exclude_modules", "layers_pattern", "ensure_weight_tying"),
    *("runtime_config", "megatron_core", "megatron_config", "eva_config", "qalora_group_size"),
    *("loftq_config", "corda_config", "lora_ga_config", "init_lora_weights"),
)
KEPT_WEIGHTS = (True, False, None, "gaussian", "eva", "orthogonal")  # init_lora_weights that leave the base as it was
OFF: tuple[Any, ...] = (None, False, "none", [], {})  # values of a setting that asks for nothing
PLAIN_PATTERN = re.compile(r"\^?[\w.]+", re.ASCII)  # a module's name or its end; PEFT takes any regular expression


@dataclass(frozen=True)
class LoraSettings:
    """How an adapter's matrices are scaled, and where they should be."""

    rank: int
    alpha: float
    rank_stabilised: bool
    rank_pattern: Mapping[str, int]  # exceptions, by the module's name or the end of it
    alpha_pattern: Mapping[str, float]
    targets: tuple[str, ...] | None  # modules' names or ends of them; None = not known without the file of weights

    def rank_of(self, module: str) -> int:
        return _matching(self.rank_pattern, module, self.rank)

    def scale_of(self, module: str) -> float:
        """alpha / r, or alpha / sqrt(r) where rank-stabilised (Kalajdzievski, A Rank Stabilization Scaling Factor for
        Fine-Tuning with LoRA)."""
        rank = self.rank_of(module)
        return _matching(self.alpha_pattern, module, self.alpha) / (math.sqrt(rank) if self.rank_stabilised else rank)

    def targeted(self, modules: list[str]) -> set[str]:
        """Which of the modules the adapter's settings say it changes."""
        ends = self.targets or ()
        return {module for module in modules if any(_ends_with(module, end) for end in ends)}


def read_lora_settings(folder: Path) -> LoraSettings:
    """Raises CheckpointError for an adapter that is no LoRA, or one that merging as W + scale * B A would get wrong."""
    path = folder / NAME
    values = read_json_object(path, MAX_CONFIG_BYTES)
    if values.get("peft_type") != "LORA":
        raise CheckpointError(f"{path} has peft_type {str(values.get('peft_type'))[:40]!r}; only 'LORA' is merged")
    for key, value in values.items():
        if key not in USED and key not in WITHOUT_EFFECT and value not in OFF:
            raise CheckpointError(
                f"{path} sets {key} to {str(value)[:40]!r}, which is not merged here; merge the adapter with PEFT's "
                "merge_and_unload and give the merged checkpoint"
            )
    if values.get("init_lora_weights", True) not in KEPT_WEIGHTS:
        raise CheckpointError(
            f"{path} has init_lora_weights {str(values['init_lora_weights'])[:40]!r}, which changed the base model's "
            "own weights; convert it with PEFT's save_pretrained(path_initial_model_for_weight_conversion=...)"
        )
    return LoraSettings(
        rank=_number(path, "r", values.get("r"), whole=True),
        alpha=_number(path, "lora_alpha", values.get("lora_alpha")),
        rank_stabilised=bool(values.get("use_rslora")),
        rank_pattern=_pattern(path, "rank_pattern", values.get("rank_pattern"), whole=True),
        alpha_pattern=_pattern(path, "alpha_pattern", values.get("alpha_pattern")),
        targets=None if values.get("exclude_modules") else _names(values.get("target_modules")),
    )


def _names(targets: Any) -> tuple[str, ...] | None:
    """target_modules where it is a list; PEFT also takes a regular expression."""
    listed = isinstance(targets, list) and all(isinstance(each, str) for each in targets)
    return tuple(targets) if listed else None


def _number(path: Path, name: str, value: Any, whole: bool = False) -> Any:
    kinds = (int,) if whole else (int, float)
    if isinstance(value, bool) or not isinstance(value, kinds) or not (1 if whole else -1e6) <= value <= 1e6:
        raise CheckpointError(f"{path} has {name} {str(value)[:40]!r}, which is no {'rank' if whole else 'scale'}")
    return value


def _pattern(path: Path, name: str, values: Any, whole: bool = False) -> dict[str, Any]:
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise CheckpointError(f"{path} has a {name} that is no object")
    for key in values:
        if not PLAIN_PATTERN.fullmatch(key):
            raise CheckpointError(
                f"{path} has {key[:40]!r} in {name}; only modules' names and ends of names are understood there"
            )
    return {key: _number(path, f"{name} of {key[:40]}", value, whole) for key, value in values.items()}


def _matching(pattern: Mapping[str, Any], module: str, default: Any) -> Any:
    """The value of the first key that names the module or ends its name, as in PEFT."""
    return next((value for key, value in pattern.items() if _ends_with(module, key)), default)


def _ends_with(module: str, name: str) -> bool:
    return module == name.removeprefix("^") or (not name.startswith("^") and module.endswith(f".{name}"))
