"""Which Baichuan a checkpoint is: what its files prove, and what they leave open."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path

from baichuan.config import PRESETS, VERSIONS, ModelConfig
from baichuan.errors import BaichuanError, ConfigError
from baichuan.text.tokenizer import MODEL_NAME, Tokenizer

logger = logging.getLogger(__name__)

LENGTH_KEYS = ("max_position_embeddings", "model_max_length")
MAX_GROWTH = 4096  # most rows that added tokens and padding add to a vocabulary; the two released are 61696 apart

Evidence = Mapping[str, list[str]]  # each fact -> the versions that it fits


def config_evidence(values: Mapping) -> dict[str, list[str]]:
    """What config.json's values prove."""
    evidence = {}
    if architectures := values.get("architectures"):
        fitting = [name for name, version in VERSIONS.items() if [version.architecture] == architectures]
        evidence[f"architectures {architectures}"] = fitting
    hidden, vocab = values.get("hidden_size"), values.get("vocab_size")
    if fitting := [name for name, preset in PRESETS.items() if preset.hidden_size == hidden]:
        evidence[f"hidden_size {hidden}"] = fitting
    if fitting := _with_vocabulary(vocab):
        evidence[f"vocab_size {vocab}"] = fitting
    keys = tuple(key for key in LENGTH_KEYS if values.get(key) is not None)
    fitting = [name for name, version in VERSIONS.items() if set(version.length_keys) == set(keys)]
    evidence[f"length in {' and '.join(keys) or 'no key'}"] = fitting
    if (named := values.get("model_version")) is not None:
        evidence[f"model_version {named!r}"] = [name for name in VERSIONS if name == named]
    return evidence


def tokenizer_evidence(folder: Path) -> dict[str, list[str]]:
    """What the folder's tokenizer.model proves; nothing where there is none that can be read.

    Settings that people edit, such as generation_config.json's repetition_penalty, prove nothing, and neither do the
    lengths of lm_head's rows: a NormHead's are stored as they were trained.
    """
    try:
        return _evidence_of(Tokenizer(folder))
    except BaichuanError:
        return {}


def require_tokenizer(tokenizer: Tokenizer, where: str, model: ModelConfig) -> None:
    """Raise ConfigError for a tokenizer that cannot be the model's: another version's, or of another size."""
    remedy = f"give the {MODEL_NAME} of the model's own checkpoint"
    for what, fitting in _evidence_of(tokenizer).items():
        if model.model_version not in fitting:
            raise ConfigError(f"{where} is not of a {model.model_version} model: {_fact((what, fitting))}; {remedy}")
    if not 0 <= model.vocab_size - tokenizer.vocab_size <= MAX_GROWTH:
        raise ConfigError(
            f"{where} has {tokenizer.vocab_size} pieces and the model's vocabulary {model.vocab_size}; {remedy}"
        )


def _evidence_of(tokenizer: Tokenizer) -> dict[str, list[str]]:
    prefix = "a space" if tokenizer.adds_space else "no space"
    fitting = [name for name, version in VERSIONS.items() if version.norm_head != tokenizer.adds_space]
    evidence = {f"{MODEL_NAME} with {prefix} before the text": fitting}
    if fitting := _with_vocabulary(tokenizer.vocab_size):
        evidence[f"{MODEL_NAME} of {tokenizer.vocab_size} pieces"] = fitting
    return evidence


def fitting_versions(evidence: Evidence) -> list[str]:
    """The versions that all the evidence fits."""
    return [name for name in VERSIONS if all(name in fitting for fitting in evidence.values())]


def decide_version(where: str, given: str | None, evidence: Evidence) -> str:
    """The version that `given`, if anything, and the evidence agree on; `where` names the files for messages.

    Raises ConfigError when something contradicts `given`, when the facts contradict each other, and when they fit
    several versions and none is given.
    """
    fitting = fitting_versions(evidence)
    if given is not None:
        _require_fit(where, given, evidence, fitting)
        return given
    if not fitting:
        facts = ", ".join(map(_fact, evidence.items()))
        raise ConfigError(
            f"{where} fits no version of Baichuan: {facts}; take the checkpoint from its publisher again, or correct "
            "what was changed in it"
        )
    if len(fitting) > 1:
        raise ConfigError(
            f"{where} fits {' and '.join(fitting)} alike; say which it is with --model_version {' or '.join(fitting)}"
        )
    logger.info("model_version %s, by %s", fitting[0], ", ".join(evidence))
    return fitting[0]


def _require_fit(where: str, given: str, evidence: Evidence, fitting: list[str]) -> None:
    if given not in VERSIONS:
        raise ConfigError(f"model_version {given!r} is not known; use one of {', '.join(VERSIONS)}")
    if against := [_fact(fact) for fact in evidence.items() if given not in fact[1]]:
        remedy = f"use --model_version {' or '.join(fitting)}" if fitting else "no version fits all of it"
        raise ConfigError(f"{where} contradicts model_version {given}: {', '.join(against)}; {remedy}")


def _fact(fact: tuple[str, list[str]]) -> str:
    what, fitting = fact
    return f"{what} (fits {', '.join(fitting) or 'no version'})"


def _with_vocabulary(size: int | None) -> list[str]:
    """The versions whose vocabulary has this size, or was resized to it; another size says nothing."""
    if not isinstance(size, int):
        return []
    return [name for name, preset in PRESETS.items() if 0 <= size - preset.vocab_size <= MAX_GROWTH]
