"""From an article to the prompt and the scored text that all sides get."""

from __future__ import annotations

from dataclasses import dataclass

from baichuan.evaluation.datasets import Sample
from baichuan.text.tokenizer import Tokenizer

PROMPT_END = " TL;DR: "


@dataclass(frozen=True)
class Task:
    """One article as token ids."""

    sample: Sample
    prompt: list[int]
    left_out: int  # tokens cut from the article's beginning
    scored: list[int]  # prompt and highlights: the text whose perplexity is measured


def prompt_text(article: str) -> str:
    """The prompt: the article, then TL;DR, as in the old example."""
    return (article + PROMPT_END).strip().replace(" n't", "n't")


def make_task(sample: Sample, tokenizer: Tokenizer, max_input_length: int, max_scored: int | None) -> Task:
    """The prompt's last max_input_length tokens; the last max_scored tokens (None = all) of these and the highlights.

    Every character of both texts counts as text: an article cannot contain control ids.
    """
    ids = tokenizer.encode_literal(prompt_text(sample.article))
    prompt = ids[-max_input_length:]
    scored = prompt + tokenizer.encode_literal(sample.highlights)
    return Task(sample, prompt, len(ids) - len(prompt), scored if max_scored is None else scored[-max_scored:])
