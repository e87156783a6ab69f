"""The best entries of the kernels' tables for this GPU: python benchmarks/tune_kernels.py --json times.json

Every candidate of tune_tables.py is compiled, checked against the plain product on random data in the models' shapes
(its error, and that two runs agree bit for bit), then timed through copies that the caches cannot hold.  What comes
before a product, such as turning x into integers, is no part of the time.  A wrong or failing candidate is named and
never chosen; what was not measured in time keeps its entry.  Ends with the new tables as Python.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import torch
import triton
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from baichuan.cli.common import Parser, run_script
from baichuan.config import PRESETS
from baichuan.errors import ConfigError, UnsupportedError
from baichuan.executors.cuda.linear import Choice, choose_kernel, has_gluon
from baichuan.executors.cuda.load import tensors_of
from baichuan.executors.cuda.products import product
from baichuan.kernels.dequantise import dequantise_to
from baichuan.kernels.gemm import gemm
from baichuan.kernels.gemm_int4 import gemm_int4
from baichuan.kernels.gemv import gemv
from baichuan.kernels.gemv_int import gemv_int
from baichuan.kernels.operand import Deinterleaved, Int16, plain
from baichuan.kernels.rows import quantise_rows
from baichuan.kernels.spec import GemvBlock
from baichuan.kernels.tiles import Tile
from baichuan.parallel.comm import Communicator
from baichuan.records import DenseWeight, Fp8Weight, Int4Weight, Int8Weight, SmoothQuantWeight, Weight
from benchmarks.bench_kernels import MAX_COPIES, relative_error
from benchmarks.gpu_timing import copies_beyond_cache, require_gpu, seconds
from benchmarks.kernel_cases import Case
from benchmarks.product_cases import product_case
from benchmarks.tune_tables import LIBRARY, ROWS, Entry, Point, Times, candidates, choose, points, tables_text

COMPILING = 0.6  # at most this share of the time is spent on compiling
REPLAYS = 3

Product = Callable[[Entry], Tensor]


def main(argv: list[str] | None = None) -> int:
    parser = Parser(__doc__)
    parser.add_argument(
        "--model_version",
        nargs="+",
        choices=tuple(PRESETS),
        default=["v2_13b", "v1_7b"],
        help="versions whose shapes are taken",
    )
    parser.add_argument(
        "--precision", nargs="+", choices=tuple(ROWS), default=list(ROWS), help="precisions of the weights"
    )
    parser.add_argument("--seconds", type=float, default=900.0, help="that the run may take")
    parser.add_argument("--compile_threads", type=int, default=16, help="kernels that are compiled at a time")
    file = parser.add_mutually_exclusive_group()
    file.add_argument("--json", type=Path, metavar="FILE", help="write all times there, as they come")
    file.add_argument("--from_json", type=Path, metavar="FILE", help="choose by the times of an earlier run")
    return run_script(parser, argv, tune)


def tune(args: argparse.Namespace, comm: Communicator) -> int:
    if args.from_json:
        gpu, times = read_times(args.from_json)
        times = {point: timed for point, timed in times.items() if point.version in args.model_version}
    else:
        require_gpu("tune_kernels.py", "--from_json chooses by the times that --json wrote on one")
        gpu, times = torch.cuda.get_device_name(), {}
        if args.json:
            write_times(args.json, gpu, times)  # an unwritable path is an error before the work
        for point, timed in measure(args):
            times[point] = timed
            if args.json:
                write_times(args.json, gpu, times)
    choice = choose(times)
    print(f"{gpu}, {len(times)} products timed")
    print(f"{'entry':24s} {'present':30s} {'best':30s} {'gain':>8s} of")
    print("\n".join(choice.report), end="\n\n")
    print(tables_text(choice))
    return 0


def write_times(path: Path, gpu: str, times: Times) -> None:
    listed = [asdict(point) | {"times": list(timed.items())} for point, timed in times.items()]
    path.write_text(json.dumps({"gpu": gpu, "points": listed}), encoding="utf-8")


def read_times(path: Path) -> tuple[str, Times]:
    try:
        file = json.loads(path.read_text(encoding="utf-8"))
        times = {}
        for fields in file["points"]:
            timed = {tuple(entry): each if each is None else float(each) for entry, each in fields.pop("times")}
            point = Point(**fields)
            candidates(point)  # raises where the fields name no product
            times[point] = timed
        return str(file["gpu"]), times
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"--from_json {path} holds no times ({type(error).__name__}: {error}); name a file that --json wrote"
        ) from None


def measure(args: argparse.Namespace) -> Iterator[tuple[Point, dict[Entry, float | None]]]:
    """Time all candidates of as many products as there is time for, the most important products first."""
    start = time.monotonic()
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False  # as in the CUDA executor
    gluon = torch.cuda.is_available() and has_gluon(torch.device("cuda"), triton.__version__)
    every = [point for point in points(args.model_version, gluon) if point.precision in args.precision]
    compiled = _compile(every, start + COMPILING * args.seconds, args.compile_threads)
    print(f"compiled {len(compiled)} kernels in {time.monotonic() - start:.0f} s", flush=True)
    for point in every:
        if time.monotonic() > start + args.seconds:
            return
        if compiled.issuperset(_kernel(point, entry) for entry in candidates(point)):
            yield point, _time(point)


def _case(point: Point) -> Case:
    return product_case(PRESETS[point.version], torch.device("cuda"), point.precision, point.matrix, point.rows)


def _kernel(point: Point, entry: Entry) -> tuple:
    """A key that is equal for points and entries with the same compiled kernel."""
    return point.precision, point.rows == 1 and point.matrix in ("gate_up", "head") and point.matrix, entry


def _compile(every: Sequence[Point], deadline: float, threads: int) -> set[tuple]:
    """Run each kernel once, in several threads: most of the time is spent in compilers outside of Python."""
    kernels: dict[tuple, Point] = {}
    for point in every:
        for entry in candidates(point):
            kernels.setdefault(_kernel(point, entry), point)

    @torch.inference_mode()
    def run(kernel: tuple) -> tuple | None:
        point = kernels[kernel]
        if time.monotonic() > deadline:
            return None
        with suppress(Exception):  # _time reports it
            x, weight = _case(point).make(0)
            bound(x, weight, point.matrix)(kernel[-1])
        return kernel

    first, *others = kernels
    run(first)  # alone, so that Triton starts only once
    with ThreadPoolExecutor(max(threads, 1)) as pool:
        compiled = {first, *filter(None, pool.map(run, others))}
    torch.cuda.synchronize()
    return compiled


@torch.inference_mode()
def _time(point: Point) -> dict[Entry, float | None]:
    case = _case(point)
    operands = case.make(0)
    expected, size = case.expected(*operands), sum(each.nbytes for each in tensors_of(operands))
    copies = [operands, *map(case.make, range(1, min(copies_beyond_cache(size), MAX_COPIES)))]
    products = [bound(x, weight, point.matrix) for x, weight in copies]
    times: dict[Entry, float | None] = {}
    for entry in candidates(point):
        times[entry] = None
        problem = wrong(products[0], entry, expected, case.tolerance)
        if problem:
            print(f"{point} {entry or 'library'}: {problem}", flush=True)
        else:
            times[entry] = seconds([partial(each, entry) for each in products], REPLAYS)
    return times


def wrong(run: Product, entry: Entry, expected: Tensor, tolerance: float) -> str:
    """What is wrong with a candidate; "" = nothing."""
    try:
        first, second = run(entry), run(entry)
        error = relative_error(first, expected)
    except Exception as failure:  # from the compiler or the launch; other candidates may work
        return f"fails: {type(failure).__name__}: {str(failure).splitlines()[0] if str(failure) else ''}"
    if not error <= tolerance:  # NaN too
        return f"is wrong: its relative error is {error:.1e}, {tolerance:.0e} is allowed"
    return "" if torch.equal(first, second) else "is wrong: two runs differ"


def bound(x: Tensor, weight: Weight, matrix: str) -> Product:
    """The product of x, already in the form that the kernel takes, as a function of how it is cut up."""
    one_row = x.shape[0] == 1 and not isinstance(weight, Fp8Weight)
    gated, out = one_row and matrix == "gate_up", torch.float32 if matrix == "head" else x.dtype
    own: Callable[..., Tensor]
    match weight:
        case DenseWeight(w):
            own = partial(gemv, x, w, out, gated) if one_row else partial(gemm, plain(x), w, None, out)
        case Int8Weight(q, scale):
            kernel = partial(gemv_int, gated=gated) if one_row else gemm
            own = partial(kernel, quantise_rows(x, Int16()), q, scale, out)
        case Int4Weight(packed, scale, zero) if one_row:
            form = choose_kernel(weight, Choice(1, x.dtype)).form
            own = partial(gemv_int, quantise_rows(x, form), packed, scale, out, gated, zero=zero)
        case Int4Weight(packed, scale, zero):
            own = partial(gemm_int4, quantise_rows(x, Deinterleaved()), packed, scale, out, zero=zero)
        case SmoothQuantWeight(q, scale) | Fp8Weight(q, scale):
            kernel = partial(gemv_int, gated=gated) if one_row else gemm
            form = choose_kernel(weight, Choice(x.shape[0], x.dtype)).form
            own = partial(kernel, quantise_rows(x, form), q, scale, out)

    def run(entry: Entry) -> Tensor:
        if entry == LIBRARY:
            return library(x, weight, out)
        return own(block=GemvBlock(*entry)) if one_row else own(tile=replace(Tile(*entry[:5]), splits=entry[5]))

    return run


def library(x: Tensor, weight: Weight, out: torch.dtype) -> Tensor:
    """PyTorch's product, of a dequantised copy where the matrix is quantised."""
    match weight:
        case DenseWeight(w):
            return product(x, w, out)
        case Int8Weight() | Int4Weight():
            return product(x, dequantise_to(weight, x.dtype), out)
        case _:
            raise UnsupportedError(type(weight).__name__)


if __name__ == "__main__":
    sys.exit(main())
