"""build.py's flags.  Every default is a dataclass's."""

from __future__ import annotations

import argparse
from dataclasses import fields

from baichuan.cli.common import DUMMY_VERSION, ENGINE_DIR, add_adapters, add_device, add_group_size, add_model_version
from baichuan.config import BACKEND_NAMES, DTYPES, BuildConfig

_BUILD = {field.name: field.default for field in fields(BuildConfig)}
SWITCH = (*DTYPES, "on", "off")

# Flags for the sizes of dummy weights, as TensorRT-LLM's example calls them, and the ModelConfig field that each sets.
SIZE_FLAGS = {
    "vocab_size": "vocab_size",
    "n_layer": "num_layers",
    "n_positions": "max_positions",
    "n_embd": "hidden_size",
    "n_head": "num_heads",
    "inter_size": "intermediate_size",
}
# Flags of that example for what every engine has here: they are accepted and change nothing.
ALWAYS_ON = {
    "enable_context_fmha": "attention over the prompt is always fused",
    "enable_context_fmha_fp32_acc": "attention always accumulates in float32",
    "strongly_typed": "every network is strongly typed",
}
# Flags for what engines with a paged KV cache always do, and others never.
PAGED = {
    "paged_kv_cache": "the KV cache of the backend torch is paged",
    "use_inflight_batching": "the backend torch takes and finishes requests at every step",
}


def add_flags(parser: argparse.ArgumentParser) -> None:
    """All of build.py's flags."""
    add_model_version(
        parser, f"must agree with the checkpoint (default: found from its files; dummy weights: {DUMMY_VERSION})"
    )
    for add in (_add_model_flags, _add_limit_flags, _add_backend_flags, _add_quantisation_flags):
        add(parser)


def _add_model_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("model")
    group.add_argument(
        "--model_dir",
        help="checkpoint in Hugging Face format: a folder or a hub id such as baichuan-inc/Baichuan2-7B-Chat",
    )
    add_adapters(group, "--model_dir")
    group.add_argument("--bin_model_dir", help="calibrated folder written by hf_baichuan_convert.py, such as OUT/1-gpu")
    group.add_argument(
        "--dtype",
        choices=DTYPES,
        default="float16",
        help="data type of activations and of weights that are not quantised",
    )
    for flag, field in SIZE_FLAGS.items():
        group.add_argument(f"--{flag}", type=int, help=f"{field} of dummy weights (default: that of the version)")
    group.add_argument("--hidden_act", choices=("silu",), help="activation function of the MLP")


def _add_limit_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("limits")
    for name, text in {
        "world_size": "number of ranks (tensor parallelism), one per GPU",
        "max_batch_size": "most sequences per call",
        "max_input_len": "most tokens per prompt",
        "max_output_len": "most new tokens per sequence",
        "max_beam_width": "most beams per sequence",
        "max_num_tokens": "most tokens in one pass through the model; 0 means max_batch_size * max_input_len",
    }.items():
        group.add_argument(f"--{name}", type=int, default=_BUILD[name], help=text)
    group.add_argument(
        "--gpus_per_node",
        type=int,
        default=8,
        help="upper limit of --world_size: all ranks of an engine run on one node",
    )


def _add_backend_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("backend")
    group.add_argument(
        "--backend",
        choices=("auto", *BACKEND_NAMES),
        default="auto",
        help="auto means torch, which runs on CPUs and GPUs; the others write one TensorRT plan per rank",
    )
    group.add_argument("--output_dir", default=ENGINE_DIR, help="folder for the engine")
    group.add_argument(
        "--logits_dtype",
        choices=("float16", "float32"),
        default=_BUILD["logits_dtype"],
        help="precision to which logits are rounded",
    )
    for name, what in (("gpt_attention_plugin", "attention"), ("gemm_plugin", "matrix products")):
        group.add_argument(
            f"--use_{name}",
            nargs="?",
            choices=SWITCH,
            const="on",
            default="on",
            help=f"compute {what} by our kernels (on, or the data type) or by the library's (off)",
        )
    group.add_argument(
        "--multi_block_mode",
        choices=("on", "off"),
        nargs="?",
        const="on",
        default="on",
        help="let decode attention split a long KV cache over several blocks of the GPU",
    )
    add_device(group, "quantises and checks the engine, and must have the memory to run it")
    group.add_argument(
        "--remove_input_padding", action="store_true", help="pack prompts without padding; torch always does"
    )
    group.add_argument("--parallel_build", action="store_true", help="build every rank in a process of its own")
    group.add_argument(
        "--no_self_check", action="store_true", help="skip the comparison of the finished engine with the checkpoint"
    )
    for name, text in ALWAYS_ON.items():
        group.add_argument(f"--{name}", action="store_true", help=text)
    for name, text in PAGED.items():
        group.add_argument(f"--{name}", action="store_true", help=f"{text}; TensorRT has none of it")
    group.add_argument(
        "--tokens_per_block", type=int, help="torch: tokens of a block of the KV cache: 16, 32, 64 or 128 (default: 64)"
    )
    group.add_argument("--visualize", action="store_true", help="TensorRT: draw the network into a file")
    group.add_argument(
        "--enable_debug_output",
        action="store_true",
        help="TensorRT: make the output of every layer an output of the network",
    )
    group.add_argument(
        "--timing_cache", help="TensorRT: file that keeps kernel timings from build to build (default: model.cache)"
    )
    group.add_argument(
        "--compute_capability", nargs="+", help="TensorRT-RTX: compute capabilities to build for, such as 8.9 12.0"
    )


def _add_quantisation_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("quantisation")
    group.add_argument("--use_weight_only", action="store_true", help="INT8 or INT4 weights, activations in --dtype")
    group.add_argument(
        "--weight_only_precision", choices=("int8", "int4"), help="weight-only: integers (default: int8)"
    )
    add_group_size(group)
    group.add_argument("--quantize_lm_head", action="store_true", help="weight-only: quantise lm_head as well")
    group.add_argument(
        "--use_smooth_quant", action="store_true", help="INT8 weights and activations; needs --bin_model_dir"
    )
    group.add_argument(
        "--per_token", "--per-token", action="store_true", help="SmoothQuant, FP8: one activation scale per token"
    )
    group.add_argument(
        "--per_channel", "--per-channel", action="store_true", help="SmoothQuant, FP8: one weight scale per channel"
    )
    group.add_argument("--int8_kv_cache", action="store_true", help="INT8 KV cache; needs --bin_model_dir")
    group.add_argument(
        "--enable_fp8",
        action="store_true",
        help="FP8 (e4m3) weights and activations; needs scales, or --per_token --per_channel",
    )
    group.add_argument("--fp8_kv_cache", action="store_true", help="FP8 (e4m3) KV cache; needs scales")
    group.add_argument(
        "--quantized_fp8_model_path",
        help="FP8 scales beside a --model_dir: an .npz file in the format of the TensorRT-LLM example",
    )
