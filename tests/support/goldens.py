"""The reference numbers that the original code gave: tests/data/goldens, described in tests/data/README.md."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

GOLDENS = Path(__file__).resolve().parents[1] / "data/goldens"
VERSIONS_WITH_GOLDENS = ("v1_7b", "v2_13b")
both_goldens = pytest.mark.parametrize("version", VERSIONS_WITH_GOLDENS)
LENGTHS = (1, 7, 33, 128)  # tokens of the prompts
FLOAT32_TOLERANCE = 1e-4  # on logits: another order of summation moves them by up to 4e-5


def checkpoint(version: str) -> Path:
    """The tiny checkpoint's folder."""
    return GOLDENS / version / "checkpoint"


@cache
def golden(version: str) -> dict[str, Tensor]:
    """ids_L [L], gen_L [24] int64; logits_L [L, 1000], gen_logits_L [24, 1000], hidden_7 [4, 7, hidden] float32."""
    return _load(GOLDENS / version / "golden.npz")


@cache
def alibi() -> dict[str, Tensor]:
    """slopes_n [n] and mask16_n [n, 16, 16], slope * key position or -inf, for n heads."""
    return _load(GOLDENS / "alibi.npz")


def _load(path: Path) -> dict[str, Tensor]:
    with np.load(path) as file:
        tensors = {name: torch.from_numpy(file[name]) for name in file.files}
    ids = [name for name in tensors if re.fullmatch(r"(ids|gen)_\d+", name)]
    return tensors | {name: tensors[name].long() for name in ids}
