"""The goldens of one version as the Python interface takes and gives them."""

from __future__ import annotations

import goldens

from baichuan import SamplingConfig

VERSION = "v1_7b"
GREEDY = SamplingConfig(top_k=1, repetition_penalty=1.0, eos_id=-1)  # the goldens never stop


def prompts() -> list[list[int]]:
    return [goldens.golden(VERSION)[f"ids_{length}"].tolist() for length in goldens.LENGTHS]


def continuations() -> list[list[int]]:
    return [goldens.golden(VERSION)[f"gen_{length}"].tolist() for length in goldens.LENGTHS]
