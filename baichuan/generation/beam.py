"""Beam search: the most probable continuations, without randomness; top-k and top-p are not used."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from baichuan.config import SamplingConfig
from baichuan.generation.decoding import Choice, Generation
from baichuan.generation.sampling import penalise


@dataclass(frozen=True)
class Hypothesis:
    """One continuation of one prompt."""

    score: float  # sum of log probabilities, divided by length ** length_penalty once finished
    ids: list[int] = field(default_factory=list)
    finish_reason: str = "length"
    logits: Tensor | None = None  # [steps, vocab_size] float32, when they are kept


@dataclass
class _Prompt:
    running: list[Hypothesis]
    finished: list[Hypothesis] = field(default_factory=list)
    done: bool = False


class BeamSearch:
    """decoding.Strategy: num_beams continuations of each prompt; row b * num_beams + i of a step is beam i of prompt b.

    A prompt is done when num_beams continuations have finished and no running one scores higher at its present
    length; this is the rule of transformers with early_stopping=False.
    """

    def __init__(
        self, config: SamplingConfig, prompts: Sequence[Sequence[int]], max_new_tokens: int, keep_logits: bool
    ):
        self.config, self.max_new_tokens, self.keep_logits = config, max_new_tokens, keep_logits
        self.prompts = [_Prompt([Hypothesis(0.0)]) for _ in prompts]
        self._histories = prompts  # the repetition penalty counts their tokens as seen
        self._length = 0

    def choose(self, logits: Tensor) -> Choice | None:
        """Extend every running beam by one token: num_beams sequences per prompt.

        logits: [rows, vocab_size] float32, one row per running beam (in the first step, one per prompt)
        """
        self._length += 1
        widths = [len(prompt.running) for prompt in self.prompts]
        scores = self._log_probabilities(logits) + torch.tensor(
            [beam.score for prompt in self.prompts for beam in prompt.running], device=logits.device
        ).unsqueeze(1)
        parents, tokens, first = [], [], 0
        for prompt, width in zip(self.prompts, widths, strict=True):
            choices = self._extend_prompt(prompt, scores[first : first + width], logits[first : first + width])
            parents += [first + parent for parent, _ in choices]
            tokens += [token for _, token in choices]
            first += width
        if all(prompt.done for prompt in self.prompts):
            return None
        return Choice(torch.tensor(tokens, device=logits.device), torch.tensor(parents, device=logits.device))

    def results(self) -> list[Generation]:
        return [Generation(best.ids, best.finish_reason, best.logits) for best in self.best()]

    def best(self) -> list[Hypothesis]:
        """Each prompt's best finished continuation."""
        return [max(prompt.finished, key=lambda hypothesis: hypothesis.score) for prompt in self.prompts]

    def _extend_prompt(self, prompt: _Prompt, scores: Tensor, logits: Tensor) -> list[tuple[int, int]]:
        """Update one prompt's beams; returns (beam, token) for each of its num_beams rows of the next step.

        scores: [beams, vocab_size], the sum of log probabilities of each beam with each next token
        logits: [beams, vocab_size] float32
        """
        beams = self.config.num_beams
        if prompt.done:
            return [(0, self.config.pad_id)] * beams
        ends = {self.config.eos_id, *self.config.stop_ids}
        count = min((1 + len(ends)) * beams, scores.numel())  # so many that at least num_beams do not end
        values, places = scores.flatten().topk(count)
        running: list[Hypothesis] = []
        choices: list[tuple[int, int]] = []
        last = self._length == self.max_new_tokens
        for rank, (value, place) in enumerate(zip(values.tolist(), places.tolist(), strict=True)):
            parent, token = divmod(place, scores.shape[1])
            extended = self._extend(prompt.running[parent], value, token, token in ends, logits[parent])
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

    def _extend(self, beam: Hypothesis, score: float, token: int, ends: bool, logits: Tensor) -> Hypothesis:
        kept = None
        if self.keep_logits:
            kept = logits.cpu()[None] if beam.logits is None else torch.cat((beam.logits, logits.cpu()[None]))
        return Hypothesis(score, beam.ids if ends else [*beam.ids, token], "stop" if ends else "length", kept)

    def _finish(self, beam: Hypothesis) -> Hypothesis:
        score = beam.score / self._length**self.config.length_penalty
        return Hypothesis(score, beam.ids, beam.finish_reason, beam.logits)

    def _cannot_improve(self, finished: list[Hypothesis], running: list[Hypothesis]) -> bool:
        best = max(beam.score for beam in running) / self._length**self.config.length_penalty
        return len(finished) == self.config.num_beams and best <= finished[-1].score

    def _log_probabilities(self, logits: Tensor) -> Tensor:
        if self.config.repetition_penalty != 1.0:
            seen = torch.zeros_like(logits, dtype=torch.bool)
            rows = [
                [*history, *beam.ids]
                for history, prompt in zip(self._histories, self.prompts, strict=True)
                for beam in prompt.running
            ]
            for row, ids in zip(seen, rows, strict=True):
                row[torch.tensor(ids, device=row.device)] = True
            logits = penalise(logits, seen, self.config.repetition_penalty)
        return (logits / self.config.temperature).log_softmax(-1)
