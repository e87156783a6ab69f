"""requests.Serving over a paged KV cache: requests join and leave the running batch at every step.

On a GPU the host is one step ahead: it plans and launches step n + 1 before it reads the tokens of step n, which step
n + 1 takes from the GPU's memory.  A sequence that ended in step n is then in step n + 1 once more, for nothing.  Only
a step of prompts alone is read first.

    host     plan 1, launch 1 | plan 2, launch 2, read 1 | plan 3, launch 3, read 2 | ...
    GPU               step 1  |          step 2          |          step 3          | ...
"""

from __future__ import annotations

import time
from collections.abc import Hashable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from baichuan.config import BuildConfig, ModelConfig
from baichuan.executors.base import PagedExecutor
from baichuan.generation.beam import BeamSearch
from baichuan.generation.blocks import BlockPool
from baichuan.generation.kept_logits import KeptLogits
from baichuan.generation.limits import request_error
from baichuan.generation.logits import Logits
from baichuan.generation.pace import Pace
from baichuan.generation.readback import Readback
from baichuan.generation.requests import Progress, Request, Timing
from baichuan.generation.sampling import Sampler
from baichuan.generation.scheduler import Budget, Job, Plan, Scheduler
from baichuan.generation.steps import StepBuilder

STEP_TOKENS = 16384  # most tokens of a step, where the engine has no max_num_tokens
CHUNK_TOKENS = 256  # prompt tokens beside running requests: such a step takes about twice as long as a decode step


@dataclass(frozen=True)
class Policy:
    """How requests share the engine."""

    chunk_tokens: int | None = CHUNK_TOKENS  # prompt tokens of a step beside running requests; None = prompts go first
    prefix_caching: bool = True  # equal beginnings of prompts share their blocks


@dataclass
class _Launched:
    """A step whose tokens the host has not read."""

    jobs: list[Job]  # the jobs that the tokens are for, in order
    tokens: Readback | None
    prefills: bool  # it computes parts of prompts ...
    prompts_alone: bool  # ... and nothing else


