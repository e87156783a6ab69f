"""What each step of the model computes: who is admitted, which part of a prompt is next, who makes room for others.

Decisions depend on the calls alone, never on the clock, so that every rank decides alike.  A step holds a token of each
running request and, within a budget, the next chunks of prompts.  With 6 tokens a step and prompts of 7, 3 and 4:

    step 0     prompt 0: tokens 0 to 5
    step 1     prompt 0: token 6, which gives its first new token     prompt 1: tokens 0 to 2     prompt 2: 0 and 1
    step 2     requests 0 and 1: a token each                         prompt 2: tokens 2 and 3

Where no block is free, the youngest request gives up its own and is computed again later, from the tokens it has.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from baichuan.generation.blocks import BlockPool, names_of
from baichuan.generation.requests import Request
from baichuan.generation.tables import BlockTables


@dataclass(frozen=True)
class Budget:
    """How much a step may hold."""

    rows: int  # rows of the block tables: one for each beam of the running requests
    tokens: int  # most tokens of a step, at least `rows`
    chunk: int | None = None  # tokens of prompts beside running requests; None = these wait until no prompt is left
    scored: int = 1024  # tokens of a step after which all logits are wanted: each gives a row of the vocabulary's size


@dataclass(eq=False)
class Job:
    """A request on its way through the scheduler."""

    request: Request
    ids: list[int]  # the prompt and the new tokens that the host knows; with beams the prompt alone
    tables: BlockTables
    slots: list[int] = field(default_factory=list)  # while it runs: a number for each of its beams
    computed: int = 0  # tokens of each row that are in the cache, or will be after the last planned step
    made: int = 0  # new tokens that are chosen, or will be after the last planned step
    decoding: bool = False  # all known tokens are computed: a step takes the one that was chosen last
    names: list[bytes] = field(default_factory=list)  # names of the first full blocks of ids
    named: int = 0  # blocks of the tables that the pool knows by name


class Piece(NamedTuple):
    """A job's part of a step: `length` tokens of each of its rows, from position `start` on."""

    job: Job
    start: int
    length: int
    decodes: bool  # its one token is the one that was chosen last; else they are ids[start : start + length]
    chooses: bool  # a new token is chosen from the last one's logits


@dataclass(frozen=True)
class Plan:
    """One step."""

    pieces: tuple[Piece, ...]  # those that decode come first
    copies: tuple[tuple[int, int], ...]  # (source, target) of each block that is copied before the step
    admitted: tuple[Job, ...]  # jobs that have taken their slots since the plan before


