"""Choosing the next token from logits, on the device that holds them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from baichuan.config import SEEDS, SamplingConfig


def numbered_seeds(config: SamplingConfig, count: int) -> list[SamplingConfig]:
    """`count` copies of the settings, with seeds that count up from config.random_seed."""
    return [replace(config, random_seed=(config.random_seed + number) % SEEDS) for number in range(count)]


class Sampler:
    """Draws a token for each of several sequences, whose state lies in slots on the device.

    A sequence's draws depend on its own settings, its seed, and how many tokens it has drawn: not on the device, the
    other sequences or the number of ranks.
    """

    def __init__(self, slots: int, vocab_size: int, max_steps: int, device: torch.device | str):
        """max_steps: the most tokens that a sequence can draw"""
        self._device, self._max_steps, self._vocab_size = torch.device(device), max_steps, vocab_size
        self._configs: list[SamplingConfig | None] = [None] * slots
        self._settings = torch.ones(3, slots, device=device)  # temperature, top_p and repetition_penalty
        self._drawn = torch.zeros(slots, dtype=torch.int64, device=device)  # draws used so far
        self._draws: Tensor | None = None  # [slots, max_steps] in [0, 1); these two where a sequence needs them
        self._seen: Tensor | None = None  # [slots, vocab_size] bool, tokens that the repetition penalty applies to
        self._true = torch.ones((), dtype=torch.bool, device=device)  # a Python bool would have to come from the host
        self._groups: list[_Group] = []
        self._grouped: list[int] = []  # the slots that _groups are made of

    @classmethod
    def of(
        cls,
        configs: Sequence[SamplingConfig],
        prompts: Sequence[Sequence[int]],
        vocab_size: int,
        max_steps: int,
        device: torch.device | str,
    ) -> Sampler:
        """A slot for each prompt, with its own settings."""
        sampler = cls(len(prompts), vocab_size, max_steps, device)
        for slot, (config, prompt) in enumerate(zip(configs, prompts, strict=True)):
            sampler.begin(slot, config, prompt)
        return sampler

    def begin(self, slot: int, config: SamplingConfig, history: Sequence[int], drawn: int = 0) -> None:
        """Give the slot to a sequence that consists of `history` and has drawn `drawn` of its tokens."""
        self._configs[slot], self._grouped = config, []
        if config.greedy and config.repetition_penalty == 1.0:
            return
        settings = [config.temperature, config.top_p if 0 < config.top_p < 1 else 2.0, config.repetition_penalty]
        self._settings[:, slot] = to_device(settings, torch.float32, self._device)
        if config.repetition_penalty != 1.0:
            if self._seen is None:
                shape = len(self._configs), self._vocab_size
                self._seen = torch.zeros(shape, dtype=torch.bool, device=self._device)
            self._seen[slot].zero_().index_fill_(0, to_device(history, torch.int64, self._device), True)
        if not config.greedy:
            if self._draws is None:
                self._draws = torch.zeros(len(self._configs), self._max_steps, device=self._device)
            draws = torch.rand(self._max_steps, generator=torch.Generator().manual_seed(config.random_seed))
            self._draws[slot] = to_device(draws, torch.float32, self._device)
            self._drawn[slot] = drawn

    def __call__(self, logits: Tensor, slots: Sequence[int] | None = None) -> Tensor:
        """The next token of the sequence in each slot; by default of all.

        logits: [sequences, vocab_size] float32 -> [sequences] int64
        """
        slots = list(range(len(self._configs)) if slots is None else slots)
        if slots != self._grouped:
            self._groups, self._grouped = self._group(slots), slots
        if len(self._groups) == 1:
            return self._draw(logits, self._groups[0])
        tokens = torch.empty(logits.shape[0], dtype=torch.int64, device=logits.device)
        for group in self._groups:
            tokens[group.rows] = self._draw(logits[group.rows], group)
        return tokens

    def _group(self, slots: Sequence[int]) -> list[_Group]:
        """The sequences that draw together."""
        alike: dict[tuple[bool, int, bool], list[int]] = {}
        for row, slot in enumerate(slots):
            config = self._configs[slot]
            assert config is not None, "a slot draws before a sequence has begun in it"
            kind = config.greedy, 0 if config.greedy else config.top_k, config.repetition_penalty != 1.0
            alike.setdefault(kind, []).append(row)
        groups = []
        for (greedy, top_k, penalised), rows in alike.items():
            own = to_device([slots[row] for row in rows], torch.int64, self._device)
            groups.append(_Group(greedy, top_k, penalised, to_device(rows, torch.int64, self._device), own))
        return groups

    def _draw(self, logits: Tensor, group: _Group) -> Tensor:
        if group.greedy and not group.penalised:
            return likeliest(logits)
        temperature, top_p, penalty = self._settings[:, group.slots, None]  # each [sequences, 1]
        if group.penalised:
            assert self._seen is not None, "begin() has made it"
            logits = penalise(logits, self._seen[group.slots], penalty)
        if group.greedy:
            tokens = likeliest(logits)
        else:
            assert self._draws is not None, "begin() has made them"
            draws = self._draws[group.slots, self._drawn[group.slots]]
            self._drawn[group.slots] += 1
            tokens = draw(logits / temperature, group.top_k, top_p, draws)
        if group.penalised:
            assert self._seen is not None
            self._seen[group.slots, tokens] = self._true
        return tokens


@dataclass(frozen=True)
class _Group:
    """Sequences whose tokens one call of each operator draws."""

    greedy: bool
    top_k: int
    penalised: bool
    rows: Tensor  # the sequences' rows of the logits, [sequences] int64
    slots: Tensor  # [sequences] int64


def to_device(values: Sequence | np.ndarray | Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The values on the device; the host does not wait for what the device still has to do."""
    host = torch.as_tensor(values, dtype=dtype)
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host.to(device)