class InFlight:
    """Any number of requests, of which as many run together as the engine has rows and blocks for."""

    scheduler: Scheduler  # these three from the first request on
    _sampler: Sampler
    _steps: StepBuilder

    def __init__(self, executor: PagedExecutor, model: ModelConfig, build: BuildConfig, policy: Policy | None = None):
        self.model, self.build, self.policy, self._executor = model, build, policy or Policy(), executor
        self.reads_late = executor.device.type != "cpu"  # a step's tokens are read when the next step has been launched
        self._ready = False
        self._logits = Logits(executor, build)
        self._searches: dict[Job, BeamSearch] = {}
        self._kept: dict[Job, KeptLogits] = {}
        self._jobs: dict[Hashable, Job] = {}  # the unfinished, in order of arrival
        self._news: dict[Hashable, Progress] = {}
        self._unread: _Launched | None = None
        self._marked_s = 0.0
        self.timing = Timing()
        self._pace = Pace()

    @property
    def unfinished(self) -> int:
        return len(self._jobs) + sum(each.finished for each in self._news.values())

    def _make_room(self) -> None:
        """Allocate the KV cache: at the first request, when the weights of all who share the GPU have been loaded."""
        executor, build = self._executor, self.build
        executor.reset(build.max_rows, build.max_seq_len)
        pool = BlockPool(executor.cache.blocks, executor.cache.tokens_per_block, self.policy.prefix_caching)
        tokens = max(build.max_num_tokens or STEP_TOKENS, build.max_rows)
        self.scheduler = Scheduler(pool, Budget(build.max_rows, tokens, self.policy.chunk_tokens))
        self._sampler = Sampler(build.max_rows, self.model.vocab_size, build.max_output_len, executor.device)
        self._steps = StepBuilder(executor)
        self._ready = True

    def add(self, request: Request) -> None:
        if not self._ready:
            self._make_room()
        assert request.key not in self._jobs and request.key not in self._news, f"{request.key} is still unfinished"
        if not self.unfinished:
            self.timing, self._marked_s = Timing(), time.perf_counter()
            self._unread = None  # a step that nobody has needed
        if error := self._error(request):
            self._news[request.key] = Progress(request.key, error=error)
            return
        self.timing.prompt_tokens += len(request.prompt)
        job = self._jobs[request.key] = self.scheduler.add(request)
        if request.keep_logits or request.prompt_logits:
            self._kept[job] = KeptLogits()

    def cancel(self, key: Hashable) -> None:
        if job := self._jobs.get(key):
            self._end(job, "cancelled")

    @torch.inference_mode()
    def step(self) -> list[Progress]:
        try:
            return self._step()
        except BaseException:
            self._start_anew()
            raise

    def _step(self) -> list[Progress]:
        if self._unread and self._unread.prompts_alone and not self._prompts_left:
            self._read()  # first tokens, which nobody gains from waiting for
        begun = time.perf_counter()
        plan = self.scheduler.plan() if self._ready else None
        launched = self._launch(plan) if plan else None
        self._pace.launched(time.perf_counter() - begun)
        if self._unread:
            self._read()
        elif launched and launched.prefills:
            self._account(launched)
        self._unread = launched
        if launched and not self.reads_late:
            self._read()
        order = {key: number for number, key in enumerate(self._jobs)} if len(self._news) > 1 else {}
        news = sorted(self._news.values(), key=lambda each: order.get(each.key, -1))
        self._news = {}
        return news

    def _start_anew(self) -> None:
        """Believe nothing of a step that failed or was interrupted: blocks have names before they are computed."""
        if self._ready:
            self._unread = None
            self._steps = StepBuilder(self._executor)
            self.scheduler.start_anew(self._jobs.values())
            for job, kept in self._kept.items():
                kept.forget_after(len(job.ids) - len(job.request.prompt))

    @property
    def spare_s(self) -> float:
        """Seconds that a caller may wait for more requests before step(), while the GPU has something to do.

        They are in the next step then.  0 where none could be, as others wait, and on a CPU.
        """
        if not self._unread or not self.reads_late or self.scheduler.waiting:
            return 0.0
        return max(self._pace.spare_s(self._unread.prefills), 0.0)

    @property
    def _prompts_left(self) -> bool:
        return bool(self.scheduler.waiting) or any(not job.decoding for job in self.scheduler.running)

    def _read(self) -> None:
        """Learn the tokens of the step that has not been read, and count its time."""
        assert self._unread is not None, "there is a step to read"
        launched, self._unread = self._unread, None
        self._hear(launched)
        self._account(launched)
        self._pace.ended(launched.prefills)
        self.timing.decode_steps += not launched.prefills

    def _error(self, request: Request) -> str | None:
        """Why the engine cannot hold the request, if so."""
        pool, blocks = self.scheduler.pool, self.scheduler.blocks_of(request)
        if (error := request_error(self.model, self.build, request)) or blocks <= pool.blocks:
            return error
        return (
            f"the request needs up to {blocks} blocks of {pool.tokens_per_block} tokens and the KV cache has "
            f"{pool.blocks}; ask for fewer tokens or beams, or leave more memory to the cache"
        )

    def _launch(self, plan: Plan) -> _Launched:
        """Compute the plan's step, and choose its tokens on the device."""
        for job in plan.admitted:
            self._begin(job)
        step, rows = self._steps.build(plan)
        logits = self._logits(step)
        sampled: list[Job] = []
        places: list[int] = []  # their rows of the logits
        for piece, (first, count) in zip(plan.pieces, rows, strict=True):
            job, end = piece.job, first + count  # a view of each row would take most of the time
            if job in self._kept:
                self._kept[job].see(piece, logits[first:end])
            if not piece.chooses:
                if job.decoding:  # a prompt that is only scored has been computed to its end
                    self._end(job, "length")
            elif job in self._searches:
                self._search(job, logits[end - len(job.tables.rows) : end])
            else:
                sampled.append(job)
                places.append(end - 1)
        prefills = not plan.pieces[-1].decodes
        made = sum(piece.job.request.sampling.num_beams for piece in plan.pieces if piece.chooses)
        self.timing.new_tokens += made
        self.timing.decode_tokens += 0 if prefills else made
        tokens = self._sample(sampled, logits, places) if sampled else None
        return _Launched(sampled, tokens, prefills, prompts_alone=not plan.pieces[0].decodes)

    def _begin(self, job: Job) -> None:
        """The job has got its slots: for the first time, or again after it gave up its blocks."""
        request, history = job.request, job.ids
        if request.sampling.num_beams > 1:
            search = BeamSearch(request.sampling, [request.prompt], request.max_new_tokens, request.keep_logits)
            self._searches[job] = search
        else:
            self._sampler.begin(job.slots[0], request.sampling, history, len(history) - len(request.prompt))

    def _sample(self, jobs: list[Job], logits: Tensor, places: list[int]) -> Readback:
        """The jobs' next tokens, each from its place among the logits' rows, on their way to the host."""
        chosen = logits if len(places) == len(logits) else logits[self._steps.on_device(places)]
        slots = [job.slots[0] for job in jobs]
        tokens = self._sampler(chosen, slots)
        self._steps.chose(jobs, slots, tokens)
        return Readback(tokens)

    def _search(self, job: Job, logits: Tensor) -> None:
        """Extend a job's beams at once: their next step depends on which of them go on."""
        search = self._searches[job]
        choice = search.choose(logits)
        if choice is None:
            [result] = search.results()
            self._end(job, result.finish_reason, tuple(result.ids), result.logits)
        else:
            assert choice.parents is not None, "a search says which beams go on"
            self.scheduler.fork(job, choice.parents)
            self._steps.chose([job] * len(job.slots), job.slots, choice.tokens)

    def _hear(self, launched: _Launched) -> None:
        """The host learns the tokens of a step."""
        tokens = launched.tokens.wait().tolist() if launched.tokens else []
        for job, token in zip(launched.jobs, tokens, strict=True):
            if self._jobs.get(job.request.key) is not job:
                continue  # it ended while the step ran
            sampling = job.request.sampling
            if token == sampling.eos_id or token in sampling.stop_ids:
                self._end(job, "stop")
                continue
            self.scheduler.extend(job, token)
            if len(job.ids) == len(job.request.prompt) + job.request.max_new_tokens:
                self._end(job, "length", (token,))
            else:
                self._news[job.request.key] = Progress(job.request.key, (token,))

    def _end(self, job: Job, reason: str, new_ids: tuple[int, ...] = (), logits: Tensor | None = None) -> None:
        """The job's last progress."""
        key = job.request.key
        earlier = self._news.get(key, Progress(key))
        self._searches.pop(job, None)
        if kept := self._kept.pop(job, None):
            chosen = len(job.ids) + (reason == "stop") - len(job.request.prompt)
            logits = kept.rows(chosen, logits, job.request.keep_logits) if reason != "cancelled" else None
        self._news[key] = replace(earlier, new_ids=earlier.new_ids + new_ids, finish_reason=reason, logits=logits)
        del self._jobs[key]
        self.scheduler.finish(job)

    def _account(self, launched: _Launched) -> None:
        """Add the time since the last call to what it was spent on."""
        now = time.perf_counter()
        passed, self._marked_s = now - self._marked_s, now
        if launched.prefills:
            self.timing.prefill_s += passed
        else:
            self.timing.decode_s += passed
