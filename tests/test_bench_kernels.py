"""The kernel benchmark's checks, in Triton's interpreter or on the GPU, and what it says when they fail."""

import pytest
import torch
from kernel_device import MARKS

from baichuan.kernels.operand import plain
from benchmarks import bench_kernels, rowwise_cases

pytestmark = MARKS

SMALL = ["--check_only", "--small"]
FAMILIES = [
    *(f"gemv {precision} down" for precision in ("float16", "bfloat16", "int8", "int4", "int4_g128")),
    *(f"gemm {precision} down" for precision in ("int8", "int4", "int4_g128", "smooth_quant_per_token")),
    *("gemv smooth_quant_per_token down", "gemm fp8 down", "add_rms_norm", "silu_mul", "quantise_rows"),
    *("argmax", "prefill attention ALiBi", "prefill attention RoPE", "kv store", "decode attention"),
]


def test_every_family_is_what_the_reference_executor_computes(capsys):
    assert bench_kernels.main([*SMALL, "--only", *FAMILIES]) == 0
    lines = capsys.readouterr().out.splitlines()[1:]
    for family in FAMILIES:
        assert any(line.startswith(family) for line in lines), family


@pytest.mark.parametrize("change", [lambda y: y.roll(1, -1), lambda y: y * 1.02, lambda y: y * torch.nan])
def test_a_wrong_kernel_ends_the_run(monkeypatch, capsys, change):
    right = rowwise_cases.silu_mul
    monkeypatch.setattr(rowwise_cases, "silu_mul", lambda x, form: plain(change(right(x).values)))
    assert bench_kernels.main([*SMALL, "--only", "silu_mul float16"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "silu_mul float16, 1 token: the relative error" in error


def test_a_name_that_no_case_has_is_refused(capsys):
    assert bench_kernels.main([*SMALL, "--only", "no such kernel"]) == 2
    assert "names no case" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_nothing_is_timed(capsys):
    assert bench_kernels.main([]) == 2
    assert "needs a GPU" in capsys.readouterr().err
