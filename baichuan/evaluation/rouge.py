"""ROUGE of many summaries, with bootstrap intervals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from baichuan.errors import ConfigError

KINDS = ("rouge1", "rouge2", "rougeL", "rougeLsum")
LABELS = {"rouge1": "ROUGE-1", "rouge2": "ROUGE-2", "rougeL": "ROUGE-L", "rougeLsum": "ROUGE-Lsum"}
TOKENIZER = "words of a-z and 0-9 in lower case without stemming; Chinese character by character"
METRIC_PATH = Path(__file__).with_name("rouge_metric.py")
RESAMPLES = 2000
BLOCK_ELEMENTS = 1 << 22  # elements of resampling's index matrix at a time, int64: 32 MB


@dataclass(frozen=True)
class Interval:
    """A mean and its 95 % bootstrap interval, each 0 to 100: ROUGE is usually given in percent."""

    value: float
    low: float
    high: float


class Rouge:
    """The metric, loaded once.  Raises ConfigError where the `evaluate` package cannot write to its cache."""

    def __init__(self) -> None:
        import evaluate

        try:
            self._metric = evaluate.load(str(METRIC_PATH), keep_in_memory=True)
        except OSError as error:
            raise ConfigError(
                f"the package evaluate, which ROUGE needs, cannot write to {error.filename} ({error.strerror}); set "
                "HF_HOME to a folder that can be written"
            ) from None

    def score(self, predictions: Sequence[str], references: Sequence[str]) -> dict[str, list[float]]:
        """Each pair's F-measure in percent, by kind of ROUGE."""
        scores = self._metric.compute(predictions=list(predictions), references=list(references))
        return {kind: [100 * value for value in scores[kind]] for kind in KINDS}


def interval(values: Sequence[float], seed: int = 0) -> Interval:
    """The mean of `values` with its 95 % percentile bootstrap interval, the same for the same seed.

    Source: Efron and Tibshirani, An Introduction to the Bootstrap, chapter 13; as ROUGE-1.5.5 does it.
    """
    sample = np.asarray(values, dtype=np.float64)
    generator = np.random.default_rng(seed)
    block = max(1, BLOCK_ELEMENTS // len(sample))
    means = []
    for start in range(0, RESAMPLES, block):
        choices = generator.integers(len(sample), size=(min(block, RESAMPLES - start), len(sample)))
        means.append(sample[choices].mean(axis=1))
    low, high = np.percentile(np.concatenate(means), [2.5, 97.5])
    return Interval(float(sample.mean()), float(low), float(high))
