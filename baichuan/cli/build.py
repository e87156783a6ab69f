"""What build.py does: a checkpoint, or dummy weights, in; an engine out."""

from __future__ import annotations

import argparse
import logging
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

import weight
from baichuan.cli import build_records
from baichuan.cli.common import check_device
from baichuan.config import BuildConfig, ModelConfig, QuantConfig, WeightOnly
from baichuan.engine import self_check
from baichuan.engine.builder import BuildRequest, build_engine
from baichuan.engine.folder import Engine
from baichuan.engine.runtime import open_executor
from baichuan.errors import CheckpointError, ConfigError, UnsupportedError
from baichuan.executors.base import Executor
from baichuan.executors.device import resolve_device
from baichuan.executors.memory import fits_host_memory, free_device_memory
from baichuan.executors.open_settings import OpenSettings
from baichuan.parallel.comm import Communicator
from baichuan.text.settings import sampling_defaults
from baichuan.text.tokenizer import MODEL_NAME, Tokenizer
from baichuan.weights.binary.config_ini import BinaryConfig
from baichuan.weights.hub.adapter import open_adapter, resolve_adapter
from baichuan.weights.hub.checkpoint import resolve_folder
from baichuan.weights.hub.config_json import read_format
from baichuan.weights.hub.version import require_tokenizer
from baichuan.weights.imported.formats import Format
from baichuan.weights.types import needs_calibration

logger = logging.getLogger(__name__)

GPU_SLACK = 1.05  # GPU memory that the self-check needs, relative to the size of its float32 weights
CHECK_TEXT = "世界上第二高的山峰是哪座？"


def build(args: argparse.Namespace, comm: Communicator) -> int:
    if comm.world_size > 1:
        raise ConfigError(f"build.py was started on {comm.world_size} ranks; start it once, with --world_size instead")
    check_device(args, comm)
    backend = build_records.choose_backend(args.backend)
    build_records.check_flags(args, backend)
    source, model = open_source(args)
    build_records.check_sizes(args, model)
    check_text_files(source, model)
    limits = build_records.build_config(args, backend)
    say_length(model, limits)
    found = weight.stored_weight_only(source, model)
    quant = build_records.quant_config(args, model, found)
    if source.binary_folder:
        say_calibration(source.binary_folder, quant)
    elif source.hub_folder and (form := read_format(source.hub_folder)):
        say_dequantised(source.hub_folder, form, found, quant)
    device = resolve_device(args.device)
    rank_tensors = partial(weight.rank_tensors, source, model, quant, tp_size=limits.world_size, device=device)
    options = build_records.backend_options(args, backend)
    request = BuildRequest(
        Path(args.output_dir),
        model,
        quant,
        limits,
        rank_tensors,
        args.parallel_build,
        options,
        text_folder=source.folder,
        dummy=source.folder is None,
        device=device,
    )
    checks = not args.no_self_check
    build_engine(request, self_checker(source, model, device) if checks else None)
    logger.info("engine written to %s", args.output_dir)
    return 0


def open_source(args: argparse.Namespace) -> tuple[weight.WeightSource, ModelConfig]:
    """Where the weights come from, and the model that they make."""
    source = weight.WeightSource(
        resolve_folder(args.model_dir) if args.model_dir else None,
        Path(args.bin_model_dir) if args.bin_model_dir else None,
        Path(args.quantized_fp8_model_path) if args.quantized_fp8_model_path else None,
        adapters=tuple(map(resolve_adapter, args.lora_dir)),
    )
    if source.folder is None:
        logger.warning(
            "neither --model_dir nor --bin_model_dir is given: the engine gets dummy weights and its text means nothing"
        )
        return source, build_records.dummy_model(args)
    model = weight.read_model(source, args.model_version, args.dtype)
    for folder in source.adapters:
        adapter = open_adapter(folder, model)
        logger.info("%s: %d matrices changed, %d replaced", folder, len(adapter.changes), len(adapter.whole))
    return source, model


def say_length(model: ModelConfig, limits: BuildConfig) -> None:
    """Warn of sequences longer than those that the model was trained for."""
    longest, known = limits.max_input_len + limits.max_output_len, int(model.max_positions * model.rope_factor)
    if longest > known:
        logger.warning(
            "max_input_len %d and max_output_len %d make sequences of up to %d tokens, and the model was trained for "
            "%d: longer texts get worse",
            limits.max_input_len,
            limits.max_output_len,
            longest,
            known,
        )


