"""Run Baichuan checkpoints: one model definition, several executors.

    from baichuan import LLM, SamplingConfig

docs/api.md describes both.  They are imported when they are first asked for: the package alone imports nothing.
"""

import importlib

__version__ = "0.1.0"
__all__ = ["LLM", "SamplingConfig"]
_HOMES = {"LLM": "baichuan.api.llm", "SamplingConfig": "baichuan.config"}


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
