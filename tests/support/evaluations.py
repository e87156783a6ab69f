"""What the evaluation's tests share: how they decode, what they summarise, and the metric."""

from __future__ import annotations

from functools import cache

from baichuan.config import SamplingConfig
from baichuan.evaluation.datasets import Sample
from baichuan.evaluation.rouge import Rouge

GREEDY = SamplingConfig(top_k=1, repetition_penalty=1.0)


@cache
def rouge() -> Rouge:
    return Rouge()


SHORT = [Sample(str(n), "abcdefgh"[n:], "abc") for n in range(5)]
