"""Every kernel on one GPU: checked against the reference executor, then timed: python benchmarks/bench_kernels.py

Random data in the model's shapes.  A result that differs from the reference's by more than its tolerance ends the run
with exit code 2.  A time is that of one call in a captured graph whose calls go through copies that the caches cannot
hold.  The share is that of the time that the copy bandwidth or the matrix products' rate, both measured in this run,
would allow; the bandwidth counts where it is the tighter one.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from baichuan.cli.common import Parser, run_script
from baichuan.config import PRESETS
from baichuan.errors import BaichuanError, ConfigError
from baichuan.parallel.comm import Communicator
from benchmarks.gpu_timing import copies_beyond_cache, copy_bandwidth, gemm_rate, require_gpu, seconds
from benchmarks.kernel_cases import Case, Sizes, full_sizes, small_sizes

RATES = {"float16": torch.float16, "int8": torch.int8, "fp8": torch.float8_e4m3fn}
MAX_COPIES = 64  # reached only by operands so small that they stay in the cache in a model, too


class Mismatch(BaichuanError):
    """A kernel does not compute what the reference executor computes."""


def main(argv: list[str] | None = None) -> int:
    parser = Parser(__doc__)
    parser.add_argument(
        "--model_version", choices=tuple(PRESETS), default="v2_13b", help="model whose shapes are taken"
    )
    parser.add_argument("--only", nargs="+", metavar="NAME", help="cases whose name has one of these in it")
    parser.add_argument("--check_only", action="store_true", help="time nothing; without a GPU: by the interpreter")
    parser.add_argument("--small", action="store_true", help="tiny shapes, for Triton's interpreter")
    parser.add_argument("--compile_threads", type=int, default=8, help="kernels that are compiled at a time")
    return run_script(parser, argv, bench)


def bench(args: argparse.Namespace, comm: Communicator) -> int:
    if not (args.check_only and args.small):
        require_gpu("bench_kernels.py", "--check_only --small checks the kernels in Triton's interpreter")
    if not torch.cuda.is_available():
        os.environ["TRITON_INTERPRET"] = "1"
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    # As in the CUDA executor: matrix products are accumulated in float32.
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    sizes = (small_sizes if args.small else full_sizes)(PRESETS[args.model_version])
    chosen = [each for each in all_cases(sizes, device) if _wanted(each.name, args.only)]
    if not chosen:
        raise ConfigError(f"--only {' '.join(args.only)} names no case; leave it out to see all names")
    if device.type == "cuda":
        _compile(chosen, args.compile_threads)
    if args.check_only:
        print(f"{'kernel':64s} {'error':>8s} tolerance")
        for case in chosen:
            print(f"{case.name:64s} {_check(case):8.1e} {case.tolerance:.0e}", flush=True)
        return 0
    bandwidth, rates = copy_bandwidth(), {name: gemm_rate(dtype) for name, dtype in RATES.items()}
    ceilings = ", ".join(f"{name} products {rate / 1e12:.0f} T/s" for name, rate in rates.items())
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {args.model_version}")
    print(f"copy {bandwidth / 1e12:.2f} TB/s, {ceilings}")
    print(f"{'kernel':64s} {'error':>8s} {'us':>8s} {'TB/s':>6s} {'TFLOP/s':>8s} share of")
    for case in chosen:
        print(_measure(case, bandwidth, rates), flush=True)
    return 0


def all_cases(sizes: Sizes, device: torch.device) -> Iterator[Case]:
    """Every kernel's cases, products first."""
    from benchmarks import attention_cases, product_cases, rowwise_cases  # whose kernels read TRITON_INTERPRET

    for family in (product_cases, rowwise_cases, attention_cases):
        yield from family.cases(sizes, device)


def _wanted(name: str, only: Sequence[str] | None) -> bool:
    return not only or any(part in name for part in only)


def _compile(chosen: Sequence[Case], threads: int) -> None:
    """Run each case once, in several threads: most of the time is spent in compilers outside of Python."""

    def run(case: Case) -> None:
        with torch.inference_mode():
            case.run(*case.make(0))

    run(chosen[0])  # alone, so that Triton starts only once
    with ThreadPoolExecutor(max(threads, 1)) as pool:
        list(pool.map(run, chosen[1:]))
    torch.cuda.synchronize()


@torch.inference_mode()
def _check(case: Case) -> float:
    """‖result - expected‖ / ‖expected‖.  Raises Mismatch where it is over the tolerance."""
    operands = case.make(0)
    expected = case.expected(*operands)
    result = case.result(case.run(*operands), *operands)
    error = relative_error(result, expected)
    if not error <= case.tolerance:  # NaN is a mismatch too
        raise Mismatch(
            f"{case.name}: the relative error against the reference executor is {error:.2e} and {case.tolerance:.0e} "
            "is allowed; the kernel is wrong for this shape, its time means nothing"
        )
    return error


def relative_error(result, expected) -> float:
    difference = (result.double() - expected.double()).norm() / expected.double().norm()
    return float(difference) if result.shape == expected.shape else float("nan")


@torch.inference_mode()
def _measure(case: Case, bandwidth: float, rates: dict[str, float]) -> str:
    """The case's line of the table."""
    from baichuan.executors.cuda.load import tensors_of

    error, first = _check(case), case.make(0)
    num_bytes = case.num_bytes or sum(each.nbytes for each in tensors_of((first, case.run(*first))))
    copies = [first, *map(case.make, range(1, min(copies_beyond_cache(num_bytes), MAX_COPIES)))]
    time = seconds([partial(case.run, *operands) for operands in copies])
    by_copy, by_products = num_bytes / bandwidth, case.flops / rates[case.rate]
    ceiling = "copy" if by_copy >= by_products else f"{case.rate} products"
    products = f"{case.flops / time / 1e12:8.1f}" if case.flops else " " * 8
    return (
        f"{case.name:64s} {error:8.1e} {1e6 * time:8.1f} {num_bytes / time / 1e12:6.2f} {products} "
        f"{100 * max(by_copy, by_products) / time:4.0f} % {ceiling}"
    )


if __name__ == "__main__":
    sys.exit(main())
