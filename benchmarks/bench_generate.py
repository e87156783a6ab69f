"""Generation on a GPU with dummy weights drawn there, nothing on disk: python benchmarks/bench_generate.py

    python benchmarks/bench_generate.py --model_version v1_7b v2_13b --precision float16 int8 --batch_size 1 64

Prints, for each combination, ms a decode step and tokens a second of greedy generation through session.Session, the
bytes that a step must read (weights, and keys and values at the middle of the output) over its time, as a share of the
copy bandwidth measured in this run, and the prefill's time and rate.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from dataclasses import dataclass, fields, replace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from baichuan.config import PRESETS, BuildConfig, ModelConfig, SamplingConfig
from baichuan.executors.cuda import CudaExecutor
from baichuan.executors.memory import kv_cache_bytes
from baichuan.session import Session
from benchmarks.gpu_timing import copy_bandwidth
from benchmarks.random_weights import PRECISIONS, RandomWeights

GREEDY = SamplingConfig(top_k=1, repetition_penalty=1.0, eos_id=-1)


@dataclass(frozen=True)
class Result:
    prefill_ms: float
    step_ms: float
    output_tokens_per_s: float  # of the whole run, prefill included


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_version", nargs="+", choices=tuple(PRESETS), default=["v1_7b"])
    parser.add_argument("--precision", nargs="+", choices=tuple(PRECISIONS), default=["float16"])
    parser.add_argument("--kv_cache", choices=("none", "int8", "fp8"), default="none")
    parser.add_argument("--batch_size", nargs="+", type=int, default=[1])
    parser.add_argument("--input_len", type=int, default=128)
    parser.add_argument("--output_len", type=int, default=128)
    parser.add_argument("--max_num_tokens", type=int, default=16384, help="prompt tokens of one prefill step")
    parser.add_argument("--num_layers", type=int, default=0, help="of a shortened model; 0 = all")
    parser.add_argument("--runs", type=int, default=3, help="of which the median is reported; one more warms up")
    args = parser.parse_args(argv)
    bandwidth = copy_bandwidth()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, copy {bandwidth / 1e12:.2f} TB/s")
    print(f"{args.input_len} tokens in, {args.output_len} out, KV cache {args.kv_cache}")
    print("version  precision                batch | prefill ms TFLOP/s | step ms   tok/s  TB/s of copy | run tok/s")
    for version in args.model_version:
        for precision in args.precision:
            measure_model(args, version, precision, bandwidth)
    return 0


def measure_model(args: argparse.Namespace, version: str, precision: str, bandwidth: float) -> None:
    dtype = precision if precision == "bfloat16" else "float16"
    model = replace(PRESETS[version], dtype=dtype, num_layers=args.num_layers or PRESETS[version].num_layers)
    quant = replace(PRECISIONS[precision], kv_cache=args.kv_cache)
    weights = RandomWeights(model, quant, "cuda").rank()
    executor = CudaExecutor(model, quant, weights)
    for batch in args.batch_size:
        result = measure(args, Session(executor, model, build_limits(args, batch)), batch)
        step_bytes = weight_bytes(weights) + kv_cache_bytes(
            model, quant, 1, batch, args.input_len + args.output_len // 2
        )
        rate = step_bytes / (result.step_ms / 1e3)
        flops = batch * args.input_len * 2 * layer_parameters(model) + batch * 2 * model.hidden_size * model.vocab_size
        print(
            f"{version:8s} {precision:24s} {batch:5d} | {result.prefill_ms:10.2f} "
            f"{flops / result.prefill_ms / 1e9:7.0f} | {result.step_ms:7.3f} {1e3 * batch / result.step_ms:7.0f} "
            f"{rate / 1e12:5.2f} {100 * rate / bandwidth:5.0f} % | {result.output_tokens_per_s:9.0f}",
            flush=True,
        )


def build_limits(args: argparse.Namespace, batch: int) -> BuildConfig:
    return BuildConfig(
        max_batch_size=batch,
        max_input_len=args.input_len,
        max_output_len=args.output_len,
        max_num_tokens=args.max_num_tokens,
    )


def measure(args: argparse.Namespace, session: Session, batch: int) -> Result:
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(session.model.vocab_size, (batch, args.input_len), generator=generator).tolist()
    results = []
    for _ in range(args.runs + 1):
        session.generate(prompts, GREEDY, args.output_len)
        timing = session.timing
        results.append(
            Result(
                prefill_ms=1e3 * timing.prefill_s,
                step_ms=1e3 * timing.decode_s / max(timing.decode_steps, 1),
                output_tokens_per_s=timing.new_tokens / (timing.prefill_s + timing.decode_s),
            )
        )
    return Result(
        *(statistics.median(getattr(r, field.name) for r in results[min(1, args.runs) :]) for field in fields(Result))
    )


def layer_parameters(model: ModelConfig) -> int:
    return model.num_layers * (4 * model.hidden_size**2 + 3 * model.hidden_size * model.intermediate_size)


def weight_bytes(weights) -> int:
    """Bytes of the matrices that a decode step reads; the embedding's rows are not worth counting."""
    matrices = [weights.lm_head]
    for layer in weights.layers:
        matrices += [layer.qkv, layer.o_proj, layer.gate_up, layer.down_proj]
    tensors = [tensor for matrix in matrices for tensor in vars(matrix).values() if tensor is not None]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


if __name__ == "__main__":
    sys.exit(main())
