"""The strategy of sampling, greedy decoding included: each sequence continues itself until it ends."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from baichuan.config import SamplingConfig
from baichuan.generation.decoding import Choice, Generation
from baichuan.generation.readback import Readback
from baichuan.generation.sampling import Sampler

OnTokens = Callable[[list[int | None]], None]  # each sequence's new token, None once it has ended


class Sampled:
    """decoding.Strategy, one sequence per prompt.  On a GPU the host reads a step's tokens while the next step runs."""

    def __init__(
        self,
        sampler: Sampler,
        configs: Sequence[SamplingConfig],
        limits: Sequence[int],
        on_tokens: OnTokens | None = None,
        keep_logits: bool = False,
    ):
        """limits: each sequence's most new tokens.  on_tokens is called once per step."""
        self._sampler, self._longest, self._on_tokens = sampler, max(limits), on_tokens
        self._sequences = [
            _Sequence({config.eos_id, *config.stop_ids}, limit) for config, limit in zip(configs, limits, strict=True)
        ]
        self._kept: list[Readback] | None = [] if keep_logits else None  # each [sequences, vocab_size]
        self._unread: Readback | None = None  # the newest tokens, not yet read by the host
        self._made = 0  # steps so far, each with one token per sequence

    def choose(self, logits: Tensor) -> Choice | None:
        if self._kept is not None:
            self._kept.append(Readback(logits))
        tokens = self._sampler(logits)
        self._made += 1
        last = self._made == self._longest
        previous, self._unread = self._unread, Readback(tokens)
        if previous:
            self._hear(previous)
        if last or tokens.device.type == "cpu":
            self._hear(self._unread)
            self._unread = None
        return None if last or all(each.done for each in self._sequences) else Choice(tokens)

    def results(self) -> list[Generation]:
        return [each.generation(self._kept, number) for number, each in enumerate(self._sequences)]

    def _hear(self, readback: Readback) -> None:
        news = [each.append(token) for each, token in zip(self._sequences, readback.wait().tolist(), strict=True)]
        if self._on_tokens:
            self._on_tokens(news)


@dataclass
class _Sequence:
    """One continuation while it grows."""

    end_ids: set[int]
    limit: int  # most ids
    ids: list[int] = field(default_factory=list)
    ended: bool = False  # by one of end_ids

    @property
    def done(self) -> bool:
        return self.ended or len(self.ids) == self.limit

    def append(self, token: int) -> int | None:
        if self.done:
            return None
        if token in self.end_ids:
            self.ended = True
            return None
        self.ids.append(token)
        return token

    def generation(self, kept: list[Readback] | None, number: int) -> Generation:
        """kept: the logits of each step, [sequences, vocab_size]; this sequence is row `number`."""
        steps = len(self.ids) + self.ended
        logits = torch.stack([each.wait()[number] for each in kept[:steps]]) if kept is not None else None
        return Generation(self.ids, "stop" if self.ended else "length", logits)
