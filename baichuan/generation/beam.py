"""Beam search: the most probable continuations, without randomness; top-k and top-p are not used."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from baichuan.config import SamplingConfig
from baichuan.generation.decoding import Choice, Generation
from baichuan.generation.sampling import penalise, to_device


@dataclass(frozen=True)
class Hypothesis:
    """One continuation of one prompt."""

    score: float  # sum of log probabilities, divided by length ** length_penalty once finished
    ids: list[int] = field(default_factory=list)
    finish_reason: str = "length"
    logits: tuple[Tensor, ...] = ()  # each [vocab_size] float32, when they are kept


@dataclass
class _Prompt:
    running: list[Hypothesis]
    finished: list[Hypothesis] = field(default_factory=list)
    done: bool = False


class BeamSearch:
    """decoding.Strategy: num_beams continuations of each prompt; row b * num_beams + i of a step is beam i of prompt b.

    A prompt is done when num_beams continuations have finished and no running one scores higher at its present
    length; this is the rule of transformers with early_stopping=False.  In a step the host waits for the device once
    for each prompt: for the best continuations.
    """

    def __init__(
        self, config: SamplingConfig, prompts: Sequence[Sequence[int]], max_new_tokens: int, keep_logits: bool
    ):
        self.config, self.max_new_tokens, self.keep_logits = config, max_new_tokens, keep_logits
        self.prompts = [_Prompt([Hypothesis(0.0)]) for _ in prompts]
        self._histories = prompts  # the repetition penalty counts their tokens as seen
        self._seen: Tensor | None = None  # [rows, vocab_size] bool, the tokens that it applies to
        self._length = 0

    def choose(self, logits: Tensor) -> Choice | None:
        """Extend every running beam by one token: num_beams sequences per prompt.

        logits: [rows, vocab_size] float32, one row per running beam (in the first step, one per prompt)
        """
        self._length += 1
        widths = [len(prompt.running) for prompt in self.prompts]
        scores = self._log_probabilities(logits) + self._running_scores(logits.device)[:, None]
        kept = logits.to("cpu", copy=True) if self.keep_logits else None
        parents: list[int] = []
        tokens: list[int] = []
        first = 0
        for prompt, width in zip(self.prompts, widths, strict=True):
            rows = slice(first, first + width)
            choices = self._extend_prompt(prompt, scores[rows], kept[rows] if kept is not None else None)
            parents += [first + parent for parent, _ in choices]
            tokens += [token for _, token in choices]
            first += width
        if all(prompt.done for prompt in self.prompts):
            return None
        new_tokens, rows_before = to_device([*tokens, *parents], torch.int64, logits.device).split(len(tokens))
        if self._seen is not None:
            self._seen = self._seen[rows_before].scatter_(1, new_tokens[:, None], True)
        return Choice(new_tokens, parents)

    def results(self) -> list[Generation]:
        return [
            Generation(best.ids, best.finish_reason, torch.stack(best.logits) if self.keep_logits else None)
            for best in self.best()
        ]

    def best(self) -> list[Hypothesis]:
        """Each prompt's best finished continuation."""
        return [max(prompt.finished, key=lambda hypothesis: hypothesis.score) for prompt in self.prompts]

    def _extend_prompt(self, prompt: _Prompt, scores: Tensor, kept: Tensor | None) -> list[tuple[int, int]]:
        """Update one prompt's beams; returns (beam, token) for each of its num_beams rows of the next step.

        scores: [beams, vocab_size], the sum of log probabilities of each beam with each next token
        kept: [beams, vocab_size] float32, the logits on the CPU
        """
        beams = self.config.num_beams
        if prompt.done:
            return [(0, self.config.pad_id)] * beams
        ends = {self.config.eos_id, *self.config.stop_ids}
        count = min((1 + len(ends)) * beams, scores.numel())  # so many that at least num_beams do not end
        best = scores.flatten().topk(count)
        values, places = torch.stack((best.values.double(), best.indices.double())).tolist()  # exact, in one transfer
        running: list[Hypothesis] = []
        choices: list[tuple[int, int]] = []
        last = self._length == self.max_new_tokens
        for rank, (value, place) in enumerate(zip(values, places, strict=True)):
            parent, token = divmod(int(place), scores.shape[1])
            own = () if kept is None else (kept[parent],)
            extended = self._extend(prompt.running[parent], value, token, token in ends, own)
            if token in ends or last:
                if rank < beams:
                    prompt.finished.append(self._finish(extended))
            elif len(running) < beams:
                running.append(extended)
                choices.append((parent, token))
        prompt.finished = sorted(prompt.finished, key=lambda each: -each.score)[:beams]
        prompt.done = last or self._cannot_improve(prompt.finished, running)
        if prompt.done:  # its rows stay in the batch until the other prompts are done
            prompt.running = [Hypothesis(0.0)] * beams
            return [(0, self.config.pad_id)] * beams
        prompt.running = running
        return choices

    def _extend(self, beam: Hypothesis, score: float, token: int, ends: bool, kept: tuple[Tensor, ...]) -> Hypothesis:
        ids = beam.ids if ends else [*beam.ids, token]
        return Hypothesis(score, ids, "stop" if ends else "length", beam.logits + kept)

    def _finish(self, beam: Hypothesis) -> Hypothesis:
        score = beam.score / self._length**self.config.length_penalty
        return Hypothesis(score, beam.ids, beam.finish_reason, beam.logits)

    def _cannot_improve(self, finished: list[Hypothesis], running: list[Hypothesis]) -> bool:
        best = max(beam.score for beam in running) / self._length**self.config.length_penalty
        return len(finished) == self.config.num_beams and best <= finished[-1].score

    def _running_scores(self, device: torch.device) -> Tensor:
        """[rows] float32"""
        scores = [beam.score for prompt in self.prompts for beam in prompt.running]
        return to_device(scores, torch.float32, device)

    def _log_probabilities(self, logits: Tensor) -> Tensor:
        if self.config.repetition_penalty != 1.0:
            if self._seen is None:
                self._seen = torch.zeros_like(logits, dtype=torch.bool)
                for row, history in zip(self._seen, self._histories, strict=True):
                    row.index_fill_(0, to_device(history, torch.int64, logits.device), True)
            logits = penalise(logits, self._seen, self.config.repetition_penalty)
        return (logits / self.config.temperature).log_softmax(-1)
