"""From packed steps to the padded batches that a TensorRT network takes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from baichuan.executors.tensorrt.contract import FREE_SLOT
from baichuan.records import Step


@dataclass(frozen=True)
class PaddedRun:
    """One run of the network: some of a step's tokens, one row per sequence, padded on the right."""

    input_ids: Tensor  # [batch, new] int32, padding is 0
    positions: Tensor  # [batch, new] int32, padding is 0
    key_positions: Tensor  # [batch, new] int32, padding is FREE_SLOT
    write_index: Tensor  # [batch] int32, tokens of the sequence that are in the cache before the run
    output_rows: Tensor  # [outputs] int32 into batch * new
    destinations: Tensor | None  # [outputs] int64, which of the step's outputs these are; None = all, in order
    most_tokens: int  # largest write_index + new

    @property
    def batch(self) -> int:
        return self.input_ids.shape[0]

    @property
    def new(self) -> int:
        return self.input_ids.shape[1]


def decode_run(step: Step) -> PaddedRun:
    """A step of one token per sequence; nothing is read back from the device."""
    positions = step.positions.int()
    columns = positions[:, None]
    return PaddedRun(
        step.tokens.int()[:, None],
        columns,
        columns,
        positions,
        step.output_rows.int(),
        None,
        step.max_context_length,
    )


def prefill_runs(step: Step, max_new: int, max_outputs: int) -> Iterator[PaddedRun]:
    """The step in windows of at most max_new tokens per sequence, with at most max_outputs outputs each.

    max_outputs is at least the batch.  Every window has a row for every sequence, so that row b is always sequence b;
    a window without outputs computes one that is discarded.
    """
    device, starts = step.tokens.device, step.cu_seqlens.long().cpu()
    lengths = starts.diff()  # [batch]
    batch, longest = len(lengths), int(lengths.max())
    past = step.context_lengths.long().cpu() - lengths
    wanted = step.output_rows.long().cpu()
    rows = torch.repeat_interleave(torch.arange(batch), lengths)  # [num_tokens], each token's sequence
    places = torch.arange(len(rows)) - starts[rows]  # [num_tokens], its place among the sequence's new ones
    tokens, positions = step.tokens.int().cpu(), step.positions.int().cpu()
    window = min(max_new, longest)
    if len(wanted) > max_outputs:
        window = min(window, max_outputs // batch)
    for first in range(0, longest, window):
        new = min(window, longest - first)
        here = (places >= first) & (places < first + new)
        cells = rows[here] * new + places[here] - first  # their places in the padded batch

        def padded(values: Tensor, padding: int, new: int = new, cells: Tensor = cells) -> Tensor:
            batch_values = torch.full((batch * new,), padding, dtype=torch.int32)
            batch_values[cells] = values
            return batch_values.view(batch, new).to(device)

        destinations = torch.nonzero(here[wanted]).flatten()
        chosen = wanted[destinations]
        output_rows = rows[chosen] * new + places[chosen] - first
        if not len(destinations):
            output_rows = torch.zeros(1, dtype=torch.int64)
        write_index = past + lengths.clamp(max=first)
        yield PaddedRun(
            padded(tokens[here], 0),
            padded(positions[here], 0),
            padded(positions[here], FREE_SLOT),
            write_index.int().to(device),
            output_rows.int().to(device),
            destinations.to(device),
            int(write_index.max()) + new,
        )
