"""The engine folder: a file per rank, the tokenizer, and config.json, which describes them and is written last."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

from baichuan import __version__
from baichuan.config import BuildConfig, EngineSpec, ModelConfig, QuantConfig, from_json, to_json
from baichuan.errors import BaichuanError, ConfigError, EngineError
from baichuan.executors.backend import Backend
from baichuan.executors.registry import BACKENDS
from baichuan.parallel.comm import Communicator
from baichuan.text.settings import TEXT_FILES
from baichuan.util import manifest
from baichuan.util.files import read_at_most
from baichuan.util.publishing import publish_folder, staged_folder
from baichuan.weights.mistaken_path import recognise

logger = logging.getLogger(__name__)

FORMAT = 2
CONFIG_NAME = "config.json"
MAX_CONFIG_BYTES = 16 << 20


@dataclass(frozen=True)
class Engine:
    """The contents of config.json."""

    folder: Path
    model: ModelConfig
    quant: QuantConfig
    build: BuildConfig
    files: dict[str, dict]  # by name: bytes and sha256, see manifest.py
    contract: dict  # what the backend's runtime needs to know of its build; empty for torch
    text_files: dict[str, dict]  # those of TEXT_FILES that the checkpoint had, described as `files` are
    dummy: bool  # the weights were made up

    @property
    def spec(self) -> EngineSpec:
        return EngineSpec(self.model, self.quant, self.build)

    @property
    def backend(self) -> Backend:
        return BACKENDS[self.build.backend]

    @property
    def digest(self) -> str:
        """SHA-256 of what the engine is, every file's content included, wherever its folder lies."""
        records = {"model": vars(self.model), "quant": vars(self.quant), "build": vars(self.build)}
        return manifest.values_digest(vars(self) | records | {"folder": None})

    def rank_file(self, rank: int) -> Path:
        return self.folder / rank_file_name(self.model, self.build, rank)


def rank_file_name(model: ModelConfig, build: BuildConfig, rank: int) -> str:
    return f"baichuan_{model.dtype}_tp{build.world_size}_rank{rank}.engine"


@contextmanager
def staging(output_dir: Path) -> Iterator[Path]:
    """An empty folder beside output_dir for the files of one build; what is still in it at the end is deleted.

    Raises ConfigError where output_dir cannot be made or holds a config.json that is no engine's, such as a
    checkpoint's, which the engine's own would overwrite.
    """
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"output_dir {output_dir} cannot be made ({error.strerror}); choose another folder") from None
    if _holds_another_config(output_dir / CONFIG_NAME):
        raise ConfigError(
            f"output_dir {output_dir} holds a {CONFIG_NAME} that is not an engine's and would be overwritten; "
            "choose another folder"
        )
    with staged_folder(output_dir) as folder:
        yield folder


def write_config(engine: Engine) -> None:
    """Write the config.json of complete rank files."""
    model, quant, build = engine.model, engine.quant, engine.build
    values = {
        "builder_config": _builder_config(model, quant, build),
        "plugin_config": _plugin_config(model, quant, build),
        "baichuan": {
            "format": FORMAT,
            "version": __version__,
            "model": to_json(model),
            "quant": to_json(quant),
            "build": to_json(build),
            "files": engine.files,
            "contract": engine.contract,
            "text_files": engine.text_files,
            "dummy": engine.dummy,
        },
    }
    (engine.folder / CONFIG_NAME).write_text(json.dumps(manifest.seal(values), indent=2) + "\n")


def publish(staged: Path, output_dir: Path) -> None:
    """Put a complete engine in the place of the one before, in one step."""
    publish_folder(staged, output_dir, _files_of(output_dir), CONFIG_NAME)


def read_engine(folder: Path) -> Engine:
    """config.json's contents, checked for edits; the rank files are not touched.  Raises EngineError."""
    path = folder / CONFIG_NAME
    if mistake := recognise(folder, "engine"):
        raise EngineError(f"engine_dir {folder} {mistake}")
    try:
        values = json.loads(read_at_most(path, MAX_CONFIG_BYTES))
    except OSError as error:
        raise EngineError(f"{path} cannot be read ({error.strerror}); build an engine into {folder} first") from None
    except (ValueError, RecursionError) as error:
        raise EngineError(f"{path} is not JSON ({error}); build the engine again") from None
    ours = values.get("baichuan") if isinstance(values, dict) else None
    if not isinstance(ours, dict):
        raise EngineError(f"{path} was not written by this build.py; build the engine again")
    if ours.get("format") != FORMAT:
        raise EngineError(f"{path} has format {ours.get('format')} and this program reads {FORMAT}; build it again")
    if not manifest.sealed(values):
        raise EngineError(f"{path} was edited after the build; build the engine again with the settings you want")
    try:
        model, quant = from_json(ModelConfig, ours["model"]), from_json(QuantConfig, ours["quant"])
        build, contract, dummy = from_json(BuildConfig, ours["build"]), ours["contract"], ours["dummy"]
        files, text_files = (_described(ours[key]) for key in ("files", "text_files"))
        if type(contract) is not dict or type(dummy) is not bool:
            raise ConfigError("contract or dummy is damaged")
    except (ConfigError, KeyError, TypeError, ValueError) as error:
        raise EngineError(f"{path} cannot be used ({error}); build the engine again") from None
    if set(files) != {rank_file_name(model, build, rank) for rank in range(build.world_size)}:  # a build deletes them
        raise EngineError(f"{path} does not list one file per rank; build the engine again")
    if not set(text_files) <= set(TEXT_FILES):
        raise EngineError(f"{path} lists text files that no engine has; build the engine again")
    return Engine(folder, model, quant, build, files, contract, text_files, dummy)


