"""The cases of matrix products: the kernel that the CUDA executor chooses for a weight and a number of rows.

The quantisation of the product's input is part of the run.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch

from baichuan.config import ModelConfig
from baichuan.errors import counted
from baichuan.executors.cpu.reference import ReferenceOps
from baichuan.executors.cpu.reference_linear import linear
from baichuan.executors.cuda.ops import CudaOps, Switches
from baichuan.model.decoder import attention_spec
from baichuan.parallel.comm import Solo
from benchmarks.kernel_cases import ROUNDED, Case, Sizes, normal
from benchmarks.random_weights import PRECISIONS, RandomWeights

FLOAT32_SUMS = 1e-4  # tensor cores truncate float32 sums instead of rounding them, some hundred times per row
E4M3_SUMS = 5e-3  # tensor cores keep about 14 bits of a block's sum of e4m3 products


def cases(sizes: Sizes, device: torch.device) -> Iterator[Case]:
    """The products of every precision."""
    for precision in PRECISIONS:
        yield from _products(sizes, device, precision)


def _products(sizes: Sizes, device: torch.device, precision: str) -> Iterator[Case]:
    """One layer's products at one row, and at more rows for one precision per kernel."""
    model, quant = sizes.model, PRECISIONS[precision]
    if precision in ("smooth_quant", "fp8_per_token"):
        return  # the same products as with the other scales of tokens; the cases of the norms have both
    names = [name for name in matrices(model) if name != "head" or quant.weights == "none"]
    for rows in sizes.rows if precision != "bfloat16" else sizes.rows[:1]:
        for name in names:
            if name != "head" or rows == 1 or device.type == "cuda":  # PyTorch has no such product on the CPU
                yield product_case(model, device, precision, name, rows)


def matrices(model: ModelConfig) -> dict[str, tuple[int, int]]:
    """[out_features, in_features] of a layer's matrices and the head"""
    hidden, intermediate = model.hidden_size, model.intermediate_size
    return {
        "qkv": (3 * hidden, hidden),
        "o_proj": (hidden, hidden),
        "gate_up": (2 * intermediate, hidden),
        "down": (hidden, intermediate),
        "head": (model.vocab_size, hidden),
    }


def product_case(model: ModelConfig, device: torch.device, precision: str, name: str, rows: int) -> Case:
    """x @ Wᵀ, with silu(gate) * up for one row of gate_up, where it is part of the kernel; the head in float32."""
    quant, (out_features, in_features) = PRECISIONS[precision], matrices(model)[name]
    dtype = torch.bfloat16 if precision == "bfloat16" else torch.float16
    model = replace(model, dtype=str(dtype).removeprefix("torch."))
    ops = CudaOps(attention_spec(model, 0, 1), Solo(), 1, device, Switches())
    by_gemv = rows == 1 and precision != "fp8"
    gated, out_dtype = name == "gate_up" and by_gemv, torch.float32 if name == "head" else dtype

    def make(seed: int) -> tuple:
        absorbed = name in ("qkv", "gate_up")  # as in SmoothQuant's weights after a norm
        weight = RandomWeights(model, quant, device, seed).linear(out_features, in_features, absorbed)
        return normal((rows, in_features), device, seed, dtype), weight

    def run(x, weight):
        chosen = ops.kernel(weight, x)
        return (chosen.run_gated if gated else chosen.run)(ops.operand(x, chosen.form), out_dtype)

    def expected(x, weight):
        with torch.device(device):  # the reference, written for the CPU, allocates its result there
            y = linear(x, weight, torch.float32, Solo())
            return ReferenceOps.silu_mul(None, y) if gated else y

    kernel = "gemv" if by_gemv else "gemm"
    tolerance = FLOAT32_SUMS if name == "head" else E4M3_SUMS if precision == "fp8" else ROUNDED[dtype]
    if gated:
        tolerance *= 2  # gate and up are rounded, then their product
    return Case(
        name=f"{kernel} {precision} {name} {out_features}x{in_features}, {counted(rows, 'row')}",
        make=make,
        run=run,
        expected=expected,
        tolerance=tolerance,
        flops=2 * rows * out_features * in_features,
        rate={"smooth_quant": "int8", "fp8": "fp8"}.get(quant.weights, "float16"),
    )
