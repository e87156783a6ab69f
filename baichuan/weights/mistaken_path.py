"""Recognising by its files what a mistaken path holds, for error messages."""

from __future__ import annotations

import json
from pathlib import Path

from baichuan.util.files import read_at_most

WEIGHT_FILES = (".bin", ".safetensors", ".pt", ".pth", ".ckpt")
MAX_CONFIG_BYTES = 16 << 20


def recognise(path: Path, wanted: str) -> str | None:
    """What `path` holds and what to do with it, as a predicate for messages: "is an engine; run it with ...".

    wanted: checkpoint, binary folder or engine.  None where path is that or is not recognised.
    """
    try:
        kind, text = _kind(path)
        if not kind:
            return _above(path, wanted)
    except OSError:
        return None
    return None if kind == wanted else text


def _above(path: Path, wanted: str) -> str | None:
    """Where a folder within `path` is what is wanted, as the snapshots in the hub's cache are: the newest of them."""
    configs = [*path.glob("snapshots/*/config.json"), *path.glob("*/config.json")]
    fitting = [config for config in configs if _kind(config.parent)[0] == wanted]
    if not fitting:
        return None
    newest = max(fitting, key=lambda config: config.stat().st_mtime).parent
    return f"is a folder above {newest.name}; give {newest}"


def _kind(path: Path) -> tuple[str, str]:
    if path.is_file():
        return _kind_of_file(path)
    if (path / "adapter_config.json").is_file():
        base = str(_json_object(path / "adapter_config.json").get("base_model_name_or_path") or "its base model")
        return "adapter", (
            f"is a LoRA adapter of {base.splitlines()[0]}, not a whole model; give that one's folder, and the adapter "
            f"with build.py --lora_dir {path}"
        )
    if (path / "config.ini").is_file():
        return "binary folder", f"is a calibrated binary folder; build from it with build.py --bin_model_dir {path}"
    values = _json_object(path / "config.json")
    if "baichuan" in values:
        return "engine", f"is an engine; run it with run.py --engine_dir {path}"
    if "builder_config" in values or {"pretrained_config", "build_config"} <= set(values):
        return "TensorRT-LLM", (
            "is an engine of TensorRT-LLM, which only the TensorRT-LLM that built it can run; build one from the "
            "checkpoint with build.py --model_dir"
        )
    if "model_type" in values or "architectures" in values:
        return "checkpoint", f"is a checkpoint; build an engine from it with build.py --model_dir {path}"
    if not values and (inside := sorted(path.glob("*.gguf"))):
        return _kind_of_file(inside[0])
    if inside := sorted(path.glob("*-gpu")):
        kind = _kind(inside[0])[0]
        return f"above {kind}", f"is the folder above {' and '.join(each.name for each in inside)}; give {inside[0]}"
    return "", ""


def _kind_of_file(path: Path) -> tuple[str, str]:
    if path.suffix == ".gguf":
        return "GGUF", (
            "is in llama.cpp's GGUF format, which is not read; take the checkpoint that it was made from, a folder "
            "with config.json"
        )
    if path.suffix in WEIGHT_FILES:
        return "weights", f"is a file of weights alone; give the folder that holds it with config.json, {path.parent}"
    return "file", f"is a file; give the folder that holds it, {path.parent}"


def _json_object(path: Path) -> dict:
    """The object in the file, empty where there is none."""
    try:
        values = json.loads(read_at_most(path, MAX_CONFIG_BYTES))
    except (OSError, ValueError, RecursionError):
        return {}
    return values if isinstance(values, dict) else {}
