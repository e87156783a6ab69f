"""Steps captured once as CUDA graphs and replayed: the host's work on a step is then a few launches.

Decode steps, the prefill of short prompts and mixed steps are captured, each at few sizes, which steps of other sizes
are padded to: there the GPU would wait for the host, which launches hundreds of kernels a step.  Of mixed steps there
are most sizes: one that is new runs in a graph that is a little larger until it has come often, and without one it is
captured when it comes for the second time.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from baichuan.kernels.spec import cdiv, next_power_of_2
from baichuan.records import Step

MAX_PREFILL = 512  # tokens: of longer steps the GPU has more work than the host
MAX_MIXED = 1024  # tokens
MAX_PROMPTS = 16  # beside single tokens
MOST_GRAPHS = 128  # each takes a few MB; further mixed steps run without
MOST_PADDING = 96  # tokens that a mixed step of a new size may be padded by ...
PATIENCE = 24  # ... this many times, which take as long as a capture


def padded_batch_size(batch_size: int) -> int:
    """The batch size that a step of batch_size sequences runs at: few sizes are captured, little is computed twice."""
    if batch_size <= 8:
        return next_power_of_2(batch_size)
    for limit, multiple in ((64, 8), (256, 32)):
        if batch_size <= limit:
            return multiple_of(batch_size, multiple)
    return multiple_of(batch_size, 128)


def padded_prefill(tokens: int) -> int:
    """The number of tokens that a prefill is padded to: up to 128 the time is that of reading the weights."""
    if tokens <= 128:
        return max(next_power_of_2(tokens), 16)
    return multiple_of(tokens, 64)


def multiple_of(number: int, unit: int) -> int:
    """The number rounded up."""
    return cdiv(number, unit) * unit


@dataclass(frozen=True)
class Size:
    """The size of a captured step, which steps are padded to."""

    tokens: int
    sequences: int
    prompts: int  # most prompts among the sequences; 0 = decode, one token a sequence

    @property
    def mixed(self) -> bool:
        return 0 < self.prompts < self.sequences

    @staticmethod
    def of(step: Step) -> Size | None:
        """The size that the step is padded to; None where it is not to be captured."""
        tokens, rows = step.tokens.shape[0], step.batch_size
        if step.output_rows.shape[0] != rows:
            return None
        if step.max_new_tokens == 1:
            sequences = padded_batch_size(rows)
            return Size(sequences, sequences, 0)
        if not step.mixed:
            sequences = padded_batch_size(rows)
            return Size(padded_prefill(tokens), sequences, sequences) if tokens <= MAX_PREFILL else None
        if tokens > MAX_MIXED or rows - step.singles > MAX_PROMPTS:
            return None
        prompts = MAX_PROMPTS if rows - step.singles > 4 else 4
        sequences = max(next_power_of_2(step.singles + prompts), 16)  # those of padding cost next to nothing
        return Size(multiple_of(tokens, 32), sequences, prompts)


class Captured:
    """One graph with the tensors that it reads and the one that it writes.

    A sequence of padding has a context length of 0 and no new tokens, or in a decode step one that is not stored;
    tokens of padding belong to no sequence.
    """

    logits: Tensor  # these two from capture() on
    graph: torch.cuda.CUDAGraph

    def __init__(self, step: Step, size: Size):
        device = step.tokens.device
        self.size = size
        self.tokens = torch.zeros(size.tokens, dtype=torch.int64, device=device)
        self.context_lengths = torch.zeros(size.sequences, dtype=torch.int32, device=device)
        self.output_rows = torch.zeros(size.sequences, dtype=torch.int64, device=device)
        self.cu_seqlens = torch.arange(size.sequences + 1, dtype=torch.int32, device=device)  # what decode steps have
        self.num_singles = torch.zeros(1, dtype=torch.int32, device=device)
        self.rows = 0
        self.loaded_rows: Tensor | None = None
        self.static = replace(
            step,
            tokens=self.tokens,
            positions=self.tokens,  # the kernels take positions from context_lengths
            cu_seqlens=self.cu_seqlens,
            context_lengths=self.context_lengths,
            output_rows=self.output_rows,
            max_new_tokens=size.tokens if size.prompts else 1,
            singles=size.sequences - size.prompts,
            num_singles=self.num_singles if size.prompts else None,
        )
        self.load(step)

    def capture(self, run: Callable[[Step], Tensor], pool, out: Tensor | None) -> None:
        """Record a run.  out: where its logits are kept; None = where the graph makes them."""
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, pool=pool):
            logits = run(self.static)
            self.logits = logits if out is None else out.copy_(logits)

    def holds(self, step: Step) -> bool:
        """Whether the mixed step fits, without much padding."""
        padding, prompts = self.size.tokens - step.tokens.shape[0], step.batch_size - step.singles
        return (
            self.size.mixed
            and 0 <= padding <= MOST_PADDING
            and prompts <= self.size.prompts
            and step.singles <= self.static.singles
        )

    def load(self, step: Step) -> None:
        rows = step.batch_size
        self.tokens[: step.tokens.shape[0]].copy_(step.tokens)
        self.context_lengths[:rows].copy_(step.context_lengths)
        if self.size.prompts:
            assert step.num_singles is not None, "a step with prompts"
            self.num_singles.copy_(step.num_singles)
            self.cu_seqlens[: rows + 1].copy_(step.cu_seqlens)
            if rows < self.size.sequences:
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
        self._captured: dict[Size, Captured] = {}
        self._met: Counter[Size] = Counter()  # how often a mixed step came that had no graph of its size
        self._out: Tensor | None = None  # the logits of mixed steps: each graph's own would take a GB together
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, run: Callable[[Step], Tensor], step: Step) -> Tensor:
        """Logits of a step by `run`, [num_outputs, vocab_size] float32, overwritten by the next call."""
        size, rows = Size.of(step), step.batch_size
        if size is None:
            return run(step)
        captured = self._captured.get(size)
        if captured is None and size.mixed:
            self._met[size] += 1
            full = len(self._captured) >= MOST_GRAPHS
            if full or self._met[size] <= PATIENCE:
                fitting = [each for each in self._captured.values() if each.holds(step)]
                captured = min(fitting, key=lambda each: each.size.tokens, default=None)
            if captured is None and (full or self._met[size] == 1):
                return run(step)
        if captured is None:
            captured = Captured(step, size)
            logits = run(captured.static)  # compiles kernels and makes library handles, which a capture must not
            captured.capture(run, self._pool, self._room_for(logits) if size.mixed else None)
            self._captured[size] = captured
            return logits[:rows]
        captured.load(step)
        captured.graph.replay()
        return captured.logits[:rows]

    def _room_for(self, logits: Tensor) -> Tensor:
        if self._out is None or len(self._out) < len(logits):
            self._out = torch.empty_like(logits)
        return self._out[: len(logits)]
