"""Figures of one text: its probability under a model, and how closely two models' distributions agree on it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from baichuan.engine.self_check import Agreement

POSITIONS_AT_ONCE = 128  # in float64: 128 MB for a vocabulary of 125696


def negative_log_likelihood(logits: Tensor, targets: Sequence[int]) -> float:
    """-Σ log softmax(logits)[i, targets[i]] in nats.  logits: [positions, vocab_size]"""
    ids = torch.tensor(targets, device=logits.device)
    parts = zip(logits.split(POSITIONS_AT_ONCE), ids.split(POSITIONS_AT_ONCE), strict=True)
    return sum(F.cross_entropy(part.double(), each, reduction="sum").item() for part, each in parts)


def agreement_of(reference: Tensor, other: Tensor) -> Agreement:
    """Agreement.of, a few positions at a time.  Both: logits [positions, vocab_size], on any device"""
    parts = [
        (len(p), Agreement.of(p, q.to(p.device)))
        for p, q in zip(reference.split(POSITIONS_AT_ONCE), other.split(POSITIONS_AT_ONCE), strict=True)
    ]
    positions = len(reference)
    return Agreement(
        sum(n * part.kl for n, part in parts) / positions, sum(n * part.top1 for n, part in parts) / positions
    )


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """The length of the common prefix, in ids."""
    for index, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return index
    return min(len(a), len(b))
