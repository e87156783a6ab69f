"""What generation asks of a backend: an executor and its KV cache."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from baichuan.records import Step


class Cache(Protocol):
    """The keys and values of the sequences that are being generated.  Sequence b of a step is row b."""

    def reorder(self, parents: Tensor) -> None:
        """Row b becomes what row parents[b] was.  parents: [new_batch_size] int64.

        The batch may grow (one prompt, several beams), shrink (finished sequences leave) or be permuted, within the
        batch_size that reset() made room for.
        """

    def truncate(self, row: int, length: int) -> None:
        """Forget sequence `row` from position `length` on; the next step continues it there."""


class Executor(Protocol):
    """One rank of a model that is ready to run.  Every rank returns the same logits."""

    device: torch.device  # where Step's tensors must lie, and where the logits appear

    @property
    def cache(self) -> Cache:
        """The cache that the last reset() made."""

    def reset(self, batch_size: int, capacity: int) -> None:
        """Forget every sequence and make room in the cache for batch_size sequences of up to capacity tokens each.

        Raises UnsupportedError with the numbers when the memory does not suffice.
        """

    def forward(self, step: Step) -> Tensor:
        """Run the model on the step's tokens: logits of step.output_rows, [num_outputs, vocab_size] float32.

        The result may be overwritten by the next call.
        """
