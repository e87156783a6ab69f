"""lm-evaluation-harness over an engine: every task that it has.  The library is the optional extra `lm_eval`.

python -m baichuan.api.lm_eval run --model baichuan --model_args engine_dir=FOLDER --tasks TASK
"""

from __future__ import annotations

import logging
import sys
from dataclasses import replace
from typing import Any

from lm_eval.__main__ import cli_evaluate
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from baichuan.api.arguments import stop_text_list
from baichuan.api.llm import LLM
from baichuan.config import SamplingConfig, require_choice, require_integer, require_range
from baichuan.errors import BaichuanError, ConfigError
from baichuan.text.printable import one_line

logger = logging.getLogger(__name__)

NEW_TOKENS = 256  # most new tokens, where a task does not say
# Four names of one thing, of which the first that is given counts, as in lm_eval's own models.
LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
SEARCH = {"num_beams": 1, "repetition_penalty": 1.0, "length_penalty": 1.0}  # unless a task says
DRAW = {"temperature": 1.0, "top_k": 0, "top_p": 0.0}  # unless a task says; they count with do_sample
ARGUMENTS = ("engine_dir", "tokenizer_dir", "device", "batch_size", "max_batch_size")  # of lm_eval's --model_args
KNOWN = {"until", "do_sample", *LENGTHS, *SEARCH, *DRAW}


@register_model("baichuan")
class BaichuanLM(TemplateLM):
    """lm_eval's model of an engine.

    engine_dir, tokenizer_dir, device: LLM's.  llm: an open engine instead.
    batch_size, max_batch_size: lm_eval's, which change nothing: an engine runs as many requests as it was built for.
    """

    def __init__(
        self,
        engine_dir: str | None = None,
        tokenizer_dir: str | None = None,
        device: str | None = None,
        llm: LLM | None = None,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
        **unknown: Any,
    ):
        super().__init__()
        if unknown:
            raise ConfigError(f"the model argument {min(unknown)} is not known; use {', '.join(ARGUMENTS)}")
        opening = {"engine_dir": engine_dir, "tokenizer_dir": tokenizer_dir, "device": device}
        self.llm = _opened({name: value for name, value in opening.items() if value is not None}, llm)
        self.max_length = self.llm.engine.build.max_input_len
        self._said: set[str] = set()  # warnings, each once

    @property
    def eot_token_id(self) -> int:
        return self.llm.sampling.eos_id

    @property
    def tokenizer_name(self) -> str:
        return str(self.llm.engine.folder)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs) -> list[int]:
        return self.llm.tokenizer.encode(string)

    def _loglikelihood_tokens(self, requests, **kwargs) -> list[tuple[float, bool]]:
        """For each continuation: (log probability given its context, whose beginning is left out where both are too
        long; whether it is the greedy one)."""
        texts, lengths = [], []
        for _, context, continuation in requests:
            if len(continuation) >= self.max_length:
                raise ConfigError(
                    f"a continuation has {len(continuation)} tokens and the engine takes {self.max_length} with its "
                    "context; build with a larger --max_input_len"
                )
            texts.append(self._fitting([*context, *continuation]))
            lengths.append(len(continuation))
        scores = self.llm.score(texts)
        return [
            (sum(score.log_probs[-length:]), all(score.likeliest[-length:])) if length else (0.0, True)
            for score, length in zip(scores, lengths, strict=True)
        ]

    def loglikelihood_rolling(self, requests, disable_tqdm: bool = False) -> list[float]:
        """Log probabilities of whole texts, each token counted once: in windows, the first behind the end id."""
        found = []
        for [text] in (request.args for request in requests):
            windows = get_rolling_token_windows(self.tok_encode(text), self.prefix_token_id, self.max_length - 1, 1)
            parts = [((text, ""), *make_disjoint_window(window)) for window in windows]
            found.append(sum(value for value, _ in self._loglikelihood_tokens(parts)))
        return found

    def generate_until(self, requests, disable_tqdm: bool = False) -> list[str]:
        """Continuations; those with equal settings run together."""
        groups: dict[str, list[int]] = {}
        for number, (_, kwargs) in enumerate(request.args for request in requests):
            groups.setdefault(repr(sorted(kwargs.items())), []).append(number)
        # Every task's errors come before anything runs.
        settings = [self._settings(requests[numbers[0]].args[1]) for numbers in groups.values()]
        texts = [""] * len(requests)
        for numbers, (sampling, new_tokens, stop_texts) in zip(groups.values(), settings, strict=True):
            contexts = (self._fitting(self.tok_encode(requests[number].args[0])) for number in numbers)
            prompts = [context or [self.prefix_token_id] for context in contexts]
            made = self.llm.generate(prompts, sampling, new_tokens, stop_texts=stop_texts)
            for number, each in zip(numbers, made, strict=True):
                texts[number] = each.checked().text or ""
        return texts

    def _settings(self, kwargs: dict[str, Any]) -> tuple[SamplingConfig, int, list[str]]:
        """How tokens are chosen, how many, and what ends a text, by a task's generation_kwargs; None is not given."""
        given = {name: value for name, value in kwargs.items() if value is not None}
        if unknown := sorted(set(given) - KNOWN):
            raise ConfigError(f"generation_kwargs has {unknown[0]}, which is not known; use {', '.join(sorted(KNOWN))}")
        sampling = sampling_of(self.llm.sampling, given)
        name = next((each for each in LENGTHS if each in given), LENGTHS[0])
        new_tokens = self._new_tokens(name, given.get(name, NEW_TOKENS))
        # Raises what the engine's limits refuse.
        self.llm.requests([[self.prefix_token_id]], sampling, new_tokens, length_name=name)
        return sampling, new_tokens, stop_text_list(given.get("until"))

    def _new_tokens(self, name: str, asked: Any) -> int:
        """The length that is asked for, or the engine's where that is less."""
        most = self.llm.engine.build.max_output_len
        require_integer(name, asked, "a number of tokens")
        if asked > most:
            self._say(
                f"{name} {asked} is more than the engine's max_output_len {most}, where texts are cut; "
                f"build with --max_output_len {asked}"
            )
        return min(asked, most)

    def _fitting(self, ids: list[int]) -> list[int]:
        """As many of the last ids as the engine takes."""
        if len(ids) > self.max_length:
            self._say(
                f"some contexts are longer than the engine's max_input_len {self.max_length} and lose their beginning; "
                "build with a larger --max_input_len"
            )
        return ids[-self.max_length :]

    def _say(self, sentence: str) -> None:
        if sentence not in self._said:
            self._said.add(sentence)
            logger.warning("%s", sentence)