class Scheduler:
    """Jobs that wait and jobs that run, each in order of arrival; whoever waits came after all that run."""

    def __init__(self, pool: BlockPool, budget: Budget):
        self.pool, self.budget = pool, budget
        self.start_anew(())
        self.preemptions = 0
        self.shared_tokens = 0  # tokens of prompts that were found in the cache

    @property
    def unfinished(self) -> int:
        return len(self.waiting) + len(self.running)

    def blocks_of(self, request: Request) -> int:
        """Blocks that the request may hold at the end of its life, alone."""
        tokens = len(request.prompt) + max(request.max_new_tokens - 1, 0)  # the last one chosen is not stored
        return request.sampling.num_beams * -(-tokens // self.pool.tokens_per_block)

    def add(self, request: Request) -> Job:
        """Queue a request, whose blocks_of and num_beams the pool and the budget must hold."""
        job = Job(request, list(request.prompt), BlockTables(self.pool))
        self.waiting.append(job)
        return job

    def start_anew(self, jobs: Iterable[Job]) -> None:
        """Compute these jobs, which are all there are, from the tokens they have: the cache holds nothing of use."""
        self.pool.forget()
        self.waiting: deque[Job] = deque(jobs)
        self.running: list[Job] = []
        self._slots = list(range(self.budget.rows - 1, -1, -1))
        for job in self.waiting:
            job.tables, job.slots, job.decoding = BlockTables(self.pool), [], False

    def plan(self) -> Plan | None:
        """The next step; None when nothing is left to compute, or all of it waits for extend()."""
        admitted = self._admit()
        pieces: list[Piece] = []
        copies: list[tuple[int, int]] = []
        rows = 0
        if self.budget.chunk is not None or all(job.decoding for job in self.running):
            for job in list(self.running):
                if job.decoding and job.made < job.request.max_new_tokens:
                    new_copies = self._grow(job)
                    if new_copies is not None:
                        copies += new_copies
                        pieces.append(Piece(job, job.computed, 1, True, True))
                        rows += len(job.tables.rows)
        left = self.budget.tokens - rows
        if rows and self.budget.chunk is not None:
            left = min(left, self.budget.chunk)
        scored = self.budget.scored
        for job in self.running:
            if not job.decoding and left > 0:
                count = min(len(job.ids) - job.computed, left)
                if job.request.prompt_logits:
                    count = min(count, scored)
                    scored -= count
                chooses = job.computed + count == len(job.ids) and job.request.max_new_tokens > 0
                if count:
                    pieces.append(Piece(job, job.computed, count, False, chooses))
                left -= count
        for piece in pieces:
            self._planned(piece)
        still = tuple(job for job in admitted if job.slots)  # not preempted since
        return Plan(tuple(pieces), tuple(copies), still) if pieces else None

    def extend(self, job: Job, token: int) -> None:
        """The host knows the next of the job's new tokens."""
        job.ids.append(token)
        if len(job.ids) % self.pool.tokens_per_block == 0:
            self._name_blocks(job)

    def fork(self, job: Job, parents: Sequence[int]) -> None:
        """Row r of the job continues what its row parents[r] was."""
        job.tables.fork(parents)

    def finish(self, job: Job) -> None:
        """Drop a job, whether it waits or runs, and free what it held."""
        if job in self.waiting:
            self.waiting.remove(job)
        else:
            self._stop(job)

    def _admit(self) -> list[Job]:
        """Let jobs run, in order, as long as slots and blocks last; each running row's next block is kept free."""
        admitted = []
        while self.waiting:
            job = self.waiting[0]
            width = job.request.sampling.num_beams
            if width > len(self._slots):
                break
            length, size = len(job.ids), self.pool.tokens_per_block
            findable = self.pool.prefix_caching and not job.request.prompt_logits
            job.names = names_of(job.ids, size, job.names) if findable else []
            found = self.pool.find(job.names[: (length - 1) // size])  # one token at least gives logits
            kept_free = sum(len(other.tables.rows) for other in self.running)
            needed = -(-length // size) - len(found) + self.pool.idle(found)
            if needed + kept_free > self.pool.free:
                break
            self.waiting.popleft()
            self.running.append(job)
            job.slots = [self._slots.pop() for _ in range(width)]
            job.tables = BlockTables(self.pool, found)
            job.tables.make_room(len(found) * size, length)
            job.computed, job.made, job.named = len(found) * size, length - len(job.request.prompt), len(found)
            self.shared_tokens += job.computed
            admitted.append(job)
        return admitted

    def _grow(self, job: Job) -> Sequence[tuple[int, int]] | None:
        """Make room for the job's next token, whatever others must give up: the blocks to be copied.

        None if the job itself had to give up its blocks.
        """
        if len(job.slots) == 1 and job.computed % self.pool.tokens_per_block:
            return ()  # its last block has room
        needed = job.tables.needed(job.computed, job.computed + 1)
        if not needed:
            return ()
        while job.slots and needed > self.pool.free:
            youngest = self.running[-1]
            self._stop(youngest)
            youngest.decoding = False
            self.waiting.appendleft(youngest)
            self.preemptions += 1
        return job.tables.make_room(job.computed, job.computed + 1) if job.slots else None

    def _stop(self, job: Job) -> None:
        self.running.remove(job)
        job.tables.release()
        self._slots += reversed(job.slots)
        job.slots = []

    def _planned(self, piece: Piece) -> None:
        job = piece.job
        job.computed += piece.length
        job.made += piece.chooses
        job.decoding = job.computed >= len(job.ids) or piece.decodes
        if not piece.decodes or job.computed % self.pool.tokens_per_block == 0:
            self._name_blocks(job)

    def _name_blocks(self, job: Job) -> None:
        """Let the job's full blocks be found: those whose tokens are known and computed."""
        size = self.pool.tokens_per_block
        full = min(job.computed, len(job.ids)) // size
        if job.slots and full > job.named and self.pool.prefix_caching:
            if full > len(job.names):
                job.names = names_of(job.ids[: full * size], size, job.names)
            for place in range(job.named, full):
                self.pool.name(job.tables.rows[0][place], job.names[place])
            job.named = full
