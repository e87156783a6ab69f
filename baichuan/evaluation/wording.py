"""Figures and settings in words."""

from __future__ import annotations

from typing import Any

from baichuan.config import SamplingConfig

CACHES_THAT_TELL = 2  # weights of at least this many times the cache are read from memory in every step


def shown(value: float | str | None, spec: str) -> str:
    """A figure as text.  value: from report.results(): text where it is not finite, None where it was not measured."""
    if value is None:
        return "–"
    return value if isinstance(value, str) else format(value, spec)


def report_title(side: dict[str, Any]) -> str:
    """A side's label and device.  side: from results()"""
    return f"{side['label'].removeprefix('engine, ')} on {side['device']}"


def agreement_text(values: dict[str, Any], side: dict[str, Any]) -> str | None:
    """One sentence on how alike a side and the reference are; None where there is no other.  Both: from results()"""
    agreement = side["agreement"]
    if agreement is None:
        return None
    return (
        f"{agreement['identical_summaries']} of {values['articles']} summaries are identical token for token; "
        f"on average the first {agreement['mean_identical_prefix']:.1f} tokens are. "
        f"Over {values['scored_tokens']} tokens of prompts and highlights, the mean KL divergence is "
        f"{shown(agreement['mean_kl'], '.3g')} nats and the likeliest next token is the same in "
        f"{100 * agreement['same_first_choice']:.2f} % of the places."
    )


def conditions_text(values: dict[str, Any]) -> str:
    """What the speeds were measured on, and how.  values: from results()"""
    machines: dict[str, list[str]] = {}
    for side in values["sides"]:
        count = side.get("threads")
        threads = f" with {count} thread{'s' * (count > 1)}" if count else ""
        machines.setdefault(side["device"] + threads, []).append(side["label"])
    if len(machines) == 1:
        places = next(iter(machines)) + (", the same for every side" if len(values["sides"]) > 1 else "")
    else:
        places = "; ".join(f"{', '.join(labels)} on {machine}" for machine, labels in machines.items())
    millions = max(side["parameters"] for side in values["sides"]) / 1e6
    return f"{places}; batches of {values['settings']['batch_size']}; a model of {millions:,.1f} million parameters."


def speed_text(values: dict[str, Any]) -> str | None:
    """How to read the speeds of several sides on one device: what they say about precisions, or why nothing."""
    sides = values["sides"]
    if len(sides) < 2 or len({side["device"] for side in sides}) > 1:
        return None
    largest, cache = max(side["bytes"] for side in sides), sides[0]["cache_bytes"]
    if largest < CACHES_THAT_TELL * cache:
        return (
            f"Tokens/s do not rank precisions here: what quantisation saves is reading weights from memory, and "
            f"{largest / 1e6:.1f} MB of them, the most of any side, stay in {cache / 1e6:.1f} MB of cache."
        )
    base = next((side for side in sides if side.get("quant", {}).get("weights") == "none"), sides[-1])
    others = [side for side in sides if side is not base]
    ratios = (f"{side['tokens_per_s'] / base['tokens_per_s']:.2f} for {side['label']}" for side in others)
    return f"Tokens/s over those of {base['label']}: {'; '.join(ratios)}."


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
