"""Generation on GPUs with dummy weights drawn there, nothing on disk: python benchmarks/bench_generate.py

    python benchmarks/bench_generate.py --model_version v1_7b v2_13b --precision float16 int8 --batch_size 1 64
    mpirun -n 2 python benchmarks/bench_generate.py --tp 1 2

Prints, for each combination, ms per decode step and tokens per second of greedy generation through session.Session, the
bytes that a step must read on each GPU (weights, and keys and values at the middle of the output) over its time, as a
share of the copy bandwidth measured in this run, and the prefill's time and rate on each GPU.  With --tp 1 N the first
rank measures alone while the others wait, then all measure together.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from baichuan.api.llm import WARM_UP_TOKENS
from baichuan.cli.common import Parser, run_script
from baichuan.config import PRESETS, BuildConfig, ModelConfig, SamplingConfig
from baichuan.errors import ConfigError
from baichuan.executors.cuda.comm import Nccl
from baichuan.executors.cuda.executor import CudaExecutor
from baichuan.executors.cuda.ops import Switches
from baichuan.executors.device import gpu_of_rank
from baichuan.executors.memory import kv_cache_bytes
from baichuan.generation.session import Session
from baichuan.parallel.comm import Communicator, Solo
from baichuan.util.files import atomic_path
from benchmarks.gpu_timing import copy_bandwidth, require_gpu
from benchmarks.random_weights import PRECISIONS, RandomWeights, add_engine_flags, add_model_flags

GREEDY = SamplingConfig(top_k=1, repetition_penalty=1.0, eos_id=-1)


@dataclass(frozen=True)
class Result:
    """One line of the table."""

    model_version: str
    precision: str
    kv_cache: str
    batch_size: int
    input_len: int
    output_len: int
    tp_size: int
    prefill_ms: float
    prefill_tflops: float  # on each GPU
    step_ms: float
    limit_ms: float  # time to read the step's bytes at the copy bandwidth
    run_tokens_per_s: float  # new tokens over prefill and decode

    @property
    def line(self) -> str:
        tokens_per_s, share = 1e3 * self.batch_size / self.step_ms, self.limit_ms / self.step_ms
        return (
            f"{self.model_version:7s} {self.precision:22s} {self.batch_size:5d} {self.tp_size:3d} | "
            f"{self.prefill_ms:10.2f} {self.prefill_tflops:7.0f} | "
            f"{self.step_ms:7.3f} {tokens_per_s:7.0f} {share:7.0%} | {self.run_tokens_per_s:9.0f}"
        )


TITLES = "version precision              batch  tp | prefill ms TFLOP/s | step ms   tok/s of copy | run tok/s | to tp 1"


def main(argv: list[str] | None = None) -> int:
    parser = Parser(__doc__)
    add_model_flags(parser)
    parser.add_argument("--tp", nargs="+", type=int, help="1, the number of ranks, or both; default: all ranks")
    parser.add_argument("--output_len", type=int, default=128, help="tokens of each continuation")
    parser.add_argument("--runs", type=int, default=3, help="of which the median is reported; two more warm up")
    add_engine_flags(parser)  # chart.py draws the results
    return run_script(parser, argv, bench)


def bench(args: argparse.Namespace, host: Communicator) -> int:
    require_gpu("bench_generate.py", "bench_cpu.py measures the CPU")
    sizes = sorted(set(args.tp or [host.world_size]))
    if not set(sizes) <= {1, host.world_size}:
        raise ConfigError(
            f"--tp {sizes[-1]} is neither 1 nor the number of ranks, {host.world_size}; "
            f"start it with mpirun -n {sizes[-1]}"
        )
    device = gpu_of_rank(host)
    torch.cuda.set_device(device)
    comms = {tp: Solo() if tp == 1 else Nccl(host, device) for tp in sizes}
    bandwidth = copy_bandwidth()
    if host.rank == 0:
        print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, copy {bandwidth / 1e12:.2f} TB/s")
        print(f"{args.input_len} tokens in, {args.output_len} out, KV cache {args.kv_cache}")
        print(TITLES, flush=True)
    results: list[Result] = []
    for version in args.model_version:
        for precision in args.precision:
            for tp in sizes:
                if host.rank < tp:
                    measure_model(args, version, precision, comms[tp], device, bandwidth, results)
                host.gather_objects(None)  # a barrier: ranks without work wait here
                if args.json and host.rank == 0:
                    write(args.json, bandwidth, results)
    return 0


def write(path: Path, bandwidth: float, results: list[Result]) -> None:
    """Write the results so far, so that a run that ends early keeps them."""
    facts = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "copy_bytes_per_s": bandwidth}
    with atomic_path(path) as part:
        part.write_text(json.dumps(facts | {"results": [asdict(each) for each in results]}, indent=1) + "\n")


def measure_model(
    args: argparse.Namespace,
    version: str,
    precision: str,
    comm: Communicator,
    device: torch.device,
    bandwidth: float,
    results: list[Result],
) -> None:
    """Measure every batch size of one model; rank 0 prints the lines and adds them to `results`."""
    dtype = precision if precision == "bfloat16" else "float16"
    model = replace(PRESETS[version], dtype=dtype, num_layers=args.num_layers or PRESETS[version].num_layers)
    model.check_tensor_parallel(comm.world_size)
    quant = replace(PRECISIONS[precision], kv_cache=args.kv_cache)
    weights = RandomWeights(model, quant, device).rank(comm.world_size, comm.rank)
    executor = CudaExecutor(model, quant, weights, comm, Switches(keep_copies=not args.no_weight_copies))
    for batch in args.batch_size:
        prefill_ms, step_ms, rate = measure(args, Session(executor, model, build_limits(args, comm, batch)), batch)
        middle = args.input_len + args.output_len // 2
        step_bytes = weight_bytes(weights) + kv_cache_bytes(model, quant, comm.world_size, batch, middle)
        flops = batch * args.input_len * 2 * layer_parameters(model) + batch * 2 * model.hidden_size * model.vocab_size
        result = Result(
            model_version=version,
            precision=precision,
            kv_cache=args.kv_cache,
            batch_size=batch,
            input_len=args.input_len,
            output_len=args.output_len,
            tp_size=comm.world_size,
            prefill_ms=prefill_ms,
            prefill_tflops=flops / comm.world_size / prefill_ms / 1e9,
            step_ms=step_ms,
            limit_ms=1e3 * step_bytes / bandwidth,
            run_tokens_per_s=rate,
        )
        results.append(result)
        if comm.rank == 0:
            print(result.line + " | " + ratio_to_one(result, results), flush=True)


def ratio_to_one(result: Result, results: list[Result]) -> str:
    """The step's time over that of the same step on one GPU in the same run, if it was measured."""
    same = replace(result, tp_size=1)
    keys = ("model_version", "precision", "batch_size", "tp_size")
    ones = [each for each in results if all(getattr(each, key) == getattr(same, key) for key in keys)]
    return f"{result.step_ms / ones[0].step_ms:.2f} x" if ones and result.tp_size > 1 else ""


