"""Figures and settings in words."""

from __future__ import annotations

from typing import Any

from baichuan.config import SamplingConfig


def shown(value: float | str | None, spec: str) -> str:
    """A figure for people; report.results() has text for what is not finite, and None for what was not measured."""
    if value is None:
        return "–"
    return value if isinstance(value, str) else format(value, spec)


def agreement_text(values: dict[str, Any]) -> str | None:
    """One sentence on how alike the sides are; None with one side.  values: of results()."""
    agreement = values["agreement"]
    if agreement is None:
        return None
    return (
        f"{agreement['identical_summaries']} of {values['articles']} summaries are identical token for token; "
        f"on average the first {agreement['mean_identical_prefix']:.1f} tokens are. "
        f"Over {values['scored_tokens']} tokens of prompts and highlights, the mean KL divergence is "
        f"{shown(agreement['mean_kl'], '.3g')} nats and the likeliest next token is the same in "
        f"{100 * agreement['same_first_choice']:.2f} % of the places."
    )


def decoding(sampling: SamplingConfig) -> str:
    """The decoding settings in words."""
    if sampling.num_beams > 1:
        words = f"beam search with {sampling.num_beams} beams, length penalty {sampling.length_penalty:g}"
    elif sampling.greedy:
        return _with_penalty("greedy decoding", sampling)
    else:
        words = f"sampling with top_k {sampling.top_k}, top_p {sampling.top_p:g}, seed {sampling.random_seed}"
    return _with_penalty(f"{words}, temperature {sampling.temperature:g}", sampling)


def _with_penalty(words: str, sampling: SamplingConfig) -> str:
    penalty = sampling.repetition_penalty
    return words if penalty == 1.0 else f"{words}, repetition penalty {penalty:g}"