def likeliest(logits: Tensor) -> Tensor:
    """logits.argmax(-1), the first of equal maxima; on a GPU by a kernel that splits each row over many programs."""
    if not logits.is_cuda:
        return logits.argmax(-1)
    from baichuan.kernels.argmax import argmax  # imports Triton, which only GPUs need

    return argmax(logits)


def penalise(logits: Tensor, seen: Tensor, penalty: Tensor | float) -> Tensor:
    """Logits of seen tokens divided by the penalty if positive, multiplied if negative.

    logits: [rows, vocab_size]; seen: [rows, vocab_size] bool; penalty: of all rows or [rows, 1].
    Source: Keskar et al., CTRL, section 4.1.
    """
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def draw(logits: Tensor, top_k: int, top_p: Tensor | float, draws: Tensor) -> Tensor:
    """A token by inverting the cumulative distribution of the likeliest ones.

    Of the top_k likeliest tokens (0 = all), a token is kept if all likelier ones together have a probability below
    top_p (of all rows or [rows, 1]; above 1 = all are kept).
    Source of top-p: Holtzman et al., The Curious Case of Neural Text Degeneration.
    logits: [rows, vocab_size]; draws: [rows] uniform in [0, 1) -> [rows] int64
    """
    k = top_k if 0 < top_k < logits.shape[-1] else logits.shape[-1]
    logits, tokens = logits.topk(k, dim=-1)  # likeliest first
    cumulative = logits.softmax(-1).cumsum(-1)
    kept = torch.ones_like(cumulative, dtype=torch.bool)
    kept[:, 1:] = cumulative[:, :-1] < top_p
    total = torch.where(kept, cumulative, 0).amax(-1)
    choice = (cumulative <= (draws * total)[:, None]).logical_and_(kept).sum(-1).clamp_max_(k - 1)
    choice = torch.minimum(choice, kept.sum(-1) - 1)  # after rounding, too, at most the last kept token
    return tokens.gather(-1, choice[:, None])[:, 0]
