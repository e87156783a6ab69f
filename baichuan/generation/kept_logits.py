"""The logits that a request wants to have, collected step by step."""

from __future__ import annotations

import torch
from torch import Tensor

from baichuan.generation.readback import Readback
from baichuan.generation.scheduler import Piece


class KeptLogits:
    """The logits of a request that wants them, on the CPU."""

    def __init__(self) -> None:
        self._prompt: list[Readback] = []  # logits of the prompt's tokens, each [tokens, vocab_size]
        self._chosen: list[Readback] = []  # logits that new tokens were chosen from, each [vocab_size]
        self._seen = 0  # tokens of the prompt whose logits are in _prompt

    def see(self, piece: Piece, logits: Tensor) -> None:
        """logits: of the piece's tokens, or of the last alone"""
        request = piece.job.request
        if request.prompt_logits and not piece.decodes:
            end = min(piece.start + piece.length, len(request.prompt))
            if end > self._seen:  # else it is computed again
                self._prompt.append(Readback(logits[self._seen - piece.start : end - piece.start]))
                self._seen = end
        if request.keep_logits and piece.chooses and request.sampling.num_beams == 1:
            self._chosen.append(Readback(logits[-1]))

    def forget_after(self, chosen: int) -> None:
        """Keep the rows of so many chosen tokens."""
        del self._chosen[chosen:]

    def rows(self, chosen: int, searched: Tensor | None, keep: bool) -> Tensor | None:
        """As Serving.step says.  chosen: new tokens, the end id included; searched: a beam search's own rows"""
        made = searched
        if made is None and self._chosen:
            made = torch.stack([row.wait() for row in self._chosen[:chosen]])
        if not self._prompt:
            return made
        return torch.cat([each.wait() for each in self._prompt] + ([made[1:]] if made is not None and keep else []))
