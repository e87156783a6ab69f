"""Kernels compile for a GPU that is not there: Triton's interpreter, which the other tests use, accepts more."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).with_name("support") / "compile_kernels.py"
ROWS = {"_gather_rows", "_quantise_rows", "_add_rms_norm", "_silu_mul"}
PRODUCTS = {"_gemv", "_gemv_int", "_gemm", "_gemm_int4", "_add_parts", "_dequantise"}
MESSAGES = {"_sum_norm", "_all_gather", "_quantise_over_ranks"}
ATTENTION = {"_store_kv", "_prefill_attention", "_decode_attention", "_combine_splits"}


@pytest.mark.parametrize(
    "capability, shared_memory",
    [
        ("90", 227 << 10),
        pytest.param("89", 99 << 10, marks=pytest.mark.slow),
        pytest.param("80", 163 << 10, marks=pytest.mark.slow),
    ],
)
def test_every_kernel_of_the_executor_compiles_and_fits(capability, shared_memory):
    """shared_memory: bytes that a program may have there (CUDA C++ Programming Guide, technical specifications)"""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, PROGRAM, capability, str(shared_memory)], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    lines = [line.split() for line in done.stdout.splitlines()]
    hopper = {"_gemm_int8"} if capability == "90" else set()
    assert {name for name, *_ in lines} == ROWS | PRODUCTS | ATTENTION | MESSAGES | hopper
    assert all(int(shared) <= shared_memory for _, _, shared in lines)
