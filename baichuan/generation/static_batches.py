"""requests.Serving over a session: one static batch after another, for executors without a paged cache."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from baichuan.generation.decoding import Generation
from baichuan.generation.limits import request_error
from baichuan.generation.requests import Progress, Request, Timing
from baichuan.generation.static_session import StaticSession


class StaticBatches:
    """A batch takes the oldest waiting requests, as many as the engine has rows, and the next begins when all have
    ended.  Of a batch's requests, those with beam search have equal settings and limits, and prompts are scored alone.
    """

    def __init__(self, session: StaticSession):
        self._session = session
        self._waiting: dict[Hashable, Request] = {}
        self._batch: _Batch | None = None
        self._news: list[Progress] = []
        self._before = Timing()  # timing of the batches that have ended

    @property
    def timing(self) -> Timing:
        return self._before + self._session.timing if self._batch else self._before

    @property
    def unfinished(self) -> int:
        running = len(self._batch.rows) if self._batch else 0
        return len(self._waiting) + running + sum(each.finished for each in self._news)

    def add(self, request: Request) -> None:
        if not self.unfinished:
            self._before = Timing()
        if error := self._error(request):
            self._news.append(Progress(request.key, error=error))
        else:
            self._waiting[request.key] = request

    def cancel(self, key: Hashable) -> None:
        if self._waiting.pop(key, None) or (self._batch and self._batch.rows.pop(key, None) is not None):
            self._news.append(Progress(key, finish_reason="cancelled"))

    def step(self) -> list[Progress]:
        if not self._batch and self._waiting:
            self._batch = _Batch(self._session, self._take())
        if self._batch and self._batch.rows:
            try:
                self._news += self._batch.step()
            except BaseException:  # tokens have been told already, so that the batch cannot begin again
                error = "its batch failed or was interrupted; ask for it again"
                self._news += [Progress(key, error=error) for key in self._batch.rows]
                self._batch = None
                raise
        if self._batch and not self._batch.rows:  # ended, or cancelled before its end
            self._before += self._session.timing
            self._batch = None
        news, self._news = self._news, []
        return news

    def _take(self) -> list[Request]:
        """The requests of the next batch, in order of arrival."""
        first = next(iter(self._waiting.values()))
        alike = [each for each in self._waiting.values() if _kind(each) == _kind(first)]
        batch = [first] if first.prompt_logits else alike[: self._session.build.max_batch_size]
        for request in batch:
            del self._waiting[request.key]
        return batch

    def _error(self, request: Request) -> str | None:
        return request_error(self._session.model, self._session.build, request)


def _kind(request: Request) -> tuple:
    """What the requests of one batch have in common."""
    sampling = request.sampling
    search = (replace(sampling, random_seed=0), request.max_new_tokens) if sampling.num_beams > 1 else None
    return request.keep_logits, request.prompt_logits, search


class _Batch:
    """Requests that run together.  `rows`: the rows of those that have not ended, by key.

    Tokens are told as they come, and a request's end with its last one.  Beam searches, whose tokens are known at the
    end, and requests with logits, which come at the end, last as long as their batch.
    """

    def __init__(self, session: StaticSession, requests: Sequence[Request]):
        first, self._requests = requests[0], requests
        self.rows = {request.key: row for row, request in enumerate(requests)}
        self._made = [0] * len(requests)  # tokens so far
        self._news: list[Progress] = []
        self._prompt_logits: Tensor | None = None
        if first.prompt_logits:
            self._prompt_logits = session.score([first.prompt])[0].cpu()
        self._with_logits = first.keep_logits or first.prompt_logits
        hear = self._hear if first.sampling.num_beams == 1 else None
        prompts = [request.prompt for request in requests]
        configs = [request.sampling for request in requests]
        limits = [request.max_new_tokens for request in requests]
        self._steps = session.steps(prompts, configs, limits, hear, first.keep_logits) if max(limits) else None

    def step(self) -> list[Progress]:
        """Run one step: what is new."""
        results: list[Generation] | None = None
        if self._steps is None:
            results = [Generation([], "length")]
        else:
            try:
                next(self._steps)
            except StopIteration as end:
                results = end.value
        for key, row in list(self.rows.items()) if results else ():
            assert results is not None
            self._end(key, results[row])
        news, self._news = self._news, []
        return news

    def _hear(self, tokens: list[int | None]) -> None:
        """A step's tokens, one for each row of the batch; None where an end id came, or had come before."""
        for key, row in list(self.rows.items()):
            token = tokens[row]
            new = () if token is None else (token,)
            self._made[row] += len(new)
            reason = None
            if token is None:
                reason = "stop"
            elif self._made[row] == self._requests[row].max_new_tokens:
                reason = "length"
            if self._with_logits:
                reason = None  # it comes with the logits
            if new or reason:
                self._news.append(Progress(key, new, reason))
            if reason:
                del self.rows[key]

    def _end(self, key: Hashable, result: Generation) -> None:
        """The last progress of a request that ends with its batch: by beam search, or with logits."""
        logits = result.logits
        if self._prompt_logits is not None:
            first = logits[1:] if logits is not None else self._prompt_logits[:0]
            logits = torch.cat((self._prompt_logits, first))
        rest = tuple(result.ids[self._made[self.rows[key]] :])
        self._news.append(Progress(key, rest, result.finish_reason, logits=logits))
        del self.rows[key]
