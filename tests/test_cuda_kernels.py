"""Writing a quantised matrix out as one of floats, by a kernel, and which matrices have such a copy."""

from dataclasses import replace

import pytest
import torch
from kernel_device import MARKS, relative_error, to_device

from baichuan.executors.cuda.dense_copies import COPY_ROWS, COPY_ROWS_WITH_ZEROS, DenseCopies
from baichuan.kernels.dequantise import dequantise_to
from baichuan.quant.weight_only import dequantise, quantise_int4, quantise_int8
from baichuan.records import Int4Weight, Int8Weight

pytestmark = MARKS

ROUNDED = {torch.float16: 2**-11, torch.bfloat16: 2**-8}  # half a step of the mantissa; Triton's interpreter cuts off
WIDTH = 288  # no power of two, nor a multiple of the kernel's block


def quantised(group_size):
    """A record of a matrix [5, WIDTH]; group_size None = int8."""
    matrix = torch.randn(5, WIDTH, generator=torch.Generator().manual_seed(0))
    if group_size is None:
        return Int8Weight(*quantise_int8(matrix))
    return Int4Weight(*quantise_int4(matrix, group_size, torch.float16))


def with_zeros(weight):
    """The record with a zero from -2 to 2 for each scale."""
    return replace(weight, zero=(torch.arange(weight.scale.numel()) % 5 - 2).to(torch.int8).view(weight.scale.shape))


WEIGHTS = {
    "int8": quantised(None),
    "int4": quantised(0),
    "int4 in groups": quantised(32),
    "int4 with zeros": with_zeros(quantised(0)),
    "int4 in groups with zeros": with_zeros(quantised(32)),
}


@pytest.mark.parametrize("dtype", ROUNDED)
@pytest.mark.parametrize("weight", WEIGHTS.values(), ids=WEIGHTS)
def test_dequantised_matrix(weight, dtype):
    dense, expected = dequantise_to(to_device(weight), dtype), dequantise(weight)
    assert dense.dtype == dtype
    assert relative_error(dense, expected) < ROUNDED[dtype]
    assert relative_error(dense.roll(1, 1), expected) > 0.5, "the control: every column in its neighbour's place"


def test_a_weight_with_zeros_has_a_copy_from_fewer_rows_on():
    plain = to_device(quantised(32))
    rows, copies = COPY_ROWS_WITH_ZEROS, DenseCopies(budget=4 * 5 * WIDTH)
    assert copies.get(to_device(with_zeros(quantised(32))), torch.float16, rows - 1) is None
    assert copies.get(plain, torch.float16, rows) is None, "the control: without zeros the integers are faster there"
    zeroed = with_zeros(quantised(32))
    dense = copies.get(to_device(zeroed), torch.float16, rows)
    assert relative_error(dense.weight, dequantise(zeroed)) < ROUNDED[torch.float16]


def test_copies_are_made_once_for_enough_rows_and_within_the_budget():
    record = quantised(32)
    weights = [replace(to_device(record)) for _ in range(2)]
    rows = COPY_ROWS[Int4Weight]
    copies = DenseCopies(budget=3 * 5 * WIDTH)  # one and a half
    assert copies.get(weights[0], torch.float16, rows - 1) is None
    dense = copies.get(weights[0], torch.float16, rows)
    assert torch.equal(dense.weight, dequantise_to(weights[0], torch.float16))
    assert copies.get(weights[1], torch.float16, rows) is None, "no room for another"
    assert copies.get(weights[0], torch.float16, rows + 1) is dense
    assert DenseCopies().get(weights[0], torch.float16, rows) is None
