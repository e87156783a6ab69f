"""An engine's text side: its own tokenizer and generation settings, or those that the user names and that fit."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from baichuan.config import SamplingConfig
from baichuan.engine.folder import Engine
from baichuan.errors import ConfigError
from baichuan.text import chat
from baichuan.text.settings import sampling_defaults
from baichuan.text.tokenizer import MODEL_NAME, Tokenizer
from baichuan.util import manifest
from baichuan.weights.hub.version import require_tokenizer


@dataclass(frozen=True)
class EngineText:
    """What turns an engine's ids into text."""

    tokenizer: Tokenizer | None  # None: neither the engine nor the user has one
    sampling: SamplingConfig  # defaults of the flags
    folder: Path | None  # where generation_config.json is looked for

    def roles(self) -> chat.ChatRoles:
        """Raises CheckpointError for role ids that cannot be used."""
        return chat.role_ids(self.folder) if self.folder else chat.ChatRoles()


def open_text(engine: Engine, given: Path | None) -> EngineText:
    """The engine's own text files, verified, or `given`: a tokenizer.model or the folder with one.

    Raises ConfigError for a `given` that is not the engine's own tokenizer, or that cannot be its model's;
    EngineError for files of the engine that are damaged.
    """
    for name, entry in engine.text_files.items():
        manifest.verify(engine.folder / name, entry)
    own = engine.text_files.get(MODEL_NAME)
    if given and own:
        _require_own(engine, given, own)
    elif given:
        require_tokenizer(Tokenizer(given), str(given), engine.model)
    path = engine.folder if own else given
    folder = given.parent if given and not own and given.is_file() else path
    if not own and engine.text_files:
        folder = engine.folder
    tokenizer = Tokenizer(path) if path else None
    return EngineText(tokenizer, sampling_defaults(engine.model.model_version, folder), folder)


def require_text(engine: Engine, text: EngineText) -> Tokenizer:
    """The tokenizer.  Raises ConfigError, saying why there is none."""
    if text.tokenizer is None:
        why = "it has dummy weights" if engine.dummy else f"what it was built from had no {MODEL_NAME}"
        raise ConfigError(
            f"text needs a tokenizer and the engine in {engine.folder} has none, for {why}; give --tokenizer_dir, the "
            f"folder with {MODEL_NAME}, or prompts as ids (run.py --input_tokens)"
        )
    return text.tokenizer


def _require_own(engine: Engine, given: Path, own: dict) -> None:
    tokenizer, file = Tokenizer(given), given / MODEL_NAME if given.is_dir() else given
    if manifest.describe(file)["sha256"] != own["sha256"]:
        raise ConfigError(
            f"{file} ({tokenizer.vocab_size} pieces) is not the tokenizer of the engine in {engine.folder} "
            f"({Tokenizer(engine.folder).vocab_size} pieces); leave --tokenizer_dir out, the engine has its own"
        )
