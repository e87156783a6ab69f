"""The CUDA executor's ops against float64: the shared table, in Triton's interpreter or on the GPU."""

import op_cases
import pytest
import torch
from kernel_device import DEVICE
from op_cases import CASES, error

from baichuan.executors.cuda.ops import CudaOps, Switches
from baichuan.parallel.comm import Solo

# Which head is whose rank's matters to ALiBi alone, and the interpreter takes seconds for each attention.
LESS_TO_SAY = ("attention RoPE, second rank", "attention ALiBi, cache")


def run(case):
    ops = CudaOps(case.spec, Solo(), op_cases.CAPACITY, DEVICE, Switches())
    with torch.inference_mode():
        return case.run(ops, torch.Tensor.cpu, DEVICE)


@pytest.mark.parametrize(
    "case",
    [pytest.param(c, marks=[pytest.mark.slow] if c.name.startswith(LESS_TO_SAY) else []) for c in CASES],
    ids=lambda case: case.name,
)
def test_op(case):
    assert error(*run(case)) <= case.tolerance


@pytest.mark.cuda
@pytest.mark.skipif(DEVICE.type != "cuda", reason="needs a GPU")
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_op_on_the_gpu(case):
    assert error(*run(case)) <= case.tolerance


@pytest.mark.parametrize(
    "name", ["linear int4 group, 7 rows", "norm_linear dense, 7 rows", "gated_mlp int8 in float16, 1 rows"]
)
def test_the_tolerance_notices_a_wrong_channel(name):
    case = next(case for case in CASES if case.name == name)
    result, expected = run(case)
    assert error(result.roll(1, 1), expected) > 3 * case.tolerance
