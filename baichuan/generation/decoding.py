"""Decoding as one loop: a strategy says what every sequence continues with, the executor runs it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from baichuan.executors.base import Cache
from baichuan.records import Step


@dataclass(frozen=True)
class Generation:
    """One prompt's continuation."""

    ids: list[int]  # without the id that ended it
    finish_reason: str  # stop: an end id came; length: max_new_tokens were made
    logits: Tensor | None = None  # [steps, vocab_size] float32, what each token, the end id too, was chosen from


@dataclass(frozen=True)
class Choice:
    """What every sequence of the next step continues with."""

    tokens: Tensor  # [batch_size] int64
    parents: Tensor | None = None  # [batch_size] int64, the sequence that each one continues; None = itself


class Strategy(Protocol):
    """How tokens are chosen: sampling.py's kinds, or beam search."""

    def choose(self, logits: Tensor) -> Choice | None:
        """The next tokens, or None when nothing is left to be made.

        logits: [sequences, vocab_size] float32, the device's own buffer, which the next step overwrites
        """

    def results(self) -> list[Generation]:
        """Each prompt's continuation, once choose() has given None."""


def decode(forward: Callable[[Step], Tensor], cache: Cache, strategy: Strategy, logits: Tensor, step: Step) -> int:
    """Run decode steps until the strategy has what it wants; how many there were.

    step: the last one, which made `logits`
    """
    steps = 0
    while (choice := strategy.choose(logits)) is not None:
        if choice.parents is not None:
            cache.reorder(choice.parents)
        step = step.next(choice.tokens, choice.parents)
        logits = forward(step)
        steps += 1
    return steps
