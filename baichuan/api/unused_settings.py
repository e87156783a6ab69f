"""Settings about memory that an engine or its device does not heed: a line of the log for each."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

from baichuan.engine.folder import Engine
from baichuan.executors.device import resolve_device
from baichuan.executors.open_settings import OpenSettings

logger = logging.getLogger(__name__)


def say_unused_arguments(engine: Engine, settings: OpenSettings, prefix_caching: bool) -> None:
    """Say which of LLM's arguments is not its default and changes nothing."""
    defaults = OpenSettings()
    values = {name: getattr(settings, name) for name in ("keep_copies", "kv_cache_free_gpu_mem_fraction")}
    given = {name: f"{name} {value}" for name, value in values.items() if value != getattr(defaults, name)}
    if not prefix_caching:
        given["prefix_caching"] = "prefix_caching False"
    say_unused_settings(given, [engine], settings.device)


def say_unused_settings(given: Mapping[str, str], engines: Sequence[Engine], device: str) -> None:
    """Say which setting changes nothing with any of the engines.

    given: what the log calls each of LLM's arguments that the user gave.
    """
    for setting, name in given.items():
        reasons = [_why_unused(setting, engine, device) for engine in engines]
        if reasons and all(reasons):
            logger.info("%s changes nothing: %s", name, "; ".join(filter(None, dict.fromkeys(reasons))))


def _why_unused(setting: str, engine: Engine, device: str) -> str | None:
    """None where the engine heeds the setting."""
    backend, weights = engine.backend, engine.quant.weights
    if setting != "keep_copies":
        return None if backend.paged else f"{backend.title} has no paged KV cache"
    if not backend.keeps_copies:
        return f"{backend.title} keeps no copies of weights"
    if weights not in ("int8", "int4"):
        return "copies are of INT8 and INT4 weights, and the engine has others"
    return "on a CPU no copies of weights are kept" if resolve_device(device) == "cpu" else None
