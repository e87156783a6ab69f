"""Run Baichuan checkpoints: one model definition, several executors.

    from baichuan import LLM, SamplingConfig

docs/api.md describes both.  They are imported when they are first asked for: the package alone imports no library.
"""

import importlib
import os

__version__ = "0.1.0"
__all__ = ["LLM", "SamplingConfig"]

# GNU's OpenMP reads this when PyTorch loads it.  By default a thread that waits looks for milliseconds before it
# sleeps; where another process needs a core too, the one it waits for does not run meanwhile, and a step on the CPU
# takes many times as long.  https://gcc.gnu.org/onlinedocs/libgomp/GOMP_005fSPINCOUNT.html
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")

_HOMES = {"LLM": "baichuan.api.llm", "SamplingConfig": "baichuan.config"}


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
