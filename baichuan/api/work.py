"""Many prompts from a file, done by one replica of an engine or several: a queue of work, and what comes back."""

from __future__ import annotations

import hashlib
import json
import logging
import threading
import time
from array import array
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from baichuan.api.beam_settings import check_beam_settings
from baichuan.api.greedy_settings import unused_when_greedy
from baichuan.api.llm import LLM
from baichuan.api.prompt_file import read_prompt_file
from baichuan.api.result_file import ResultFile
from baichuan.config import SEEDS, SamplingConfig
from baichuan.errors import BaichuanError, ConfigError, counted
from baichuan.generation.requests import Progress, Request

logger = logging.getLogger(__name__)

AHEAD = 8  # for every 8 requests that run one waits beside them, so that a row that ends is filled at once


@dataclass(frozen=True)
class Task:
    """One line of the file, held small: there may be millions."""

    key: str
    prompt: array  # token ids
    sampling: SamplingConfig
    max_new_tokens: int

    @property
    def request(self) -> Request:
        return Request(self.key, tuple(self.prompt), self.sampling, self.max_new_tokens)

    def digest(self, engine: str) -> str:
        """What the result depends on, in short.  engine: names the weights."""
        values = [engine, list(self.prompt), asdict(self.sampling), self.max_new_tokens]
        return hashlib.sha256(json.dumps(values).encode()).hexdigest()[:16]


def read_tasks(
    llm: LLM, path: Path, sampling: SamplingConfig, max_new_tokens: int, as_chat: Callable[[str], Any] | None = None
) -> list[Task]:
    """The file's prompts, each checked.  Seeds count up from sampling.random_seed where a line has none of its own.

    as_chat: the messages that a text prompt stands for; None: the text is continued.
    Logs each kind of setting that greedy decoding does not use, once, with the first line that has it of its own.
    Raises ConfigError with the number of the first line that the engine cannot hold, or that has a setting of its own
    which changes nothing with the number of beams that it has or inherits.
    """
    tasks: list[Task] = []
    first, count = dict[str, str](), Counter[str]()  # of each sentence about unused settings: its first line, its lines
    for number, line in enumerate(read_prompt_file(path)):
        prompt = as_chat(line.prompt) if as_chat and isinstance(line.prompt, str) else line.prompt
        own: dict[str, Any] = {"random_seed": (sampling.random_seed + number) % SEEDS}
        most = line.settings.get("max_output_len", max_new_tokens)
        try:
            config = replace(sampling, **{**own, **line.sampling(sampling)})
            check_beam_settings(line.settings, config.num_beams)
            request = llm.request(prompt, config, most)
        except BaichuanError as error:
            raise ConfigError(f"{line.place}: {error}") from None
        tasks.append(Task(line.key, array("i", request.prompt), request.sampling, most))
        for sentence in unused_when_greedy(line.settings, config):
            first.setdefault(sentence, line.place)
            count[sentence] += 1
    for sentence, place in first.items():
        others = f" and {counted(count[sentence] - 1, 'other')}" if count[sentence] > 1 else ""
        logger.info("%s%s: %s", place, others, sentence)
    return tasks


@dataclass(frozen=True)
class Result:
    """What became of a task."""

    key: str
    prompt_tokens: int
    ids: tuple[int, ...]
    finish_reason: str | None
    error: str | None

    def values(self, digest: str, text: str | None) -> dict[str, Any]:
        """The result's line."""
        if self.error:
            return {"key": self.key, "request": digest, "error": self.error}
        made = {"finish_reason": self.finish_reason, "prompt_tokens": self.prompt_tokens, "ids": list(self.ids)}
        return {"key": self.key, "request": digest, **({} if text is None else {"text": text}), **made}


class Queue:
    """Rank 0's: what is left to do, and where results go.  Any thread may call it."""

    def __init__(self, llm: LLM, tasks: Sequence[Task], results: ResultFile, replicas: int):
        """Raises ConfigError where the file's results are of other prompts, settings or weights."""
        self._engine = json.dumps([file["sha256"] for _, file in sorted(llm.engine.files.items())])
        self._tokenizer, self._results, self._replicas = llm.text.tokenizer, results, replicas
        self._tasks = {task.key: task for task in tasks}
        for key, request in results.done.items():
            if self._tasks[key].digest(self._engine) != request:
                raise results.of_another_run(key)
        self._left = [task for task in reversed(tasks) if task.key not in results.done]
        self._lock = threading.Lock()
        self._started_s: float | None = None
        self.total, self.failed, self.tokens = len(self._left), 0, 0
        self.on_result: Callable[[], None] = lambda: None  # called after each result

    def pull(self, count: int, wait: bool = True) -> list[Request]:
        """Up to `count` requests, none where the work is done.

        No replica takes more than its share of what is left, so that all end at about the same time.
        """
        with self._lock:
            self._started_s = self._started_s or time.monotonic()
            share = min(count, -(-len(self._left) // self._replicas))
            return [self._left.pop().request for _ in range(share)]

    def push(self, results: Sequence[Result]) -> None:
        """Write what became of requests."""
        with self._lock:
            for result in results:
                text = None
                if self._tokenizer and max(result.ids, default=0) < self._tokenizer.vocab_size:
                    text = self._tokenizer.decode(result.ids)
                self._results.write(result.values(self._tasks[result.key].digest(self._engine), text))
                self.failed += result.error is not None
                self.tokens += len(result.ids)
                self.on_result()

    def answer(self, message: int | Sequence[Result]) -> list[Request] | None:
        """pull or push, for another replica."""
        if isinstance(message, int):
            return self.pull(message)
        self.push(message)
        return None

    def put_in_order(self) -> None:
        """Give the results, when all are there, the order of the prompts."""
        self._results.put_in_order(list(self._tasks))

    @property
    def seconds(self) -> float:
        """Since the first request was pulled."""
        return time.monotonic() - (self._started_s or time.monotonic())

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / max(self.seconds, 1e-9)


def work(
    llm: LLM,
    pull: Callable[[int, bool], Sequence[Request] | None],
    push: Callable[[Sequence[Result]], None],
) -> None:
    """Do what the queue has until it is empty; as many requests at once as the engine was built for.

    pull: Queue.pull, or an asker's: whether to wait for the queue's answer; None = it is not there yet.
    """
    serving, _ = llm.load()
    rows = llm.engine.build.max_batch_size
    room = rows + rows // AHEAD
    running: dict[Any, Request] = {}
    made: dict[Any, list[int]] = {}
    empty = False
    while True:
        if not empty and len(running) < room:
            pulled = pull(room - len(running), not running)
            empty = pulled is not None and not pulled
            for request in pulled or ():
                running[request.key], made[request.key] = request, []
                serving.add(request)
        if not running:
            return
        done: list[Result] = []
        for progress in serving.step():
            made[progress.key] += progress.new_ids
            if progress.finished:
                done.append(_result(running.pop(progress.key), made.pop(progress.key), progress))
        if done:
            push(done)


def _result(request: Request, ids: list[int], last: Progress) -> Result:
    return Result(str(request.key), len(request.prompt), tuple(ids), last.finish_reason, last.error)
