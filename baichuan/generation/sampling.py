"""Choosing the next token from logits, on the device that holds them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from baichuan.config import SamplingConfig


def numbered_seeds(config: SamplingConfig, count: int) -> list[SamplingConfig]:
    """`count` copies of the settings, with seeds that count up from config.random_seed."""
    return [replace(config, random_seed=(config.random_seed + number) % (1 << 63)) for number in range(count)]


class Sampler:
    """Draws one token per sequence and step.

    A sequence's draws depend on its own settings, its seed, and how many tokens it has drawn: not on the device, the
    other sequences or the number of ranks.
    """

    def __init__(
        self,
        configs: Sequence[SamplingConfig],
        prompts: Sequence[Sequence[int]],
        vocab_size: int,
        max_steps: int,
        device: torch.device | str,
    ):
        """configs, prompts: one per sequence.  max_steps: the most tokens that a sequence can draw."""
        alike: dict[SamplingConfig, list[int]] = {}  # rows by settings, with the seed left out
        for row, config in enumerate(configs):
            alike.setdefault(replace(config, random_seed=0), []).append(row)
        self._groups = []  # (group, its rows of the logits; None = all rows)
        for config, rows in alike.items():
            seeds, histories = [configs[row].random_seed for row in rows], [prompts[row] for row in rows]
            group = _Group(config, seeds, histories, vocab_size, max_steps, device)
            self._groups.append((group, torch.tensor(rows, device=device) if len(alike) > 1 else None))

    def __call__(self, logits: Tensor) -> Tensor:
        """The next token of each sequence.  logits: [sequences, vocab_size] float32 -> [sequences] int64"""
        if len(self._groups) == 1:
            return self._groups[0][0].draw(logits)
        tokens = torch.empty(logits.shape[0], dtype=torch.int64, device=logits.device)
        for group, rows in self._groups:
            tokens[rows] = group.draw(logits[rows])
        return tokens


class _Group:
    """The sampling state of sequences with the same settings, which draw together."""

    def __init__(self, config: SamplingConfig, seeds, histories, vocab_size: int, max_steps: int, device):
        self.config = config
        self._seen = None  # [sequences, vocab_size] bool, tokens that the repetition penalty applies to
        if config.repetition_penalty != 1.0:
            self._seen = torch.zeros(len(histories), vocab_size, dtype=torch.bool, device=device)
            for row, history in enumerate(histories):
                self._seen[row, torch.tensor(history, device=device)] = True
        if not config.greedy:
            generators = (torch.Generator().manual_seed(seed) for seed in seeds)
            draws = torch.stack([torch.rand(max_steps, generator=generator) for generator in generators])
            self._draws = draws.to(device)  # [sequences, max_steps] in [0, 1)
            self._drawn = torch.zeros(len(seeds), 1, dtype=torch.int64, device=device)  # draws used so far

    def draw(self, logits: Tensor) -> Tensor:
        if self._seen is not None:
            logits = penalise(logits, self._seen, self.config.repetition_penalty)
        if self.config.greedy:
            tokens = likeliest(logits)
        else:
            draws = self._draws.gather(1, self._drawn)[:, 0]
            self._drawn += 1
            tokens = draw(logits / self.config.temperature, self.config.top_k, self.config.top_p, draws)
        if self._seen is not None:
            self._seen.scatter_(1, tokens[:, None], True)
        return tokens


def likeliest(logits: Tensor) -> Tensor:
    """logits.argmax(-1), the first of equal maxima; on a GPU by a kernel that splits each row over many programs."""
    if not logits.is_cuda:
        return logits.argmax(-1)
    from baichuan.kernels.argmax import argmax  # imports Triton, which only GPUs need

    return argmax(logits)


def penalise(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Logits of seen tokens divided by the penalty if positive, multiplied if negative.

    logits: [rows, vocab_size]; seen: [rows, vocab_size] bool.  Source: Keskar et al., CTRL, section 4.1.
    """
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def draw(logits: Tensor, top_k: int, top_p: float, draws: Tensor) -> Tensor:
    """A token by inverting the cumulative distribution of the likeliest ones.

    Of the top_k likeliest tokens (0 = all), a token is kept if all likelier ones together have a probability below
    top_p (0 or 1 = all are kept).  Source of top-p: Holtzman et al., The Curious Case of Neural Text Degeneration.
    logits: [rows, vocab_size]; draws: [rows] uniform in [0, 1) -> [rows] int64
    """
    k = top_k if 0 < top_k < logits.shape[-1] else logits.shape[-1]
    logits, tokens = logits.topk(k, dim=-1)  # likeliest first
    cumulative = logits.softmax(-1).cumsum(-1)
    kept = torch.ones_like(cumulative, dtype=torch.bool)
    if 0 < top_p < 1:
        kept[:, 1:] = cumulative[:, :-1] < top_p
    total = torch.where(kept, cumulative, 0).amax(-1)
    choice = (cumulative <= (draws * total)[:, None]).logical_and_(kept).sum(-1).clamp_max_(k - 1)
    choice = torch.minimum(choice, kept.sum(-1) - 1)  # after rounding, too, at most the last kept token
    return tokens.gather(-1, choice[:, None])[:, 0]
