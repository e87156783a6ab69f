"""Decode steps captured once as CUDA graphs and replayed: the host's work on a step is then a few launches."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from baichuan.records import Step


def padded_batch_size(batch_size: int) -> int:
    """The batch size that a step of batch_size sequences runs at: few sizes are captured, little is computed twice."""
    if batch_size <= 8:
        return 1 << (batch_size - 1).bit_length()
    for limit, multiple in ((64, 8), (256, 32)):
        if batch_size <= limit:
            return -(-batch_size // multiple) * multiple
    return -(-batch_size // 128) * 128


class _Captured:
    """One graph with the tensors that it reads and the one that it writes."""

    def __init__(self, run: Callable[[Step], Tensor], step: Step, size: int, pool):
        device = step.tokens.device
        self.tokens = torch.zeros(size, dtype=torch.int64, device=device)
        self.context_lengths = torch.zeros(size, dtype=torch.int32, device=device)  # 0 = a row of padding
        self.output_rows = torch.zeros(size, dtype=torch.int64, device=device)
        self.rows, self.loaded_rows = 0, None
        static = replace(
            step,
            tokens=self.tokens,
            positions=self.output_rows,  # the decode kernels take positions from context_lengths
            cu_seqlens=torch.arange(size + 1, dtype=torch.int32, device=device),
            context_lengths=self.context_lengths,
            output_rows=self.output_rows,
        )
        self.load(step)
        self.first_logits = run(static)  # compiles kernels and makes library handles, which a capture must not
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, pool=pool):
            self.logits = run(static)

    def load(self, step: Step) -> None:
        rows = step.batch_size
        self.tokens[:rows].copy_(step.tokens)
        self.context_lengths[:rows].copy_(step.context_lengths)
        if step.output_rows is not self.loaded_rows:
            self.output_rows[:rows].copy_(step.output_rows)
            self.loaded_rows = step.output_rows
        if rows < self.rows:
            self.context_lengths[rows:].zero_()
        self.rows = rows


class DecodeGraphs:
    """The captured steps of one set of KV caches; dropped with them."""

    def __init__(self):
        self._captured: dict[int, _Captured] = {}
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, run: Callable[[Step], Tensor], step: Step) -> Tensor:
        """Logits of a decode step by `run`, [batch_size, vocab_size] float32, overwritten by the next call."""
        rows, size = step.batch_size, padded_batch_size(step.batch_size)
        captured = self._captured.get(size)
        if captured is None:
            captured = self._captured[size] = _Captured(run, step, size, self._pool)
            return captured.first_logits[:rows]
        captured.load(step)
        captured.graph.replay()
        return captured.logits[:rows]
