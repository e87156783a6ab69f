"""From a scheduler's plan to the executor's Step: the tables, and each row's tokens from the host or the device."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from baichuan.executors.base import PagedExecutor
from baichuan.generation.sampling import to_device
from baichuan.generation.scheduler import Job, Plan
from baichuan.records import Step, leading_ones

MOST_PENDING = 16  # steps whose tokens are kept apart until a row needs one of them


class StepBuilder:
    """Builds the steps of one executor.  Tokens that are chosen on the device stay there."""

    def __init__(self, executor: PagedExecutor):
        self._executor = executor
        self._last = torch.zeros(executor.cache.rows, dtype=torch.int64, device=executor.device)  # tokens by slot ...
        self._newer: list[tuple[Sequence[int], Tensor]] = []  # ... as far as these are not newer
        self._tables: list[tuple[int, ...]] = []  # as the cache has them
        self._step: Step | None = None  # the one before, where the next may follow on it row by row ...
        self._jobs: list[Job] = []  # ... with the tokens chosen for these jobs
        self._chosen: Tensor | None = None

    def build(self, plan: Plan) -> tuple[Step, list[tuple[int, int]]]:
        """The plan's step, and each piece's (first, number) of rows of its logits.

        Copies blocks and sets the cache's tables.  A piece has a row for each beam, or for each token of a prompt all
        of whose logits are wanted.
        """
        cache = self._executor.cache
        if plan.copies:
            cache.copy_blocks(plan.copies)
        tables = [tuple(row) for piece in plan.pieces for row in piece.job.tables.rows]
        if tables != self._tables:
            cache.set_tables(tables)
            self._tables = tables
        jobs = [piece.job for piece in plan.pieces if piece.decodes]
        if self._step is None or self._chosen is None or jobs != self._jobs or len(jobs) < len(plan.pieces):
            return self._build(plan)
        self._step = self._step.next(self._chosen)
        self._newer.clear()  # each of these slots gets its next token now
        return self._step, [(row, 1) for row in range(len(jobs))]

    def chose(self, jobs: Sequence[Job], slots: Sequence[int], tokens: Tensor) -> None:
        """`tokens` were chosen on the last step, for a row of these jobs each."""
        everything = self._step is not None and len(jobs) == self._step.batch_size
        self._jobs, self._chosen = (list(jobs), tokens) if everything and len(set(jobs)) == len(jobs) else ([], None)
        self._newer.append((slots, tokens))

    def on_device(self, values: Sequence[int] | np.ndarray) -> Tensor:
        """int64"""
        return to_device(values, torch.int64, self._executor.device)

    def _build(self, plan: Plan) -> tuple[Step, list[tuple[int, int]]]:
        slots: list[int] = []  # slots of the rows that decode: their tokens are on the device
        known: list[int] = []  # the other rows' tokens, from the host
        lengths: list[int] = []
        contexts: list[int] = []
        outputs: list[int] = []
        rows: list[tuple[int, int]] = []
        count = 0  # tokens
        for piece in plan.pieces:
            end, width = piece.start + piece.length, len(piece.job.tables.rows)
            if piece.decodes:
                slots += piece.job.slots[:width]
            else:
                known += piece.job.ids[piece.start : end]
            lengths += [piece.length] * width
            contexts += [end] * width
            count += piece.length * width
            wanted = piece.length if piece.job.request.prompt_logits and not piece.decodes else width
            rows.append((len(outputs), wanted))
            outputs += range(count - wanted, count)
        starts = np.cumsum([0, *lengths])
        firsts = np.subtract(contexts, lengths)  # the position of each row's first token
        positions = np.arange(count) + np.repeat(firsts - starts[:-1], lengths)
        singles = leading_ones(lengths)
        parts = slots, known, positions, starts, contexts, outputs, [singles]
        values = np.concatenate([np.asarray(part, np.int64) for part in parts])
        packed = self.on_device(values).split([len(part) for part in parts])
        self._step = Step(
            tokens=self._tokens(packed[0], packed[1]),
            positions=packed[2],
            cu_seqlens=packed[3].int(),
            context_lengths=packed[4].int(),
            output_rows=packed[5],
            max_new_tokens=max(lengths),
            max_context_length=max(contexts),
            singles=singles,
            num_singles=packed[6].int(),
        )
        self._jobs, self._chosen = [], None
        return self._step, rows

    def _tokens(self, slots: Tensor, known: Tensor) -> Tensor:
        """The tokens of the rows that decode, then those that the host knows."""
        if len(slots) or len(self._newer) > MOST_PENDING:
            for places, newer in self._newer:
                self._last[self.on_device(places)] = newer
            self._newer.clear()
        return torch.cat((self._last[slots], known)) if len(slots) else known  # saves time before a first token
