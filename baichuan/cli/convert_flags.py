"""hf_baichuan_convert.py's flags.  Every default is a dataclass's."""

from __future__ import annotations

import argparse

from baichuan.calibration.request import METHODS, ConvertRequest
from baichuan.cli.common import add_adapters, add_device, add_group_size, add_model_version
from baichuan.config import STORAGE_TYPES
from baichuan.text.hub_dataset import CNN_DAILYMAIL


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
        type=_strength,
        metavar="ALPHA",
        help="calibrate for SmoothQuant with this strength, 0 to 1, or auto: each linear's best for each of build.py's "
        "modes, or one for all where that is better; and the KV cache as well",
    )
    _add_weight_only_flags(parser)
    parser.add_argument(
        "--storage-type",
        "--storage_type",
        "-t",
        choices=STORAGE_TYPES,
        default=ConvertRequest.storage_type,
        help="data type of weights that are not quantised",
    )
    add_adapters(parser, "--in-file")
    add_model_version(parser, "must agree with the checkpoint (default: found from its files)")
    add_device(parser, "calibrates")
    parser.add_argument(
        "--calib_dataset",
        default=CNN_DAILYMAIL,
        help="texts: a json, jsonl, csv, parquet or txt file, or the hub id of a data set",
    )
    parser.add_argument("--calib_size", type=int, default=512, help="number of texts")
    parser.add_argument("--calib_max_length", type=int, default=512, help="tokens per text; the rest is cut off")


def _add_weight_only_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--use_weight_only",
        action="store_true",
        help="find weight-only integers, and the scales of the KV cache as well",
    )
    parser.add_argument(
        "--weight_only_method",
        choices=METHODS,
        help=f"how integers are found (default: {ConvertRequest.method}, which is more accurate; awq is for INT4)",
    )
    parser.add_argument(
        "--weight_only_precision", choices=("int8", "int4"), help="weight-only: integers (default: int4)"
    )
    add_group_size(parser)
    parser.add_argument(
        "--weight_only_symmetric",
        action="store_true",
        help="INT4: no zero beside each scale, which is smaller and faster, and less accurate",
    )


def _strength(text: str) -> float | str:
    try:
        return text if text == "auto" else float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text} is neither a number nor auto; give 0 to 1, or auto") from None
