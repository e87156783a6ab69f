"""Generation over an executor whose cache has a row for each sequence: one batch of prompts, until all have ended."""

from __future__ import annotations

import time
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from baichuan.config import BuildConfig, ModelConfig, SamplingConfig
from baichuan.executors.base import RowExecutor
from baichuan.generation.beam import BeamSearch
from baichuan.generation.decoding import Generation, Strategy, decode
from baichuan.generation.logits import Logits
from baichuan.generation.requests import Timing
from baichuan.generation.sampled import OnTokens, Sampled
from baichuan.generation.sampling import Sampler
from baichuan.records import Step


@dataclass
class StaticSession:
    """An executor with the limits of its engine."""

    executor: RowExecutor
    model: ModelConfig
    build: BuildConfig
    timing: Timing = field(default_factory=Timing)  # the last steps()'

    def steps(
        self,
        prompts: Sequence[Sequence[int]],
        configs: Sequence[SamplingConfig],
        limits: Sequence[int],
        on_tokens: OnTokens | None = None,
        keep_logits: bool = False,
    ) -> Generator[None, None, list[Generation]]:
        """Continue each prompt until an end id or its limit; yields after each decode step.

        on_tokens is called once per step (not with beam search, whose tokens are known only at the end).

        Prompts that the engine cannot hold are the caller's fault.  With beam search all settings and limits are equal.
        """
        sampling, max_new_tokens = configs[0], max(limits)
        self.timing = Timing(prompt_tokens=sum(map(len, prompts)))
        self.executor.reset(len(prompts) * sampling.num_beams, max(map(len, prompts)) + max_new_tokens)
        start = time.perf_counter()
        logits, step = self._prefill(prompts)
        self._wait()
        self.timing.prefill_s = time.perf_counter() - start
        start = time.perf_counter()
        strategy: Strategy
        if sampling.num_beams > 1:
            strategy = BeamSearch(sampling, prompts, max_new_tokens, keep_logits)
        else:
            sampler = Sampler.of(configs, prompts, self.model.vocab_size, max_new_tokens, logits.device)
            strategy = Sampled(sampler, configs, limits, on_tokens, keep_logits)
        for _ in decode(self._forward, self.executor.cache, strategy, logits, step):
            self.timing.decode_steps += 1
            yield
        self._wait()
        self.timing.decode_s = time.perf_counter() - start
        rows = len(prompts) * sampling.num_beams
        self.timing.decode_tokens = rows * self.timing.decode_steps
        self.timing.new_tokens = rows + self.timing.decode_tokens
        return strategy.results()

    def score(self, sequences: Sequence[Sequence[int]]) -> list[Tensor]:
        """Logits after every token of each sequence, each [len(sequence), vocab_size] float32."""
        self.executor.reset(len(sequences), max(map(len, sequences)))
        logits = self._forward(Step.of(sequences, all_outputs=True, device=self.executor.device))
        return list(logits.clone().split([len(sequence) for sequence in sequences]))

    def _prefill(self, prompts: Sequence[Sequence[int]]) -> tuple[Tensor, Step]:
        """Run the prompts in chunks of at most max_num_tokens tokens.

        Returns the logits of each prompt's last token, [prompts, vocab_size] float32, and the last chunk's step.
        """
        limit = self.build.max_num_tokens or sum(map(len, prompts))
        chunks = 1
        while max(_chunk_sizes(prompts, chunks)) > limit and chunks < max(map(len, prompts)):
            chunks += 1
        for chunk in range(chunks):
            bounds = [(len(p) * chunk // chunks, len(p) * (chunk + 1) // chunks) for p in prompts]
            tokens = [prompt[a:b] for prompt, (a, b) in zip(prompts, bounds, strict=True)]
            step = Step.of(tokens, [a for a, _ in bounds], device=self.executor.device)
            logits = self._forward(step)
        return logits, step

    @cached_property
    def _forward(self) -> Logits:
        return Logits(self.executor, self.build)

    def _wait(self) -> None:
        if self.executor.device.type == "cuda":
            torch.cuda.synchronize(self.executor.device)


def _chunk_sizes(prompts: Sequence[Sequence[int]], chunks: int) -> list[int]:
    """Tokens of each chunk when every prompt is cut into `chunks` nearly equal pieces, all ending in the last."""
    return [sum(len(p) * (c + 1) // chunks - len(p) * c // chunks for p in prompts) for c in range(chunks)]