def _described(files: Any) -> dict[str, dict]:
    """The entries of files by name, as manifest.describe gives them.  Raises ConfigError."""

    def right(entry: Any) -> bool:
        if type(entry) is not dict or entry.keys() != {"bytes", "sha256"}:
            return False
        digests = entry["sha256"]
        return type(entry["bytes"]) is int and type(digests) is list and all(type(each) is str for each in digests)

    if type(files) is not dict or not all(map(right, files.values())):
        raise ConfigError("its list of files is damaged")
    return files


@contextmanager
def verified_meanwhile(
    engine: Engine, comm: Communicator, digests: Mapping[Path, manifest.Description] = MappingProxyType({})
) -> Iterator[None]:
    """Check this rank's file, its size first and its digests while the block reads it.

    At the end every rank raises EngineError when one rank's file is damaged; nothing read may be used before.
    digests: those that are being computed already, by path
    """
    path = engine.rank_file(comm.rank)
    _agree(comm, partial(manifest.require_size, path, engine.files[path.name]))
    with ThreadPoolExecutor(1) as pool:
        checked = pool.submit(manifest.verify, path, engine.files[path.name], digests.get(path))
        try:
            yield
        except EngineError:
            checked.result()  # damage explains the reader's failure: raise its error instead
            raise
        _agree(comm, checked.result)


def _agree(comm: Communicator, check: Callable[[], None]) -> None:
    """Run the check; every rank raises EngineError when it fails on one."""
    failure = None
    try:
        check()
    except BaichuanError as error:
        failure = str(error)
    if failures := [each for each in comm.gather_objects(failure) if each]:
        raise EngineError(failures[0])


def _files_of(folder: Path) -> set[str]:
    """The files of the engine in this folder, none if there is no readable one."""
    try:
        engine = read_engine(folder)
        return {*engine.files, *engine.text_files}
    except EngineError:
        return set()


def _holds_another_config(path: Path) -> bool:
    """Whether this is a JSON object that neither this build.py nor the old example's wrote."""
    try:
        values = json.loads(read_at_most(path, MAX_CONFIG_BYTES))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(values, dict) and "builder_config" not in values


def _builder_config(model: ModelConfig, quant: QuantConfig, build: BuildConfig) -> dict:
    """The section that readers of the old example's config.json expect."""
    return {
        "name": "baichuan",
        "precision": model.dtype,
        "tensor_parallel": build.world_size,
        "num_layers": model.num_layers,
        "num_heads": model.num_heads,
        "hidden_size": model.hidden_size,
        "inter_size": model.intermediate_size,
        "vocab_size": model.vocab_size,
        "hidden_act": model.hidden_act,
        "max_position_embeddings": model.max_positions,
        "max_batch_size": build.max_batch_size,
        "max_input_len": build.max_input_len,
        "max_output_len": build.max_output_len,
        "max_beam_width": build.max_beam_width,
        "max_num_tokens": build.max_num_tokens,
        "quant_mode": to_json(quant),
        "model_version": model.model_version,
    }


def _plugin_config(model: ModelConfig, quant: QuantConfig, build: BuildConfig) -> dict:
    """Which fused implementations the engine asks for: a dtype, or False."""
    return {
        "gpt_attention_plugin": model.dtype if build.gpt_attention_plugin else False,
        "gemm_plugin": model.dtype if build.gemm_plugin else False,
        "weight_only_quant_matmul_plugin": model.dtype if quant.weights in ("int8", "int4") else False,
        "smooth_quant_gemm_plugin": model.dtype if quant.weights == "smooth_quant" else False,
        "nccl_plugin": model.dtype if build.world_size > 1 else False,
        "remove_input_padding": BACKENDS[build.backend].packed,
        "paged_kv_cache": BACKENDS[build.backend].paged,
        "tokens_per_block": build.tokens_per_block if BACKENDS[build.backend].paged else 0,
        "multi_block_mode": build.multi_block_mode,
    }
