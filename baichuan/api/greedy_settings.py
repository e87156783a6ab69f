"""What greedy decoding does not use, for flags and for the lines of a file of prompts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from baichuan.config import SamplingConfig

OF_DRAWING = ("top_k", "top_p", "temperature", "random_seed")


def unused_when_greedy(given: Mapping[str, Any], sampling: SamplingConfig, mark: str = "") -> list[str]:
    """A sentence for each setting that changes nothing, where `sampling` is greedy.

    given: the settings that the user gave, defaults and what is inherited left out.
    mark: what stands before a setting's name where it is given, such as -- of flags.
    """
    if not sampling.greedy:
        return []
    cause = "temperature 0" if sampling.temperature == 0 else "top_k 1"
    unused = [name for name, value in given.items() if name in OF_DRAWING and f"{name} {value:g}" != cause]
    return [f"{cause} is greedy decoding, where {mark}{name} changes nothing" for name in unused]
