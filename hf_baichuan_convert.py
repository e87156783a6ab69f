"""Calibrate a Baichuan checkpoint and write the folder that build.py --bin_model_dir reads:
python hf_baichuan_convert.py -i baichuan-inc/Baichuan2-13B-Chat -o OUT -sq 0.8 -t fp16"""

from __future__ import annotations

import argparse
import logging
import sys
from functools import partial
from pathlib import Path

from baichuan.calibration.convert import ConvertRequest, convert
from baichuan.cli.common import Parser, add_device, add_model_version, check_device, run_script
from baichuan.config import require_range
from baichuan.errors import ConfigError
from baichuan.parallel.comm import Communicator
from baichuan.text.texts import DEFAULT_DATASET, encode_texts, read_texts
from baichuan.text.tokenizer import Tokenizer
from baichuan.weights.binary.layout import STORAGE_TYPES
from baichuan.weights.hub.checkpoint import open_checkpoint, resolve_folder
from baichuan.weights.hub.config_json import MAX_CONFIG_BYTES, read_json_object, read_model_config

logger = logging.getLogger("baichuan.convert")


def main(argv: list[str] | None = None) -> int:
    parser = Parser(__doc__)
    add_flags(parser)
    return run_script(parser, argv, run)


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--in-file", "--in_file", "-i", required=True, help="checkpoint in Hugging Face format: a folder or a hub id"
    )
    parser.add_argument("--out-dir", "--out_dir", "-o", required=True, help="write the folder OUT_DIR/{tp}-gpu")
    parser.add_argument(
        "--tensor-parallelism",
        "--tensor_parallelism",
        "-tp",
        type=int,
        default=ConvertRequest.tp_size,
        help="number of ranks of the engine",
    )
    parser.add_argument(
        "--processes", "-p", type=int, default=ConvertRequest.processes, help="number of processes that write"
    )
    parser.add_argument(
        "--calibrate-kv-cache",
        "--calibrate_kv_cache",
        "-kv",
        action="store_true",
        help="calibrate the scales for an INT8 or FP8 KV cache and for FP8 weights",
    )
    parser.add_argument(
        "--smoothquant",
        "-sq",
        type=float,
        metavar="ALPHA",
        help="calibrate for SmoothQuant with this strength, 0 to 1, and the KV cache as well",
    )
    parser.add_argument(
        "--storage-type",
        "--storage_type",
        "-t",
        choices=tuple(STORAGE_TYPES),
        default=ConvertRequest.storage_type,
        help="data type of weights that are not quantised",
    )
    add_model_version(parser, "must agree with the checkpoint (default: found from its files)")
    add_device(parser, "calibrates")
    parser.add_argument(
        "--calib_dataset",
        default=DEFAULT_DATASET,
        help="texts: a json, jsonl, csv, parquet or txt file, or the hub id of a data set",
    )
    parser.add_argument("--calib_size", type=int, default=512, help="number of texts")
    parser.add_argument("--calib_max_length", type=int, default=512, help="tokens per text; the rest is cut off")


def run(args: argparse.Namespace, comm: Communicator) -> int:
    if comm.world_size > 1:
        raise ConfigError(f"{comm.world_size} ranks were started; start hf_baichuan_convert.py once, with -tp instead")
    check_device(args, comm)
    if args.smoothquant is None and not args.calibrate_kv_cache:
        raise ConfigError(
            "neither -kv nor -sq was given; add one, or build from the checkpoint itself with build.py --model_dir"
        )
    require_range("calib_size", args.calib_size, 1, 1 << 20)
    require_range("calib_max_length", args.calib_max_length, 1, 1 << 16)
    folder = resolve_folder(args.in_file)
    hub_config = read_json_object(folder / "config.json", MAX_CONFIG_BYTES)
    model = read_model_config(folder, args.model_version, "float32")
    request = ConvertRequest(
        Path(args.out_dir),
        model,
        partial(open_checkpoint, folder, model),
        args.tensor_parallelism,
        args.processes,
        args.smoothquant,
        args.storage_type,
        folder,
        args.device,
    )
    texts = read_texts(args.calib_dataset, args.calib_size, "--calib_dataset")
    if len(texts) < args.calib_size:
        logger.warning("%s has %d texts, fewer than calib_size %d", args.calib_dataset, len(texts), args.calib_size)
    samples = encode_texts(texts, Tokenizer(folder), args.calib_max_length, model.vocab_size)
    written = convert(request, samples, vars(args) | hub_config | {"model_version": model.model_version})
    logger.info("written to %s", written)
    return 0


if __name__ == "__main__":
    sys.exit(main())
