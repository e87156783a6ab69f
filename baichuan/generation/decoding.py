"""The decode loop: a strategy chooses the next token of every sequence, the executor computes the next logits."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from baichuan.executors.base import RowCache
from baichuan.generation.sampling import to_device
from baichuan.records import Step


@dataclass(frozen=True)
class Generation:
    """One prompt's continuation."""

    ids: list[int]  # without the id that ended it
    finish_reason: str  # stop: an end id was chosen; length: max_new_tokens were generated
    logits: Tensor | None = None  # [steps, vocab_size] float32, a row per chosen token, the end id included


@dataclass(frozen=True)
class Choice:
    """The tokens of the next step, one per sequence."""

    tokens: Tensor  # [batch_size] int64
    parents: Sequence[int] | None = None  # the row of the step before that each continues; None = its own


class Strategy(Protocol):
    """How tokens are chosen: by sampling (sampled.py) or by beam search (beam.py)."""

    def choose(self, logits: Tensor) -> Choice | None:
        """The next tokens, or None when every sequence is finished.

        logits: [sequences, vocab_size] float32, in a buffer of the executor that the next step overwrites
        """

    def results(self) -> list[Generation]:
        """Each prompt's continuation, once choose() has given None."""


def decode(
    forward: Callable[[Step], Tensor], cache: RowCache, strategy: Strategy, logits: Tensor, step: Step
) -> Iterator[None]:
    """Run decode steps until the strategy is finished; yields after each of them.

    logits: [sequences, vocab_size] float32; step: the step that computed them
    """
    while (choice := strategy.choose(logits)) is not None:
        parents = None
        if choice.parents is not None:
            parents = to_device(choice.parents, torch.int64, choice.tokens.device)
            cache.reorder(parents)
        step = step.next(choice.tokens, parents)
        logits = forward(step)
        yield