def say_dequantised(folder: Path, form: Format, found: WeightOnly | None, quant: QuantConfig) -> None:
    """Say what becomes of the integers of a checkpoint that another tool quantised."""
    if found and (found.precision, found.group_size) == (quant.weights, quant.group_size):
        logger.info("%s: the integers that %s found are kept as they are", folder, form.label)
        return
    then = f"quantised to {quant.weights.upper()} anew" if quant.weights != "none" else "not quantised again"
    hint = ""
    if found:
        keeping = "--use_weight_only --weight_only_precision int4"
        hint = f"; {keeping} --weight_only_group_size {found.group_size} keeps the integers"
    elif quant.weights == "int4":
        hint = "; no engine has integers in this form, and INT8 or float16 keep what they mean more closely"
    logger.warning(
        "%s: the weights are dequantised from %s in %d bits, and %s%s", folder, form.label, form.bits, then, hint
    )


def say_calibration(folder: Path, quant: QuantConfig) -> None:
    """Warn where the engine uses nothing of what the folder was calibrated for."""
    config = BinaryConfig(folder)
    smoothed, found = config.smoothed, config.weight_only
    if found and found.precision == quant.weights:
        logger.info("the %s weights are those that the calibration found", found.precision.upper())
        return
    if found and quant.weights == "none":
        made_for, flags = (
            f"{found.precision.upper()} weights",
            f"--use_weight_only --weight_only_precision {found.precision}",
        )
    elif smoothed and quant.weights != "smooth_quant":
        made_for, flags = "SmoothQuant", "--use_smooth_quant"
    elif not smoothed and quant.kv_cache == "none" and not needs_calibration(quant):
        made_for, flags = "an 8-bit KV cache or FP8", "--int8_kv_cache, --fp8_kv_cache or --enable_fp8"
    else:
        return
    weights = "not quantised" if quant.weights == "none" else f"quantised to {quant.weights} alone"
    logger.warning("%s was calibrated for %s and the engine is %s; add %s", folder, made_for, weights, flags)


def self_checker(source: weight.WeightSource, model: ModelConfig, device: str = "auto") -> Callable[[Engine], None]:
    """The check of a finished engine, on `device`, against the checkpoint itself, in float32."""

    def open_rank(engine: Engine, comm: Communicator) -> Executor:
        return open_executor(engine, comm, OpenSettings(device))

    def check(engine: Engine) -> None:
        if source.folder is None:
            logger.info("self-check skipped: dummy weights leave nothing to compare the engine with")
            return
        size = self_check.float32_bytes(model)
        on_gpu = resolve_device(device) == "cuda" and size * GPU_SLACK < free_device_memory(torch.device("cuda"))
        if not (on_gpu or fits_host_memory(size)):
            logger.info("self-check skipped: the float32 weights take %.1f GB of memory", size / 1e9)
            return
        start = time.perf_counter()
        try:
            engine.backend.require_runnable(engine.contract, engine.build.world_size)
            ids = check_ids(source, model)[: engine.build.max_input_len]
            where = "cuda" if on_gpu else "cpu"
            expected = self_check.float_logits(weight.float_model(source, model, engine.build.world_size, where), ids)
            agreement = self_check.check_engine(engine, partial(open_rank, engine), expected, ids)
        except (CheckpointError, UnsupportedError) as error:
            logger.info("self-check skipped: %s", error)
            return
        logger.info(
            "self-check against the float32 weights: mean KL %.2g nats, same first choice at %.1f %% of the positions, "
            "%.1f s",
            agreement.kl,
            100 * agreement.top1,
            time.perf_counter() - start,
        )

    return check


def check_text_files(source: weight.WeightSource, model: ModelConfig) -> None:
    """Raise a BaichuanError for a tokenizer or generation settings of no use to the engine; say where it gets none."""
    if source.folder is None:
        return
    sampling_defaults(model.model_version, source.folder)
    if (source.folder / MODEL_NAME).is_file():
        require_tokenizer(Tokenizer(source.folder), str(source.folder / MODEL_NAME), model)
    else:
        logger.warning(
            "%s has no %s, so the engine gets none: run.py will need --tokenizer_dir", source.folder, MODEL_NAME
        )


def check_ids(source: weight.WeightSource, model: ModelConfig) -> list[int]:
    """The self-check's prompt: a question by the checkpoint's own tokenizer, or seeded ids where there is none."""
    if source.folder and (source.folder / MODEL_NAME).is_file():
        return Tokenizer(source.folder).encode(CHECK_TEXT)
    return self_check.default_ids(model.vocab_size)
