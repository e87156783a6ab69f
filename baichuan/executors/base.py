"""What generation asks of a backend."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from baichuan.records import Step


class Executor(Protocol):
    """One rank of a model that is ready to run.  Owns its KV cache; every rank returns the same logits."""

    device: torch.device  # where Step's tensors must lie, and where the logits appear

    def reset(self, batch_size: int, capacity: int) -> None:
        """Forget every sequence and make room for batch_size sequences of up to capacity tokens each.

        Raises UnsupportedError with the numbers when the memory does not suffice.
        """

    def forward(self, step: Step) -> Tensor:
        """Run the model on the step's tokens: logits of step.output_rows, [num_outputs, vocab_size] float32.

        The result may be overwritten by the next call.
        """

    def reorder_cache(self, parents: Tensor) -> None:
        """Row b of the cache becomes what row parents[b] was.  parents: [new_batch_size] int64.

        The batch may grow (one prompt, several beams), shrink (finished sequences leave) or be permuted, within the
        batch_size that reset() made room for.
        """
