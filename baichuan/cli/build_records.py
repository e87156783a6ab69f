"""The records that build.py's flags make."""

from __future__ import annotations

import argparse
import logging
from dataclasses import fields, replace
from typing import Any

from baichuan.cli.build_flags import ALWAYS_ON, PAGED, SIZE_FLAGS
from baichuan.cli.common import DUMMY_VERSION
from baichuan.config import DTYPES, PRESETS, BuildConfig, ModelConfig, QuantConfig, WeightOnly
from baichuan.errors import ConfigError, UnsupportedError
from baichuan.executors.backend import Backend
from baichuan.executors.registry import BACKENDS
from baichuan.quant.weight_only import fitting_group_sizes

logger = logging.getLogger(__name__)

AUTO = "torch"  # the backend that runs everywhere


def check_flags(args: argparse.Namespace, backend: Backend) -> None:
    """Raise a BaichuanError for a flag that cannot do what it says; log once which flags change nothing."""
    for name in (*PAGED, "tokens_per_block"):
        value = getattr(args, name)
        if not backend.paged and value is not None and value is not False:  # 0 is given, and 0 == False
            raise UnsupportedError(
                f"--{name} is not available: {backend.title} engines have a KV cache with a row for each sequence of a "
                f"batch; leave it out, or add --backend torch"
            )
    for name, text in (ALWAYS_ON | (PAGED if backend.paged else {})).items():
        if getattr(args, name):
            logger.info("--%s changes nothing: %s", name, text)
    owners = {flag: other for other in reversed(BACKENDS.values()) for flag in other.flags}
    for flag, owner in owners.items():
        if getattr(args, flag) and flag not in backend.flags:
            raise ConfigError(
                f"--{flag} belongs to {owner.title} and the backend is {backend.name}; add --backend {owner.name}"
            )
    if args.remove_input_padding and not backend.packed:
        raise UnsupportedError(
            f"--remove_input_padding is not available: {backend.title} networks take padded batches; leave it out"
        )
    if args.world_size > args.gpus_per_node:
        raise ConfigError(
            f"world_size {args.world_size} exceeds gpus_per_node {args.gpus_per_node} and an engine's ranks run on one "
            "node; use fewer ranks or raise --gpus_per_node"
        )
    for name in ("gpt_attention_plugin", "gemm_plugin"):
        value = getattr(args, f"use_{name}")
        if value in DTYPES and value != args.dtype:
            raise ConfigError(f"--use_{name} {value} differs from --dtype {args.dtype}; give both the same type")


def choose_backend(name: str) -> Backend:
    """`auto` resolved.  Raises UnsupportedError for a backend that is not installed."""
    if name == "auto":
        logger.info("backend %s (auto)", AUTO)
    backend = BACKENDS[AUTO if name == "auto" else name]
    backend.require_installed()
    return backend


def backend_options(args: argparse.Namespace, backend: Backend) -> Any:
    """What the backend's own flags ask for."""
    return backend.build_options({flag: getattr(args, flag) for flag in backend.flags})


def dummy_model(args: argparse.Namespace) -> ModelConfig:
    """The version's preset with the sizes that were given."""
    sizes = {field: getattr(args, flag) for flag, field in SIZE_FLAGS.items() if getattr(args, flag) is not None}
    return replace(PRESETS[args.model_version or DUMMY_VERSION], dtype=args.dtype, **sizes)


def check_sizes(args: argparse.Namespace, model: ModelConfig) -> None:
    """Raise ConfigError where a size was given that the model, unless it is dummy_model's, does not have."""
    for flag, field in SIZE_FLAGS.items():
        given = getattr(args, flag)
        if given is not None and given != getattr(model, field):
            raise ConfigError(
                f"--{flag} {given} contradicts the checkpoint's {getattr(model, field)}; "
                "sizes are for dummy weights, leave the flag out"
            )


def quant_config(args: argparse.Namespace, model: ModelConfig, found: WeightOnly | None = None) -> QuantConfig:
    """The quantisation that the flags ask for."""
    kinds = {
        "use_weight_only": args.weight_only_precision or "int8",
        "use_smooth_quant": "smooth_quant",
        "enable_fp8": "fp8",
    }
    chosen = [flag for flag in kinds if getattr(args, flag)]
    if len(chosen) > 1:
        raise ConfigError(f"--{chosen[0]} and --{chosen[1]} exclude each other; choose one")
    if args.weight_only_precision and not args.use_weight_only:
        raise ConfigError(f"--weight_only_precision {args.weight_only_precision} needs --use_weight_only; add it")
    if args.quantized_fp8_model_path and not (args.model_dir and (args.enable_fp8 or args.fp8_kv_cache)):
        raise ConfigError("--quantized_fp8_model_path needs --model_dir, and --enable_fp8 or --fp8_kv_cache; add them")
    if args.quantized_fp8_model_path and args.per_token and args.per_channel and not args.fp8_kv_cache:
        raise ConfigError(
            "--quantized_fp8_model_path is not used: FP8 with --per_token and --per_channel needs no scales; "
            "leave it out"
        )
    if args.int8_kv_cache and args.fp8_kv_cache:
        raise ConfigError("--int8_kv_cache and --fp8_kv_cache exclude each other; choose one")
    weights = kinds[chosen[0]] if chosen else "none"
    if weights == "smooth_quant" and not (args.per_token and args.per_channel):
        logger.warning(
            "SmoothQuant with one scale per tensor is far less accurate than with scales per token and per channel "
            "(MMLU 29.4 against 54.5 was reported); add --per_token --per_channel unless you know that it suffices"
        )
    group_size = args.weight_only_group_size
    if group_size is None and found and found.precision == weights:
        group_size = found.group_size
    elif group_size is None:
        group_size = default_group_size(model, args.world_size) if weights == "int4" else 0
    elif weights != "int4":
        raise ConfigError(
            f"--weight_only_group_size {group_size} needs INT4 weights; "
            "add --use_weight_only --weight_only_precision int4"
        )
    return QuantConfig(
        weights=weights,
        group_size=group_size,
        zero_points=bool(found and found.precision == weights and found.zero_points),
        quantize_lm_head=args.quantize_lm_head,
        per_token=args.per_token,
        per_channel=args.per_channel,
        kv_cache="int8" if args.int8_kv_cache else "fp8" if args.fp8_kv_cache else "none",
    )


def default_group_size(model: ModelConfig, tp_size: int) -> int:
    """INT4's group size when no flag says so: 32, the most accurate and small enough for every tensor-parallel size
    of the released models, or the row where 32 does not divide a rank's share."""
    return 32 if 32 in fitting_group_sizes(model, tp_size) else 0


def build_config(args: argparse.Namespace, backend: Backend) -> BuildConfig:
    switches = {
        "gpt_attention_plugin": args.use_gpt_attention_plugin != "off",
        "gemm_plugin": args.use_gemm_plugin != "off",
        "multi_block_mode": args.multi_block_mode != "off",
    }
    given = {name: value for name, value in vars(args).items() if value is not None}
    names = [field.name for field in fields(BuildConfig) if field.name not in (*switches, "backend")]
    return BuildConfig(backend=backend.name, **switches, **{name: given[name] for name in names if name in given})