def _opened(given: dict[str, Any], llm: LLM | None) -> LLM:
    """`llm`, or the engine that LLM's given arguments open."""
    if llm is None:
        if "engine_dir" not in given:
            raise ConfigError("the model argument engine_dir is missing; give the folder that build.py wrote")
        return LLM(**given)
    if not isinstance(llm, LLM):
        raise ConfigError(f"the model argument llm is {llm!r:.60}, which is no LLM; give engine_dir instead")
    if given:
        raise ConfigError(f"{min(given)} and llm, an open engine, are both given; leave one of them out")
    return llm


def sampling_of(default: SamplingConfig, given: dict[str, Any]) -> SamplingConfig:
    """What a task's generation_kwargs mean: greedy decoding or beam search, unless the task samples.

    default: says which ids end a text.  As in transformers, whose names these are, the penalties count either way, and
    temperature, top_k and top_p with do_sample alone.  Raises ConfigError for values that cannot be used.
    """
    temperature = given.get("temperature", 0)
    require_range("temperature", temperature, 0.0, 100.0)
    do_sample = given.get("do_sample", temperature > 0)
    require_choice("do_sample", do_sample, (True, False))
    search, draw = ({name: given.get(name, value) for name, value in values.items()} for values in (SEARCH, DRAW))
    config = replace(default, **{**DRAW, **search, "top_k": 1})
    if not do_sample:
        return config
    if config.num_beams > 1:
        raise ConfigError(
            f"num_beams {config.num_beams} is a search and do_sample draws tokens, which do not go together here; "
            "leave one of them out"
        )
    return replace(config, **draw)


if __name__ == "__main__":
    try:
        cli_evaluate()
    except BaichuanError as error:
        print(f"baichuan.api.lm_eval: error: {one_line(str(error))}", file=sys.stderr)
        sys.exit(2)
