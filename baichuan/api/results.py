"""What an LLM gives back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from baichuan.api.stop_texts import StopTexts
from baichuan.errors import UnsupportedError
from baichuan.generation.requests import Progress
from baichuan.text.tokenizer import Tokenizer

POSITIONS_AT_ONCE = 128  # in float64: 128 MB for a vocabulary of 125696


@dataclass(frozen=True, eq=False)
class Completion:
    """One prompt's continuation."""

    prompt_ids: list[int]
    ids: list[int]  # without the id that ended it
    text: str | None  # the ids as text; None where the engine has no tokenizer, and with an error
    finish_reason: str  # stop: an end id was chosen; length: all tokens asked for are there; cancelled; error
    logits: Tensor | None = None  # [steps, vocab_size] float32, a row per chosen token, the end id included
    error: str | None = None  # why this request failed, one sentence; the others have gone on

    @staticmethod
    def of(
        prompt: Sequence[int], ids: list[int], last: Progress, stop: StopTexts | None, tokenizer: Tokenizer | None
    ) -> Completion:
        """last: the request's last progress.  stop: what has looked for stop texts, if there are any"""
        if last.error or last.finish_reason is None:
            return Completion(list(prompt), ids, None, "error", error=last.error or "the request has no end")
        if stop and stop.found:
            return Completion(list(prompt), ids, stop.text, "stop", last.logits)
        text = tokenizer.decode(ids) if tokenizer and max(ids, default=0) < tokenizer.vocab_size else None
        return Completion(list(prompt), ids, text, last.finish_reason, last.logits)

    def checked(self) -> Completion:
        """The completion itself.  Raises UnsupportedError with its error, if it has one."""
        if self.error:
            raise UnsupportedError(self.error)
        return self


@dataclass(frozen=True, eq=False)
class Piece:
    """What a step adds to a text that is streamed."""

    text: str  # may be empty: a character can take several tokens
    ids: list[int]
    finish_reason: str | None = None  # Completion's, in the last piece; None before
    logits: Tensor | None = None  # Completion's, in the last piece; None before


@dataclass(frozen=True)
class Score:
    """How likely a text is: the probability of each id but the first, given those before it."""

    ids: list[int]
    log_probs: list[float]  # [len(ids) - 1] natural logarithms
    likeliest: list[bool]  # [len(ids) - 1] whether greedy decoding would have chosen the id

    @property
    def log_likelihood(self) -> float:
        return sum(self.log_probs)

    @staticmethod
    def of(ids: list[int], logits: Tensor) -> Score:
        """logits: [len(ids), vocab_size] float32, after each of the ids"""
        log_probs: list[float] = []
        likeliest: list[bool] = []
        targets = torch.tensor(ids[1:], device=logits.device)
        parts = logits[:-1].split(POSITIONS_AT_ONCE), targets.split(POSITIONS_AT_ONCE)
        for part, wanted in zip(*parts, strict=True):
            log_probs += part.double().log_softmax(-1).gather(1, wanted[:, None])[:, 0].tolist()
            likeliest += (part.argmax(-1) == wanted).tolist()
        return Score(ids, log_probs, likeliest)
