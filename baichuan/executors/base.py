"""What generation asks of a backend: an executor and its KV cache."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from baichuan.records import Step


class RowCache(Protocol):
    """Keys and values in rows of their own.  Sequence b of a step is row b."""

    def reorder(self, parents: Tensor) -> None:
        """Row b becomes what row parents[b] was.  parents: [new_batch_size] int64.

        The batch may grow (one prompt, several beams), shrink (finished sequences leave) or be permuted, within the
        rows that reset() made room for.
        """

    def truncate(self, row: int, length: int) -> None:
        """Forget sequence `row` from position `length` on; the next step continues it there."""


class PagedCache(Protocol):
    """Keys and values in a pool of blocks, which rows may share.  Sequence b of a step is row b of the tables."""

    @property
    def blocks(self) -> int:
        """Blocks of the pool."""

    @property
    def tokens_per_block(self) -> int:
        """A power of two."""

    @property
    def rows(self) -> int:
        """Most sequences of a step."""

    def set_tables(self, rows: Sequence[Sequence[int]]) -> None:
        """Row r has the blocks rows[r] from the next step on."""

    def copy_blocks(self, copies: Sequence[tuple[int, int]]) -> None:
        """Copy each (source, target); no target is a source."""


class Executor(Protocol):
    """One rank of a model that is ready to run.  Every rank returns the same logits."""

    device: torch.device  # where Step's tensors must lie, and where the logits appear
    paged: bool  # PagedExecutor, else RowExecutor

    def reset(self, rows: int, capacity: int) -> None:
        """Forget every sequence and make room in the cache for `rows` sequences of up to `capacity` tokens each.

        A paged cache gives each row blocks of its own, as far as the memory suffices.
        Raises UnsupportedError with the numbers when the memory does not suffice.
        """

    def forward(self, step: Step) -> Tensor:
        """Run the model on the step's tokens: logits of step.output_rows, [num_outputs, vocab_size] float32.

        The result may be overwritten by the next call.
        """


class RowExecutor(Executor, Protocol):
    @property
    def cache(self) -> RowCache:
        """The cache that the last reset() made."""


class PagedExecutor(Executor, Protocol):
    @property
    def cache(self) -> PagedCache:
        """The cache that the last reset() made or kept."""
