"""What a call of the Python interface is given: prompts, settings, texts and folders, checked where they enter."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from baichuan.config import SamplingConfig
from baichuan.errors import BaichuanError, ConfigError
from baichuan.generation.sampling import numbered_seeds
from baichuan.text.tokenizer import is_id

Message = Mapping[str, str]  # role: "system" | "user" | "assistant"; content: its text
Prompt = str | Sequence[int] | Sequence[Message]  # a text, its ids, or a chat's messages


def is_chat(prompt: Any) -> bool:
    return isinstance(prompt, Sequence) and len(prompt) > 0 and isinstance(prompt[0], Mapping)


def prompt_list(prompts: Any) -> list[Prompt]:
    """One prompt, of whatever kind, as a list of one.  Raises ConfigError for what cannot be a prompt or hold any."""
    if isinstance(prompts, str):
        return [prompts]
    values = entries(prompts)
    return [values] if is_chat(values) or (values and is_id(values[0])) else values


def entries(values: Any) -> list:
    """A list of Python's own values, of an array's or a tensor's too.  Raises ConfigError for what is no list."""
    values = _own(values)
    if not isinstance(values, Iterable) or isinstance(values, (bytes, bytearray, Mapping)):
        raise ConfigError(
            f"a prompt is {type(values).__name__} ({values!r:.60}); "
            "give a text, a list of token ids, or a list of a chat's messages"
        )
    return [_own(each) for each in values]


def _own(value: Any) -> Any:
    return value.tolist() if hasattr(value, "tolist") else value


def settings_list(sampling: Any, default: SamplingConfig, count: int) -> list[SamplingConfig]:
    """Each prompt's settings: one for all, or none, is copied, with seeds that count up from its random_seed."""
    if sampling is None or isinstance(sampling, SamplingConfig):
        return numbered_seeds(sampling or default, count)
    configs = list(sampling) if isinstance(sampling, Iterable) else [sampling]
    if not all(isinstance(each, SamplingConfig) for each in configs):
        raise ConfigError(
            f"sampling {sampling!r:.60} is no SamplingConfig and no list of them; "
            "give a SamplingConfig, or a list with one for each prompt"
        )
    if len(configs) != count:
        raise ConfigError(f"{len(configs)} settings for {count} prompts; give one for each, or one for all")
    return configs


def stop_text_list(stop_texts: Any) -> list[str]:
    """One text as a list of one, None as an empty list."""
    if stop_texts is None:
        return []
    texts = list(stop_texts) if isinstance(stop_texts, Iterable) and not isinstance(stop_texts, str) else [stop_texts]
    if not all(isinstance(each, str) for each in texts):
        raise ConfigError(f"stop_texts {stop_texts!r:.60} is no text and no list of texts; give texts, or ()")
    return texts


def folder(name: str, path: Any) -> Path:
    if not _is_path(path):
        raise ConfigError(f"{name} {path!r:.60} is no path; give a folder's")
    return Path(path)


def tokenizer_folder(given: Any) -> Path | None:
    """Where the tokenizer is that is given as a folder or a hub id, from which it is downloaded; None for None."""
    if given is None:
        return None
    if not _is_path(given):
        raise ConfigError(f"tokenizer_dir {given!r:.60} is no path; give a checkpoint's folder or hub id, or None")
    from baichuan.weights.hub.checkpoint import resolve_tokenizer  # imports every reader of checkpoints

    try:
        return resolve_tokenizer(str(given))
    except OSError as error:  # such as a name that is too long
        why = error.strerror or error
        raise ConfigError(f"tokenizer_dir {given!r:.60} cannot be read ({why}); give another folder") from None


def _is_path(value: Any) -> bool:
    try:
        return isinstance(value, (str, os.PathLike)) and str(value) != "" and b"\0" not in os.fsencode(value)
    except ValueError:  # half a surrogate pair, which no file's name can hold
        return False


def require_callable(name: str, value: Any) -> None:
    if not callable(value):
        raise ConfigError(f"{name} {value!r:.60} cannot be called; give a function without parameters")


@contextmanager
def said_of(place: str, told: bool = True) -> Iterator[None]:
    """An error within begins with the place that it is of, such as `prompt 1`, unless told is False."""
    try:
        yield
    except BaichuanError as error:
        if not told:
            raise
        raise type(error)(f"{place}: {error}") from None
