"""Steps captured once as CUDA graphs and replayed: the host's work on a step is then a few launches.

Decode steps and the prefill of short prompts are captured, each at few sizes, which steps of other sizes are padded to:
there the GPU would wait for the host, which launches hundreds of kernels a step.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from baichuan.records import Step

MAX_PREFILL = 512  # tokens: of longer steps the GPU has more work than the host


def padded_batch_size(batch_size: int) -> int:
    """The batch size that a step of batch_size sequences runs at: few sizes are captured, little is computed twice."""
    if batch_size <= 8:
        return 1 << (batch_size - 1).bit_length()
    for limit, multiple in ((64, 8), (256, 32)):
        if batch_size <= limit:
            return -(-batch_size // multiple) * multiple
    return -(-batch_size // 128) * 128


def padded_prefill(tokens: int) -> int:
    """The tokens that a prefill of so many runs at: up to 128 what counts is reading the weights."""
    if tokens <= 128:
        return max(1 << (tokens - 1).bit_length(), 16)
    return -(-tokens // 64) * 64


@dataclass(frozen=True)
class Size:
    """Of a captured step."""

    tokens: int
    sequences: int
    decode: bool  # one token a sequence

    @staticmethod
    def of(step: Step) -> Size | None:
        """The size that the step is padded to; None where it is not to be captured."""
        if step.output_rows.shape[0] != step.batch_size:
            return None
        sequences = padded_batch_size(step.batch_size)
        if step.max_new_tokens == 1:
            return Size(sequences, sequences, True)
        if step.mixed or step.tokens.shape[0] > MAX_PREFILL:  # mixed steps come in too many sizes
            return None
        return Size(padded_prefill(step.tokens.shape[0]), sequences, False)


class _Captured:
    """One graph with the tensors that it reads and the one that it writes.

    A sequence of padding has a context length of 0 and no new tokens, or in a decode step one that is not stored;
    tokens of padding belong to no sequence.
    """

    def __init__(self, run: Callable[[Step], Tensor], step: Step, size: Size, pool):
        device = step.tokens.device
        self.size = size
        self.tokens = torch.zeros(size.tokens, dtype=torch.int64, device=device)
        self.context_lengths = torch.zeros(size.sequences, dtype=torch.int32, device=device)
        self.output_rows = torch.zeros(size.sequences, dtype=torch.int64, device=device)
        self.cu_seqlens = torch.arange(size.sequences + 1, dtype=torch.int32, device=device)  # what decode steps have
        self.rows = 0
        self.loaded_rows: Tensor | None = None
        static = replace(
            step,
            tokens=self.tokens,
            positions=self.tokens,  # the kernels take positions from context_lengths
            cu_seqlens=self.cu_seqlens,
            context_lengths=self.context_lengths,
            output_rows=self.output_rows,
            max_new_tokens=1 if size.decode else size.tokens,
            singles=size.sequences if size.decode else 0,
        )
        self.load(step)
        self.first_logits = run(static)  # compiles kernels and makes library handles, which a capture must not
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, pool=pool):
            self.logits = run(static)

    def load(self, step: Step) -> None:
        rows = step.batch_size
        self.tokens[: step.tokens.shape[0]].copy_(step.tokens)
        self.context_lengths[:rows].copy_(step.context_lengths)
        if not self.size.decode:
            self.cu_seqlens[: rows + 1].copy_(step.cu_seqlens)
            self.cu_seqlens[rows + 1 :].copy_(step.cu_seqlens[-1:].expand(self.size.sequences - rows))
        if step.output_rows is not self.loaded_rows:
            self.output_rows[:rows].copy_(step.output_rows)
            self.loaded_rows = step.output_rows
        if rows < self.rows:
            self.context_lengths[rows:].zero_()
        self.rows = rows


class StepGraphs:
    """The captured steps of one set of KV caches; dropped with them."""

    def __init__(self):
        self._captured: dict[Size, _Captured] = {}
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, run: Callable[[Step], Tensor], step: Step) -> Tensor:
        """Logits of a step by `run`, [num_outputs, vocab_size] float32, overwritten by the next call."""
        size, rows = Size.of(step), step.batch_size
        if size is None:
            return run(step)
        captured = self._captured.get(size)
        if captured is None:
            captured = self._captured[size] = _Captured(run, step, size, self._pool)
            return captured.first_logits[:rows]
        captured.load(step)
        captured.graph.replay()
        return captured.logits[:rows]
