"""What a serving loop takes and gives: requests that arrive at any time, and their progress step by step."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, fields
from typing import Protocol

from torch import Tensor

from baichuan.config import SamplingConfig


@dataclass(frozen=True)
class Request:
    """One prompt to continue, with settings and limits of its own."""

    key: Hashable  # the caller's name for it, unique among the unfinished
    prompt: tuple[int, ...]  # token ids
    sampling: SamplingConfig  # seed, end ids and number of beams included
    max_new_tokens: int  # 0 only with prompt_logits: the prompt is scored and not continued
    keep_logits: bool = False  # the logits that each new token was chosen from are wanted
    prompt_logits: bool = False  # the logits after every token of the prompt are wanted


@dataclass(frozen=True, eq=False)
class Progress:
    """What one step did for one request.  The last of a request has a finish_reason or an error."""

    key: Hashable
    new_ids: tuple[int, ...] = ()  # without the id that ended it; of a beam search all ids come with the last progress
    finish_reason: str | None = None  # stop: an end id was chosen; length: all tokens asked for are there; cancelled
    error: str | None = None  # why this request failed, one sentence; the others go on
    logits: Tensor | None = None  # with the last progress, on the CPU, float32; see Serving.step

    @property
    def finished(self) -> bool:
        return self.finish_reason is not None or self.error is not None


@dataclass
class Timing:
    """How long a generation took, in seconds of wall time."""

    prompt_tokens: int = 0
    new_tokens: int = 0  # over all sequences, end ids and beams included
    prefill_s: float = 0.0
    decode_s: float = 0.0
    decode_steps: int = 0  # steps without any part of a prompt
    decode_tokens: int = 0  # new tokens that these steps made

    def __add__(self, other: Timing) -> Timing:
        return Timing(*(getattr(self, each.name) + getattr(other, each.name) for each in fields(self)))

    def summary(self) -> str:
        """Tokens per second of both phases, for the log."""
        prefill = f"prefill {self.prompt_tokens} tokens, {self.prompt_tokens / max(self.prefill_s, 1e-9):.1f} tok/s"
        if not self.decode_steps:
            return prefill
        decode_ms = 1e3 * self.decode_s / self.decode_steps
        decoded = self.decode_tokens / max(self.decode_s, 1e-9)
        return f"{prefill}; decode {self.decode_steps} steps, {decoded:.1f} tok/s, {decode_ms:.2f} ms per step"


class Serving(Protocol):
    """Requests in, progress out, over one rank of an engine.

    Every rank makes the same calls with the same arguments in the same order and gets the same progress: where only
    rank 0 knows what arrives, its caller broadcasts that first.
    """

    def add(self, request: Request) -> None:
        """Queue a request.  One that the engine cannot hold gets its error with the next step(); nothing is raised."""

    def cancel(self, key: Hashable) -> None:
        """End a request now: its last progress says cancelled.  A key that is finished or unknown is ignored."""

    def step(self) -> list[Progress]:
        """Run one step of the model, if anything is to be run: what is new since the call before, in order of arrival.

        Progress.logits with keep_logits: [steps, vocab_size], a row per chosen token, the end id included; with
        prompt_logits: [len(prompt), vocab_size]; with both, the prompt's rows come first and the last of them, which
        is the first chosen token's, once.
        """

    @property
    def unfinished(self) -> int:
        """Requests whose last progress is still to come."""

    @property
    def timing(self) -> Timing:
        """How long the work took that was done since the last request that found nothing unfinished was added."""
