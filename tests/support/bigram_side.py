"""A side of an evaluation whose answers can be worked out: the next token depends on the last one alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from baichuan.evaluation.datasets import Sample
from baichuan.evaluation.request import Request
from baichuan.evaluation.rouge import Rouge
from baichuan.evaluation.summary import Evaluation
from baichuan.evaluation.tasks import make_task
from baichuan.generation.decoding import Generation


class LetterTokenizer:
    """Ids are ASCII codes, so that texts and ids can be read in a test."""

    vocab_size = 128

    def encode_literal(self, text: str) -> list[int]:
        return list(text.encode("ascii"))

    def decode(self, ids: list[int]) -> str:
        return bytes(ids).decode("ascii")


@dataclass
class BigramSide:
    """Greedy over a seeded table of logits, or a fixed summary by `answer`."""

    key: str
    seed: int = 0
    answer: Callable[[list[int]], str] | None = None
    before: Callable[[int], None] = lambda call: None  # told the number of each call of generate
    calls: int = 0

    def __post_init__(self):
        self.label = f"side {self.key}"
        self.facts = {
            "bytes": 5_000_000,
            "parameters": 1_250_000,
            "device": "a CPU",
            "cache_bytes": 1 << 20,
            "threads": 1,
            "dtype": "float32",
        }
        generator = torch.Generator().manual_seed(self.seed)
        self.table = torch.randn(128, 128, generator=generator, dtype=torch.float32)

    def check(self, prompts, sampling, max_new_tokens) -> None:
        pass

    def generate(self, prompts, sampling, max_new_tokens) -> list[Generation]:
        self.before(self.calls)
        self.calls += 1
        return [self._continue(prompt, max_new_tokens) for prompt in prompts]

    def warm_up(self, prompts, sampling, max_new_tokens) -> None:
        self.warmed = (prompts, max_new_tokens)
        self.generate(prompts, sampling, 1)

    def score(self, ids) -> Tensor:
        return self.table[torch.tensor(ids)]

    def _continue(self, prompt: list[int], max_new_tokens: int) -> Generation:
        if self.answer:
            ids = list(self.answer(prompt).encode("ascii"))
            return Generation(ids[:max_new_tokens], "stop" if len(ids) < max_new_tokens else "length")
        ids = [prompt[-1]]
        for _ in range(max_new_tokens):
            ids.append(int(self.table[ids[-1]].argmax()))
        return Generation(ids[1:], "length")


def evaluation_of(sides, samples: list[Sample], request: Request, rouge: Rouge | None, scoring: bool) -> Evaluation:
    """An evaluation over LetterTokenizer's ids; of several sides the last one is the reference."""
    tokenizer = LetterTokenizer()
    tasks = [make_task(sample, tokenizer, request.max_input_length, None) for sample in samples]
    reference = sides[-1].key if len(sides) > 1 else None
    return Evaluation(sides, tasks, request, tokenizer, rouge, scoring, reference)
