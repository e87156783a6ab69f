"""What hf_baichuan_convert.py does: a checkpoint and texts in, a calibrated folder out."""

from __future__ import annotations

import argparse
import logging
from functools import partial
from pathlib import Path

from baichuan.calibration.convert import convert
from baichuan.calibration.request import ConvertRequest
from baichuan.cli.build_records import default_group_size
from baichuan.cli.common import check_device
from baichuan.config import ModelConfig, WeightOnly, require_range
from baichuan.errors import ConfigError
from baichuan.parallel.comm import Communicator
from baichuan.quant.weight_only import check_group_size
from baichuan.text.texts import encode_texts, read_texts
from baichuan.text.tokenizer import Tokenizer
from baichuan.weights.hub.adapter import open_merged, resolve_adapter
from baichuan.weights.hub.checkpoint import resolve_folder
from baichuan.weights.hub.config_json import MAX_CONFIG_BYTES, read_json_object, read_model_config

logger = logging.getLogger(__name__)


def convert_checkpoint(args: argparse.Namespace, comm: Communicator) -> int:
    if comm.world_size > 1:
        raise ConfigError(f"{comm.world_size} ranks were started; start hf_baichuan_convert.py once, with -tp instead")
    check_device(args, comm)
    if args.smoothquant is None and not args.calibrate_kv_cache and not args.use_weight_only:
        raise ConfigError(
            "none of -kv, -sq and --use_weight_only was given; add one, or build from the checkpoint itself with "
            "build.py --model_dir"
        )
    require_range("calib_size", args.calib_size, 1, 1 << 20)
    require_range("calib_max_length", args.calib_max_length, 1, 1 << 16)
    folder = resolve_folder(args.in_file)
    hub_config = read_json_object(folder / "config.json", MAX_CONFIG_BYTES)
    model = read_model_config(folder, args.model_version, "float32")
    request = ConvertRequest(
        Path(args.out_dir),
        model,
        partial(open_merged, folder, model, [resolve_adapter(name) for name in args.lora_dir]),
        args.tensor_parallelism,
        args.processes,
        args.smoothquant,
        args.storage_type,
        folder,
        args.device,
        weight_only(args, model),
        args.weight_only_method or ConvertRequest.method,
    )
    texts = read_texts(args.calib_dataset, args.calib_size, "--calib_dataset")
    if len(texts) < args.calib_size:
        logger.warning("%s has %d texts, fewer than calib_size %d", args.calib_dataset, len(texts), args.calib_size)
    samples = encode_texts(texts, Tokenizer(folder), args.calib_max_length, model.vocab_size)
    flags = {name: value for name, value in vars(args).items() if name != "started_s"}
    written = convert(request, samples, flags | hub_config | {"model_version": model.model_version})
    logger.info("written to %s", written)
    return 0


def weight_only(args: argparse.Namespace, model: ModelConfig) -> WeightOnly | None:
    """The integers to be found.  Raises ConfigError for a flag that would change nothing or does not fit the model."""
    precision, group_size = args.weight_only_precision or "int4", args.weight_only_group_size
    if not args.use_weight_only:
        given = {each: getattr(args, f"weight_only_{each}") for each in ("method", "precision", "symmetric")}
        flags = [flag for flag, value in given.items() if value] + ["group_size"] * (group_size is not None)
        if flags:
            raise ConfigError(f"--weight_only_{flags[0]} needs --use_weight_only; add it")
        return None
    if args.weight_only_symmetric and precision == "int8":
        raise ConfigError("--weight_only_symmetric belongs to INT4, INT8 is always symmetric; leave it out")
    if group_size is None:
        group_size = default_group_size(model, args.tensor_parallelism) if precision == "int4" else 0
    if precision == "int4":
        for name, width in (("o_proj", model.hidden_size), ("down_proj", model.intermediate_size)):
            check_group_size(group_size, width, name)
            check_group_size(group_size, width // args.tensor_parallelism, name)
    return WeightOnly(precision, group_size, args.weight_only_symmetric)
