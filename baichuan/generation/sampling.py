"""Choosing the next token from logits, on whatever device they lie."""

from __future__ import annotations

import torch
from torch import Tensor

from baichuan.config import SamplingConfig


class Sampler:
    """Draws one token a row and step.  The draws depend on the seed and the row alone: not on the device, the other
    rows or the number of ranks."""

    def __init__(self, config: SamplingConfig, prompts: list[list[int]], vocab_size: int, max_steps: int, device):
        self.config = config
        self._step = 0
        self._seen = None  # [rows, vocab_size] bool, the tokens that the repetition penalty is for
        if config.repetition_penalty != 1.0:
            self._seen = torch.zeros(len(prompts), vocab_size, dtype=torch.bool, device=device)
            for row, prompt in enumerate(prompts):
                self._seen[row, torch.tensor(prompt, device=device)] = True
        if not config.greedy:
            generators = (torch.Generator().manual_seed(config.random_seed + row) for row in range(len(prompts)))
            draws = torch.stack([torch.rand(max_steps, generator=g) for g in generators], dim=1)
            self._draws = draws.to(device)  # [max_steps, rows] in [0, 1)

    def __call__(self, logits: Tensor) -> Tensor:
        """The next token of each row.  logits: [rows, vocab_size] float32 -> [rows] int64"""
        if self._seen is not None:
            logits = penalise(logits, self._seen, self.config.repetition_penalty)
        if self.config.greedy:
            tokens = likeliest(logits)
        else:
            tokens = draw(
                logits / self.config.temperature, self.config.top_k, self.config.top_p, self._draws[self._step]
            )
        if self._seen is not None:
            self._seen.scatter_(1, tokens[:, None], True)
        self._step += 1
        return tokens


def likeliest(logits: Tensor) -> Tensor:
    """logits.argmax(-1), the first of equal ones; on a GPU by a kernel that shares a row among many programs."""
    if not logits.is_cuda:
        return logits.argmax(-1)
    from baichuan.kernels.argmax import argmax  # Triton is needed on GPUs alone

    return argmax(logits)


def penalise(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Logits of seen tokens divided by the penalty if positive, multiplied if negative.

    logits: [rows, vocab_size]; seen: [rows, vocab_size] bool.  Source: Keskar et al., CTRL, section 4.1.
    """
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def draw(logits: Tensor, top_k: int, top_p: float, draws: Tensor) -> Tensor:
    """A token by inverting the cumulative distribution of the likeliest ones.

    Of the top_k likeliest tokens (0 = all) those stay whose more likely ones have less than top_p of the probability
    together (0 or 1 = all).  logits: [rows, vocab_size]; draws: [rows] uniform in [0, 1) -> [rows] int64
    """
    k = top_k if 0 < top_k < logits.shape[-1] else logits.shape[-1]
    logits, tokens = logits.topk(k, dim=-1)  # likeliest first
    cumulative = logits.softmax(-1).cumsum(-1)
    kept = torch.ones_like(cumulative, dtype=torch.bool)
    if 0 < top_p < 1:
        kept[:, 1:] = cumulative[:, :-1] < top_p
    total = torch.where(kept, cumulative, 0).amax(-1)
    choice = (cumulative <= (draws * total)[:, None]).logical_and_(kept).sum(-1).clamp_max_(k - 1)
    choice = torch.minimum(choice, kept.sum(-1) - 1)  # rounding cannot lead past the last kept token
    return tokens.gather(-1, choice[:, None])[:, 0]
