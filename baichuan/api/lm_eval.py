"""lm-evaluation-harness over an engine: every task that it has.  The library is the optional extra `lm_eval`.

python -m baichuan.api.lm_eval run --model baichuan --model_args engine_dir=FOLDER --tasks TASK
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from lm_eval.__main__ import cli_evaluate
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from baichuan.api.llm import LLM
from baichuan.config import SamplingConfig
from baichuan.errors import BaichuanError, ConfigError
from baichuan.text.printable import one_line

NEW_TOKENS = 256  # most new tokens, where a task does not say
SAMPLING = {"temperature", "top_k", "top_p", "repetition_penalty"}
KNOWN = SAMPLING | {"until", "max_gen_toks", "do_sample"}


@register_model("baichuan")
class BaichuanLM(TemplateLM):
    """lm_eval's model of an engine.

    engine_dir, tokenizer_dir, device: LLM's.  llm: an open engine instead.
    """

    def __init__(
        self, engine_dir: str = "", tokenizer_dir: str | None = None, device: str = "auto", llm: LLM | None = None, **_
    ):
        super().__init__()
        self.llm = llm or LLM(engine_dir, tokenizer_dir, device="auto" if device is None else device)
        self.max_length = self.llm.engine.build.max_input_len

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
            texts.append([*context, *continuation][-self.max_length :])
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
        settings: dict[str, dict[str, Any]] = {}
        for number, (_, given) in enumerate(request.args for request in requests):
            groups.setdefault(repr(sorted(given.items())), []).append(number)
            settings[repr(sorted(given.items()))] = given
        texts = [""] * len(requests)
        for name, numbers in groups.items():
            made = self._generate([requests[number].args[0] for number in numbers], settings[name])
            for number, text in zip(numbers, made, strict=True):
                texts[number] = text
        return texts

    def _generate(self, contexts: Sequence[str], given: dict[str, Any]) -> list[str]:
        if unknown := sorted(set(given) - KNOWN):
            raise ConfigError(f"generation_kwargs has {unknown[0]}, which is not known; use {', '.join(sorted(KNOWN))}")
        until = given.get("until") or []
        most = min(int(given.get("max_gen_toks", NEW_TOKENS)), self.llm.engine.build.max_output_len)
        prompts = [self.tok_encode(context)[-self.max_length :] or [self.prefix_token_id] for context in contexts]
        made = self.llm.generate(
            prompts, self._sampling(given), most, stop_texts=[until] if isinstance(until, str) else until
        )
        return [each.text or "" for each in made]

    def _sampling(self, given: dict[str, Any]) -> SamplingConfig:
        """Greedy decoding, unless the task samples."""
        plain = replace(self.llm.sampling, top_k=1, top_p=0.0, temperature=1.0, repetition_penalty=1.0)
        if not given.get("do_sample", given.get("temperature", 0) > 0):
            return plain
        return replace(plain, top_k=0, **{name: given[name] for name in SAMPLING & set(given)})


if __name__ == "__main__":
    try:
        cli_evaluate()
    except BaichuanError as error:
        print(f"baichuan.api.lm_eval: error: {one_line(str(error))}", file=sys.stderr)
        sys.exit(2)
