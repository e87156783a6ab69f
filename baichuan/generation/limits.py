"""What an engine can be asked for; known from its record, before its weights are loaded."""

from __future__ import annotations

from collections.abc import Sequence

from baichuan.config import BuildConfig, ModelConfig, SamplingConfig, require_integer
from baichuan.errors import ConfigError
from baichuan.generation.requests import Request
from baichuan.text.tokenizer import check_ids


def check_requests(
    model: ModelConfig,
    build: BuildConfig,
    prompts: Sequence[Sequence[int]],
    sampling: SamplingConfig,
    max_new_tokens: int,
) -> None:
    """Raise ConfigError unless the engine can hold these requests in one static batch."""
    if not prompts or len(prompts) > build.max_batch_size:
        raise ConfigError(
            f"{len(prompts)} prompts do not fit an engine of max_batch_size {build.max_batch_size}; "
            "give 1 to that many, or build with a larger --max_batch_size"
        )
    for index, prompt in enumerate(prompts):
        check_request(model, build, prompt, sampling, max_new_tokens, f"prompt {index}")


def check_request(
    model: ModelConfig,
    build: BuildConfig,
    prompt: Sequence[int],
    sampling: SamplingConfig,
    max_new_tokens: int,
    name: str = "the prompt",
    length_name: str = "max_output_len",
) -> None:
    """Raise ConfigError unless the engine can hold this request.

    name: what the message calls the prompt.  length_name: what it calls max_new_tokens.
    """
    if sampling.num_beams > build.max_beam_width:
        raise ConfigError(
            f"num_beams {sampling.num_beams} exceeds the engine's max_beam_width {build.max_beam_width}; "
            "use fewer, or build with a larger --max_beam_width"
        )
    require_integer(length_name, max_new_tokens, "a number of tokens")
    if not 1 <= max_new_tokens <= build.max_output_len:
        raise ConfigError(
            f"{length_name} {max_new_tokens} is out of the engine's range 1 to {build.max_output_len}; "
            "ask for less, or build with a larger --max_output_len"
        )
    if not prompt:
        raise ConfigError(f"{name} is empty; give it at least one word")
    if len(prompt) > build.max_input_len:
        raise ConfigError(
            f"{name} has {len(prompt)} tokens and the engine takes 1 to {build.max_input_len}; "
            "shorten it, or build with a larger --max_input_len"
        )
    check_ids(prompt, model.vocab_size, name)


def request_error(model: ModelConfig, build: BuildConfig, request: Request) -> str | None:
    """Why the engine cannot hold a request, in one sentence; None if it can."""
    new_tokens = request.max_new_tokens or int(request.prompt_logits)
    try:
        check_request(model, build, request.prompt, request.sampling, new_tokens)
    except ConfigError as error:
        return str(error)
    return None