def build_limits(args: argparse.Namespace, comm: Communicator, batch: int) -> BuildConfig:
    return BuildConfig(
        world_size=comm.world_size,
        max_batch_size=batch,
        max_input_len=args.input_len,
        max_output_len=args.output_len,
        max_num_tokens=args.max_num_tokens,
    )


def measure(args: argparse.Namespace, session: Session, batch: int) -> tuple[float, float, float]:
    """Medians over the runs: ms of the prefill, ms of a decode step, new tokens per second of the whole run."""
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(session.model.vocab_size, (batch, args.input_len), generator=generator).tolist()
    runs = []
    if args.runs:  # PyTorch loads what a process's second request needs for the first time
        session.generate(prompts, GREEDY, min(args.output_len, WARM_UP_TOKENS))
    for _ in range(args.runs + 1):
        session.generate(prompts, GREEDY, args.output_len)
        timing = session.timing
        step_ms = 1e3 * timing.decode_s / max(timing.decode_steps, 1)
        rate = batch * args.output_len / (timing.prefill_s + timing.decode_s)
        runs.append((1e3 * timing.prefill_s, step_ms, rate))
    return tuple(statistics.median(column) for column in zip(*runs[min(1, args.runs) :], strict=True))


def layer_parameters(model: ModelConfig) -> int:
    return model.num_layers * (4 * model.hidden_size**2 + 3 * model.hidden_size * model.intermediate_size)


def weight_bytes(weights) -> int:
    """Bytes of the matrices that a decode step reads; the few rows of the embedding are left out."""
    matrices = [weights.lm_head]
    for layer in weights.layers:
        matrices += [layer.qkv, layer.o_proj, layer.gate_up, layer.down_proj]
    tensors = [getattr(matrix, each.name) for matrix in matrices for each in fields(matrix)]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors if tensor is not None)


if __name__ == "__main__":
    sys.exit(main())
