"""The Python interface: an engine folder as an object that continues, answers, streams and scores texts."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import TypeVar

import torch
from torch import Tensor

from baichuan.api.arguments import (
    Message,
    Prompt,
    entries,
    folder,
    is_chat,
    prompt_list,
    require_callable,
    said_of,
    settings_list,
    stop_text_list,
    tokenizer_folder,
)
from baichuan.api.ranks import Ranks
from baichuan.api.results import Completion, Piece, Score
from baichuan.api.stop_texts import StopTexts
from baichuan.api.traffic import Traffic
from baichuan.api.unused_settings import say_unused_arguments
from baichuan.config import SamplingConfig, require_choice
from baichuan.engine.runtime import open_serving
from baichuan.engine.text import open_text, require_text
from baichuan.engine.world import check_world, read_alike
from baichuan.errors import ConfigError, UnsupportedError
from baichuan.executors.open_settings import OpenSettings
from baichuan.generation.limits import check_request
from baichuan.generation.requests import Progress, Request, Serving, Timing
from baichuan.parallel.comm import world_of_this_process
from baichuan.text.chat import ChatRoles, build_chat_prompt, check_messages
from baichuan.text.tokenizer import Tokenizer
from baichuan.util.manifest import Description

T = TypeVar("T")

WARM_UP_TOKENS = 4  # new ones: by the prefill, a captured step and replayed ones
GIVEN_AHEAD = 4  # requests that the engine is given, as a multiple of those that it runs at once
SCORED_AT_ONCE = 2048  # tokens whose logits are held at once: 1 GB for a vocabulary of 125696


class LLM:
    """An engine.  Its record and tokenizer are read at once, its weights by load() or when they are first needed.

    engine_dir: the folder that build.py wrote.
    tokenizer_dir: a checkpoint's folder or hub id, only needed where the engine has no tokenizer.
    device: auto, cpu or cuda.
    keep_copies: whether spare GPU memory may hold dequantised copies of INT8 and INT4 weights.
    kv_cache_free_gpu_mem_fraction: most of the memory free at the first request that the KV cache takes, 0.01 to 1;
        less where the engine's limits need less.  On a CPU, of the host's memory.
    prefix_caching: whether prompts that begin alike share what is cached of their beginnings.
    model_version: a version that the engine must have; None = any.
    ranks: the processes that serve together; default: all that mpirun started.
    digests: of the engine's files, those that are being computed already, by path.
    say_unused: whether load() logs which of these arguments changes nothing with this engine or device.
    Raises EngineError for a folder that is no engine or is damaged, or where ranks have different engines.
    """

    def __init__(
        self,
        engine_dir: str | Path,
        tokenizer_dir: str | Path | None = None,
        *,
        device: str = OpenSettings.device,
        keep_copies: bool = OpenSettings.keep_copies,
        kv_cache_free_gpu_mem_fraction: float = OpenSettings.kv_cache_free_gpu_mem_fraction,
        prefix_caching: bool = True,
        model_version: str | None = None,
        ranks: Ranks | None = None,
        digests: Mapping[Path, Description] = MappingProxyType({}),
        say_unused: bool = True,
    ):
        require_choice("prefix_caching", prefix_caching, (True, False))
        self._settings = OpenSettings(device, keep_copies, kv_cache_free_gpu_mem_fraction)
        self._prefix_caching, self._digests, self._say_unused = prefix_caching, digests, say_unused
        self.ranks = ranks or Ranks(world_of_this_process())
        self.engine = read_alike(folder("engine_dir", engine_dir), self.ranks.comm)
        check_world(self.engine, self.ranks.comm, model_version)
        self.text = open_text(self.engine, tokenizer_folder(tokenizer_dir))
        self._keys, self._loading = itertools.count(), threading.RLock()
        self._opened: tuple[Serving, torch.device] | None = None

    @property
    def sampling(self) -> SamplingConfig:
        """The checkpoint's own settings, or its version's: what is used where none are given."""
        return self.text.sampling

    @property
    def tokenizer(self) -> Tokenizer:
        """Raises ConfigError where there is none."""
        return require_text(self.engine, self.text)

    def load(self) -> tuple[Serving, torch.device]:
        """The engine with its weights, which are loaded unless they are there, and where it runs.

        Under mpirun every rank calls it.
        """
        with self._loading:
            if self._opened is None:
                comm = self.ranks.comm
                if self._say_unused and comm.rank == 0:
                    say_unused_arguments(self.engine, self._settings, self._prefix_caching)
                serving, device = open_serving(self.engine, comm, self._settings, self._digests, self._prefix_caching)
                serving = self.ranks.join(serving)
                self._traffic = Traffic(serving, GIVEN_AHEAD * self.engine.build.max_batch_size)
                self._opened = serving, device
            return self._opened

    @property
    def timing(self) -> Timing:
        """How long what was done last took, from an idle engine on."""
        return self.load()[0].timing

    def lead(self, body: Callable[[], T]) -> T | None:
        """Under mpirun: body() on rank 0, while the other ranks compute their share; None there.  Else body()."""
        require_callable("body", body)
        self.load()
        return self.ranks.lead(body)

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling: SamplingConfig | Sequence[SamplingConfig] | None = None,
        max_new_tokens: int | None = None,
        keep_logits: bool = False,
        stop_texts: str | Sequence[str] | None = None,
    ) -> list[Completion]:
        """Continue each of any number of prompts, or one.

        sampling: for all prompts, with seeds that count up from random_seed; or a list, one for each prompt.
        max_new_tokens: of each continuation; default: the most that the engine was built for.
        keep_logits: keep the logits that each token was chosen from.
        stop_texts: a text ends before the first of these that it contains; its ids may go on beyond that.
        Raises ConfigError, before anything runs, for what the engine cannot hold; a request that fails while others run
        has its error in its Completion.
        """
        requests = self.requests(prompts, sampling, max_new_tokens, keep_logits, "max_new_tokens")
        stop_texts = stop_text_list(stop_texts)
        made: dict[Hashable, list[int]] = {request.key: [] for request in requests}
        ended: dict[Hashable, Progress] = {}
        stops = {request.key: StopTexts(self.tokenizer, stop_texts) for request in requests} if stop_texts else {}
        for progress in self._run(requests):
            key = progress.key
            made[key] += progress.new_ids
            if progress.finished:
                ended[key] = progress
            found = bool(stops) and stops[key].push(progress.new_ids, progress.finished)
            if found and not progress.finished and not keep_logits:  # a request that is cancelled has none
                self._traffic.cancel(key)
        tokenizer = self.text.tokenizer
        return [
            Completion.of(each.prompt, made[each.key], ended[each.key], stops.get(each.key), tokenizer)
            for each in requests
        ]

    def chat(
        self, messages: Sequence[Message], sampling: SamplingConfig | None = None, max_new_tokens: int | None = None
    ) -> Completion:
        """The answer to a chat's messages, each with a role ("system", "user" or "assistant") and a content.

        Raises ConfigError as generate() does, and UnsupportedError where the request fails.
        """
        check_messages(messages)
        return self.generate([messages], sampling, max_new_tokens)[0].checked()

    def stream(
        self,
        prompt: Prompt,
        sampling: SamplingConfig | None = None,
        max_new_tokens: int | None = None,
        keep_logits: bool = False,
        stopped: Callable[[], bool] = lambda: False,
    ) -> Iterator[Piece]:
        """The continuation of one prompt, piece by piece.  Ends early where `stopped` says so between two steps.

        Of a beam search everything comes with the last piece.  Raises ConfigError as generate() does, at once, and
        UnsupportedError where the request fails.
        """
        require_callable("stopped", stopped)
        [config] = settings_list(sampling, self.sampling, 1)
        return self._pieces(self.request(prompt, config, max_new_tokens, keep_logits, "max_new_tokens"), stopped)

    def score(self, texts: str | Sequence[str] | Sequence[Sequence[int]]) -> list[Score]:
        """How likely each text is, from its second token on.  Raises ConfigError as generate() does."""
        each, requests = prompt_list(texts), list[Request]()
        for number, text in enumerate(each):
            with said_of(f"text {number}", len(each) > 1):
                requests.append(self._scored(self.encode(text)))
                if len(requests[-1].prompt) < 2:
                    raise ConfigError("a text of 1 token has no probability; score at least two tokens")
        return [Score.of(*found) for found in self._logits(requests)]

    def logits(self, ids: Sequence[int]) -> Tensor:
        """Logits after each of the ids, [len(ids), vocab_size] float32."""
        [(_, logits)] = self._logits([self._scored(self.encode(ids))])
        return logits

    def warm_up(self, prompts: Prompt | Sequence[Prompt], sampling=None, max_new_tokens: int | None = None) -> None:
        """On a GPU, do now what the first generate() would do once: compile or load kernels, capture graphs.

        Twice: the second time a prompt's first blocks are shared, so that its step has another size.
        """
        if self.load()[1].type == "cuda":
            most = max_new_tokens or self.engine.build.max_output_len
            for _ in range(2):
                self.generate(prompts, sampling, min(WARM_UP_TOKENS, most))

    def encode(self, prompt: Prompt) -> list[int]:
        """The prompt's ids."""
        if isinstance(prompt, str):
            return self.tokenizer.encode(prompt)
        if is_chat(prompt):
            return build_chat_prompt(self.tokenizer, prompt, *self.roles)  # type: ignore[arg-type]  # all are messages
        return entries(prompt)

    @property
    def roles(self) -> ChatRoles:
        """The ids that open a chat's turns.  Raises CheckpointError for role ids that cannot be used."""
        return self.text.roles()

    def requests(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling: SamplingConfig | Sequence[SamplingConfig] | None = None,
        max_new_tokens: int | None = None,
        keep_logits: bool = False,
        length_name: str = "max_output_len",
    ) -> list[Request]:
        """generate()'s requests, whose keys are unique in this object.  Raises ConfigError as generate() does.

        length_name: what messages call max_new_tokens; default: as the scripts' flag and a prompt file's column.
        """
        each, requests = prompt_list(prompts), list[Request]()
        configs = settings_list(sampling, self.sampling, len(each))
        for number, (prompt, config) in enumerate(zip(each, configs, strict=True)):
            with said_of(f"prompt {number}", len(each) > 1):
                requests.append(self.request(prompt, config, max_new_tokens, keep_logits, length_name))
        return requests

    def request(
        self,
        prompt: Prompt,
        sampling: SamplingConfig,
        max_new_tokens: int | None = None,
        keep_logits: bool = False,
        length_name: str = "max_output_len",
    ) -> Request:
        """One of requests()."""
        require_choice("keep_logits", keep_logits, (True, False))
        if is_chat(prompt):
            sampling = replace(sampling, stop_ids=(*sampling.stop_ids, *self.roles))
        ids = tuple(self.encode(prompt))
        most = self.engine.build.max_output_len if max_new_tokens is None else max_new_tokens
        check_request(self.engine.model, self.engine.build, ids, sampling, most, length_name=length_name)
        return Request(next(self._keys), ids, sampling, int(most), keep_logits)

    def _run(self, requests: Sequence[Request], stopped: Callable[[], bool] = lambda: False) -> Iterator[Progress]:
        self.load()
        return self._traffic.progress(requests, stopped)

    def _pieces(self, request: Request, stopped: Callable[[], bool]) -> Iterator[Piece]:
        decoder = self.text.tokenizer.stream() if self.text.tokenizer else None
        for progress in self._run([request], stopped):
            if progress.error:
                raise UnsupportedError(progress.error)
            text = "".join(map(decoder.push, progress.new_ids)) if decoder else ""
            if progress.finished and decoder:
                text += decoder.finish()
            yield Piece(text, list(progress.new_ids), progress.finish_reason, progress.logits)

    def _scored(self, ids: list[int]) -> Request:
        """A request for the logits after each of the ids."""
        plain = SamplingConfig(top_k=1)
        check_request(self.engine.model, self.engine.build, ids, plain, 1, "the text")
        return Request(next(self._keys), tuple(ids), plain, 0, prompt_logits=True)

    def _logits(self, requests: Sequence[Request]) -> Iterator[tuple[list[int], Tensor]]:
        """The ids of each of _scored's requests with the logits after each, [len(ids), vocab_size] float32."""
        while requests:
            ends = itertools.accumulate(len(request.prompt) for request in requests)
            count = max(1, sum(end <= SCORED_AT_ONCE for end in ends))
            found = {progress.key: progress for progress in self._run(requests[:count])}
            for request in requests[:count]:
                progress = found.pop(request.key)
                if progress.error or progress.logits is None:
                    raise UnsupportedError(progress.error or "the engine gave no logits")
                yield list(request.prompt), progress.logits
            requests = requests[count:]
