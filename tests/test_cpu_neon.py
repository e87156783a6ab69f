"""The CPU kernels on NEON: compiled for aarch64, run by an emulator, the same products within the same bounds."""

from __future__ import annotations

import shutil
import struct
import subprocess
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from op_cases import normal
from test_cpu_kernels import SHAPES, compare, matrix_of

from baichuan.executors.cpu.library import SOURCES
from baichuan.executors.cpu.native import FEW_ROWS, TYPES, Matrix
from baichuan.executors.cpu.reference_linear import linear as reference_linear
from baichuan.parallel.comm import Solo
from baichuan.quant.weight_only import quantise_int8
from baichuan.records import SmoothQuantWeight

COMPILER, EMULATOR = "aarch64-linux-gnu-gcc", "qemu-aarch64"
PROGRAM = Path(__file__).resolve().parent / "neon_program.c"

INSTALLED = shutil.which(COMPILER) and shutil.which(EMULATOR)
pytestmark = [pytest.mark.slow, pytest.mark.skipif(not INSTALLED, reason=f"needs {COMPILER} and {EMULATOR}")]


class Emulated:
    """native.Kernels.product on another processor."""

    def __init__(self, program: Path):
        self.program = program

    def product(self, x: torch.Tensor, matrix: Matrix, out_dtype: torch.dtype) -> torch.Tensor:
        found, weight = matrix.struct, matrix.weight
        values = [getattr(weight, each.name) for each in fields(weight)]
        tensors = [value for value in values if value is not None]  # weight, scale, input_scale
        sizes = [t.numel() * t.element_size() for t in tensors[1:]] + [0, 0]
        header = (found.out, getattr(found, "in"), found.groups, found.type, found.scale_type, found.w8a8)
        header += (x.shape[0], TYPES[x.dtype], TYPES[out_dtype], *sizes[:2])
        given = struct.pack("<11q", *header) + b"".join(map(_bytes, (*tensors, x)))
        done = subprocess.run([EMULATOR, self.program], input=given, capture_output=True, check=True, timeout=60)
        return torch.frombuffer(bytearray(done.stdout), dtype=out_dtype).view(x.shape[0], -1)


def _bytes(x: torch.Tensor) -> bytes:
    return x.contiguous().view(-1).view(torch.uint8).numpy().tobytes()


@pytest.fixture(scope="module")
def emulated(tmp_path_factory) -> Emulated:
    program = tmp_path_factory.mktemp("neon") / "program"
    sources = [PROGRAM, *sorted(SOURCES.glob("*.c"))]
    flags = ["-O3", "-fopenmp", "-static", "-std=gnu11", "-Wall", "-Werror", f"-I{SOURCES}"]
    subprocess.run([COMPILER, *flags, *sources, "-lm", "-o", program], check=True)
    return Emulated(program)


@pytest.mark.parametrize("tokens", [1, 6, FEW_ROWS + 3])
@pytest.mark.parametrize("shape", SHAPES[1:5])
def test_products(emulated, shape, tokens):
    compare(emulated, shape, tokens)


@pytest.mark.parametrize("tokens", [1, 6, FEW_ROWS + 3])
def test_smoothquant_s_integers(emulated, tokens):
    q, scale = quantise_int8(normal(53, 1000, seed=3))
    weight, x = SmoothQuantWeight(q, scale, torch.tensor([0.02]), None), normal(tokens, 1000, seed=5)
    expected = reference_linear(x, weight, torch.float32, Solo())
    assert torch.equal(emulated.product(x, matrix_of(weight), torch.float32), expected)
