"""Generation over an executor: prompts in, token ids out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from baichuan.config import BuildConfig, ModelConfig, SamplingConfig
from baichuan.errors import UnsupportedError
from baichuan.executors.base import Executor
from baichuan.generation.decoding import Generation
from baichuan.generation.in_flight import Policy
from baichuan.generation.limits import check_requests
from baichuan.generation.requests import Progress, Request, Serving, Timing
from baichuan.generation.sampled import OnTokens
from baichuan.generation.sampling import numbered_seeds
from baichuan.generation.serve import serve

AS_A_BATCH = Policy(chunk_tokens=None, prefix_caching=False)  # all prompts first, and nothing of earlier calls


@dataclass
class Session:
    """An executor with the limits of its engine, which answers one batch of prompts at a time."""

    executor: Executor
    model: ModelConfig
    build: BuildConfig
    _serving: Serving | None = field(default=None, init=False)

    @property
    def serving(self) -> Serving:
        """Its KV cache is allocated when it is first needed."""
        if self._serving is None:
            self._serving = serve(self.executor, self.model, self.build, AS_A_BATCH)
        return self._serving

    @property
    def timing(self) -> Timing:
        """The last generate()'s."""
        return self.serving.timing

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: SamplingConfig,
        max_new_tokens: int,
        on_tokens: OnTokens | None = None,
        keep_logits: bool = False,
    ) -> list[Generation]:
        """Continue each prompt until an end id or max_new_tokens.  Raises ConfigError for what the engine cannot hold.

        on_tokens is called once per step (not with beam search, whose tokens are known only at the end).
        """
        self.check(prompts, sampling, max_new_tokens)
        ids: list[list[int]] = [[] for _ in prompts]

        def hear(news: dict[int, Progress]) -> None:
            tokens = [list(news[row].new_ids) if row in news else [] for row in range(len(prompts))]
            for own, new in zip(ids, tokens, strict=True):
                own += new
            if on_tokens:
                on_tokens([new[0] if new else None for new in tokens])

        configs = numbered_seeds(sampling, len(prompts))
        ended = self._run(
            [
                Request(row, tuple(prompt), config, max_new_tokens, keep_logits)
                for row, (prompt, config) in enumerate(zip(prompts, configs, strict=True))
            ],
            hear,
        )
        return [Generation(own, str(each.finish_reason), each.logits) for own, each in zip(ids, ended, strict=True)]

    def score(self, sequences: Sequence[Sequence[int]]) -> list[Tensor]:
        """Logits after every token of each sequence, each [len(sequence), vocab_size] float32 on the CPU."""
        greedy = SamplingConfig(top_k=1)
        self.check(sequences, greedy, 1)
        requests = [Request(row, tuple(ids), greedy, 0, prompt_logits=True) for row, ids in enumerate(sequences)]
        return [each.logits for each in self._run(requests) if each.logits is not None]

    def check(self, prompts: Sequence[Sequence[int]], sampling: SamplingConfig, max_new_tokens: int) -> None:
        """Raise ConfigError unless the engine can hold this request."""
        check_requests(self.model, self.build, prompts, sampling, max_new_tokens)

    def _run(self, requests: Sequence[Request], hear: Callable[[dict], None] = lambda news: None) -> list[Progress]:
        """Each request's last progress.  hear: called with each step's news, by key"""
        ended: dict = {}
        for request in requests:
            self.serving.add(request)
        while self.serving.unfinished:
            news = {progress.key: progress for progress in self.serving.step()}
            ended |= {key: progress for key, progress in news.items() if progress.finished}
            if news:
                hear(news)
        for progress in ended.values():
            if progress.error:
                raise UnsupportedError(progress.error)
        return [ended[request.key] for request in requests]
